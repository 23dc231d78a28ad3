"""Token ids to text, a few at a time, never half a character.

A character may be spread over several tokens and a token's spacing may depend on its neighbours, so each push decodes a
short window twice and emits the difference; the window moves on with the text, so the whole costs linear time. Algorithm:
the prefix-offset method of text-generation-inference, in our own words. Knows no stop strings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

__all__ = ["Decoder", "IncrementalDetokenizer"]

_CONTEXT = 6  # prompt tokens that may change how the first output token is spaced
_BROKEN = "\ufffd"
_LONGEST_HOLD = 16  # a model may really emit U+FFFD: after that many tokens it is taken at its word


class Decoder(Protocol):
    """What is needed of a tokenizer."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = ..., clean_up_tokenization_spaces: bool = ...) -> str:
        """Text of the ids."""


class IncrementalDetokenizer:
    """Feed ids with `push`, end with `flush`. Special tokens give no text."""

    def __init__(self, tokenizer: Decoder, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt_ids[-_CONTEXT:])
        self._start = 0  # where the window begins
        self._read = len(self._ids)  # ids up to here are emitted

    def push(self, ids: Sequence[int]) -> str:
        """Add ids; returns the whole characters they complete."""
        self._ids += ids
        before = self._decode(self._ids[self._start : self._read])
        after = self._decode(self._ids[self._start :])
        waiting = len(self._ids) - self._read
        if len(after) <= len(before) or (after.endswith(_BROKEN) and waiting < _LONGEST_HOLD):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return after[len(before) :]

    def flush(self) -> str:
        """What is still held, less an unfinished character."""
        before = self._decode(self._ids[self._start : self._read])
        after = self._decode(self._ids[self._start :])
        self._start = self._read = len(self._ids)
        return after[len(before) :].rstrip(_BROKEN)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
