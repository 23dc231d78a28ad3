"""Work that gives way: answers that a worker makes while nobody else waits for its places.

Knows no engines.
"""

from __future__ import annotations

import asyncio

from buddymoe_ray.serve.refusals import unavailable
from buddymoe_ray.serve.work import Delta, Refusal

__all__ = ["Guests"]

Items = asyncio.Queue[Delta | Refusal]


class Guests:
    """Calls whose answers may be sent away, the youngest first; clients then come again after some seconds."""

    def __init__(self, *, retry_after_seconds: int) -> None:
        self._answers: dict[Items, int] = {}
        self._retry_after = retry_after_seconds

    def add(self, items: Items, answers: int) -> None:
        """A call of so many answers, which reads what becomes of it from `items`."""
        self._answers[items] = answers

    def leave(self, items: Items) -> int:
        """A call is over: how many answers it still had."""
        return self._answers.pop(items, 0)

    def send_away(self, answers: int) -> int:
        """Make room for so many, as far as there are guests; how many answers went."""
        gone = 0
        while self._answers and gone < answers:
            items, count = self._answers.popitem()
            items.put_nowait(unavailable("others need its place", retry_after_seconds=self._retry_after))
            gone += count
        return gone
