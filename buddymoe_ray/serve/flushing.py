"""When what a call's sequences say is handed on: the first tokens at once, the others together, an end at once.

A batch on its way to a client costs more than a step of a small model, so a worker of many calls hands on less often.
Nobody is woken for a token that waits. Knows neither engines nor what carries batches.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from buddymoe_ray.serve.deltas import merge
from buddymoe_ray.serve.work import Batch, Delta, Refusal, Reply

__all__ = ["Batches", "Items"]

MOST_BATCHES, LONGEST_PAUSE = 200, 0.1
"""A second from one worker, and the seconds that a token waits for it at most."""


class Items:
    """What the sequences of one call say, in order, for one reader of the same event loop."""

    def __init__(self) -> None:
        self._items = deque[Delta | Refusal]()
        self._waiter: asyncio.Future[None] | None = None
        self._for_end = False

    def put_nowait(self, item: Delta | Refusal) -> None:
        """From whoever computes."""
        self._items.append(item)
        if self._waiter is not None and not self._waiter.done() and not (self._for_end and _goes_on(item)):
            self._waiter.set_result(None)

    def take(self) -> Delta | Refusal | None:
        """The next item; None when there is none."""
        return self._items.popleft() if self._items else None

    async def wait(self, seconds: float, *, for_end: bool) -> None:
        """Until there is an item, or one with which a sequence ends, but no longer than that."""
        self._waiter, self._for_end = asyncio.get_running_loop().create_future(), for_end
        try:
            async with asyncio.timeout(seconds):
                await self._waiter
        except TimeoutError:
            pass
        finally:
            self._waiter = None


class Batches:
    """Of one call with so many choices open: at most every `flush_seconds`, None: all at the end. `calls` says how many
    others its worker has."""

    def __init__(
        self,
        items: Items,
        open_choices: int,
        *,
        flush_seconds: float | None,
        beat_seconds: float,
        calls: Callable[[], int],
    ) -> None:
        self._items, self.open_choices, self._calls = items, open_choices, calls
        self._now = asyncio.get_running_loop().time
        self._flush_seconds, self._beat_seconds = flush_seconds, beat_seconds
        self._flush_at = self._now() if flush_seconds is not None else float("inf")
        self._beat_at = self._now() + beat_seconds
        self._deltas: list[Delta] = []

    async def next(self) -> Reply:
        """The next batch, an empty one after `beat_seconds` without, or a refusal, which is the end."""
        while True:
            while (item := self._items.take()) is not None:
                if isinstance(item, Refusal):
                    self.open_choices = 0
                    return item
                self._deltas.append(item)
                self.open_choices -= not _goes_on(item)
            now = self._now()
            if not self.open_choices or (self._deltas and now >= self._flush_at):
                break
            if now >= self._beat_at:
                self._beat_at = now + self._beat_seconds
                return Batch(deltas=())
            until = min(self._flush_at, self._beat_at) if self._deltas else self._beat_at
            await self._items.wait(until - now, for_end=bool(self._deltas))
        batch, self._deltas = Batch(deltas=merge(self._deltas)), []
        self._flush_at, self._beat_at = now + self._pause(), now + self._beat_seconds
        return batch

    def _pause(self) -> float:
        if not self._flush_seconds:
            return 0.0
        return max(self._flush_seconds, min(self._calls() / MOST_BATCHES, LONGEST_PAUSE))


def _goes_on(item: Delta | Refusal) -> bool:
    return isinstance(item, Delta) and item.finish_reason is None
