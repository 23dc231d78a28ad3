"""Grammars that rule what may be chosen next: compiled once for a vocabulary, followed by each sequence for itself.

xgrammar does the work; this module bounds it and knows what a token's bytes are here. A grammar is a function of the
tokens generated so far, so a sequence that goes on elsewhere follows it again from its start. Knows neither sampling
nor sequences. On the token path: logits → `mask_logits` → `sampler`.

Masks are made when a state is first seen. Of 151,936 tokens, one thread: a row's step takes .5 ms longer, 6 in a new
state. All of a grammar at once took up to 31 s and 1.5 GB (a hundred of `[a-z]{1,200}`), which nothing could stop.

Legend: R rows with a rule, V vocabulary.
"""

from __future__ import annotations

import json
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from buddymoe_ray.errors import BuddyMoEError, RequestError
from buddymoe_ray.models.token_bytes import TokenBytes
from buddymoe_ray.types import StructuredOutput

__all__ = ["GrammarState", "Grammars", "TokenRule", "mask_logits"]

MAX_BYTES = 2 << 20
"""Of one grammar's automata, without masks; all masks of a grammar took at most a hundred times as much."""
KEPT_BYTES = 128 << 20
KEPT = 64
SECONDS, SECONDS_PER_TOKEN = 1.0, 0.01
"""CPU time that a sequence's grammar may take of the step thread, which others wait for. Masks take .1 to 5 ms, but in
`root ::= root root | "a"`, which reads a text in ever more ways, the 400th token takes 330."""


_CONTROLS = bytes(range(32))


class Grammars:
    """The grammars of one vocabulary. From any thread.

    Args:
        tokenizer: a transformers tokenizer, or None: then every grammar is refused.
        vocab_size: how many logits the model has; ids that the tokenizer has not are never allowed.
    """

    def __init__(self, tokenizer: Any | None, vocab_size: int) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._lock = threading.Lock()
        self._compilers: dict[tuple[bool, bytes], Any] = {}
        self._compiled: OrderedDict[tuple[str, str, bool], Any] = OrderedDict()

    def open(self, wanted: StructuredOutput, ends: frozenset[int], *, specials: bool = False) -> GrammarState:
        """The state before the first token.

        Args:
            wanted: what the text must be; the same as before costs nothing.
            ends: ids that may come where the text is whole, and nowhere else.
            specials: whether special tokens give text.

        Raises:
            RequestError: there is no tokenizer, or no such grammar can be made, is too large or has no text.
        """
        from xgrammar import GrammarMatcher

        if self._tokenizer is None:
            raise RequestError(
                f"{wanted.field} is set, must be left out for a model without tokenizer. hint: remove it",
                param=wanted.field.split(".")[0],
            )
        matcher = GrammarMatcher(self._grammar(wanted, specials), override_stop_tokens=sorted(ends) or None)
        state = GrammarState(matcher, ends, self._vocab_size)
        if not state.allowed().any() and not matcher.is_completed():
            raise RequestError(
                f"{wanted.field} allows no token at all, must allow some text. hint: check it",
                param=wanted.field.split(".")[0],
            )
        return state

    def _grammar(self, wanted: StructuredOutput, specials: bool) -> Any:
        key = (wanted.kind, wanted.source, specials)
        with self._lock:
            if key not in self._compiled:
                self._compiled[key] = self._compile(wanted, specials)
            self._compiled.move_to_end(key)
            while len(self._compiled) > KEPT or (len(self._compiled) > 1 and self._bytes() > KEPT_BYTES):
                self._compiled.popitem(last=False)
            return self._compiled[key]

    def _bytes(self) -> int:
        return sum(grammar.memory_size_bytes for grammar in self._compiled.values())

    def _compile(self, wanted: StructuredOutput, specials: bool) -> Any:
        controls = {"json": b"", "json_object": b"", "structural_tag": b"\r\n"}.get(wanted.kind, _CONTROLS)
        words = (specials, controls)
        compiler = self._compilers.get(words) or self._compilers.setdefault(words, self._compiler(*words))
        param = wanted.field.split(".")[0]
        try:
            grammar = _compiled(compiler, wanted)
        except (RuntimeError, ValueError, UnicodeError) as error:
            reason = str(error).strip().split(": ", 1)[-1]
            raise RequestError(
                f"{wanted.field} is no grammar ({reason:.300}), must be one. hint: check it", param=param
            ) from error
        if grammar.memory_size_bytes > MAX_BYTES:
            raise RequestError(
                f"{wanted.field} comes to automata of {grammar.memory_size_bytes} bytes, must be at most {MAX_BYTES}. "
                "hint: fewer or shorter alternatives and repetitions",
                param=param,
            )
        return grammar

    def _compiler(self, specials: bool, controls: bytes) -> Any:
        """One over the bytes that tokens add to a text, which special tokens do not unless asked to, and without those
        of other control characters: JSON has none, but xgrammar would have them in strings with a `maxLength`."""
        from xgrammar import GrammarCompiler, TokenizerInfo, VocabType

        bytes_of = TokenBytes(self._tokenizer)
        silent = () if specials else frozenset(self._tokenizer.all_special_ids)  # type: ignore[union-attr]
        words = [b"" if token in silent else bytes_of(token) for token in range(self._vocab_size)]
        others = set(_CONTROLS) - set(controls)
        words = [b"" if others.intersection(word) else word for word in words]
        info = TokenizerInfo(words, VocabType.RAW, vocab_size=self._vocab_size, stop_token_ids=[])
        return GrammarCompiler(info, max_threads=1, cache_enabled=False, enable_dynamic_compilation=True)


def _compiled(compiler: Any, wanted: StructuredOutput) -> Any:
    """JSON is written as Python's json.dumps does: of white space a model that has lost its way would write no end."""
    if wanted.kind == "json":
        return compiler.compile_json_schema(wanted.source, any_whitespace=False)
    if wanted.kind == "json_object":
        return compiler.compile_json_schema('{"type": "object"}', any_whitespace=False)
    if wanted.kind == "regex":
        return compiler.compile_regex(wanted.source)
    if wanted.kind == "structural_tag":
        return compiler.compile_structural_tag(wanted.source)
    if wanted.kind == "grammar":
        return compiler.compile_grammar(wanted.source)
    alternatives = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in json.loads(wanted.source))
    return compiler.compile_grammar(f"root ::= {alternatives}")


class GrammarState:
    """Where one sequence is in its grammar."""

    def __init__(self, matcher: Any, ends: frozenset[int], vocab_size: int) -> None:
        self._matcher, self._ends, self._vocab_size = matcher, sorted(ends), vocab_size
        self._seconds = SECONDS
        self._next: np.ndarray[Any, np.dtype[np.int32]] | None = None  # what may come, where it was asked for

    def accept(self, token_id: int) -> None:
        """Take the next token, which is none of the ends. Raises BuddyMoEError when the grammar has no place for it: it
        was chosen elsewhere, or no token of the vocabulary had one; or when following it takes too long."""
        began, self._next = time.thread_time(), None
        accepted = self._matcher.accept_token(token_id)
        self._seconds += SECONDS_PER_TOKEN - (time.thread_time() - began)
        if self._seconds < 0:
            raise BuddyMoEError(
                f"the grammar takes more than {SECONDS} s and {SECONDS_PER_TOKEN} s a token, must be followed faster. "
                "hint: let it read a text in one way only"
            )
        if not accepted:
            raise BuddyMoEError(
                f"token {token_id} has no place in what was asked for, must be one that the grammar allows. "
                "hint: this vocabulary may have no text of it"
            )

    def end(self) -> None:
        """An end is chosen. Raises BuddyMoEError where the text is not whole: then nothing had a place."""
        if not self._matcher.is_completed():
            raise BuddyMoEError(
                "the text is not whole and no token may come, must be one that the grammar allows. hint: it comes to "
                "a dead end"
            )

    def allowed(self) -> np.ndarray[Any, np.dtype[np.int32]]:
        """Which tokens may come next: a row of int32, a bit each. They are found once."""
        if self._next is None:
            self._next = np.zeros((1, -(-self._vocab_size // 32)), np.int32)
            self._fill(self._next, 0)
        return self._next

    @property
    def ended(self) -> bool:
        """Whether the text is whole and nothing can follow."""
        if not self._matcher.is_completed():
            return False
        mask = self.allowed().copy()
        for token in self._ends:
            mask[0, token // 32] &= ~np.int32(np.uint32(1 << token % 32).view(np.int32))
        return not mask.any()

    def fill(self, mask: Any, row: int) -> None:
        """Write which tokens may come next into a row of int32, a bit each."""
        if self._next is None:
            self._fill(mask, row)
        else:  # it is known
            mask[row] = torch.from_numpy(self._next[0])

    def _fill(self, mask: Any, row: int) -> None:
        began = time.thread_time()
        self._matcher.fill_next_token_bitmask(mask, row)
        self._seconds -= time.thread_time() - began


class TokenRule(Protocol):
    """Says which tokens may come next in one sequence: its grammar, or a mark that must come."""

    def fill(self, mask: Any, row: int) -> None:
        """Write which they are into a row of int32, a bit each."""


def mask_logits(logits_RV: Tensor, rules: Sequence[TokenRule]) -> None:
    """Put -inf where a row's rule does not allow a token, in place; float32, contiguous."""
    from xgrammar import allocate_token_bitmask, apply_token_bitmask_inplace

    masks = allocate_token_bitmask(*logits_RV.shape)
    for row, rule in enumerate(rules):
        rule.fill(masks, row)
    apply_token_bitmask_inplace(logits_RV, masks.to(logits_RV.device))
