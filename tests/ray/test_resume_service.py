"""Streams of a running service while one of its workers is killed (SIGKILL): nothing is lost, nothing comes twice.

How long the streams stood still is recorded as a property of each test and printed; it is not asserted.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import httpx
import openai
import pytest
from fakes import fake_token, open_fake_engine
from ray import serve
from serving import Deploy, eventually, running

from buddymoe_ray.client import Client
from buddymoe_ray.errors import CapacityError
from buddymoe_ray.serve.handles import WORKER_NAME, ReplicaWorkers
from buddymoe_ray.serve.resume import ResumeLimits, resumable
from buddymoe_ray.serve.work import Batch, Work, WorkerReport
from buddymoe_ray.types import GenerationRequest, SamplingParams

STREAMS, TOKENS = 16, 120
Recorded = Callable[[str, object], None]


def workers_of(app: str) -> list[WorkerReport]:
    handle: Any = serve.get_deployment_handle(WORKER_NAME, app)
    answers = handle.broadcast("report").results(timeout_s=10, return_exceptions=True)
    return [answer for answer in answers if isinstance(answer, WorkerReport)]  # one that was just killed is an error


def openai_client(url: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(api_key="none", base_url=f"{url}/v1", max_retries=0)


class Watched:
    """One stream: its text, when each piece of it came, and what it cost."""

    def __init__(self) -> None:
        self.text = ""
        self.times: list[float] = []
        self.resumed = 0
        self.ended = False

    def add(self, text: str) -> None:
        self.text += text
        self.times.append(time.monotonic())

    def end(self, resumed: int) -> None:
        self.resumed, self.ended = resumed, True

    @property
    def longest_wait(self) -> float:
        return max(after - before for before, after in zip(self.times, self.times[1:], strict=False))


@dataclass(frozen=True)
class Busiest:
    """The worker with the most streams. `lost` is how many of the watched ones its end can touch, at most: those that
    have not come to their end here and run nowhere else (a stream may have ended there and still be on its way)."""

    pid: int
    running: int
    lost: int


def the_busiest(app: str, streams: Sequence[Watched] = ()) -> Busiest:
    under_way = sum(not watched.ended for watched in streams)  # before the workers are asked: never too few
    *others, busiest = sorted(workers_of(app), key=lambda report: report.snapshot.running)
    assert busiest.snapshot.running > 0 and busiest.pid != os.getpid()
    elsewhere = sum(report.snapshot.running for report in others)
    return Busiest(pid=busiest.pid, running=busiest.snapshot.running, lost=under_way - elsewhere)


def kill_the_busiest(app: str, streams: Sequence[Watched] = ()) -> Busiest:
    """End its process, without a word."""
    busiest = the_busiest(app, streams)
    os.kill(busiest.pid, signal.SIGKILL)
    return busiest


async def over_http(client: openai.AsyncOpenAI, watched: Watched, **asked: Any) -> None:
    options: Any = {"stream": True, "stream_options": {"include_usage": True}}
    async for chunk in await client.completions.create(**asked, **options):
        if chunk.usage is None:
            watched.add(chunk.choices[0].text)
        else:
            watched.end(chunk.usage.model_extra["buddymoe"]["resumed"])  # type: ignore[index]
            assert chunk.usage.completion_tokens == asked["max_tokens"]


async def by_handle(client: Client, watched: Watched, prompt: str, **asked: Any) -> None:
    async for event in client.astream(prompt, **asked):
        watched.add(event.text)
        if event.usage is not None:
            watched.end(event.usage.resumed)
    assert event.usage is not None and event.usage.completion_tokens == asked["max_tokens"]


async def by_workers(workers: ReplicaWorkers, limits: ResumeLimits, watched: Watched, prompt: str, seed: int) -> None:
    sampling = SamplingParams(seed=seed)
    asked = Work(request_id=uuid4().hex, prompts=(prompt,), sampling=sampling, max_tokens=TOKENS, flush_seconds=0.0)
    async for reply in resumable(asked, workers.generate, limits):
        assert isinstance(reply, Batch), reply
        for delta in reply.deltas:
            watched.add(delta.text)
            if delta.usage is not None:
                watched.end(delta.usage.resumed)


def in_a_thread(client: Client, watched: Watched, prompt: str, **asked: Any) -> None:
    for event in client.stream(prompt, **asked):
        watched.add(event.text)
        if event.usage is not None:
            watched.end(event.usage.resumed)
    assert event.usage is not None and event.usage.completion_tokens == asked["max_tokens"]


def expected(prompt: str, seed: int, tokens: int = TOKENS) -> str:
    """The fake engine's text."""
    asked = GenerationRequest(
        request_id="", prompt_token_ids=tuple(prompt.encode()), sampling=SamplingParams(seed=seed)
    )
    return bytes(fake_token(asked, position) for position in range(tokens)).decode()


async def begun(streams: list[Watched], pieces: int) -> None:
    while any(len(watched.times) < pieces for watched in streams):
        await asyncio.sleep(0.01)


def report(record_property: Recorded, streams: list[Watched], lost: int) -> None:
    moved = [watched for watched in streams if watched.resumed]
    assert 0 < len(moved) <= lost, "streams of the killed worker moved, and no others"
    seconds = sorted(watched.longest_wait for watched in moved)
    record_property("moved_streams", len(moved))
    record_property("longest_wait_seconds", round(seconds[-1], 3))
    print(f"{len(moved)} of {len(streams)} streams moved, waits {seconds[0]:.3f} to {seconds[-1]:.3f} s")


@pytest.fixture(scope="module")
def mortals(deploy: Deploy) -> str:
    """Two workers over the fake engine; every test kills one and Serve brings it back."""
    return deploy("mortals", open_engine=open_fake_engine, model_name="fake", num_cpus=0, workers=2, flush_ms=0)


async def test_sixteen_streams_outlive_a_killed_worker(mortals: str, record_property: Recorded) -> None:
    """Over HTTP, by the asynchronous handle and by the synchronous one, all side by side."""
    client = await asyncio.to_thread(Client, "mortals")
    streams = [Watched() for _ in range(STREAMS)]
    async with openai_client(mortals) as http, asyncio.TaskGroup() as group:
        for seed, watched in enumerate(streams):
            asked: dict[str, Any] = {"prompt": f"stream {seed}", "max_tokens": TOKENS, "seed": seed, "temperature": 1.0}
            if seed % 4 == 0:
                group.create_task(by_handle(client, watched, **asked))
            elif seed % 4 == 1:
                group.create_task(asyncio.to_thread(in_a_thread, client, watched, **asked))
            else:
                group.create_task(over_http(http, watched, model="fake", **asked))
        await begun(streams, 5)
        killed = await asyncio.to_thread(kill_the_busiest, "mortals", streams)
    assert [watched.text for watched in streams] == [expected(f"stream {seed}", seed) for seed in range(STREAMS)]
    report(record_property, streams, killed.lost)


async def test_streams_leave_a_worker_that_stands_still(mortals: str, record_property: Recorded) -> None:
    """Its process is stopped, not killed: nobody says that it is gone. When it goes on its streams have left."""
    limits = ResumeLimits(silence_seconds=5.0)
    workers = ReplicaWorkers(serve.get_deployment_handle(WORKER_NAME, "mortals"))
    client = await asyncio.to_thread(Client, "mortals")
    streams = [Watched() for _ in range(8)]
    stopped: list[int] = []
    try:
        async with asyncio.TaskGroup() as group:
            for seed, watched in enumerate(streams):
                group.create_task(by_workers(workers, limits, watched, f"stream {seed}", seed))
            await begun(streams, 5)
            busiest = await asyncio.to_thread(the_busiest, "mortals", streams)
            os.kill(busiest.pid, signal.SIGSTOP)
            stopped.append(busiest.pid)
    finally:
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
    await asyncio.to_thread(eventually, lambda: running(client) == 0)
    assert [watched.text for watched in streams] == [expected(f"stream {seed}", seed) for seed in range(8)]
    report(record_property, streams, busiest.lost)


async def test_choices_and_whole_answers_outlive_a_killed_worker(mortals: str) -> None:
    """Choices that stream, and an answer that is sent as one: the first go on, the second is computed again."""
    body = {"model": "fake", "prompt": ["one", "two"], "max_tokens": TOKENS, "seed": 1, "n": 2}
    texts = [""] * 4
    async with openai_client(mortals) as http:
        whole = asyncio.create_task(http.completions.create(**body))  # type: ignore[call-overload]
        killed = 0
        async for chunk in await http.completions.create(**body, stream=True):  # type: ignore[call-overload]
            texts[chunk.choices[0].index] += chunk.choices[0].text
            if not killed and min(map(len, texts)) > 3:
                killed = (await asyncio.to_thread(kill_the_busiest, "mortals")).running
        reply = await whole
    wanted = [expected(prompt, seed) for prompt in ("one", "two") for seed in (1, 2)]
    assert texts == [choice.text for choice in reply.choices] == wanted and killed >= 4


def test_leaving_a_moved_stream_frees_its_slot(mortals: str) -> None:
    client = Client("mortals")
    body = {"model": "fake", "prompt": "hello", "max_tokens": 4000, "stream": True}
    with httpx.stream("POST", f"{mortals}/v1/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        kill_the_busiest("mortals")
        eventually(lambda: running(client) == 1)
        next(lines)
    eventually(lambda: running(client) == 0, seconds=20)  # the request alone would run for 80 s


async def test_streams_leave_an_engine_that_died_and_it_is_replaced(mortals: str) -> None:
    """Only its step thread is gone. It ends itself: idle as it is, routers would prefer it to one that works."""
    client = await asyncio.to_thread(Client, "mortals")
    await asyncio.to_thread(eventually, lambda: len(client.snapshots()) == 2)
    before = {report.pid for report in await asyncio.to_thread(workers_of, "mortals")}
    watched = [Watched() for _ in range(5)]
    async with asyncio.TaskGroup() as group:
        for seed, other in enumerate(watched[1:]):
            group.create_task(by_handle(client, other, f"stream {seed}", max_tokens=TOKENS, seed=seed))
        await begun(watched[1:], 2)
        group.create_task(by_handle(client, watched[0], "\x03", max_tokens=60, seed=1))  # its fourth token is fatal
    assert watched[0].text == expected("\x03", 1, 60)
    assert [other.text for other in watched[1:]] == [expected(f"stream {seed}", seed) for seed in range(4)]
    assert 0 < watched[0].resumed <= 3  # what was under way at its death is lost
    print(f"waited {watched[0].longest_wait:.3f} s for another worker")

    def replaced() -> bool:
        return len(before & (now := {report.pid for report in workers_of("mortals")})) == 1 and len(now) == 2

    await asyncio.to_thread(eventually, replaced)
    await asyncio.to_thread(eventually, lambda: httpx.get(f"{mortals}/health").status_code == 200)
    assert (await client.agenerate("hello", max_tokens=8)).usage.completion_tokens == 8


def test_with_one_worker_a_stream_waits_for_its_replacement(deploy: Deploy, record_property: Recorded) -> None:
    deploy("alone", open_engine=open_fake_engine, model_name="fake", num_cpus=0)
    client, watched = Client("alone"), Watched()
    recorded = client.stream("hello", max_tokens=4000, record=True)
    next(recorded)
    events = client.stream("hello", seed=1, max_tokens=40)
    watched.add(next(events).text)
    assert kill_the_busiest("alone").running == 2
    with pytest.raises(CapacityError, match=r"worker was lost after \d+ tokens, and a request with buddymoe.record"):
        list(recorded)
    for event in events:
        watched.add(event.text)
    assert watched.text == expected("hello", 1, 40)
    assert event.usage is not None and 0 < event.usage.resumed < 40
    record_property("longest_wait_seconds", round(watched.longest_wait, 3))
    print(f"waited {watched.longest_wait:.3f} s for a new worker")
    eventually(lambda: running(client) == 0)


async def test_real_streams_outlive_a_killed_worker(tiny: str, record_property: Recorded) -> None:
    """`builtin:tiny` at a quarter of its experts: greedy and sampled, with and without stop strings, to the token."""
    prompts = ["def add(a, b):\n    return", "import os\n", "class Stack:\n    def __init__(self", "naïve = 'ü☃"]
    bodies: list[dict[str, Any]] = [
        {"prompt": prompt, "max_tokens": 96, "extra_body": {"ignore_eos": True}, "stop": ["\n\n\n\n# never"]}
        | ({"temperature": 0} if at % 2 else {"temperature": 1, "seed": at, "frequency_penalty": 0.5})
        for at, prompt in enumerate(prompts)
    ]
    streams = [Watched() for _ in bodies]
    async with openai_client(tiny) as http:
        asked = [http.completions.create(model="builtin:tiny", **body) for body in bodies]
        whole = [reply.choices[0].text for reply in await asyncio.gather(*asked)]
        async with asyncio.TaskGroup() as group:
            for watched, body in zip(streams, bodies, strict=True):
                group.create_task(over_http(http, watched, model="builtin:tiny", **body))
            await begun(streams, 3)
            killed = await asyncio.to_thread(kill_the_busiest, "tiny", streams)
    assert [watched.text for watched in streams] == whole
    report(record_property, streams, killed.lost)


async def test_a_service_is_replaced_and_stops_without_losing_a_stream(deploy: Deploy) -> None:
    """A stream that its old worker has no time for goes on at a new one; one that runs when the service stops ends."""
    options: dict[str, Any] = {"open_engine": open_fake_engine, "model_name": "fake", "num_cpus": 0, "flush_ms": 0}
    url = await asyncio.to_thread(deploy, "replaced", drain_seconds=1, **options)
    [old] = await asyncio.to_thread(workers_of, "replaced")
    watched, drained = Watched(), Watched()
    async with openai_client(url) as http:
        long = {"model": "fake", "prompt": "long", "max_tokens": 250, "seed": 3}
        stream = asyncio.create_task(over_http(http, watched, **long))
        await begun([watched], 3)
        await asyncio.to_thread(deploy, "replaced", drain_seconds=20, **options)
        await stream
        [new] = await asyncio.to_thread(workers_of, "replaced")
        assert old.replica != new.replica and watched.text == expected("long", 3, 250)
        short = asyncio.create_task(over_http(http, drained, model="fake", prompt="short", max_tokens=TOKENS, seed=4))
        await begun([drained], 3)
        handle: Any = serve.get_app_handle("replaced")
        left = asyncio.create_task(asyncio.to_thread(handle.drain.remote(20).result))
        while httpx.get(f"{url}/health").status_code == 200:
            await asyncio.sleep(0.05)
        refused = httpx.post(f"{url}/v1/completions", json={"model": "fake", "prompt": "late"})
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "2")
        await short
        assert await left == 0 and drained.text == expected("short", 4)
    assert watched.resumed > 0, "it was at two workers"
