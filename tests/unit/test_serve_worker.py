"""One worker over a fake engine: choices, batching, refusals, cancellation, and the bytes of tokens."""

from __future__ import annotations

import asyncio
import json
import os
import re
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fakes import FakeEngine, FakeLimits, LocalWorkers, byte_tokenizer, fake_token

from buddymoe_ray.client import Client
from buddymoe_ray.errors import CapacityError, RequestError
from buddymoe_ray.models.token_bytes import TokenBytes
from buddymoe_ray.serve.deltas import described, merge, total_usage
from buddymoe_ray.serve.prompts import output_limit
from buddymoe_ray.serve.wire import parse_chat
from buddymoe_ray.serve.work import Batch, ChatMessage, Delta, Refusal, Reply, Terms, TokenText, Work, WorkerReport
from buddymoe_ray.serve.worker import Worker
from buddymoe_ray.types import GenerationRequest, SamplingParams, StandinAccesses, TokenLogprob, Usage

GREEDY = SamplingParams(temperature=0.0)


def work(prompt: str = "hello", **changes: object) -> Work:
    return replace(Work(request_id="r", prompts=(prompt,), sampling=GREEDY, max_tokens=5), **changes)


async def replies_to(worker: Worker, asked: Work) -> list[Reply]:
    return [reply async for reply in worker.generate(asked)]


async def whole(worker: Worker, asked: Work) -> tuple[Delta, ...]:
    replies = await replies_to(worker, asked)
    assert all(isinstance(reply, Batch) for reply in replies), replies
    return merge(delta for reply in replies for delta in reply.deltas)  # type: ignore[union-attr]


async def refusal(worker: Worker, asked: Work) -> Refusal:
    [reply] = await replies_to(worker, asked)
    assert isinstance(reply, Refusal), reply
    return reply


async def test_one_choice_ends_with_usage() -> None:
    [delta] = await whole(Worker(FakeEngine()), work())
    assert len(delta.text) == len(delta.token_ids) == 5
    assert (delta.finish_reason, delta.logprobs) == ("length", ())
    assert delta.usage == Usage(prompt_tokens=5, completion_tokens=5, hits=15, fetched=5)


async def test_batched_and_whole_answers_are_the_same() -> None:
    worker = Worker(FakeEngine(delay=0.001))
    asked = work(max_tokens=40, n=3, sampling=SamplingParams(seed=1))
    expected = await whole(worker, asked)
    for flush_seconds in (0.0, 0.005, 10.0):
        assert await whole(worker, replace(asked, flush_seconds=flush_seconds)) == expected


async def test_without_flushing_everything_is_one_batch_and_with_it_the_first_tokens_come_first() -> None:
    worker = Worker(FakeEngine())
    assert len(await replies_to(worker, work(max_tokens=30))) == 1
    first, *_ = replies = await replies_to(worker, work(max_tokens=30, flush_seconds=5.0))
    assert isinstance(first, Batch) and len(replies) == 2
    assert sum(len(delta.token_ids) for delta in first.deltas) == 1


async def test_choices_of_prompts_are_numbered_and_seeded() -> None:
    engine = FakeEngine()
    asked = work(prompts=("ab", "cd"), n=2, sampling=SamplingParams(seed=10))
    deltas = await whole(Worker(engine), asked)
    assert sorted(delta.choice for delta in deltas) == [0, 1, 2, 3]
    assert [(r.request_id, bytes(r.prompt_token_ids), r.sampling.seed) for r in engine.seen] == [
        ("r-0", b"ab", 10),
        ("r-1", b"ab", 11),
        ("r-2", b"cd", 10),
        ("r-3", b"cd", 11),
    ]
    assert total_usage(deltas, n=2) == Usage(prompt_tokens=4, completion_tokens=20, hits=60, fetched=20)


async def test_without_a_seed_no_choice_gets_one() -> None:
    engine = FakeEngine()
    await whole(Worker(engine), work(n=2))
    assert [request.sampling.seed for request in engine.seen] == [None, None]


async def test_token_ids_are_taken_as_they_are_and_reported_when_asked() -> None:
    worker = Worker(FakeEngine())
    text, ids = [await replies_to(worker, work(prompts=(p,), report_prompts=True)) for p in ("hello", tuple(b"hello"))]
    assert text == ids
    assert isinstance(text[0], Batch) and text[0].prompt_token_ids == (tuple(b"hello"),)


async def test_a_conversation_goes_through_the_template() -> None:
    engine = FakeEngine()
    messages = (ChatMessage(role="system", content="be"), ChatMessage(role="user", content="hi"))
    await whole(Worker(engine), work(prompts=(), messages=messages))
    decoded = byte_tokenizer().decode(engine.seen[0].prompt_token_ids)
    assert decoded == "<|system|>be<|user|>hi<|assistant|>"


async def test_refusals_before_the_engine_is_asked() -> None:
    engine = FakeEngine(limits=FakeLimits(max_model_len=16, kv_tokens=1024))
    worker = Worker(engine)
    long = await refusal(worker, work("x" * 16))
    assert (long.status, long.param, long.code) == (400, "prompt", "context_length_exceeded")
    assert "must be at most 15" in long.message and "16 tokens" in long.message
    both = await refusal(worker, work("x" * 10, max_tokens=7))
    assert "10 + 7 tokens, must be at most 16" in both.message and "lower max_tokens to 6" in both.message
    assert (await refusal(worker, work(""))).param == "prompt"
    one_long = await refusal(worker, work(prompts=("ok", "x" * 20)))
    assert one_long.code == "context_length_exceeded"
    assert engine.seen == []


async def test_terms_reach_the_engine_and_what_they_cost_comes_back() -> None:
    engine = FakeEngine()
    terms = Terms(mode="bounded", budget=0.01, record=True, replay="abc")
    [delta] = await whole(Worker(engine), work(terms=terms))
    [request] = engine.seen
    assert (request.mode, request.budget, request.record, request.replay) == ("bounded", 0.01, True, "abc")
    assert delta.usage is not None and delta.usage.standins == StandinAccesses(lowbit=10, drop=1)
    assert (delta.usage.budget, delta.usage.record) == (0.01, "record of r-0")


@pytest.mark.parametrize(
    ("terms", "param", "said"),
    [
        (Terms(mode="quick"), "mode", "mode is 'quick', must be exact or bounded or fast"),  # type: ignore[arg-type]
        (Terms(mode=["fast"]), "mode", "mode is \\['fast'\\]"),  # type: ignore[arg-type]
        (Terms(mode="bounded", budget=-0.1), "budget", "budget is -0.1, must be a number from 0 to 1"),
        (Terms(budget=1.5), "budget", "budget is 1.5"),
        (Terms(budget=float("nan")), "budget", "budget is nan"),
        (Terms(budget=float("inf")), "budget", "budget is inf"),
        (Terms(budget="0.1"), "budget", "budget is '0.1'"),  # type: ignore[arg-type]
        (Terms(budget=True), "budget", "budget is True"),
        (Terms(record="yes"), "record", "record is 'yes', must be true or false"),  # type: ignore[arg-type]
        (Terms(replay=b"abc"), "replay", "replay is b'abc', must be text"),  # type: ignore[arg-type]
    ],
)
async def test_terms_no_engine_knows_are_refused_before_one_sees_them(terms: Terms, param: str, said: str) -> None:
    engine = FakeEngine()
    refused = await refusal(Worker(engine), work(terms=terms))
    assert (refused.status, refused.param) == (400, f"buddymoe.{param}")
    assert re.match(said, refused.message) and "hint:" in refused.message
    assert engine.seen == []


async def test_costs_of_choices_add_up_and_a_tripped_guard_is_told() -> None:
    deltas = await whole(Worker(FakeEngine()), work(n=2, terms=Terms(mode="fast")))
    total = total_usage(deltas, n=2)
    assert total.standins == StandinAccesses(lowbit=20, drop=2) and total.standins.total == 22
    assert (total.hits, total.fetched, total.guard, total.mode) == (30, 0, "ok", "fast")
    assert total.expected_rise == pytest.approx(0.01)
    assert deltas[1].usage is not None
    tripped = replace(deltas[1], usage=replace(deltas[1].usage, guard="tripped", mode="exact"))
    for order in ((deltas[0], tripped), (tripped, deltas[0])):
        worse = total_usage(order, n=2)
        assert (worse.guard, worse.mode, worse.requested_mode) == ("tripped", "exact", "fast")
        assert worse.standins.total == 22


def test_a_report_carries_the_workers_name() -> None:
    engine = FakeEngine()
    assert Worker(engine, name="w7").report() == WorkerReport(replica="w7", pid=os.getpid(), snapshot=engine.snapshot())


async def test_without_a_tokenizer_only_ids_are_served() -> None:
    engine = FakeEngine()
    engine.tokenizer = None
    worker = Worker(engine)
    assert "tokenizer" in (await refusal(worker, work("text"))).message
    chat = await refusal(worker, work(prompts=(), messages=(ChatMessage(role="user", content="x"),)))
    assert (chat.status, chat.param) == (400, "messages")
    [delta] = await whole(worker, work(prompts=((5, 6),), sampling=replace(GREEDY, logprobs=0)))
    assert len(delta.token_ids) == 5 and delta.logprobs[0].data == b""


async def test_a_request_the_engine_refuses() -> None:
    engine = FakeEngine()
    refused = await refusal(Worker(engine), work(prompts=("fine", "\x01"), max_tokens=50))
    assert (refused.status, refused.param) == (400, "prompt")
    assert engine.running == set()


async def test_an_error_of_one_choice_leaves_the_others() -> None:
    deltas = await whole(Worker(FakeEngine()), work(prompts=("fine", "\x02"), max_tokens=6))
    fine, failed = sorted(deltas, key=lambda delta: delta.choice)
    assert (fine.finish_reason, len(fine.token_ids)) == ("length", 6)
    assert (failed.finish_reason, len(failed.token_ids)) == ("error", 3)
    assert failed.error == "an expert could not be read. hint: check the disk"


async def test_an_unforeseen_error_is_told_without_its_text() -> None:
    [failed] = await whole(Worker(FakeEngine()), work("\x04"))
    assert failed.finish_reason == "error" and failed.error is not None and "secret" not in failed.error


async def test_a_dead_engine_is_unavailable_and_unwell() -> None:
    worker = Worker(FakeEngine(), retry_after_seconds=7)
    await worker.check_health()
    *_, last = await replies_to(worker, work("\x03", flush_seconds=0.0))
    assert isinstance(last, Refusal) and (last.status, last.retry_after_seconds) == (503, 7)
    assert (await refusal(worker, work())).status == 503
    with pytest.raises(CapacityError):
        await worker.check_health()


async def test_closing_the_stream_cancels_every_choice() -> None:
    engine = FakeEngine(delay=0.001)
    worker = Worker(engine)
    async with aclosing(worker.generate(work(n=4, max_tokens=100, flush_seconds=0.0))) as replies:
        await anext(replies)
        assert worker.snapshot().running == 4
    assert worker.snapshot().running == 0
    assert engine.cancelled == 4


async def test_cancelling_the_task_cancels_every_choice() -> None:
    engine = FakeEngine(delay=0.001)
    task = asyncio.create_task(replies_to(Worker(engine), work(n=2, max_tokens=100)))
    while len(engine.running) < 2:
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (engine.running, engine.cancelled) == (set(), 2)


async def test_a_finished_request_counts_as_no_cancellation() -> None:
    engine = FakeEngine()
    await whole(Worker(engine), work(n=2))
    assert engine.cancelled == 0


async def test_more_calls_than_run_and_wait_are_refused_until_one_ends() -> None:
    engine = FakeEngine(delay=0.001, limits=FakeLimits(max_running=2))
    worker = Worker(engine, max_queued_requests=1, retry_after_seconds=7)
    streams = [worker.generate(work(request_id=f"{i}", max_tokens=100, flush_seconds=0.0)) for i in range(3)]
    for stream in streams:
        await anext(stream)
    refused = await refusal(worker, work())
    assert (refused.status, refused.code, refused.retry_after_seconds) == (503, "overloaded", 7)
    assert "3 requests run or wait" in refused.message
    await streams[0].aclose()
    assert len(await whole(worker, work())) == 1
    for stream in streams[1:]:
        await stream.aclose()
    assert engine.running == set()


async def test_admission_counts_answers_and_not_calls() -> None:
    engine = FakeEngine(delay=0.001, limits=FakeLimits(max_running=4))
    worker = Worker(engine, max_queued_requests=4)
    asked = work(n=6, max_tokens=100, flush_seconds=0.0)
    async with aclosing(worker.generate(asked)) as replies:
        await anext(replies)
        full = await refusal(worker, replace(asked, request_id="second", n=3))
        assert (full.status, full.code) == (503, "overloaded") and "6 requests run or wait" in full.message
        async with aclosing(worker.generate(replace(asked, request_id="third", n=2))) as more:
            await anext(more)
    assert len(await whole(worker, work(n=9, max_tokens=2))) == 9, "an idle worker takes any call"


async def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenised(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker(FakeEngine())
    monkeypatch.setattr("buddymoe_ray.serve.work_plan.encode", lambda *_: pytest.fail("it was tokenised"))
    for asked in (
        work("x" * 10_000),
        work(prompts=("fine", "x" * 10_000)),
        work(prompts=(), messages=(ChatMessage(role="user", content="x" * 6000),) * 2),
    ):
        refused = await refusal(worker, asked)
        assert (refused.status, refused.code) == (400, "context_length_exceeded")
        assert (
            refused.param == asked.prompt_field and "characters, must be at most 1664 for 128 tokens" in refused.message
        )


class Odd:
    def __repr__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"max_tokens": 2.0}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 10**5000}, "max_tokens"),
        ({"max_tokens": -(10**5000)}, "max_tokens"),
        ({"prompts": ((1, True),)}, "prompt"),
        ({"prompts": ((1, 2.0),)}, "prompt"),
        ({"prompts": (b"bytes",)}, "prompt"),
        ({"prompts": (iter([1]),)}, "prompt"),
        ({"prompts": (np.ones((2, 2), int),)}, "prompt"),
        ({"prompts": (np.ones(2),)}, "prompt"),
        ({"prompts": ("\ud800",)}, "prompt"),
        ({"prompts": (None,)}, "prompt"),
        ({"prompts": (Odd(),)}, "prompt"),
        ({"prompts": (), "messages": (ChatMessage(role="user", content="a\udfff"),)}, "messages"),
        ({"terms": Terms(replay="\ud800")}, "buddymoe.replay"),
        *[
            ({"sampling": replace(GREEDY, **{name: value})}, name)
            for name, value in (
                ("seed", 1.5),
                ("seed", "a"),
                ("seed", True),
                ("seed", 2**64),
                ("seed", -(2**64)),
                ("top_k", 2.5),
                ("top_k", None),
                ("temperature", "0.5"),
                ("temperature", True),
                ("temperature", None),
                ("temperature", 10**400),
                ("temperature", np.array([1.0, 2.0])),
                ("top_p", 1j),
                ("logprobs", True),
                ("logprobs", 1.0),
                ("stop", (1,)),
                ("stop", 3),
                ("stop", b"x"),
                ("stop", iter("x")),
                ("stop", ("\ud800",)),
                ("stop", ("x",) * 65),
                ("stop", ("x" * 1025,)),
                ("stop", {"x": 1}),
                ("stop_token_ids", (1.0,)),
                ("stop_token_ids", ("a",)),
                ("stop_token_ids", 5),
                ("stop_token_ids", (-1,)),
                ("stop_token_ids", range(5)),
                ("stop_token_ids", (1,) * 5000),
                ("ignore_eos", 1),
                ("ignore_eos", "yes"),
                ("presence_penalty", Odd()),
            )
        ],
    ],
)
async def test_wrong_types_are_refused_for_that_call_alone(changes: dict[str, Any], param: str) -> None:
    engine = FakeEngine()
    refused = await refusal(Worker(engine), work(**changes))
    assert (refused.status, refused.param) == (400, param), refused
    assert "must " in refused.message and "hint:" in refused.message and len(refused.message) < 400
    assert engine.seen == []


async def test_numbers_and_lists_of_numpy_are_as_good_as_pythons() -> None:
    engine = FakeEngine()
    sampling = replace(
        GREEDY,
        temperature=np.float32(0.5),
        seed=np.int64(7),
        top_k=np.uint8(3),
        logprobs=np.int32(2),
        ignore_eos=np.bool_(True),
        stop="never",
        stop_token_ids=np.array([300]),
    )
    await whole(
        Worker(engine),
        work(prompts=(np.array([97, 98]), [99, np.int64(100)]), sampling=sampling, max_tokens=np.int64(3)),
    )
    first, second = engine.seen
    assert (first.prompt_token_ids, second.prompt_token_ids) == ((97, 98), (99, 100))
    got = first.sampling
    assert (got.temperature, got.seed, got.top_k, got.logprobs, got.max_tokens) == (0.5, 7, 3, 2, 3)
    assert {type(v) for v in vars(got).values()} <= {int, float, bool, tuple, dict, type(None)}
    assert (got.stop, got.stop_token_ids, got.ignore_eos) == (("never",), (300,), True)


async def test_what_breaks_while_a_call_is_read_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("a secret path")

    monkeypatch.setattr("buddymoe_ray.serve.work_plan.encode", broken)
    refused = await refusal(Worker(FakeEngine()), work())
    assert refused.status == 500 and "secret" not in refused.message


async def test_info_and_close() -> None:
    engine = FakeEngine(model_id="m")
    worker = Worker(engine)
    info = worker.info()
    assert (info.model_id, info.max_model_len, info.max_running, info.kv_tokens) == ("m", 128, 8, 1024)
    worker.close()
    assert engine.closed


@pytest.mark.parametrize(
    ("prompt", "wanted", "model", "kv", "default", "expected"),
    [
        (10, None, 100, 1000, 1024, 90),
        (10, None, 100, 1000, 20, 20),
        (10, 90, 100, 1000, 20, 90),
        (99, None, 100, 1000, 20, 1),
        (10, None, 1000, 50, 1024, 40),
        (10, 91, 100, 1000, 20, "lower max_tokens to 90"),
        (100, None, 100, 1000, 20, "the model's context is 100 tokens"),
        (60, 1, 1000, 50, 20, "the KV cache is 50 tokens"),
    ],
)
def test_output_limit(prompt: int, wanted: int | None, model: int, kv: int, default: int, expected: int | str) -> None:
    limit = output_limit(prompt, work(max_tokens=wanted), max_model_len=model, kv_tokens=kv, default_max_tokens=default)
    if isinstance(expected, int):
        assert limit == expected
    else:
        assert isinstance(limit, Refusal) and expected in limit.message, limit


def test_token_bytes_of_a_byte_level_vocabulary() -> None:
    bytes_of = TokenBytes(byte_tokenizer())
    assert [bytes_of(byte) for byte in range(256)] == [bytes([byte]) for byte in range(256)]
    assert bytes_of(257) == b"<|user|>"
    assert bytes_of(10_000) == b""
    assert b"".join(bytes_of(id_) for id_ in byte_tokenizer()("naïve ☃")["input_ids"]) == "naïve ☃".encode()


class PieceTokenizer:
    """The three members TokenBytes reads, as a SentencePiece tokenizer has them."""

    def __init__(self, pieces: list[str]) -> None:
        self.pieces = pieces
        self.added_tokens_decoder = {0: "<s>"}

    def __len__(self) -> int:
        return len(self.pieces)

    def convert_ids_to_tokens(self, token_id: int) -> str:
        return self.pieces[token_id]


def test_token_bytes_of_sentencepiece_with_byte_fallback() -> None:
    bytes_of = TokenBytes(PieceTokenizer(["<s>", "▁the", "re", "<0xE2>", "▁"]))
    assert [bytes_of(id_) for id_ in range(5)] == [b"<s>", b" the", b"re", b"\xe2", b" "]


def test_logprobs_are_described_with_bytes() -> None:
    entry = TokenLogprob(token_id=97, logprob=-0.5, top=((97, -0.5), (0xE2, -2.0)))
    assert described(entry, TokenBytes(byte_tokenizer())) == TokenText(
        token_id=97,
        logprob=-0.5,
        data=b"a",
        top=(TokenText(token_id=97, logprob=-0.5, data=b"a"), TokenText(token_id=0xE2, logprob=-2.0, data=b"\xe2")),
    )


def test_merge_joins_in_order_and_keeps_the_end() -> None:
    usage = Usage(prompt_tokens=1, completion_tokens=2)
    parts = [
        Delta(choice=1, token_ids=(1,), text="a"),
        Delta(choice=0, token_ids=(2,), text="b"),
        Delta(choice=1, token_ids=(3,), text="c", finish_reason="stop", usage=usage),
    ]
    assert merge(parts) == (
        Delta(choice=1, token_ids=(1, 3), text="ac", finish_reason="stop", usage=usage),
        Delta(choice=0, token_ids=(2,), text="b"),
    )
    with pytest.raises(AssertionError, match="goes on after its end"):
        merge([parts[2], parts[0]])


def test_fake_tokens_are_a_function_of_prompt_seed_and_position() -> None:
    request = GenerationRequest(request_id="a", prompt_token_ids=(1,), sampling=SamplingParams(seed=1))
    other = replace(request, request_id="b")
    assert [fake_token(request, i) for i in range(9)] == [fake_token(other, i) for i in range(9)]


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, {"temperature": 0.6, "top_k": 20, "repetition_penalty": 1.05, "max_tokens": 5}),
        ({"temperature": 0.0, "top_k": 0}, {"temperature": 0.0, "top_k": 0, "repetition_penalty": 1.05}),
        (
            {"max_tokens": 7, "repetition_penalty": 1.0},
            {"temperature": 0.6, "repetition_penalty": 1.0, "max_tokens": 7},
        ),
    ],
)
async def test_what_a_request_leaves_open_is_the_checkpoints(
    asked: dict[str, Any], expected: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    engine = FakeEngine()
    engine.sampling_defaults = {"temperature": 0.6, "top_k": 20, "repetition_penalty": 1.05, "max_tokens": 5}
    worker = Worker(engine)
    assert "generation_config.json" in caplog.text and "'top_k': 20" in caplog.text
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}]} | asked
    work = parse_chat(json.dumps(body).encode()).work("r", flush_seconds=0)
    _ = [reply async for reply in worker.generate(work)]
    [request] = engine.seen
    assert {name: getattr(request.sampling, name) for name in expected} == expected
    assert dict(worker.info().sampling_defaults) == engine.sampling_defaults


async def test_a_python_client_takes_messages_as_http_does() -> None:
    client: Any = object.__new__(Client)
    client._workers = LocalWorkers(Worker(FakeEngine()))
    parts = [{"type": "text", "text": "he"}, {"type": "text", "text": "llo"}]
    said = [await client.achat([{"role": "user", "content": content}], max_tokens=4) for content in ("hello", parts)]
    assert said[0].prompt_token_ids == said[1].prompt_token_ids and said[0].text == said[1].text
    for content in (b"hello", np.array(["hello"]), None, [5]):
        with pytest.raises(RequestError, match=r"messages\[0\]\.content is not usable") as caught:
            await client.achat([{"role": "user", "content": content}], max_tokens=4)
        assert caught.value.param == "messages"
    with pytest.raises(RequestError, match=r"an event loop runs here.*await agenerate"):
        client.generate("hello", max_tokens=4)
    with pytest.raises(RequestError, match=r"messages\[1\] is 'hello', must be a mapping"):
        await client.achat([{"role": "user", "content": "a"}, "hello"], max_tokens=4)
