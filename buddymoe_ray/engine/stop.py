"""Finds stop strings in streamed text, also when one is spread over many tokens.

Holds back exactly the text that may still become a stop string; the held text is part of the state, so a resumed stream
goes on where it stood. Knows text, and the special tokens that give none though their name is a stop string.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from buddymoe_ray.errors import RequestError

__all__ = ["StopChecker", "special_stops"]


def special_stops(stops: Sequence[str], tokenizer: Any, *, silent: bool = True) -> dict[int, str]:
    """The stop strings that are a special token, by its id: they end the output themselves.

    Where special tokens are `silent`, they give no text: raises RequestError for a stop string that holds one beside
    other text, for it would never be met.
    """
    if not stops:
        return {}
    specials, inside = _specials(tokenizer)
    mixed = next((found[0] for stop in stops if stop not in specials and (found := inside.search(stop))), None)
    if silent and mixed is not None:
        raise RequestError(
            f"stop holds {mixed!r} beside other text, must not: special tokens give no text. "
            "hint: stop at the special token alone",
            param="stop",
        )
    return {specials[stop]: stop for stop in stops if stop in specials}


@lru_cache(maxsize=8)
def _specials(tokenizer: Any) -> tuple[dict[str, int], re.Pattern[str]]:
    """Ids of a tokenizer's special tokens by content, and what finds one of them in a text."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    specials = {token.content: token_id for token_id, token in added.items() if token.special}
    return specials, re.compile("|".join(map(re.escape, specials)) or "(?!)")


class StopChecker:
    """`stops` are non-empty strings; the match that is complete first wins (of two, the longer) and is not emitted.

    So the outcome does not depend on how the text is cut into pushes.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        assert all(stops), "a stop string is empty, must be text"
        self._stops = tuple(stops)
        self._borders = [_borders(stop) for stop in self._stops]
        self._sizes = [0] * len(self._stops)  # how much of each the text ends with
        self.held = ""
        self.met: str | None = None  # the one that was met

    def push(self, text: str) -> tuple[str, bool]:
        """Add text; returns (text that is safe to emit, whether a stop string was met)."""
        if not self._stops:
            return text, False
        window = self.held + text
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := window.find(stop)) >= 0]
        if found:
            _, at, self.met = min(found)
            self.held = ""
            return window[:at], True
        keep = max(self._overlap(at, text) for at in range(len(self._stops)))
        self.held = window[len(window) - keep :]
        return window[: len(window) - keep], False

    def _overlap(self, at: int, text: str) -> int:
        """Length of the longest end of all text, `text` its last, that is a proper beginning of a stop string that is
        not in it. Linear in `text`, whatever the two are (Knuth, Morris, Pratt)."""
        stop, borders, size = self._stops[at], self._borders[at], self._sizes[at]
        for char in text:
            while size and stop[size] != char:
                size = borders[size - 1]
            size += stop[size] == char
        self._sizes[at] = size
        return size

    def flush(self) -> str:
        """The held text, when generation ends without a stop string."""
        text, self.held = self.held, ""
        return text


def _borders(stop: str) -> list[int]:
    """Of every beginning of `stop`, by its length less one: its longest proper end that is a beginning too."""
    borders = [0]
    for char in stop[1:]:
        size = borders[-1]
        while size and stop[size] != char:
            size = borders[size - 1]
        borders.append(size + (stop[size] == char))
    return borders
