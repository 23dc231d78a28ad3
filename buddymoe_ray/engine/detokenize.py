"""Token ids to text, a few at a time, never half a character.

A character may be spread over several tokens and a token's spacing may depend on its neighbours, so each push decodes a
short window twice and emits the difference; the window moves on with the text, so the whole costs linear time.
Algorithm: the prefix-offset method of text-generation-inference, in our own words. Knows no stop strings.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Protocol

__all__ = ["Decoder", "IncrementalDetokenizer"]

_CONTEXT = 6  # prompt tokens that may change how the first output token is spaced
_BROKEN = "\ufffd"
_LONGEST_HOLD = 16  # a model may really emit U+FFFD: after that many tokens it is taken at its word
_UNFINISHED = 3  # tokens that a begun character can have at most: four bytes, of which one is still to come


class Decoder(Protocol):
    """What is needed of a tokenizer."""

    def decode(
        self, token_ids: list[int], *, skip_special_tokens: bool = ..., clean_up_tokenization_spaces: bool = ...
    ) -> str:
        """Text of the ids."""


class IncrementalDetokenizer:
    """Feed ids with `push`, end with `flush`. Special tokens give no text, but with `specials`.

    `begins` fills with the character at which each token begins in the text, in order, once its text is out; a token
    that continues a character begins where that one does. Whoever reads it takes from the left.
    """

    def __init__(self, tokenizer: Decoder, prompt_ids: Sequence[int], *, specials: bool = False) -> None:
        self._tokenizer, self._specials = tokenizer, specials
        self._ids = self._context(prompt_ids)
        self._start = 0  # where the window begins
        self._read = len(self._ids)  # ids up to here are emitted
        self._owed = 0  # ... but for so many U+FFFD at their end, which may be a character begun
        self._length = 0  # characters emitted
        self._waiting: list[int] = []  # indices in `_ids` of tokens whose beginning is not known
        self.begins: deque[int] = deque()

    def push(self, ids: Sequence[int]) -> str:
        """Add ids; returns the whole characters they complete."""
        self._waiting += range(len(self._ids), len(self._ids) + len(ids))
        self._ids += ids
        end = len(self._ids)
        before = self._emitted()
        after = self._decode(self._ids[self._start :])
        if after.endswith(_BROKEN):
            if end - self._read < _LONGEST_HOLD:
                return ""
            end, after = self._whole(end)
            owed = min(_UNFINISHED, len(after) - len(after.rstrip(_BROKEN)))
        elif after == before:
            self.begins.extend([self._length] * len(self._waiting))
            self._waiting = []
            self._forget_silent(has_context=before != "")
            return ""
        else:
            owed = 0
        text = self._out(before, after[: len(after) - owed], end)
        self._start, self._read, self._owed = self._read, end, owed
        return text

    def flush(self) -> str:
        """What is still held, less an unfinished character."""
        before = self._emitted()
        text = self._out(before, self._decode(self._ids[self._start :]).rstrip(_BROKEN), len(self._ids))
        self._start = self._read = len(self._ids)
        self._owed = 0
        return text

    def _out(self, before: str, after: str, end: int) -> str:
        """What `after`, the window's text up to token `end`, adds; notes where the tokens that made it begin."""
        text = _added(before, after)
        begin = emitted = len(after) - len(text)
        while self._waiting and self._waiting[0] < end:
            at = self._waiting.pop(0)
            begun = before if at == self._read else self._decode(self._ids[self._start : at])
            begin = max(begin, _shared(begun, after))  # a character begun may spoil finished ones before it
            self.begins.append(self._length + begin - emitted)
        self._length += len(text)
        return text

    def _emitted(self) -> str:
        """Text of the window that was emitted."""
        text = self._decode(self._ids[self._start : self._read])
        return text[: len(text) - self._owed]

    def _context(self, prompt_ids: Sequence[int]) -> list[int]:
        """The end of the prompt, from the start of a character on: bytes cut out of one spoil those after them."""
        for size in range(_CONTEXT, _CONTEXT + _UNFINISHED + 1):
            ids = list(prompt_ids[-size:])
            if not self._decode(ids).startswith(_BROKEN):
                return ids
        return list(prompt_ids[-_CONTEXT:])

    def _whole(self, end: int) -> tuple[int, str]:
        """Where a text that ends broken is cut so that a character begun at its end stays whole; and the text there.

        Tokens that each end one character and begin the next leave no such place: then the begun one is owed.
        """
        for cut in range(end - 1, end - 1 - _UNFINISHED, -1):
            text = self._decode(self._ids[self._start : cut])
            if not text.endswith(_BROKEN):
                break
        return cut, text

    def _forget_silent(self, *, has_context: bool) -> None:
        """Drop waiting ids that add no text (end tokens, ids past the vocabulary): the window would grow without end.

        Without text before them, a leading space may look silent too; then only special tokens are dropped.
        """
        waiting = self._ids[self._read :]
        self._ids[self._read :] = [] if has_context else [i for i in waiting if not self._is_special(i)]

    def _is_special(self, token_id: int) -> bool:
        text = self._tokenizer.decode([token_id], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text != self._decode([token_id])

    def _decode(self, ids: list[int]) -> str:
        skipped = not self._specials
        return self._tokenizer.decode(ids, skip_special_tokens=skipped, clean_up_tokenization_spaces=False)


def _added(before: str, after: str) -> str:
    """What `after` has beyond `before`; a prompt's broken end that a later token mends counts as added."""
    return after[_shared(before, after) :]


def _shared(one: str, other: str) -> int:
    """Length of what both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (here, there) in pairs if here != there), min(len(one), len(other)))
