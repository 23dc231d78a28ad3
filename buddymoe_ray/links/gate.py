"""How many peers' questions a worker computes at once, and how many may wait.

The worker's own steps come first: what does not fit is declined at once. No peer has more than half of the places,
so one that does not take its answers leaves room for others. Knows no questions. Invariant: never more than
`max_concurrent` turns are held, never more than `max_concurrent + max_waiting` are inside.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Gate"]


class Gate:
    """From any thread. Who was let in by `admit` must `leave`; `peer` is any object that tells peers apart."""

    def __init__(self, *, max_concurrent: int, max_waiting: int) -> None:
        assert max_concurrent > 0 and max_waiting >= 0, (
            f"{max_concurrent} at once and {max_waiting} waiting, must be > 0"
        )
        self._concurrent, self._most = max_concurrent, max_concurrent + max_waiting
        self._free = threading.Condition()
        self._of: Counter[object] = Counter()
        self._running = self._inside = 0
        self._closed = False

    @property
    def inside(self) -> int:
        """How many compute or wait."""
        return self._inside

    def admit(self, peer: object) -> bool:
        """Let one in, or say at once that it is full."""
        with self._free:
            if self._closed or self._inside >= self._most or self._of[peer] >= (self._most + 1) // 2:
                return False
            self._inside += 1
            self._of[peer] += 1
            return True

    def leave(self, peer: object) -> None:
        """One that was let in is done."""
        with self._free:
            self._inside -= 1
            self._of[peer] -= 1
            if not self._of[peer]:
                del self._of[peer]

    @contextmanager
    def turn(self, *, deadline: float) -> Iterator[bool]:
        """Hold one of the turns for a block; False when there was none by then (`time.monotonic`), or at the end."""
        with self._free:
            self._free.wait_for(
                lambda: self._closed or self._running < self._concurrent, timeout=max(0.0, deadline - time.monotonic())
            )
            mine = not self._closed and self._running < self._concurrent and time.monotonic() < deadline
            self._running += mine
        try:
            yield mine
        finally:
            if mine:
                with self._free:
                    self._running -= 1
                    self._free.notify_all()  # one that gives up just now must not swallow it

    def close(self) -> None:
        """Let nobody in and nobody wait any more."""
        with self._free:
            self._closed = True
            self._free.notify_all()
