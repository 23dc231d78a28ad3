"""When a peer may be asked: a circuit breaker, so that a slow or dead one costs one timeout and not one per layer.

closed -> open after a failure; after a wait one question may pass as a probe (half-open): its success closes, its
failure opens again for twice as long, up to a cap. Pure but for the injected clock. Invariant: only the outcome of a
question that was asked in the present state counts, so late news from before changes nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Literal

__all__ = ["Breaker"]

BreakerState = Literal["closed", "open", "half-open"]

FIRST_SECONDS, CAP_SECONDS = 0.5, 30.0
"""The first and the longest wait of an open breaker."""


class Breaker:
    """From any thread. Times are seconds of `clock`; a probe without an outcome for `probe_seconds` has failed."""

    def __init__(self, *, clock: Callable[[], float], probe_seconds: float) -> None:
        self._clock, self._probe = clock, probe_seconds
        self._lock = threading.Lock()
        self._state: BreakerState = "closed"
        self._wait = FIRST_SECONDS
        self._until = 0.0  # open: next probe; half-open: when the probe has failed
        self._era = 0  # counts changes of state; a pass is worth something in its own era only

    def enter(self) -> int | None:
        """A pass for one question, for `succeeded` or `failed`; None when none may be asked now."""
        with self._lock:
            self._expire()
            if self._state == "closed":
                return self._era
            if self._state == "half-open" or self._clock() < self._until:
                return None
            self._change("half-open", self._probe)
            return self._era

    def current(self, ticket: int) -> bool:
        """Whether the state is still the one in which the pass was given."""
        with self._lock:
            return ticket == self._era

    def succeeded(self, ticket: int) -> None:
        """The question was answered in time."""
        with self._lock:
            if ticket == self._era and self._state == "half-open":
                self._wait = FIRST_SECONDS
                self._change("closed", 0.0)

    def failed(self, ticket: int) -> None:
        """The question was not answered, or wrongly."""
        with self._lock:
            if ticket == self._era:
                self._open()

    def _expire(self) -> None:
        if self._state == "half-open" and self._clock() >= self._until:
            self._open()

    def _open(self) -> None:
        if self._state == "half-open":
            self._wait = min(CAP_SECONDS, 2 * self._wait)
        self._change("open", self._wait)

    def _change(self, state: BreakerState, seconds: float) -> None:
        self._state = state
        self._until = self._clock() + seconds
        self._era += 1
