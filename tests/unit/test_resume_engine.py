"""An engine that goes on where another stopped: the same tokens, text, log probabilities and ends, cut anywhere."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import SPECIALS, bpe, byte_fallback, metaspace

from buddymoe_ray.config import EngineConfig
from buddymoe_ray.engine.async_engine import AsyncEngine
from buddymoe_ray.engine.engine import Engine
from buddymoe_ray.engine.sampler import Sampled
from buddymoe_ray.engine.sequence import Sequence
from buddymoe_ray.errors import RequestError
from buddymoe_ray.moe import StepOutcome
from buddymoe_ray.serve.deltas import merge
from buddymoe_ray.serve.resume import ResumeLimits, WorkerLost, resumable
from buddymoe_ray.serve.work import Batch, Reply, Work
from buddymoe_ray.serve.worker import Worker
from buddymoe_ray.types import GenerationRequest, SamplingParams, TokenEvent

PROMPT = "class Stack:\n    def __init__(self, items):\n"
LONG = 16
CUTS = (1, 2, 3, 5, 8, 12, LONG - 1)


@pytest.fixture(scope="module")
def engines() -> Iterator[tuple[Engine, Engine]]:
    """Where a request begins and where it goes on: same model and seed, other memory and chunks, so other misses."""
    first = Engine.from_config(EngineConfig(memory="25%", seed=5))
    second = Engine.from_config(EngineConfig(memory="40%", seed=5, prefill_chunk=7))
    yield first, second
    for engine in (first, second):
        engine._scheduler.check_integrity()
        engine.close()


def run(engine: Engine, *requests: GenerationRequest) -> dict[str, list[TokenEvent]]:
    told: dict[str, list[TokenEvent]] = {request.request_id: [] for request in requests}
    for request in requests:
        engine.add(request)
    for event in engine.drain():
        told[event.request_id].append(event)
    return told


def ids_of(events: list[TokenEvent]) -> tuple[int, ...]:
    return tuple(token for event in events for token in event.token_ids)


def text_of(events: list[TokenEvent]) -> str:
    return "".join(event.text for event in events)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"seed": 3},
        {"seed": 11, "top_p": 0.9, "top_k": 50, "logprobs": 3},
        {},  # no seed: both engines draw the same from their own seed and the request's id
        {"seed": 4, "presence_penalty": 1.5, "frequency_penalty": 1.0, "repetition_penalty": 1.3},
        {"temperature": 0.0, "frequency_penalty": 2.0, "logprobs": 1},
        {"seed": 5, "temperature": 2.0, "logprobs": 0},  # hot enough to spell characters in pieces
    ],
    ids=str,
)
def test_cut_anywhere_it_is_the_uninterrupted_output(engines: tuple[Engine, Engine], options: dict[str, Any]) -> None:
    first, second = engines
    sampling = SamplingParams(max_tokens=LONG, ignore_eos=True, **options)
    asked = GenerationRequest(request_id="r", prompt_token_ids=tuple(first.encode(PROMPT)), sampling=sampling)
    whole = run(first, asked)["r"]
    for cut, moved in _moved(second, asked, ids_of(whole)):
        assert ids_of(moved) == ids_of(whole[cut:]), cut
        assert [event.text for event in moved] == [event.text for event in whole[cut:]], cut
        assert [event.finish_reason for event in moved] == [event.finish_reason for event in whole[cut:]]
        ours, theirs = [[e for event in part for e in event.logprobs] for part in (moved, whole[cut:])]
        assert [entry.token_id for entry in ours] == [entry.token_id for entry in theirs]
        assert [e.logprob for e in ours] == pytest.approx([e.logprob for e in theirs], abs=1e-3)
        usage = moved[-1].usage
        assert usage is not None and (usage.completion_tokens, usage.resumed) == (LONG, cut)
        assert usage.prompt_tokens == len(asked.prompt_token_ids)
        assert usage.hits + usage.fetched == (LONG - cut - 1) * 16  # the first new token comes with the prefill


def _moved(engine: Engine, asked: GenerationRequest, tokens: tuple[int, ...]) -> Iterator[tuple[int, list[TokenEvent]]]:
    """The request resumed at many cuts, all in one batch; without a seed its name counts: one by one, at a few."""
    if asked.sampling.seed is None and asked.sampling.temperature:
        for cut in (1, 8, len(tokens) - 1):
            yield cut, run(engine, replace(asked, resumed_token_ids=tokens[:cut]))[asked.request_id]
        return
    cuts = [replace(asked, request_id=str(n), resumed_token_ids=tokens[:n]) for n in CUTS if n < len(tokens)]
    yield from ((int(name), events) for name, events in run(engine, *cuts).items())


def test_a_stop_string_across_the_cut_is_met(engines: tuple[Engine, Engine]) -> None:
    first, second = engines
    prompt = tuple(first.encode(PROMPT))
    greedy = SamplingParams(temperature=0.0, max_tokens=LONG)
    free = run(first, GenerationRequest(request_id="r", prompt_token_ids=prompt, sampling=greedy))["r"]
    text = text_of(free)
    stop = text[len(text_of(free[:5])) - 2 : len(text_of(free[:9])) + 1]  # several tokens, and parts of the outer ones
    sampling = replace(greedy, stop=(stop,))
    asked = GenerationRequest(request_id="r", prompt_token_ids=prompt, sampling=sampling)
    whole = run(first, asked)["r"]
    assert text_of(whole) == text.split(stop)[0] and whole[-1].finish_reason == "stop"
    assert any(event.text == "" for event in whole[:-1]), "text was held back"
    for cut, moved in _moved(second, asked, ids_of(whole)):
        assert [(e.text, e.finish_reason) for e in moved] == [(e.text, e.finish_reason) for e in whole[cut:]], cut


def test_resumed_requests_share_passes_with_others(engines: tuple[Engine, Engine]) -> None:
    """All cuts at once, beside requests that begin: prefill of both kinds is chunked into the same steps."""
    first, second = engines
    prompt = tuple(first.encode(PROMPT))
    asked = GenerationRequest(
        request_id="r", prompt_token_ids=prompt, sampling=SamplingParams(seed=9, max_tokens=LONG, ignore_eos=True)
    )
    tokens = ids_of(run(first, asked)["r"])
    cuts = [replace(asked, request_id=f"r{cut}", resumed_token_ids=tokens[:cut]) for cut in range(0, LONG, 4)]
    for name, events in run(second, *cuts).items():
        assert ids_of(events) == tokens[int(name[1:]) :]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resumed_token_ids": (5, -1)}, r"resumed_token_ids holds -1, must be in \[0, "),
        ({"resumed_token_ids": (5, 10**6)}, "resumed_token_ids holds 1000000"),
        ({"resumed_token_ids": (5,) * 4}, "end by length at token 4 of 4, must be unfinished"),
        ({"resumed_token_ids": (5,) * 9}, "end by length at token 4 of 9"),
        ({"resumed_token_ids": (5, 6)}, "end by stop at token 2 of 2"),
        ({"resumed_token_ids": (5,), "record": True}, "given with record or replay, must be alone"),
        ({"resumed_token_ids": (5,), "replay": "abc"}, "given with record or replay, must be alone"),
    ],
)
def test_what_cannot_be_resumed_is_refused(
    engines: tuple[Engine, Engine], changes: dict[str, Any], message: str
) -> None:
    asked = GenerationRequest(
        request_id="r", prompt_token_ids=(7, 8), sampling=SamplingParams(max_tokens=4, stop_token_ids=(6,))
    )
    with pytest.raises(RequestError, match=message) as caught:
        engines[0].add(replace(asked, **changes))
    assert caught.value.param == "resumed_token_ids" and not engines[0].has_work()


def test_a_bounded_request_is_charged_within_its_budget_over_both_parts() -> None:
    budget, cut = 0.01, 20
    with_standins = EngineConfig(memory="25%", mode="bounded", budget=budget, guard_share=0.0)
    engine = Engine.from_config(with_standins)
    asked = GenerationRequest(
        request_id="r",
        prompt_token_ids=tuple(engine.encode(PROMPT)),
        sampling=SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True),
    )
    engine.add(asked)
    part: list[TokenEvent] = []
    while len(ids_of(part)) < cut:
        part += engine.step()
    engine.cancel("r")  # as when the worker died; what it was charged is told here only
    before = engine.drain()[-1].usage
    usage = run(engine, replace(asked, resumed_token_ids=ids_of(part)))["r"][-1].usage
    assert before is not None and usage is not None
    assert 0 < usage.expected_rise <= budget * (usage.completion_tokens - usage.resumed - 1)
    assert before.expected_rise + usage.expected_rise <= budget * usage.completion_tokens
    engine.close()


async def test_three_sampled_choices_move_between_real_engines(engines: tuple[Engine, Engine]) -> None:
    """The whole way from `Work`: n choices with a seed each, the first worker killed in their midst."""
    served = [AsyncEngine(Engine.from_config(EngineConfig(memory=memory, seed=5))) for memory in ("25%", "50%")]
    workers = [Worker(engine) for engine in served]
    asked = [
        Work(request_id="r", prompts=(PROMPT,), sampling=sampling, max_tokens=LONG, n=3, flush_seconds=0.0)
        for sampling in (SamplingParams(seed=1), SamplingParams())
    ]
    attempts = 0

    async def attempt(work: Work) -> AsyncGenerator[Reply, None]:
        nonlocal attempts
        attempts += 1
        given = 0
        async with aclosing(workers[bool(work.resume)].generate(work)) as replies:
            async for reply in replies:
                yield reply
                given += 1
                if given == 10 and not work.resume:
                    raise WorkerLost("killed by a test")

    try:
        for work in asked:
            whole = merge([d for r in [r async for r in workers[0].generate(work)] for d in _deltas(r)])
            parts = [d async for r in resumable(work, attempt, ResumeLimits()) for d in _deltas(r)]
            for mine, other in zip(_in_order(merge(parts)), _in_order(whole), strict=True):
                assert (mine.token_ids, mine.text, mine.finish_reason) == (
                    other.token_ids,
                    other.text,
                    other.finish_reason,
                )
            assert len({delta.text for delta in whole}) == 3
        assert attempts == 4
    finally:
        for engine in served:
            engine.close()


def _deltas(reply: Reply) -> tuple[Any, ...]:
    assert isinstance(reply, Batch), reply
    return reply.deltas


def _in_order(deltas: tuple[Any, ...]) -> list[Any]:
    return sorted(deltas, key=lambda delta: delta.choice)


@settings(max_examples=60)
@given(
    text=st.text(alphabet="ab 世🙂é\ufffd", min_size=1, max_size=14),
    stops=st.lists(st.text(alphabet="ab 世🙂", min_size=1, max_size=4), max_size=2),
    tokenizer=st.sampled_from(["bpe", "metaspace", "byte_fallback"]),
)
def test_held_characters_and_stop_strings_are_part_of_what_moves(text: str, stops: list[str], tokenizer: str) -> None:
    made = {"bpe": bpe, "metaspace": metaspace, "byte_fallback": byte_fallback}[tokenizer]()
    ids = made.encode(text, add_special_tokens=False)
    if not ids:
        return

    def sequence(resumed: list[int]) -> Sequence:
        asked = GenerationRequest(
            request_id="r",
            prompt_token_ids=tuple(made.encode("The fox", add_special_tokens=False)),
            sampling=SamplingParams(max_tokens=len(ids), stop=tuple(stops), seed=1),
            resumed_token_ids=tuple(resumed),
        )
        return Sequence(asked, tokenizer=made, max_model_len=1000)

    def feed(seq: Sequence, tokens: list[int]) -> list[TokenEvent]:
        events: list[TokenEvent] = []
        for token in tokens:
            if not seq.finished:
                events.append(seq.append(Sampled(token_id=token)))
        return events

    whole = feed(sequence([]), ids)
    for cut in range(len(whole)):
        moved = feed(sequence(ids[:cut]), ids[cut:])
        assert [(e.text, e.finish_reason) for e in moved] == [(e.text, e.finish_reason) for e in whole[cut:]], cut


def test_the_state_of_a_resumed_sequence_is_that_of_one_that_got_there() -> None:
    ids = bpe().encode(" jumps over the lazy", add_special_tokens=False)
    asked = GenerationRequest(request_id="r", prompt_token_ids=(1, 2, 3), sampling=SamplingParams(max_tokens=99))
    end = bpe().convert_tokens_to_ids(SPECIALS[0])
    there = Sequence(asked, tokenizer=bpe(), max_model_len=200, default_seed=1)
    for token in ids:
        there.append(Sampled(token_id=token))
    resumed = replace(asked, resumed_token_ids=tuple(ids))
    here = Sequence(resumed, tokenizer=bpe(), eos_token_ids=frozenset({end}), max_model_len=200, default_seed=1)
    for name in ("params", "seed", "token_ids", "position"):
        assert getattr(here.sampling_state, name) == getattr(there.sampling_state, name)
    assert (here.output_ids, here.max_length, here.prompt_length) == (there.output_ids, there.max_length, 3)
    assert (here.prefill_length, here.prompt_computed) == (3 + len(ids), False)
    here.advance(3)
    assert not here.prompt_computed
    here.advance(len(ids))
    assert here.prompt_computed and here.append(Sampled(token_id=end)).finish_reason == "stop"


def test_seeds_are_hashes_of_engine_seed_and_name() -> None:
    def seed(name: str, default: int) -> int:
        asked = GenerationRequest(request_id=name, prompt_token_ids=(1,))
        return Sequence(asked, max_model_len=50, default_seed=default).sampling_state.seed

    assert seed("plumless", 0) != seed("buckeroo", 0), "two names of one crc32"
    assert len({seed(f"r-{at}", at % 3) for at in range(300)}) == 300
    assert all(0 <= seed(f"r-{at}", -1) < 2**64 for at in range(50))
    assert seed("chatcmpl-1-0", 0) == 0xFDE3AC5C100FCBB9, "an upgraded service must draw the same"


def test_uses_that_a_peer_answered_were_fetched_before() -> None:
    outcome = StepOutcome.empty(2)
    outcome.count_exact(np.array([[True, False, False], [False, False, False]]))
    outcome.count_elsewhere(np.array([1, 3]), exact=True)
    assert (outcome.hits_T.tolist(), outcome.peer_T.tolist(), outcome.fetched_T.tolist()) == ([1, 0], [1, 3], [1, 0])
    with pytest.raises(AssertionError, match=r"accesses are \[2, 0\], must be at most the fetched \[1, 0\]"):
        outcome.count_elsewhere(np.array([2, 0]), exact=True)
