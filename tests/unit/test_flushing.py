"""When what a call's sequences say is handed on."""

from __future__ import annotations

import asyncio

import pytest

from buddymoe_ray.serve import flushing
from buddymoe_ray.serve.flushing import Batches, Items
from buddymoe_ray.serve.refusals import unavailable
from buddymoe_ray.serve.work import Batch, Delta, Refusal


def delta(text: str, *, end: bool = False, choice: int = 0) -> Delta:
    return Delta(choice=choice, text=text, finish_reason="stop" if end else None)


def batches_of(items: Items, *, calls: int = 1, flush_seconds: float | None = 0.025, choices: int = 1) -> Batches:
    return Batches(items, choices, flush_seconds=flush_seconds, beat_seconds=60, calls=lambda: calls)


async def said(batches: Batches) -> str:
    batch = await batches.next()
    assert isinstance(batch, Batch), batch
    return "".join(delta.text for delta in batch.deltas)


@pytest.mark.parametrize(
    ("calls", "flush_seconds", "pause"), [(1, 0.025, 0.025), (16, 0.025, 0.08), (900, 0.025, 0.1), (900, 0.0, 0.0)]
)
async def test_a_worker_of_many_calls_hands_on_less_often(calls: int, flush_seconds: float, pause: float) -> None:
    items = Items()
    batches = batches_of(items, calls=calls, flush_seconds=flush_seconds)
    items.put_nowait(delta("a"))
    assert await said(batches) == "a"
    assert batches._flush_at - batches._beat_at + 60 == pytest.approx(pause)


async def test_who_waits_for_a_flush_is_woken_by_an_end_and_not_by_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flushing, "LONGEST_PAUSE", 3600.0)
    items = Items()
    batches = batches_of(items, calls=10**6, choices=2)
    items.put_nowait(delta("a"))
    assert await said(batches) == "a"
    items.put_nowait(delta("b"))
    reading = asyncio.create_task(said(batches))
    await asyncio.sleep(0)
    waiter = items._waiter
    for text in "cde":
        items.put_nowait(delta(text))
        await asyncio.sleep(0)
        assert items._waiter is waiter and waiter is not None and not waiter.done(), "a token that waits wakes nobody"
    items.put_nowait(delta("f", end=True))
    await asyncio.sleep(0)
    assert not reading.done(), "the other choice goes on, and its tokens wait"
    items.put_nowait(delta("g", end=True, choice=1))
    assert await reading == "bcdefg" and not batches.open_choices


async def test_a_refusal_is_told_at_once() -> None:
    items, refusal = Items(), unavailable("gone", retry_after_seconds=1)
    batches = batches_of(items, flush_seconds=None)
    items.put_nowait(delta("a"))
    reading = asyncio.create_task(batches.next())
    await asyncio.sleep(0)
    items.put_nowait(refusal)
    found = await reading
    assert isinstance(found, Refusal) and found == refusal and not batches.open_choices
