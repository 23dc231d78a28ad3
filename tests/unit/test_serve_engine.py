"""The worker and HTTP app over the real engine and `builtin:tiny` at a quarter of its experts, without ray."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import openai
import pytest
from asgi import openai_client, talking_to
from fakes import LocalWorkers

from buddymoe_ray import LLM
from buddymoe_ray.config import EngineConfig
from buddymoe_ray.engine.async_engine import AsyncEngine
from buddymoe_ray.engine.engine import Engine
from buddymoe_ray.serve.app import open_async_engine
from buddymoe_ray.serve.resume import ResumeLimits, resumable
from buddymoe_ray.serve.work import Batch, ChatMessage, Delta, Refusal, Reply, Terms, Work
from buddymoe_ray.serve.worker import Worker
from buddymoe_ray.types import EngineResult, SamplingParams

PROMPTS = ["def add(a, b):\n    return", "import os\n", "class Stack:\n    def __init__(self", "naïve = 'ü☃"]
CHAT: Any = [{"role": "user", "content": "What does list.append do?"}]


@pytest.fixture(scope="module")
def resident() -> list[EngineResult]:
    """What the fully resident model generates, in process."""
    with LLM("builtin:tiny", memory="100%") as llm:
        return llm.generate(PROMPTS, max_tokens=24)


@pytest.fixture(scope="module")
def engine() -> Iterator[AsyncEngine]:
    opened = open_async_engine(EngineConfig(model="builtin:tiny", memory="25%"), "tiny")
    assert isinstance(opened, AsyncEngine)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def worker(engine: AsyncEngine) -> Worker:
    return Worker(engine)


@asynccontextmanager
async def openai_over(worker: Worker) -> AsyncGenerator[openai.AsyncOpenAI, None]:
    async with talking_to(LocalWorkers(worker), model="tiny") as client:
        yield openai_client(client)


async def test_served_text_is_the_resident_models(worker: Worker, resident: list[EngineResult]) -> None:
    async with openai_over(worker) as client:
        reply = await client.completions.create(model="tiny", prompt=PROMPTS, max_tokens=24, temperature=0)
        streams = [
            await client.completions.create(model="tiny", prompt=prompt, max_tokens=24, temperature=0, stream=True)
            for prompt in PROMPTS
        ]
        streamed = ["".join([chunk.choices[0].text async for chunk in stream]) for stream in streams]
    assert [choice.text for choice in reply.choices] == [result.text for result in resident]
    assert streamed == [result.text for result in resident]
    assert [choice.finish_reason for choice in reply.choices] == [result.finish_reason for result in resident]
    assert reply.usage is not None
    assert reply.usage.completion_tokens == sum(len(result.token_ids) for result in resident)
    spent = (reply.usage.model_extra or {})["buddymoe"]
    assert spent["mode"] == "exact" and spent["fetched"] > 0 and spent["hits"] > 0


async def test_a_conversation_is_answered_and_logprobs_spell_it(worker: Worker) -> None:
    async with openai_over(worker) as client:
        reply = await client.chat.completions.create(
            model="tiny", messages=CHAT, max_tokens=16, temperature=0, logprobs=True, top_logprobs=3
        )
    [choice] = reply.choices
    assert choice.logprobs is not None and choice.logprobs.content is not None
    spelled = b"".join(bytes(entry.bytes or []) for entry in choice.logprobs.content)
    content = choice.message.content or ""
    assert spelled.startswith(content.encode()) or content.encode().startswith(spelled)
    for entry in choice.logprobs.content:
        assert entry.logprob <= 0 and len(entry.top_logprobs) == 3
        assert entry.logprob == pytest.approx(entry.top_logprobs[0].logprob)  # greedy takes the best


async def test_seeds_repeat_and_choices_differ(worker: Worker) -> None:
    async with openai_over(worker) as client:

        async def texts(seed: int, n: int) -> list[str]:
            reply = await client.completions.create(
                model="tiny", prompt="import ", max_tokens=16, seed=seed, n=n, temperature=1
            )
            return [choice.text for choice in reply.choices]

        pair = await texts(7, 2)
        assert pair == await texts(7, 2)
        assert pair[0] != pair[1]
        assert await texts(8, 1) == pair[1:]


async def test_a_stop_string_is_not_part_of_the_text(worker: Worker, resident: list[EngineResult]) -> None:
    whole = resident[0].text
    stop = whole[5:8]
    async with openai_over(worker) as client:
        reply = await client.completions.create(
            model="tiny", prompt=PROMPTS[0], max_tokens=24, temperature=0, stop=[stop]
        )
    assert reply.choices[0].text == whole[: whole.index(stop)]
    assert reply.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    "fields", [{"prompt": [10**6]}, {"prompt": "x " * 5000}, {"prompt": ""}, {"max_tokens": 10**6}]
)
async def test_what_the_engine_cannot_serve_is_400(worker: Worker, fields: dict[str, Any]) -> None:
    async with openai_over(worker) as client:
        with pytest.raises(openai.BadRequestError) as caught:
            await client.completions.create(**{"model": "tiny", "prompt": "x", "max_tokens": 2} | fields)
    assert caught.value.param == "prompt"
    if "max_tokens" in fields or "x " in str(fields["prompt"]):
        assert caught.value.code == "context_length_exceeded"
        assert str(worker.info().max_model_len) in caught.value.message


async def test_a_closed_stream_frees_its_slot_within_one_step(worker: Worker, engine: AsyncEngine) -> None:
    asked = Work(
        request_id="leaver",
        messages=(ChatMessage(role="user", content="x"),),
        sampling=SamplingParams(ignore_eos=True),
        max_tokens=900,
        flush_seconds=0.0,
    )
    async with aclosing(worker.generate(asked)) as replies:
        assert isinstance(await anext(replies), Batch)
        assert engine.snapshot().running == 1
    closed = engine.snapshot()
    while engine.snapshot().running:
        await asyncio.sleep(0)
    # one step may be under way when the stream is closed and one may have begun since; then the queue is read
    assert engine.snapshot().steps <= closed.steps + 2
    after = engine.snapshot()
    assert (after.waiting, after.free_kv_blocks) == (0, after.total_kv_blocks)


async def test_sixteen_streams_at_once(worker: Worker) -> None:
    async with openai_over(worker) as client:

        async def text(at: int) -> str:
            stream = await client.completions.create(
                model="tiny", prompt=f"x{at} = ", max_tokens=12, temperature=0, stream=True
            )
            return "".join([chunk.choices[0].text async for chunk in stream])

        alone = [await text(at) for at in range(16)]
        together = await asyncio.gather(*[text(at) for at in range(16)])
    assert alone == together


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"mode": "bounded"}, "mode"),
        ({"mode": "fast"}, "mode"),
        ({"budget": 0.01}, "budget"),
        ({"mode": "exact", "budget": 0.01}, "budget"),
        ({"replay": "abc"}, "replay"),
    ],
)
async def test_what_a_service_without_stand_ins_cannot_give_is_400(
    worker: Worker, asked: dict[str, Any], param: str
) -> None:
    async with openai_over(worker) as client:
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError) as caught:
                await client.completions.create(
                    model="tiny", prompt="x", max_tokens=2, stream=stream, extra_body={"buddymoe": asked}
                )
            assert caught.value.param == f"buddymoe.{param}"
            assert "must be" in caught.value.message and "hint:" in caught.value.message


@pytest.fixture(scope="module")
def bounded() -> Iterator[Worker]:
    """The same model with stand-ins, as the shipped deployment has it."""
    config = EngineConfig(model="builtin:tiny", memory="25%", mode="bounded", budget=0.003, guard_share=0.0)
    opened = Worker(open_async_engine(config, "tiny"))
    yield opened
    opened.close()


async def spend(client: openai.AsyncOpenAI, prompt: str, **asked: Any) -> tuple[str, int, dict[str, Any]]:
    reply = await client.completions.create(
        model="tiny", prompt=prompt, max_tokens=24, temperature=0, extra_body={"buddymoe": asked}
    )
    assert reply.usage is not None
    return reply.choices[0].text, reply.usage.completion_tokens, (reply.usage.model_extra or {})["buddymoe"]


async def test_charges_are_within_the_requests_own_budget(bounded: Worker) -> None:
    before = bounded.snapshot()
    async with openai_over(bounded) as client:
        answers = [await spend(client, prompt, **asked) for prompt in PROMPTS for asked in ({}, {"budget": 0.05})]
    for (_, tokens, spent), budget in zip(answers, [0.003, 0.05] * len(PROMPTS), strict=True):
        assert (spent["mode"], spent["budget"]) == ("bounded", budget)
        assert 0 <= spent["expected_rise"] <= budget * tokens
        assert spent["hits"] + spent["fetched"] + sum(spent["standins"].values()) == (tokens - 1) * 16
    after = bounded.snapshot()
    assert after.expected_rise - before.expected_rise == pytest.approx(sum(s["expected_rise"] for *_, s in answers))
    assert after.access_fetched - before.access_fetched == sum(s["fetched"] for *_, s in answers)
    assert after.standins.total - before.standins.total == sum(sum(s["standins"].values()) for *_, s in answers) > 0


async def test_exact_requests_of_a_bounded_service_are_the_resident_models(
    bounded: Worker, resident: list[EngineResult]
) -> None:
    async with openai_over(bounded) as client:
        others = [
            f"# {at}\nwhile True:\n    print({at}, " for at in range(4)
        ]  # the same text would be fetched for both
        exact_calls = [spend(client, prompt, mode="exact") for prompt in PROMPTS]
        answers = await asyncio.gather(*exact_calls, *[spend(client, other, mode="fast") for other in others])
    exact, fast = answers[: len(PROMPTS)], answers[len(PROMPTS) :]
    assert [text for text, _, _ in exact] == [result.text for result in resident]
    assert all(sum(spent["standins"].values()) == spent["expected_rise"] == 0 for *_, spent in exact)
    assert all(spent["mode"] == "fast" and spent["budget"] is None for *_, spent in fast)
    assert sum(sum(spent["standins"].values()) for *_, spent in fast) > 0


@pytest.mark.parametrize("mode", ["exact", "bounded", "fast"])
async def test_a_record_replays_to_the_same_text_and_nothing_is_substituted_beside_it(
    bounded: Worker, mode: str
) -> None:
    """The replay names no mode: an access that the record does not name was the expert's own, and must be again."""
    async with openai_over(bounded) as client:
        first = await asyncio.gather(*[spend(client, prompt, mode=mode, record=True) for prompt in PROMPTS])
        again = [
            await spend(client, prompt, replay=spent["record"])
            for prompt, (_, _, spent) in zip(PROMPTS, first, strict=True)
        ]
    assert [spent["standins"] for *_, spent in again] == [spent["standins"] for *_, spent in first]
    assert [text for text, _, _ in again] == [text for text, _, _ in first]


async def test_a_record_of_another_prompt_is_400(bounded: Worker) -> None:
    async with openai_over(bounded) as client:
        _, _, spent = await spend(client, PROMPTS[0], record=True)
        with pytest.raises(openai.BadRequestError, match="another prompt") as caught:
            await spend(client, "another prompt", replay=spent["record"])
    assert caught.value.param == "buddymoe.replay"


async def test_terms_no_engine_knows_do_not_reach_it(bounded: Worker) -> None:
    """The step thread is everyone's: an unchecked word in it would end all requests."""
    for terms in (Terms(mode="quick"), Terms(budget="a lot")):  # type: ignore[arg-type]
        [refused] = [
            r
            async for r in bounded.generate(
                Work(request_id="odd", prompts=("x",), sampling=SamplingParams(), terms=terms)
            )
        ]
        assert isinstance(refused, Refusal) and refused.status == 400
    await bounded.check_health()


async def test_a_dead_step_thread_is_unwell(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine.from_config(EngineConfig(model="builtin:tiny", memory="25%"))

    def fail() -> None:
        raise ZeroDivisionError("a bug in a step")

    monkeypatch.setattr(engine, "step", fail)
    opened = AsyncEngine(engine, model_id="tiny")
    limits = ResumeLimits(wait_seconds=0.2)
    async with talking_to(LocalWorkers(Worker(opened)), model="tiny", limits=limits) as client:
        with pytest.raises(openai.InternalServerError) as caught:
            await openai_client(client).completions.create(model="tiny", prompt="x")
        health = await client.get("/health")
    opened.close()
    assert caught.value.status_code == 503
    assert health.status_code == 503 and "engine is stopped" in health.json()["problems"][0]


@pytest.mark.parametrize("prompt", [PROMPTS[0], PROMPTS[3]], ids=["ascii", "half characters"])
async def test_offsets_index_the_text_streamed_or_not(worker: Worker, prompt: str) -> None:
    asked: Any = {"model": "tiny", "prompt": prompt, "max_tokens": 16, "logprobs": 2, "n": 2, "seed": 3, "stop": "'"}
    async with openai_over(worker) as client:
        whole = await client.completions.create(**asked)
        chunks = [chunk async for chunk in await client.completions.create(**asked, stream=True)]
    for choice in whole.choices:
        parts = [part for chunk in chunks for part in chunk.choices if part.index == choice.index]
        text, logprobs = choice.text, choice.logprobs
        assert logprobs is not None and "".join(part.text for part in parts) == text
        streamed = [offset for part in parts for offset in (part.logprobs and part.logprobs.text_offset) or []]
        assert streamed == logprobs.text_offset
        assert [token for part in parts for token in (part.logprobs and part.logprobs.tokens) or []] == logprobs.tokens
        assert logprobs.tokens and logprobs.token_logprobs and logprobs.top_logprobs
        for at, token in enumerate(logprobs.tokens):
            offset, value = streamed[at], logprobs.token_logprobs[at]
            assert 0 <= offset <= len(text)
            assert "\ufffd" in token or text[offset:].startswith(token[: len(text) - offset])
            assert logprobs.top_logprobs[at][token] == value
            assert len(logprobs.top_logprobs[at]) >= 2


async def test_streams_of_a_dead_step_thread_go_on_at_another_worker() -> None:
    """The real engine's thread dies in the middle of an answer; another worker ends it with the same tokens."""
    config = EngineConfig(model="builtin:tiny", memory="25%", max_model_len=64)
    engines = [Engine.from_config(config) for _ in range(2)]
    workers = [Worker(AsyncEngine(engine, model_id="tiny")) for engine in engines]
    sampling = SamplingParams(seed=3, ignore_eos=True)
    asked = Work(request_id="r", prompts=("import os",), sampling=sampling, max_tokens=12, flush_seconds=0.0)
    whole = [d for r in [r async for r in workers[1].generate(asked)] for d in r.deltas]
    attempts = itertools.count()

    def attempt(work: Work) -> AsyncGenerator[Reply, None]:
        return workers[next(attempts)].generate(work)

    told: list[Delta] = []
    async for reply in resumable(asked, attempt, ResumeLimits(wait_seconds=30)):
        assert isinstance(reply, Batch), reply
        told += reply.deltas
        if len(told) == 2:
            engines[0]._scheduler.schedule = None  # type: ignore[method-assign, assignment]
    for worker in workers:
        worker.close()
    assert "".join(d.text for d in told) == "".join(d.text for d in whole)
    assert [t for d in told for t in d.token_ids] == [t for d in whole for t in d.token_ids]
    assert next(attempts) == 2
