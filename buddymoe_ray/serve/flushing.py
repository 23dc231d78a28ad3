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
FEWER_BATCHES, LONGER_PAUSE, READ_TOKENS = 64, 0.25, 100
"""A second from one worker, and the seconds that a token waits for it at most; then the same of sequences that say more
than so many tokens a second, ten times as many as people read."""


class Items:
    """What the sequences of one call say, in order, from any thread, for one reader on the event loop that made it."""

    def __init__(self) -> None:
        self._loop, self._news = asyncio.get_running_loop(), asyncio.Event()
        self._items = deque[TokenEvent | Refusal]()
        self._waits = self._for_end = self._end_came = False

    def put(self, item: TokenEvent | Refusal) -> None:
        """From whoever computes."""
        self._items.append(item)
        if ends := not _goes_on(item):
            self._end_came = True
        if self._waits and (ends or not self._for_end):  # read after the item is there: who begins to wait now finds it
            self._waits = False
            with suppress(RuntimeError):  # the loop is closed: nobody reads on
                self._loop.call_soon_threadsafe(self._news.set)

    def take(self) -> list[TokenEvent | Refusal]:
        """All that was said since."""
        self._end_came = False
        return [self._items.popleft() for _ in range(len(self._items))]

    async def wait(self, seconds: float, *, for_end: bool) -> None:
        """Until there is an item, or one with which a sequence ends, but no longer than that."""
        self._news.clear()
        self._for_end, self._waits = for_end, True
        if not self._end_came and (for_end or not self._items):
            over = self._loop.call_later(seconds, self._news.set)
            try:
                await self._news.wait()
            finally:
                over.cancel()
        self._waits = False


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
        self._items, self.open_choices, self._calls, self._delta_of = items, open_choices, calls, delta_of
        self._now = asyncio.get_running_loop().time
        self._flush_seconds, self._beat_seconds = flush_seconds, beat_seconds
        self._flush_at = self._now() if flush_seconds is not None else float("inf")
        self._beat_at = self._now() + beat_seconds
        self._events: dict[str, list[TokenEvent]] = {}  # by sequence
        self._refusal: Refusal | None = None

    async def next(self) -> Reply:
        """The next batch, an empty one after `beat_seconds` without, or a refusal, which is the end; who reads a stream
        has what was said before it."""
        while True:
            for item in self._items.take():
                if isinstance(item, Refusal):
                    self._refusal = item
                    break
                self._events.setdefault(item.request_id, []).append(item)
                self.open_choices -= not _goes_on(item)
            now = self._now()
            if self._refusal and (not self._events or self._flush_seconds is None):
                self.open_choices = 0
                return self._refusal
            if self._refusal or not self.open_choices or (self._events and now >= self._flush_at):
                break
            if now >= self._beat_at:
                self._beat_at = now + self._beat_seconds
                return Batch(deltas=())
            pauses = bool(self._events) or now < self._flush_at
            until = min(self._flush_at, self._beat_at) if pauses else self._beat_at
            await self._items.wait(until - now, for_end=pauses)
        batch = Batch(deltas=tuple(self._delta_of(joined(events)) for events in self._events.values()))
        self._flush_at, self._beat_at = self._next_flush(now), now + self._beat_seconds
        self._events = {}
        return batch

    def _next_flush(self, now: float) -> float:
        """Calls of one pause hand on together: most of what a batch costs is to be woken for it."""
        if not self._flush_seconds:
            return now
        tokens = max(sum(len(event.token_ids) for event in events) for events in self._events.values())
        fast = tokens > 1 + READ_TOKENS * (now - self._beat_at + self._beat_seconds)
        most, longest = (FEWER_BATCHES, LONGER_PAUSE) if fast else (MOST_BATCHES, LONGEST_PAUSE)
        pause = max(self._flush_seconds, min(self._calls() / most, longest))
        return (now // pause + 1) * pause


def _goes_on(item: TokenEvent | Refusal) -> bool:
    return isinstance(item, TokenEvent) and item.finish_reason is None
