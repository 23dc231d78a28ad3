"""The engine under asyncio: streams side by side, cancellation, refusals, a step thread that dies, closing."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from families import build_checkpoint

from buddymoe_ray import EngineConfig, SamplingParams
from buddymoe_ray.engine.async_engine import QUICK_TOKENS, AsyncEngine
from buddymoe_ray.engine.engine import Engine
from buddymoe_ray.errors import CapacityError, RequestError
from buddymoe_ray.types import GenerationRequest, TokenEvent


def request(name: str, *ids: int, max_tokens: int = 8) -> GenerationRequest:
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    return GenerationRequest(request_id=name, prompt_token_ids=ids or (5, 6, 7), sampling=sampling)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("qwen3_moe")
    build_checkpoint("qwen3_moe", made)
    return made


@pytest.fixture
def running(folder: Path):
    made = AsyncEngine(Engine.from_config(EngineConfig(model=str(folder), memory="50%", max_running=4)))
    yield made
    made.close()


async def tokens_of(engine: AsyncEngine, made: GenerationRequest) -> list[int]:
    events: list[TokenEvent] = []
    await engine.run(made, events.append)
    return [token for event in events for token in event.token_ids]


async def begun(engine: AsyncEngine, made: GenerationRequest) -> asyncio.Task[None]:
    """A request that has told its first event."""
    loop, first = asyncio.get_running_loop(), asyncio.Event()
    task = asyncio.create_task(engine.run(made, lambda event: loop.call_soon_threadsafe(first.set) and None))
    await first.wait()
    return task


async def test_streams_side_by_side_equal_streams_alone(running: AsyncEngine) -> None:
    prompts = [(5 + i, 6, 7 + i) for i in range(6)]
    alone = [await tokens_of(running, request(f"alone{i}", *p)) for i, p in enumerate(prompts)]
    beside = await asyncio.gather(*(tokens_of(running, request(f"beside{i}", *p)) for i, p in enumerate(prompts)))
    assert beside == alone


async def test_a_short_request_wakes_no_thread_and_one_that_takes_long_does(
    running: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread's turn beside the step's costs more than most requests take to prepare; a grammar may take seconds."""
    threads = 0

    async def counted(call: Callable[[], object]) -> object:
        nonlocal threads
        threads += 1
        return call()

    monkeypatch.setattr(asyncio, "to_thread", counted)
    assert len(await tokens_of(running, request("short"))) == 8 and threads == 0
    long = replace(request("long"), replay="no record")
    with pytest.raises(RequestError, match="replay"):
        await tokens_of(running, long)
    with pytest.raises(RequestError):
        await tokens_of(running, request("longer", *[5] * QUICK_TOKENS))
    assert threads == 2


async def test_leaving_a_stream_frees_its_slot_within_a_step(running: AsyncEngine) -> None:
    stream = await begun(running, request("long", max_tokens=200))
    assert running.snapshot().running == 1
    at = running.snapshot().steps
    stream.cancel()
    while running.snapshot().running:
        await asyncio.sleep(0.001)
    assert running.snapshot().steps <= at + 3  # the step in flight, and those run before the command was seen
    assert running.snapshot().free_kv_blocks == running.snapshot().total_kv_blocks


async def test_a_refused_request_raises_and_others_go_on(running: AsyncEngine) -> None:
    with pytest.raises(RequestError, match="token id 999"):
        await tokens_of(running, request("bad", 999))
    assert len(await tokens_of(running, request("good"))) == 8


async def test_a_dead_step_thread_fails_every_client_and_the_health_check(folder: Path) -> None:
    engine = Engine.from_config(EngineConfig(model=str(folder), memory="50%"))
    made = AsyncEngine(engine)
    await made.check_health()
    stream = await begun(made, request("victim", max_tokens=200))

    def broken(*_: object) -> None:
        raise RuntimeError("the device fell off the bus")

    engine._runner.decode = broken  # type: ignore[method-assign]
    with pytest.raises(CapacityError, match="fell off the bus"):
        await stream
    with pytest.raises(CapacityError, match="restart"):
        await made.check_health()
    with pytest.raises(CapacityError):
        await tokens_of(made, request("late"))
    made.close()


async def test_closing_fails_what_is_unfinished(folder: Path) -> None:
    made = AsyncEngine(Engine.from_config(EngineConfig(model=str(folder), memory="50%")))
    stream = await begun(made, request("unfinished", max_tokens=200))
    await asyncio.to_thread(made.close)
    with pytest.raises(CapacityError, match="closed"):
        await stream
    made.close()
    with pytest.raises(CapacityError, match="closed"):
        await tokens_of(made, request("late"))


async def test_one_bad_request_never_ends_the_step_thread(
    running: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever type a caller's field has: the others go on with the same tokens, and the thread lives."""
    alone = await tokens_of(running, request("alone", max_tokens=40))
    beside = asyncio.create_task(tokens_of(running, request("beside", max_tokens=40)))
    wrong = [{"max_tokens": 2.0}, {"seed": "a", "temperature": 1.0}, {"top_k": 2.5}, {"stop": 3}, {"logprobs": True}]
    for at, changes in enumerate(wrong):
        made = replace(request(f"bad{at}"), sampling=replace(SamplingParams(), **changes))
        with pytest.raises(RequestError) as caught:
            await tokens_of(running, made)
        assert caught.value.param in changes
    assert await beside == alone
    await running.check_health()


async def test_a_cancelled_task_leaves_nothing(running: AsyncEngine) -> None:
    for at in range(8):
        task = asyncio.create_task(tokens_of(running, request(f"task{at}", max_tokens=200)))
        await asyncio.sleep(0.002 * at)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    while running.snapshot().running + running.snapshot().waiting:
        await asyncio.sleep(0.001)
    assert running.snapshot().free_kv_blocks == running.snapshot().total_kv_blocks
    assert len(await tokens_of(running, request("after"))) == 8


async def test_leaving_under_a_name_that_is_taken_ends_nobody_else(running: AsyncEngine) -> None:
    first = await begun(running, request("name", max_tokens=200))
    second = asyncio.create_task(tokens_of(running, request("name")))
    await asyncio.sleep(0)  # it has asked to be added
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    async with asyncio.timeout(60):
        await first


async def test_a_record_is_read_off_the_step_thread(running: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def read(made: GenerationRequest, setup: object) -> dict[int, object]:
        seen.append(threading.current_thread().name)
        return {}

    monkeypatch.setattr("buddymoe_ray.engine.engine.open_replay", read)
    await tokens_of(running, replace(request("r"), replay="a record"))
    assert seen and not {"engine-step", threading.main_thread().name} & set(seen)
