"""When what a call's sequences say is handed on."""

from __future__ import annotations

import asyncio
import time

import pytest

from buddymoe_ray.serve import flushing
from buddymoe_ray.serve.flushing import Batches, Items
from buddymoe_ray.serve.refusals import unavailable
from buddymoe_ray.serve.work import Batch, Delta, Refusal
from buddymoe_ray.types import FinishReason, TokenEvent


def event(text: str, *, end: bool = False, choice: int = 0, tokens: int = 1) -> TokenEvent:
    reason: FinishReason | None = "stop" if end else None
    return TokenEvent(request_id=str(choice), token_ids=(7,) * tokens, text=text, finish_reason=reason)


def delta_of(event: TokenEvent) -> Delta:
    return Delta(choice=int(event.request_id), text=event.text, finish_reason=event.finish_reason)


def batches_of(items: Items, *, calls: int = 1, flush_seconds: float | None = 0.025, choices: int = 1) -> Batches:
    return Batches(items, choices, delta_of=delta_of, flush_seconds=flush_seconds, beat_seconds=60, calls=lambda: calls)


async def said(batches: Batches) -> str:
    batch = await batches.next()
    assert isinstance(batch, Batch), batch
    return "".join(delta.text for delta in batch.deltas)


@pytest.mark.parametrize(
    ("calls", "flush_seconds", "tokens", "pause"),
    [
        (1, 0.025, 1, 0.025),
        (16, 0.025, 1, 0.08),
        (900, 0.025, 1, 0.1),
        (1, 0.025, 400, 0.025),
        (8, 0.025, 400, 0.125),
        (900, 0.025, 400, 0.25),  # faster than anybody reads
        (900, 0.5, 400, 0.5),
        (900, 0.0, 400, 0.0),
    ],
)
async def test_a_worker_of_many_calls_hands_on_less_often_and_all_together(
    calls: int, flush_seconds: float, tokens: int, pause: float
) -> None:
    for _ in range(2):
        batches = batches_of(items := Items(), calls=calls, flush_seconds=flush_seconds)
        items.put(event("a", tokens=tokens))
        assert await said(batches) == "a", "the first tokens at once"
        now, times = batches._beat_at - 60, batches._flush_at / (pause or 1)
        assert now <= batches._flush_at <= now + pause
        assert not pause or times == pytest.approx(round(times)), "others flush then, too"


async def test_who_waits_for_a_flush_is_woken_by_an_end_and_not_by_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flushing, "LONGEST_PAUSE", 3600.0)
    items = Items()
    batches = batches_of(items, calls=10**6, choices=2)
    items.put(event("a"))
    assert await said(batches) == "a"
    reading = asyncio.create_task(said(batches))
    await asyncio.sleep(0)
    for text in "bcde":
        items.put(event(text))
        await asyncio.sleep(0)
        assert items._waits and not items._news.is_set(), "a token that waits wakes nobody"
    items.put(event("f", end=True))
    await asyncio.sleep(0)
    assert not reading.done(), "the other choice goes on, and its tokens wait"
    items.put(event("g", end=True, choice=1))
    assert await reading == "bcdefg" and not batches.open_choices


async def test_a_refusal_is_told_at_once() -> None:
    items, refusal = Items(), unavailable("gone", retry_after_seconds=1)
    batches = batches_of(items, flush_seconds=None)
    items.put(event("a"))
    reading = asyncio.create_task(batches.next())
    await asyncio.sleep(0)
    items.put(refusal)
    found = await reading
    assert isinstance(found, Refusal) and found == refusal and not batches.open_choices


async def test_a_stream_has_what_was_said_before_a_refusal() -> None:
    items, refusal = Items(), unavailable("gone", retry_after_seconds=1)
    batches = batches_of(items, choices=2)
    for item in (event("a"), event("b"), refusal, event("c", choice=1)):
        items.put(item)
    assert await said(batches) == "ab" and batches.open_choices
    assert await batches.next() == refusal and not batches.open_choices


@pytest.mark.parametrize("flush_seconds", [0.0, 1e-4])
async def test_nothing_that_another_thread_says_is_lost_or_late(flush_seconds: float) -> None:
    """The reader begins to wait just when something is said, often."""
    items = Items()
    batches, told = batches_of(items, flush_seconds=flush_seconds), list[str]()

    def say() -> None:
        for at in range(300):
            items.put(event(f"{at} ", end=at == 299))
            if at % 3:
                while items._items:
                    time.sleep(0)  # until it is read: what is missed now would only be found at the next beat

    saying = asyncio.create_task(asyncio.to_thread(say))
    async with asyncio.timeout(30):
        while batches.open_choices:
            told.append(await said(batches))
    await saying
    assert "".join(told) == "".join(f"{at} " for at in range(300))


@pytest.mark.parametrize(("for_end", "item"), [(False, event("a")), (True, event("a", end=True))])
async def test_what_was_said_before_somebody_waits_is_not_waited_for(for_end: bool, item: TokenEvent) -> None:
    items = Items()
    items.put(item)
    async with asyncio.timeout(10):
        await items.wait(3600, for_end=for_end)
    assert items.take() == [item] and not items.take()
