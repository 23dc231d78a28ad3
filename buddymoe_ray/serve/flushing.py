"""When what a call's sequences say is handed on: the first tokens at once, the others together, an end at once.

A batch on its way to a client costs more than a step of a small model, so a worker of many calls hands on less often.
Nobody is woken for a token that waits. Knows neither engines nor what carries batches.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from buddymoe_ray.serve.deltas import joined
from buddymoe_ray.serve.work import Batch, Delta, Refusal, Reply
from buddymoe_ray.types import TokenEvent

__all__ = ["Batches", "Items"]

MOST_BATCHES, LONGEST_PAUSE = 200, 0.1
"""A second from one worker, and the seconds that a token waits for it at most."""


class Items:
    """What the sequences of one call say, in order, from any thread, for one reader on the event loop that made it."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._items = deque[TokenEvent | Refusal]()
        self._waiter: asyncio.Future[None] | None = None
        self._woken: asyncio.Future[None] | None = None
        self._for_end = self._end_came = False

    def put(self, item: TokenEvent | Refusal) -> None:
        """From whoever computes."""
        self._items.append(item)
        if not _goes_on(item):
            self._end_came = True
        elif self._for_end:
            return
        waiter = self._waiter  # read after the item is there: who begins to wait now finds it
        if waiter is not None and waiter is not self._woken:
            self._woken = waiter
            with suppress(RuntimeError):  # the loop is closed: nobody reads on
                self._loop.call_soon_threadsafe(_wake, waiter)

    def take(self) -> list[TokenEvent | Refusal]:
        """All that was said since."""
        self._end_came = False
        return [self._items.popleft() for _ in range(len(self._items))]

    async def wait(self, seconds: float, *, for_end: bool) -> None:
        """Until there is an item, or one with which a sequence ends, but no longer than that."""
        self._for_end, self._waiter = for_end, (waiter := self._loop.create_future())
        if not self._end_came and (for_end or not self._items):
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await waiter
        self._waiter = None


class Batches:
    """Of one call with so many choices open: at most every `flush_seconds`, None: all at the end. `delta_of` says what
    an event adds to the choice that its request answers, `calls` how many others the worker has."""

    def __init__(
        self,
        items: Items,
        open_choices: int,
        *,
        delta_of: Callable[[TokenEvent], Delta],
        flush_seconds: float | None,
        beat_seconds: float,
        calls: Callable[[], int],
    ) -> None:
        self._items, self.open_choices, self._calls = items, open_choices, calls
        self._now = asyncio.get_running_loop().time
        self._flush_seconds, self._beat_seconds = flush_seconds, beat_seconds
        self._flush_at = self._now() if flush_seconds is not None else float("inf")
        self._beat_at = self._now() + beat_seconds
        self._delta_of = delta_of
        self._events: dict[str, list[TokenEvent]] = {}  # by sequence

    async def next(self) -> Reply:
        """The next batch, an empty one after `beat_seconds` without, or a refusal, which is the end."""
        while True:
            for item in self._items.take():
                if isinstance(item, Refusal):
                    self.open_choices = 0
                    return item
                self._events.setdefault(item.request_id, []).append(item)
                self.open_choices -= not _goes_on(item)
            now = self._now()
            if not self.open_choices or (self._events and now >= self._flush_at):
                break
            if now >= self._beat_at:
                self._beat_at = now + self._beat_seconds
                return Batch(deltas=())
            until = min(self._flush_at, self._beat_at) if self._events else self._beat_at
            await self._items.wait(until - now, for_end=bool(self._events))
        batch = Batch(deltas=tuple(self._delta_of(joined(events)) for events in self._events.values()))
        self._events = {}
        self._flush_at, self._beat_at = now + self._pause(), now + self._beat_seconds
        return batch

    def _pause(self) -> float:
        if not self._flush_seconds:
            return 0.0
        return max(self._flush_seconds, min(self._calls() / MOST_BATCHES, LONGEST_PAUSE))


def _goes_on(item: TokenEvent | Refusal) -> bool:
    return isinstance(item, TokenEvent) and item.finish_reason is None


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
