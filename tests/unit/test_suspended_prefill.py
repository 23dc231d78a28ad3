"""Prompts that are set aside between two pieces: no bit changes whatever runs meanwhile, and whoever leaves in the
middle, or loses an expert, costs nobody else anything."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import build_checkpoint

import buddymoe_ray.residency.tier as tier
from buddymoe_ray import LLM
from buddymoe_ray.cache import DiskReader
from buddymoe_ray.engine import beside
from buddymoe_ray.engine.engine import Engine
from buddymoe_ray.engine.forward_seconds import ForwardSeconds
from buddymoe_ray.engine.pieces import Member, cut_pieces
from buddymoe_ray.engine.scheduler import PrefillChunk, Scheduler
from buddymoe_ray.engine.sequence import Sequence
from buddymoe_ray.engine.suspended import SuspendedPass
from buddymoe_ray.errors import CacheError
from buddymoe_ray.moe import ReadAhead
from buddymoe_ray.policy import Prefill
from buddymoe_ray.types import GenerationRequest, SamplingParams, TokenEvent

PROMPTS = [[5 + (7 * i + 3 * j) % 90 for j in range(n)] for i, n in enumerate((43, 3, 17, 1))]

Bits = dict[str, list[tuple[int, float]]]


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every prompt is set aside after every piece, and pieces are small; toy experts are read ahead too."""
    monkeypatch.setattr("buddymoe_ray.cache.disk.READ_ON_THE_SPOT", 0)
    monkeypatch.setattr(tier, "READ_ON_THE_SPOT", 0)
    for name, value in (("_ALONE_SECONDS", 0.0), ("_LEAST_SECONDS", 0.0), ("_SHARE", 0.0), ("_AT_ONCE", 0)):
        monkeypatch.setattr(beside, name, value)
    monkeypatch.setattr(beside, "_ROWS_BESIDE", 3)
    monkeypatch.setattr(beside, "_ROWS_ALONE", 5)
    monkeypatch.setattr("buddymoe_ray.engine.suspended._FEWEST", 7)


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beside.PrefillBeside, "begin", lambda *_, **__: False)


def request(name: str, ids: list[int], tokens: int = 6) -> GenerationRequest:
    sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, logprobs=0)
    return GenerationRequest(request_id=name, prompt_token_ids=tuple(ids), sampling=sampling)


def bits(events: list[TokenEvent]) -> Bits:
    found: Bits = {}
    for event in events:
        assert event.error is None, event.error
        found.setdefault(event.request_id, []).extend((item.token_id, item.logprob) for item in event.logprobs)
    return found


def served(folder: Path, **options: Any) -> tuple[Bits, int]:
    """Prompts of which each arrives while those before are computed; and how many steps that took."""
    with LLM(str(folder), **{"max_model_len": 64, **options}) as llm:
        engine, events, steps = llm.engine, list[TokenEvent](), 0
        for at, ids in enumerate(PROMPTS):
            engine.add(request(str(at), ids))
            for _ in range(9):
                events += engine.step()
                engine._scheduler.check_integrity()
        while engine.has_work():
            events += engine.step()
            steps += 1
        engine.cache.check_integrity()
        assert engine.snapshot().free_kv_blocks == engine.snapshot().total_kv_blocks
    return bits(events), steps


FORMS = [
    ("olmoe", {"memory": "40%"}),
    ("mixtral", {"memory": "40%", "expert_dtype": "int4", "dense_dtype": "int8", "threads": 2}),
    ("qwen2_moe", {"memory": "40%", "read_ahead": "off"}),  # it has torch's functions replaced around its experts
    ("deepseek_v3", {"dtype": "bfloat16"}),
]


@pytest.mark.parametrize(("family", "form"), FORMS)
def test_no_bit_depends_on_being_set_aside(
    family: str, form: dict[str, Any], tmp_path: Path, pieces: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_checkpoint(family, tmp_path)
    aside, steps = served(tmp_path, **form)
    with monkeypatch.context() as patch:
        patch.setattr(beside.PrefillBeside, "begin", lambda *_, **__: False)
        once, few = served(tmp_path, **form)
    assert aside == once
    assert steps > few + 20, "prompts took many steps"


@pytest.fixture
def engine(tmp_path: Path, pieces: None) -> Iterator[Engine]:
    build_checkpoint("olmoe", tmp_path)
    with LLM(str(tmp_path), memory="40%", max_model_len=64, prefix_cache="off") as llm:
        yield llm.engine


def alone(engine: Engine, ids: list[int], tokens: int = 6) -> list[tuple[int, float]]:
    engine.add(request("alone", ids, tokens))
    return bits(engine.drain())["alone"]


def passes(engine: Engine) -> list[SuspendedPass]:
    return list(engine._beside._passes)


@pytest.mark.parametrize("after", [7, 33])
def test_who_leaves_in_the_middle_leaves_the_others_alone(engine: Engine, after: int) -> None:
    long, other = [alone(engine, PROMPTS[at]) for at in (0, 2)]
    engine.add(request("gone", PROMPTS[0]))
    engine.add(request("stays", PROMPTS[2]))
    events = [event for _ in range(after) for event in engine.step()]
    engine.cancel("gone")
    engine._scheduler.check_integrity()
    engine.add(request("new", PROMPTS[0]))  # into the blocks that are free now
    found = bits([event for event in [*events, *engine.drain()] if event.request_id != "gone"])
    assert found == {"stays": other, "new": long}
    assert not passes(engine)
    engine.cache.check_integrity()


def test_who_loses_its_blocks_begins_again(tmp_path: Path, pieces: None) -> None:
    build_checkpoint("olmoe", tmp_path)
    small = {"memory": "40%", "max_model_len": 64, "prefix_cache": "off", "max_running": 8}
    with LLM(str(tmp_path), **small) as llm:
        expected = [alone(llm.engine, PROMPTS[2], 45), alone(llm.engine, PROMPTS[0])]
        pool: Any = llm.engine._runner._paged.pool  # type: ignore[attr-defined]
        kept = [*pool.keys_NHd.values(), *pool.values_NHd.values()]
        block = sum(part.nbytes for part in kept) // pool.blocks
    with LLM(str(tmp_path), kv_memory=str(6 * block), **small) as llm:
        llm.engine.add(request("old", PROMPTS[2], 45))
        events = list[TokenEvent]()
        while not events:
            events = llm.engine.step()
        llm.engine.add(request("young", PROMPTS[0]))
        computing = False
        while not llm.engine.snapshot().preemptions:
            computing = bool(passes(llm.engine))
            events += llm.engine.step()
        assert computing, "it was taken from a prompt in progress"
        llm.engine._scheduler.check_integrity()
        found = bits([*events, *llm.engine.drain()])
    assert [found["old"], found["young"]] == expected


def test_an_expert_that_cannot_be_read_ends_who_needs_it(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    other = alone(engine, PROMPTS[3])
    engine.add(request("stays", PROMPTS[3], 6))
    events = list[TokenEvent]()
    while not events:
        events = engine.step()
    submit = DiskReader.submit
    failing = threading.Event()

    def refused(self: DiskReader, *args: Any) -> Any:
        if failing.is_set():
            raise CacheError("the disk is on fire. hint: a test")
        return submit(self, *args)

    monkeypatch.setattr(DiskReader, "submit", refused)
    engine.add(request("lost", PROMPTS[0]))
    events += engine.step()
    assert passes(engine)
    while passes(engine):
        failing.set()
        engine._go_on(True)  # no decode meanwhile, which the same disk would end
        failing.clear()
    events += engine.drain()
    assert [event.error for event in events if event.request_id == "lost" and event.finish_reason == "error"] == [
        "the disk is on fire. hint: a test"
    ]
    assert bits([event for event in events if event.request_id == "stays"])["stays"][: len(other)] == other
    engine._scheduler.check_integrity()
    engine.cache.check_integrity()
    assert alone(engine, PROMPTS[2])


def test_what_runs_before_all_rows_of_a_layer_are_there_changes_no_bit(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no forward fits into what is left of a slice, experts that are resident fill it."""
    expected = alone(engine, PROMPTS[0])
    one, fill, filled = SuspendedPass._one, SuspendedPass._fill, list[int]()

    def late(self: SuspendedPass, seconds: float, *, must: bool) -> bool:
        monkeypatch.setattr(self._parts.forwards, "of", lambda _: 1e9)
        return one(self, 1.0, must=True)

    def noted(self: SuspendedPass, layer: Any, seconds: float) -> bool:
        found = fill(self, layer, seconds)
        filled.extend([len(layer.pieces)] * found)
        return found

    monkeypatch.setattr("buddymoe_ray.engine.suspended._FILLING", 2)
    monkeypatch.setattr(SuspendedPass, "_one", late)
    monkeypatch.setattr(SuspendedPass, "_fill", noted)
    assert alone(engine, PROMPTS[0]) == expected
    assert len({*filled}) > 3, "the first pieces' rows did not run while others were on their way"


def test_a_forward_that_fails_costs_its_prompt_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    other = alone(engine, PROMPTS[2])
    forward = torch.nn.Embedding.forward

    def broken(module: torch.nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
        if (ids == 159).any():
            raise ValueError("no such word")
        return forward(module, ids)

    monkeypatch.setattr(torch.nn.Embedding, "forward", broken)
    engine.add(request("bad", [5] * 20 + [159]))
    engine.add(request("good", PROMPTS[2]))
    events = engine.drain()
    assert [event.finish_reason for event in events if event.request_id == "bad"] == ["error"]
    assert bits([event for event in events if event.request_id == "good"]) == {"good": other}
    assert not passes(engine)


def test_a_pass_that_fails_strands_nobody(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not who lost an expert in it before either: that one is computed again with the others."""
    expected = [alone(engine, PROMPTS[at]) for at in (0, 2)]
    engine.add(request("0", PROMPTS[0]))
    engine.add(request("1", PROMPTS[2]))
    engine.step()
    [both] = passes(engine)
    both._members[0].lost = "the disk was on fire"
    both._drop(both._members[0])

    def broken(*_: Any) -> None:
        raise ValueError("nobody's fault")

    monkeypatch.setattr(SuspendedPass, "_one", broken)
    events = engine.step()
    monkeypatch.undo()
    found = bits([*events, *engine.drain()])
    assert [found["0"], found["1"]] == expected
    engine._scheduler.check_integrity()


def test_a_reset_in_the_middle_leaves_nothing(engine: Engine) -> None:
    expected = alone(engine, PROMPTS[0])
    for after in (1, 12, 30):
        engine.add(request("gone", PROMPTS[0]))
        for _ in range(after):
            engine.step()
        assert passes(engine)
        engine.reset()
        assert not passes(engine) and not engine.has_work()
        assert engine._step.suspend is None and alone(engine, PROMPTS[0]) == expected


def test_an_engine_is_closed_from_another_thread(tmp_path: Path, pieces: None) -> None:
    build_checkpoint("olmoe", tmp_path)
    llm = LLM(str(tmp_path), memory="40%", max_model_len=64)
    llm.engine.add(request("gone", PROMPTS[0]))
    thread = threading.Thread(target=lambda: [llm.engine.step() for _ in range(9)])
    thread.start()
    thread.join()
    assert passes(llm.engine)
    llm.close()


def test_a_short_prompt_does_not_wait_for_a_long_one(engine: Engine) -> None:
    engine.add(request("long", PROMPTS[0]))
    for _ in range(3):
        engine.step()
    engine.add(request("short", PROMPTS[1]))
    firsts = [event.request_id for event in engine.drain() if event.token_ids]
    assert firsts.index("short") < firsts.index("long")
    engine.add(request("long", PROMPTS[0]))
    engine.add(request("short", PROMPTS[1]))  # they arrive together
    firsts = [event.request_id for event in engine.drain() if event.token_ids]
    assert firsts.index("short") < firsts.index("long")


def test_decode_goes_on_beside_a_prompt(engine: Engine) -> None:
    engine.add(request("stream", PROMPTS[3], 62))
    while not engine.step():
        pass
    engine.add(request("prompt", PROMPTS[2]))
    between = 0
    while "prompt" not in (told := {event.request_id for event in engine.step()}):
        assert "stream" in told, "every step has a token of the stream"
        between += 1
    assert between > 15


def test_a_layer_is_read_before_the_one_before_ends(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every missing expert once, whatever was read ahead."""
    ahead, early = ReadAhead.expect, list[tuple[int, int]]()

    def noted(self: ReadAhead, layer: int, experts: list[int]) -> bool:
        [each] = passes(engine)
        assert each._layer is not None
        missing = set(experts) - engine.cache.resident(layer)
        if missing and layer > each._layer.block.layer:
            early.append((layer, len(each._layer.rest)))
        return ahead(self, layer, experts)

    monkeypatch.setattr(ReadAhead, "expect", noted)
    layers = range(len(engine.cache.layout.experts_per_layer))
    missing = sum(int((~engine.cache.resident_mask(layer)).sum()) for layer in layers)
    read = engine.snapshot().bytes_loaded_device
    engine.add(request("0", PROMPTS[0], 1))
    engine.drain()
    assert engine.snapshot().bytes_loaded_device - read <= missing * engine.cache.layout.expert_bytes
    assert {layer for layer, _ in early} == set(layers[1:]) and max(rest for _, rest in early) > 1
    engine.cache.check_integrity()


def test_a_decode_that_was_held_up_makes_no_long_slices() -> None:
    turns = beside.PrefillBeside(None)
    for seconds in (0.01, 0.01, 1.0):
        turns.decoded(seconds)
    assert turns._slice(True) < 0.025
    for _ in range(70):
        turns.decoded(0.1)
    assert turns._slice(True) > 0.15, "but it gets used to what lasts"
    for at in range(70):
        turns.decoded(0.03 if at % 5 == 0 else 0.01)
    assert turns._slice(True) > 0.05, "and to what happens often"
    for at in range(70):
        turns.decoded(0.013 if at % 20 == 0 else 0.01)
    assert turns._slice(True) > 0.025, "or is no chance"


def test_forwards_are_cut_to_take_as_long_wherever_they_begin() -> None:
    """A row looks back to all before it: behind 2,000 tokens it takes 3.4 times as long."""
    forwards = ForwardSeconds()
    for start in range(0, 2048, 128):
        piece: Any = SimpleNamespace(ids=[0] * 128, positions=range(start, start + 128))
        forwards.measured(piece, 1e-4 * 128 + 1.3e-7 * sum(range(start + 1, start + 129)))
    for start in (0, 500, 2000):
        rows = forwards.rows(start, 0.02)
        piece = SimpleNamespace(ids=[0] * rows, positions=range(start, start + rows))
        assert forwards.of(piece) == pytest.approx(0.02, rel=0.05)
        assert 1e-4 * rows + 1.3e-7 * sum(range(start + 1, start + rows + 1)) == pytest.approx(0.02, rel=0.05)
    long = Sequence(request("long", [1] * 2000), max_model_len=4096)
    long.blocks = list(range(125))
    member = Member(PrefillChunk(seq=long, start=0, end=2000), long.blocks)
    cut = cut_pieces([member], lambda start: forwards.rows(start, 0.02), 16, torch.device("cpu"))
    counts = [len(piece.ids) for piece in cut]
    assert sum(counts) == 2000 and counts[0] > 2.5 * counts[-2], counts


def test_there_is_room_beside_the_longest_prompt() -> None:
    pool = Scheduler(num_blocks=100, block_size=4, max_running=9, prefill=Prefill(beside=16, alone=64), suspends=True)

    def add(name: str, tokens: int) -> Sequence:
        seq = Sequence(request(name, [1] * tokens), max_model_len=400)
        pool.add(seq)
        return seq

    def begun() -> dict[str, int]:
        found = {chunk.seq.request_id: chunk.end - chunk.start for chunk in pool.schedule().prefill}
        for seq in pool._admitted.values():
            seq.computing += found.get(seq.request_id, 0)
        return found

    add("a", 90)
    assert begun() == {"a": 64}
    add("b", 10)
    add("c", 10)
    assert begun() == {"b": 10, "c": 6} and begun() == {}


def test_prompts_of_a_kind_wait_for_the_pass_and_begin_together() -> None:
    """Each in a pass of its own would read all experts again."""
    pool = Scheduler(num_blocks=99, block_size=4, max_running=30, prefill=Prefill(beside=16, alone=16), suspends=True)
    for at in range(8):
        pool.add(Sequence(request(str(at), [1] * 4), max_model_len=400))

    def begun() -> list[Sequence]:
        found = [chunk.seq for chunk in pool.schedule().prefill]
        for seq in found:
            seq.computing = 4
        return found

    first = begun()
    assert [seq.request_id for seq in first] == ["0", "1", "2", "3"] and not begun()
    for seq in first:
        seq.computing = 0
        seq.advance(4)
    assert [seq.request_id for seq in begun()] == ["4", "5", "6", "7"]


SHORT_TEXTS = {"gone": PROMPTS[0][:4], "stays": PROMPTS[2][:5], "other": PROMPTS[2][:7]}


def three_short(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[TokenEvent]]:
    """Begun; what those that stay come to alone, and the events of the first step. Two share a forward."""
    monkeypatch.setattr(beside, "_ROWS_ALONE", 9)
    expected = {name: alone(engine, SHORT_TEXTS[name]) for name in ("stays", "other")}
    for name, ids in SHORT_TEXTS.items():
        engine.add(request(name, ids))
    return expected, engine.step()


@pytest.mark.parametrize("after", [1, 4, 9])
def test_short_prompts_share_a_forward_and_whoever_leaves_it_costs_the_others_time_alone(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    expected, events = three_short(engine, monkeypatch)
    [each] = passes(engine)
    assert len([*each._ready, *(each._layer.pieces if each._layer else ())]) == 2
    for _ in range(after):
        events += engine.step()
    engine.cancel("gone")
    engine.add(request("new", SHORT_TEXTS["gone"]))  # into the blocks that are free now
    found = bits([event for event in [*events, *engine.drain()] if event.request_id not in ("gone", "new")])
    assert found == expected and not passes(engine)
    engine._scheduler.check_integrity()
    engine.cache.check_integrity()


def test_the_last_layer_runs_experts_of_rows_alone_whose_logits_are_wanted(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = dict[int, int]()
    run = SuspendedPass._run

    def noted(self: SuspendedPass, layer: Any, *more: Any) -> float:
        ran.setdefault(layer.block.layer, sum(map(len, layer.rest.values())))
        return run(self, layer, *more)

    monkeypatch.setattr(SuspendedPass, "_run", noted)
    engine.add(request("0", PROMPTS[0], 1))
    engine.drain()
    top_k = ran[0] // len(PROMPTS[0])
    assert top_k > 0 and set(ran.values()) == {len(PROMPTS[0]) * top_k, top_k} and ran[max(ran)] == top_k


def test_who_began_anew_is_not_given_up_with_the_pass_that_it_left(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else two passes would count its tokens."""
    expected, events = three_short(engine, monkeypatch)
    [first] = passes(engine)
    engine.cancel("gone")
    first.leave()
    [stays] = [member for member in first._members if member.chunk.seq.request_id == "stays"]
    assert stays.gone and not stays.there and stays.chunk.seq.computing == 0
    left = [chunk.seq.request_id for chunk in first.close()]
    assert left == ["other"]
    engine._beside.reset()
    found = bits([event for event in [*events, *engine.drain()] if event.request_id != "gone"])
    assert found == expected
    engine._scheduler.check_integrity()
