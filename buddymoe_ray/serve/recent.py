"""An answer that many may want and few may cause: asked for at most once in so many seconds. Knows no question."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

__all__ = ["Recent"]

T = TypeVar("T")


class Recent(Generic[T]):
    """What `ask` answered within the last `seconds`, however often it is wanted; who leaves stops nobody's question."""

    def __init__(self, ask: Callable[[], Awaitable[T]], seconds: float) -> None:
        self._ask, self._seconds = ask, seconds
        self._asked = -math.inf
        self._answer: asyncio.Future[T] | None = None

    async def get(self) -> T:
        """The answer; raises what `ask` raised."""
        now = time.monotonic()
        if self._answer is None or (self._answer.done() and now - self._asked >= self._seconds):
            self._asked, self._answer = now, asyncio.ensure_future(self._ask())
        return await asyncio.shield(self._answer)
