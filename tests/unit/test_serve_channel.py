"""The connection beside Serve on which an ingress asks a worker of its node, over a real socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from fakes import FakeEngine

from buddymoe_ray.serve.channel import Channel, offer
from buddymoe_ray.serve.resume import ResumeLimits, WorkerLost, resumable
from buddymoe_ray.serve.work import Refusal, Reply, Terms, Thinking, ToolUse, Work
from buddymoe_ray.serve.worker import Worker
from buddymoe_ray.types import SamplingParams, StructuredOutput

TEXT = Work(request_id="r", prompts=("hello",), sampling=SamplingParams(seed=5), max_tokens=8, flush_seconds=0.0)
LONG = replace(TEXT, max_tokens=100)


@asynccontextmanager
async def reached(worker: Worker) -> AsyncGenerator[Channel, None]:
    async with asyncio.timeout(20):
        channel = await Channel.open(await offer(worker.generate))
        try:
            yield channel
        finally:
            await channel.close()


async def all_of(replies: AsyncGenerator[Reply, None]) -> list[Reply]:
    async with aclosing(replies):
        return [reply async for reply in replies if isinstance(reply, Refusal) or reply.deltas or reply.spelled]


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"n": 3, "report_prompts": True, "flush_seconds": None, "prompts": ("hello", (1 << 8) * (104,))},
        {"sampling": SamplingParams(logprobs=2, stop=("z",), logit_bias={104: 1}), "given": frozenset({"stop"})},
        {"echo": True, "sampling": SamplingParams(prompt_logprobs=1)},
        {"spells_only": True, "prompts": ("\N{SNOWMAN}hello",)},
        {"terms": Terms(mode="fast", record=True), "timeout": 7, "weight": 2},
        {"max_tokens": 1 << 40},
        {"prompts": ("\x01",)},
        {"prompts": ("\x02",)},
    ],
)
async def test_replies_are_those_of_the_worker(change: dict[str, object]) -> None:
    work = replace(TEXT, **change)
    async with reached(Worker(FakeEngine())) as channel:
        found, same = [await all_of(ask(work)) for ask in (channel.generate, Worker(FakeEngine()).generate)]
    assert found == same and found


async def test_work_arrives_as_it_was_sent() -> None:
    seen: list[Work] = []

    async def answer(work: Work) -> AsyncGenerator[Reply, None]:
        seen.append(work)
        yield Refusal(status=400, message="\udc80 seen", retry_after_seconds=3)

    tool = {"type": "function", "function": {"name": "f", "parameters": {"enum": [None, 1.5, {"a": [True]}]}}}
    schema = StructuredOutput(kind="json", source='{"type": "object"}')
    sent = [
        TEXT,
        replace(TEXT, prompts=("\udc80",), sampling=SamplingParams(structured_outputs=schema), cache_salt="\udc80"),
        replace(TEXT, tools=ToolUse(tools=(tool,), only="f"), thinking=Thinking(enabled=True, budget=4)),
    ]
    channel = await Channel.open(await offer(answer))
    told = [await all_of(channel.generate(work)) for work in sent]
    await channel.close()
    assert seen == sent and told == 3 * [[Refusal(status=400, message="\udc80 seen", retry_after_seconds=3)]]


async def test_a_socket_is_at_a_path_of_any_tmpdir_for_this_user_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/tmp/" + 100 * "x")
    path = Path(await offer(Worker(FakeEngine()).generate))
    assert path.parent.stat().st_mode & 0o777 == 0o700
    channel = await Channel.open(str(path))
    assert await all_of(channel.generate(TEXT)) and not path.parent.exists()
    await channel.close()


async def test_who_leaves_frees_its_sequences_and_no_others() -> None:
    engine = FakeEngine(delay=0.01)
    async with reached(Worker(engine)) as channel:
        left, stays = channel.generate(replace(LONG, n=3)), channel.generate(replace(TEXT, request_id="s"))
        await anext(left)
        staying = asyncio.create_task(all_of(stays))
        await left.aclose()
        while len(engine.running) > 1:
            await asyncio.sleep(0.01)
        assert engine.cancelled == 3 and [delta.finish_reason for delta in (await staying)[-1].deltas] == ["length"]  # type: ignore[union-attr]


async def test_a_connection_that_ends_frees_the_worker_and_moves_its_streams() -> None:
    first, second = FakeEngine(delay=0.01), Worker(FakeEngine())
    worker, expected = Worker(first), await all_of(second.generate(TEXT))
    async with reached(worker) as channel:
        moving = resumable(TEXT, lambda work: (second if work.resume else channel).generate(work), ResumeLimits())
        begun = await anext(moving)
        await channel.close()
        assert not channel.is_open
        rest = await all_of(moving)
        await worker.settle()
        with pytest.raises(WorkerLost, match="connection ended"):
            await anext(channel.generate(TEXT))
    assert first.cancelled == 1
    texts = ["".join(delta.text for reply in some for delta in reply.deltas) for some in ([begun, *rest], expected)]  # type: ignore[union-attr]
    assert texts[0] == texts[1]


async def test_what_no_frame_holds_is_said_at_once() -> None:
    deep: list[object] = []
    for _ in range(1100):
        deep = [deep]
    async with reached(Worker(FakeEngine())) as channel:
        with pytest.raises(TypeError):
            channel.generate(replace(TEXT, prompts=((1 << 64,),)))
        with pytest.raises(ValueError, match="recursion limit"):
            channel.generate(replace(TEXT, template_options={"deep": deep}))
        assert await all_of(channel.generate(TEXT))


async def test_what_cannot_be_read_ends_its_call_alone() -> None:
    deep: list[object] = []
    statuses = list[int]()
    async with reached(Worker(FakeEngine(delay=0.01))) as channel:
        other = asyncio.create_task(all_of(channel.generate(LONG)))
        for level in range(1, 1030):
            deep = [deep]
            if level > 1015:  # of some levels msgpack writes one more than it reads
                with suppress(ValueError):
                    [first, *_] = await all_of(channel.generate(replace(TEXT, template_options={"deep": deep})))
                    statuses += [first.status] if isinstance(first, Refusal) else []
        assert [delta.finish_reason for delta in (await other)[-1].deltas] == ["length"]  # type: ignore[union-attr]
    assert statuses == [500]


async def test_what_is_said_at_once_is_written_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls that flush together wake the other end once."""
    said, written = asyncio.Event(), list[bytes]()
    write = asyncio.StreamWriter.write
    monkeypatch.setattr(asyncio.StreamWriter, "write", lambda self, data: (written.append(data), write(self, data)))

    async def answer(work: Work) -> AsyncGenerator[Reply, None]:
        await said.wait()
        yield Refusal(status=400, message=work.request_id)

    channel = await Channel.open(await offer(answer))
    asking = [asyncio.create_task(all_of(channel.generate(replace(TEXT, request_id=name)))) for name in "abcd"]
    await asyncio.sleep(0.1)
    assert len(written) == 1, "the questions"
    said.set()
    assert [reply.message for [reply] in await asyncio.gather(*asking) if isinstance(reply, Refusal)] == [*"abcd"]
    assert [data.count(b"message") for data in written[1:]] in ([4], [4, 0])
    await channel.close()


async def test_an_offer_that_nobody_takes_is_withdrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("buddymoe_ray.serve.channel.OFFERED_SECONDS", 0.05)
    path = Path(await offer(Worker(FakeEngine()).generate))
    assert path.exists()
    while path.parent.exists():
        await asyncio.sleep(0.01)
    with pytest.raises(OSError):
        await Channel.open(str(path))
