"""A stream whose worker dies goes on elsewhere: every token once, one end per choice, and nothing left running."""

from __future__ import annotations

import asyncio
import json
import pickle
import random
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest
from asgi import TEXT, messages_of, talking_to
from fakes import FakeEngine, LocalWorkers

from buddymoe_ray.serve.deltas import merge, total_usage
from buddymoe_ray.serve.prompts import resumed_choices
from buddymoe_ray.serve.refusals import STOPPED, failure, overloaded, unavailable
from buddymoe_ray.serve.resume import ResumeLimits, WorkerLost, resumable
from buddymoe_ray.serve.work import Batch, Delta, Refusal, Reply, ResumedChoice, Terms, Work
from buddymoe_ray.serve.worker import Worker
from buddymoe_ray.types import SamplingParams

SOON = ResumeLimits(wait_seconds=0.2)
SILENT = 100  # a worker that lives 102 replies long falls silent after 2, and is not seen to die
Life = int | Refusal | None  # replies a worker gives before it is killed; what it refuses with; None: it lives


def work(**changes: Any) -> Work:
    sampled = SamplingParams(seed=7, logprobs=2)
    made = Work(request_id="r", prompts=("hello",), sampling=sampled, max_tokens=6, flush_seconds=0.0)
    return replace(made, **changes)


class Mortals(LocalWorkers):
    """Attempts meet one worker after the other; each ends as its `Life` says, and "hangs" never answers."""

    def __init__(
        self, *lives: Life | str, limits: ResumeLimits = SOON, delay: float = 0.0, beat_seconds: float = 5.0
    ) -> None:
        self.engines = [FakeEngine(delay=delay) for _ in lives]
        super().__init__(*[Worker(engine, beat_seconds=beat_seconds) for engine in self.engines])
        self.lives, self.limits = lives, limits
        self.asked: list[Work] = []
        self.open = self.beats = 0

    def generate(self, asked: Work) -> AsyncGenerator[Reply, None]:
        return resumable(asked, self.attempt, self.limits)

    async def attempt(self, asked: Work) -> AsyncGenerator[Reply, None]:
        turn = min(len(self.asked), len(self.lives) - 1)
        self.asked.append(asked)
        self.open += 1
        try:
            async with aclosing(self._live(self.lives[turn], self.workers[turn], asked)) as replies:
                async for reply in replies:
                    self.beats += reply == Batch(deltas=())
                    yield reply
        finally:
            self.open -= 1

    async def _live(self, life: Life | str, worker: Worker, asked: Work) -> AsyncGenerator[Reply, None]:
        if isinstance(life, Refusal):
            yield life
            return
        if life == "hangs":
            await asyncio.Event().wait()
        given = 0
        async with aclosing(worker.generate(asked)) as replies:
            while given != life:
                if isinstance(life, int) and given == life - SILENT:
                    await asyncio.Event().wait()
                reply = await anext(replies, None)
                if reply is None:
                    return
                yield reply
                given += 1
        raise WorkerLost("the worker was killed by a test")


async def told(workers: LocalWorkers, asked: Work) -> tuple[Delta, ...]:
    replies = [reply async for reply in workers.generate(asked)]
    assert all(isinstance(reply, Batch) for reply in replies), replies
    return merge(delta for reply in replies for delta in reply.deltas)  # type: ignore[union-attr]


async def refused(workers: LocalWorkers, asked: Work) -> Refusal:
    *_, last = [reply async for reply in workers.generate(asked)]
    assert isinstance(last, Refusal), last
    return last


def same(got: tuple[Delta, ...], whole: tuple[Delta, ...]) -> None:
    """Equal but for what the moves took with them."""
    for mine, other in zip(sorted(got, key=_choice), sorted(whole, key=_choice), strict=True):
        assert mine.usage is not None and other.usage is not None
        assert replace(mine, usage=None) == replace(other, usage=None)
        assert mine.usage.completion_tokens == other.usage.completion_tokens == len(mine.token_ids)
        assert mine.usage.hits == 3 * (len(mine.token_ids) - mine.usage.resumed)


def _choice(delta: Delta) -> int:
    return delta.choice


@pytest.mark.parametrize("killed_after", range(7))
async def test_a_stream_goes_on_after_any_token(killed_after: int) -> None:
    whole = await told(LocalWorkers(Worker(FakeEngine())), work())
    workers = Mortals(killed_after, None)
    got = await told(workers, work())
    same(got, whole)
    assert len(workers.asked) == (2 if killed_after < 6 else 1)  # with every choice ended nothing is left to ask
    assert got[0].usage is not None and got[0].usage.resumed == killed_after % 6
    assert workers.open == 0 and all(not engine.running for engine in workers.engines)


@pytest.mark.parametrize("first", range(4))
@pytest.mark.parametrize("second", range(4))
async def test_a_stream_outlives_two_workers(first: int, second: int) -> None:
    whole = await told(LocalWorkers(Worker(FakeEngine())), work())
    same(await told(Mortals(first, second, None), work()), whole)


@pytest.mark.parametrize("seed", range(12))
async def test_choices_of_prompts_keep_their_numbers_seeds_and_names(seed: int) -> None:
    """Prompts of several lengths, three choices each, killed at random: finished choices are not asked again."""
    rng = random.Random(seed)
    asked = work(prompts=("ab", tuple(b"cde")), n=3, max_tokens=8, report_prompts=True)
    plain = LocalWorkers(Worker(FakeEngine()))
    whole = await told(plain, asked)
    workers = Mortals(rng.randrange(30), rng.randrange(12), rng.randrange(12), None)
    replies = [reply async for reply in workers.generate(asked)]
    same(merge(delta for reply in replies for delta in reply.deltas), whole)  # type: ignore[union-attr]
    assert [r.prompt_token_ids for r in replies if r.prompt_token_ids] == [(tuple(b"ab"), tuple(b"cde"))]  # type: ignore[union-attr]
    names = {f"r-{choice}": (choice // 3, 7 + choice % 3) for choice in range(6)}
    for request in (request for engine in workers.engines for request in engine.seen):
        prompt, number = names[request.request_id]
        assert bytes(request.prompt_token_ids) == (b"ab", b"cde")[prompt] and request.sampling.seed == number


async def test_a_finished_choice_is_left_alone() -> None:
    """The second of three prompts ends early by its stop string."""
    plain = LocalWorkers(Worker(FakeEngine()))
    free = await told(plain, work(prompts=("a", "b", "c"), max_tokens=12))
    stop = SamplingParams(seed=7, stop=(sorted(free, key=_choice)[1].text[0],))
    asked = work(prompts=("a", "b", "c"), max_tokens=12, sampling=stop)
    whole = await told(plain, asked)
    assert [len(delta.token_ids) for delta in sorted(whole, key=_choice)].count(1) == 1
    workers = Mortals(4, None)
    got = await told(workers, asked)
    same(got, whole)
    assert 1 not in {resumed.choice for resumed in workers.asked[1].resume}
    total = total_usage(got, n=1)
    assert total.prompt_tokens == 3 and total.completion_tokens == sum(len(delta.token_ids) for delta in whole)


async def test_before_the_first_token_it_is_a_retry() -> None:
    workers = Mortals(0, 0, None)
    [delta] = await told(workers, work(terms=Terms(record=True)))  # nothing was told, so its record has no hole
    assert delta.usage is not None and (delta.usage.resumed, delta.usage.record) == (0, "record of r-0")
    assert workers.asked[2].resume == (ResumedChoice(choice=0),)


async def test_a_whole_answer_is_computed_again() -> None:
    whole = await told(LocalWorkers(Worker(FakeEngine())), work())
    assert await told(Mortals(0, None), work(flush_seconds=None)) == whole


@pytest.mark.parametrize("terms", [Terms(record=True), Terms(replay="record of r-0")])
async def test_a_record_is_not_continued(terms: Terms) -> None:
    workers = Mortals(2, None)
    last = await refused(workers, work(terms=terms))
    kind = "record" if terms.record else "replay"
    assert last.status == 503 and f"after 2 tokens, and a request with buddymoe.{kind} cannot move" in last.message
    assert len(workers.asked) == 1


async def test_moves_are_bounded() -> None:
    workers = Mortals(1, 2, 2, 2, 2, limits=ResumeLimits(moves=3))
    last = await refused(workers, work())
    assert last.status == 503 and "moved 3 times" in last.message and "hint:" in last.message
    assert [sum(len(r.token_ids) for r in asked.resume) for asked in workers.asked] == [0, 1, 2, 3]
    none = Mortals(1, None, limits=ResumeLimits(moves=0))
    assert "moved 0 times" in (await refused(none, work())).message


@pytest.mark.parametrize("life", ["hangs", unavailable("no worker", retry_after_seconds=1)])
async def test_without_another_worker_it_ends_with_an_error(life: Life | str) -> None:
    workers = Mortals(2, life)
    last = await refused(workers, work())
    assert last.status == 503 and "no other took the request in 0.2 s" in last.message
    assert workers.open == 0


async def test_it_waits_for_a_worker_with_room() -> None:
    full, none = overloaded(calls=9, retry_after_seconds=1), unavailable("none yet", retry_after_seconds=1)
    whole = await told(LocalWorkers(Worker(FakeEngine())), work())
    limits = ResumeLimits(moves=1)
    same(await told(Mortals(3, full, none, full, None, limits=limits), work()), whole)
    assert await refused(Mortals(full, None), work()) == full  # who comes new is told at once


@pytest.mark.parametrize("flush_seconds", [0.0, None])
async def test_a_worker_that_falls_silent_is_left(flush_seconds: float | None) -> None:
    """Cut off from its caller, its end is never told; the next one to be tried is silent from the start."""
    limits = ResumeLimits(silence_seconds=0.4, moves=1)
    asked = work(flush_seconds=flush_seconds)
    workers = Mortals(SILENT + 2, "hangs", None, limits=limits, delay=0.02, beat_seconds=0.02)
    same(await told(workers, asked), await told(LocalWorkers(Worker(FakeEngine())), asked))
    assert len(workers.asked) == 3 and workers.open == 0 and not workers.engines[0].running


@pytest.mark.parametrize("flush_seconds", [0.0, 0.05, None])
async def test_a_slow_worker_says_that_it_lives(flush_seconds: float | None) -> None:
    """Its tokens come later than the silence that is allowed; nobody sees the beats in between."""
    workers = Mortals(None, limits=ResumeLimits(silence_seconds=0.4), delay=0.5, beat_seconds=0.05)
    asked = work(flush_seconds=flush_seconds, max_tokens=2, report_prompts=True)
    replies = [reply async for reply in workers.generate(asked)]
    assert all(isinstance(reply, Batch) and reply.deltas for reply in replies) and len(workers.asked) == 1
    assert workers.beats >= 4, "the worker was silent"
    assert [r.prompt_token_ids for r in replies if r.prompt_token_ids] == [(tuple(b"hello"),)]  # type: ignore[union-attr]


async def test_a_call_that_waits_for_its_first_worker_is_not_silent() -> None:
    workers = Mortals("hangs", limits=ResumeLimits(silence_seconds=0.01))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await told(workers, work())
    assert len(workers.asked) == 1 and workers.open == 0


async def test_what_the_next_worker_refuses_or_fails_at_is_told() -> None:
    assert await refused(Mortals(2, failure()), work()) == failure()
    workers = Mortals(2, None)
    *_, last = await told(workers, work(prompts=("\x02",)))  # its engine fails at the fourth token, here too
    assert (last.finish_reason, last.error) == ("error", "an expert could not be read. hint: check the disk")


@pytest.mark.parametrize("life", ["hangs", unavailable("no worker", retry_after_seconds=1)])
async def test_cancelling_during_a_move_ends_the_attempt(life: Life | str) -> None:
    workers = Mortals(2, life, limits=ResumeLimits(wait_seconds=60))
    task = asyncio.create_task(refused(workers, work()))
    while len(workers.asked) < 2:
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert workers.open == 0 and not workers.engines[0].running


async def test_closing_after_a_move_cancels_the_attempt_that_runs() -> None:
    workers = Mortals(2, None, delay=0.001)
    async with aclosing(workers.generate(work(n=2, max_tokens=100))) as replies:
        async for _ in replies:
            if workers.engines[1].running:
                break
        assert workers.open == 1
    assert workers.open == 0 and not workers.engines[1].running and workers.engines[1].cancelled == 2


@pytest.mark.parametrize("stream", [True, False])
async def test_over_http_nothing_shows_but_the_count(stream: bool) -> None:
    body = (
        TEXT | {"seed": 3, "n": 2, "stream": stream} | ({"stream_options": {"include_usage": True}} if stream else {})
    )
    async with talking_to(LocalWorkers(Worker(FakeEngine()))) as client:
        plain = (await client.post("/v1/completions", json=body)).text
    async with talking_to(Mortals(0 if not stream else 3, None)) as client:
        moved = (await client.post("/v1/completions", json=body)).text
    if not stream:
        assert _texts([plain]) == _texts([moved])
        return
    *chunks, usage, done = messages_of(moved)
    assert done == "[DONE]" and _texts(chunks) == _texts(messages_of(plain)[:-2])
    spent = json.loads(usage)["usage"]
    assert spent["completion_tokens"] == 12 and spent["buddymoe"]["resumed"] > 0


def _texts(messages: list[str]) -> dict[int, str]:
    texts: dict[int, str] = {}
    for choice in (choice for message in messages for choice in json.loads(message)["choices"]):
        texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
    return texts


async def test_over_http_a_lost_stream_ends_with_an_error() -> None:
    async with talking_to(Mortals(3, "hangs")) as client:
        *_, last = messages_of((await client.post("/v1/completions", json=TEXT | {"stream": True})).text)
        assert json.loads(last)["error"]["code"] == "unavailable"
    async with talking_to(Mortals(3, "hangs", limits=ResumeLimits()), request_timeout_seconds=0.1) as client:
        *_, last = messages_of((await client.post("/v1/completions", json=TEXT | {"stream": True})).text)
        assert json.loads(last)["error"]["code"] == "timeout"  # the request's own deadline


async def test_a_call_that_comes_again_displaces_the_one_before() -> None:
    """A worker that was out of sight only: the first answer ends, and both never share an engine's name."""
    engine = FakeEngine(delay=0.001)
    worker = Worker(engine)
    first = worker.generate(work(max_tokens=100))
    ids = [token for _ in range(3) for token in (await anext(first)).deltas[0].token_ids]  # type: ignore[union-attr]
    again = work(max_tokens=100, resume=(ResumedChoice(choice=0, token_ids=tuple(ids)),))
    replies = [reply async for reply in worker.generate(again)]
    assert replies[0] == Batch(deltas=())
    [delta] = merge(delta for reply in replies for delta in reply.deltas)  # type: ignore[union-attr]
    assert len(delta.token_ids) == 97 and delta.finish_reason == "length"
    *_, last = [reply async for reply in first]
    assert isinstance(last, Refusal) and "elsewhere" in last.message
    assert not engine.running and engine.cancelled == 1


def test_work_names_its_choices_and_stays_small() -> None:
    asked = work(prompts=("a", "b"), n=2)
    assert asked.choices == 4 and work(prompts=(), messages=()).choices == 1
    assert resumed_choices(asked) == {0: (), 1: (), 2: (), 3: ()}
    moved = replace(asked, resume=(ResumedChoice(choice=2, token_ids=tuple(range(50_000, 51_000))),))
    assert resumed_choices(moved) == {2: tuple(range(50_000, 51_000))}
    assert len(pickle.dumps(moved, protocol=5)) < len(pickle.dumps(asked, protocol=5)) + 6_000
    assert pickle.loads(pickle.dumps(moved)) == moved


@pytest.mark.parametrize("choices", [(4,), (-1,), (1, 1)])
async def test_choices_that_are_not_there_are_refused(choices: tuple[int, ...]) -> None:
    engine = FakeEngine()
    asked = work(prompts=("a", "b"), n=2, resume=tuple(ResumedChoice(choice=choice) for choice in choices))
    [reply] = [reply async for reply in Worker(engine).generate(asked)]
    assert isinstance(reply, Refusal) and reply.status == 400 and "must be different ones below 4" in reply.message
    assert engine.seen == []


@pytest.mark.parametrize("stream", [0.0, None])
async def test_streams_leave_a_worker_whose_engine_died(stream: float | None) -> None:
    """Its process lives and says so; they go on elsewhere with the same tokens, as those of a killed one do."""
    asked = work(n=2, flush_seconds=stream, max_tokens=30)
    whole = await told(LocalWorkers(Worker(FakeEngine())), asked)
    workers = Mortals(None, None, delay=0.002)
    replies: list[Batch] = []
    async for reply in workers.generate(asked):
        assert isinstance(reply, Batch)
        replies.append(reply)
        workers.engines[0].die()
    if stream is None:  # nothing is told before the end: it dies meanwhile
        workers = Mortals(None, None, delay=0.002)
        task = asyncio.create_task(told(workers, asked))
        while workers.engines[0].steps < 4:
            await asyncio.sleep(0.001)
        workers.engines[0].die()
        same(await task, whole)
    else:
        same(merge(delta for reply in replies for delta in reply.deltas), whole)
    assert len(workers.asked) == 2


async def test_who_comes_new_to_a_dead_engine_goes_elsewhere_too() -> None:
    workers = Mortals(None, None, None)
    for engine in workers.engines[:2]:
        engine.die()
    same(await told(workers, work()), await told(LocalWorkers(Worker(FakeEngine())), work()))
    assert len(workers.asked) == 3


async def test_a_worker_with_a_dead_engine_takes_nothing_that_moves() -> None:
    """Until Serve's health check replaces it, every try may meet it again: those are no moves."""
    asked = work(max_tokens=30)
    whole = await told(LocalWorkers(Worker(FakeEngine())), asked)
    workers = Mortals(5, None, None, None, None, None, None, limits=ResumeLimits(moves=1, wait_seconds=20.0))
    for engine in workers.engines[1:-1]:
        engine.die()
    same(await told(workers, asked), whole)
    assert len(workers.asked) == 7 and workers.beats == 1


async def test_only_a_worker_that_answers_alike_goes_on() -> None:
    """While a service is replaced, workers of both run: another model's tokens are no continuation."""
    asked = work(binding="old")
    whole = await told(LocalWorkers(Worker(FakeEngine())), asked)
    workers = Mortals(3, None, None, limits=ResumeLimits(wait_seconds=20.0))
    workers.workers[1]._binding, workers.workers[2]._binding = "new", "old"
    same(await told(workers, asked), whole)
    assert [len(engine.seen) for engine in workers.engines] == [1, 0, 1]
    assert len(await told(LocalWorkers(workers.workers[1]), asked)) == 1, "who begins may begin anywhere"


async def test_where_no_worker_will_come_nothing_is_waited_for() -> None:
    ended = replace(unavailable("no worker runs", retry_after_seconds=2), code=STOPPED)
    workers = Mortals(2, ended, limits=ResumeLimits(wait_seconds=1000.0))
    assert await refused(workers, work()) == ended
