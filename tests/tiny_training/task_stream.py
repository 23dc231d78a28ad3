"""Rows of whole tasks in the chat form, with marks on the tokens that are learned: the answers.

A row depends on (seed, index) alone, so a resumed run sees what an uninterrupted one sees; tasks are drawn anew for
each row, of the training split. Positions begin at 0 with every conversation and none sees another.
Neighbours: buddymoe_ray.tasks draws, trainer.py mixes the rows with windows of text.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from buddymoe_ray.tasks import FAMILIES, Task, draw

ROW = 256
# how often a family comes, where that is not once: what is computed takes longer to learn than what is copied
WEIGHTS = {
    **dict.fromkeys(("subtract", "multiply", "sort numbers", "sort words"), 3.0),
    **dict.fromkeys(("add", "convert", "reverse", "calendar"), 2.0),
    **dict.fromkeys(("dates", "extract", "tools", "functions", "talk"), 0.5),
}
_GO_ON = 0.25  # share of tasks that are asked in the conversation of the one before


@dataclass(frozen=True, kw_only=True)
class TaskRows:
    """tokens, positions: [B, L] int64; learned: [B, L] bool, whether the token is an answer's."""

    tokens_BL: Tensor
    positions_BL: Tensor
    learned_BL: Tensor


@dataclass(frozen=True, kw_only=True)
class Turn:
    """Token ids of a question with the marks around it, and of its answer with the mark that ends it."""

    opens: bool
    asked: list[int]
    answer: list[int]


class TaskStream:
    """Endless rows of 256 tokens, filled with tasks, padded at their ends."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        self._tokenizer, self._seed = tokenizer, seed
        self._families, self._weights = tuple(FAMILIES), [WEIGHTS.get(family, 1.0) for family in FAMILIES]

    def batch(self, first: int, count: int) -> TaskRows:
        """Rows first ... first + count - 1."""
        shape = (count, ROW)
        tokens, positions = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
        learned = torch.zeros(shape, dtype=torch.bool)
        for row in range(count):
            at = begin = 0
            for turn in self._row(first + row):
                begin = at if turn.opens else begin
                answer, end = at + len(turn.asked), at + len(turn.asked) + len(turn.answer)
                tokens[row, at:end] = torch.tensor([*turn.asked, *turn.answer])
                positions[row, at:end] = torch.arange(at - begin, end - begin)
                learned[row, answer:end] = True
                at = end
        return TaskRows(tokens_BL=tokens, positions_BL=positions, learned_BL=learned)

    def _row(self, index: int) -> Iterator[Turn]:
        rng, room = Random(f"{self._seed}/{index}"), ROW
        opens = True
        while True:
            (family,) = rng.choices(self._families, self._weights)
            turn = self.encode(draw(rng, family, "train"), opens=opens)
            room -= len(turn.asked) + len(turn.answer)
            if room < 0:
                return
            yield turn
            opens = rng.random() >= _GO_ON

    def encode(self, task: Task, *, opens: bool) -> Turn:
        """A task as the first turn of a conversation, or as a later one (never one with a system message)."""
        opens = opens or bool(task.system)
        asked = str(self._tokenizer.apply_chat_template(task.messages, tokenize=False, add_generation_prompt=True))
        texts = [asked if opens else "\n" + asked, task.taught + str(self._tokenizer.eos_token)]
        asked_ids, answer_ids = self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return Turn(opens=opens, asked=asked_ids, answer=answer_ids)
