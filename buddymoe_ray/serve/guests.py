"""Work that gives way: answers that a worker makes while nobody else waits for its places.

Knows no engines.
"""

from __future__ import annotations

from buddymoe_ray.serve.flushing import Items
from buddymoe_ray.serve.refusals import unavailable

__all__ = ["Guests"]


class Guests:
    """Calls in a worker's `places` that may be sent away, the youngest first; clients then come again after some
    seconds."""

    def __init__(self, *, places: int, retry_after_seconds: int) -> None:
        self._places, self._retry_after = places, retry_after_seconds
        self._calls: dict[Items, int] = {}

    @property
    def answers(self) -> int:
        """Of all guests."""
        return sum(self._calls.values())

    def fit(self, others: int, answers: int) -> bool:
        """Whether a call of so many answers may come, beside so many of others: alone always."""
        taken = others + self.answers
        return not taken or taken + answers <= self._places

    def add(self, items: Items, answers: int) -> None:
        """A call has come, which reads what becomes of it from `items`."""
        self._calls[items] = answers

    def leave(self, items: Items) -> None:
        """A call, if it is a guest's, is over."""
        self._calls.pop(items, None)

    def make_room(self, others: int) -> None:
        """Others have so many answers: guests go until all have a place, as far as there are guests."""
        while self._calls and others + self.answers > self._places:
            items, _ = self._calls.popitem()
            items.put(unavailable("others need its place", retry_after_seconds=self._retry_after))
