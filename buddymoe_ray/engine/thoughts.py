"""How long a model may think: when its budget of tokens is spent, the mark that ends its thoughts is its next token.

A budget rules a choice as a grammar does, so log probabilities stay the model's own. It is a function of the tokens
generated so far: a sequence that goes on elsewhere has the same. On the token path: `Sequence.rule` → `mask_logits`.
"""

from __future__ import annotations

from typing import Any

from buddymoe_ray.engine.answers import AnswerForm
from buddymoe_ray.errors import RequestError
from buddymoe_ray.types import ThoughtBudget

__all__ = ["ThoughtLimit", "thought_budget"]

_MARKS = (("<think>", "</think>"), ("<|channel|>analysis<|message|>", "<|end|>"))


def thought_budget(tokenizer: Any, form: AnswerForm | None, tokens: int | None) -> ThoughtBudget | None:
    """A budget for answers of that form; None where there is none, or no thoughts.

    Raises:
        RequestError: the model ends its thoughts by more than one token, or by marks that are not known.
    """
    if tokens is None or form is None or not form.thinks:
        return None
    from transformers.utils.chat_parsing.response_templates import load_response_template

    field = load_response_template(form.template).fields["reasoning_content"]
    for begin, end in _MARKS:
        told = [tokenizer.encode(mark, add_special_tokens=False) for mark in (begin, end)]
        read = [
            pattern is not None and pattern.fullmatch(mark)
            for pattern, mark in ((field.open_re, begin), (field.close_re, end))
        ]
        if all(read) and len(told[1]) == 1:
            begun = form.opening.rfind(begin) > form.opening.rfind(end)
            return ThoughtBudget(tokens=tokens, begin=() if begun else tuple(told[0]), end=told[1][0])
    raise RequestError(
        "thinking_token_budget is given, must be left out: no token of this model is known to end its thoughts. "
        "hint: limit the whole answer",
        param="thinking_token_budget",
    )


class ThoughtLimit:
    """Where one sequence is in its thoughts. Those that begin again have what the earlier ones left."""

    def __init__(self, budget: ThoughtBudget) -> None:
        self._budget = budget
        self._left = budget.tokens
        self._thinking = not budget.begin
        self._last: tuple[int, ...] = ()  # as many tokens as begin thoughts

    def accept(self, token_id: int) -> None:
        """Take the next token."""
        begin, end = self._budget.begin, self._budget.end
        if self._thinking:
            self._thinking = token_id != end
            self._left -= self._thinking
        elif begin:
            self._last = (*self._last, token_id)[-len(begin) :]
            self._thinking = self._last == begin

    @property
    def spent(self) -> bool:
        """Whether the end of thoughts must come next."""
        return self._thinking and self._left <= 0

    def fill(self, mask: Any, row: int) -> None:
        """Write that it alone may come into a row of int32, a bit each token."""
        word, bit = divmod(self._budget.end, 32)
        mask[row] = 0
        mask[row, word] = (1 << bit) - (1 << 32) * (bit == 31)
