"""Finds stop strings in streamed text, also when one is spread over many tokens.

Holds back exactly the text that may still become a stop string; the held text is part of the state, so a resumed stream
goes on where it stood. Knows text only.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["StopChecker"]


class StopChecker:
    """`stops` are non-empty strings; the match that is complete first wins (of two, the longer) and is not emitted.

    So the outcome does not depend on how the text is cut into pushes.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        assert all(stops), "a stop string is empty, must be text"
        self._stops = tuple(stops)
        self.held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Add text; returns (text that is safe to emit, whether a stop string was met)."""
        if not self._stops:
            return text, False
        window = self.held + text
        found = [(at + len(stop), at) for stop in self._stops if (at := window.find(stop)) >= 0]
        if found:
            self.held = ""
            return window[: min(found)[1]], True
        keep = max(_overlap(window, stop) for stop in self._stops)
        self.held = window[len(window) - keep :]
        return window[: len(window) - keep], False

    def flush(self) -> str:
        """The held text, when generation ends without a stop string."""
        text, self.held = self.held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
