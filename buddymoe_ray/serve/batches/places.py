"""Places for the lines of all batches of a service: as many as its workers have, given in the order of asking.

Knows neither lines nor workers.
"""

from __future__ import annotations

import asyncio
from collections import deque

__all__ = ["Places"]


class Places:
    """`count` may change while some are taken. One event loop uses it."""

    def __init__(self, count: int = 1) -> None:
        self._count, self._taken = count, 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    def resize(self, count: int) -> None:
        """There are so many from now on."""
        self._count = count
        self._give()

    async def take(self) -> None:
        """Wait for one, which `leave` gives back."""
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        self._give()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # it was given in the same moment
                self.leave()
            raise

    def leave(self) -> None:
        """One is free again."""
        self._taken -= 1
        self._give()

    def _give(self) -> None:
        while self._waiting and self._taken < self._count:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                self._taken += 1
