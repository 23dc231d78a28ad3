"""Decode steps recorded once and replayed, on a GPU or its twin: the tokens and accounts of the eager engine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from calibration_rig import random_ids, silent
from families import build_checkpoint

from buddymoe_ray.cache import HostTier
from buddymoe_ray.calibrate.expected_loss import LossOptions
from buddymoe_ray.calibrate.run import CalibrationOptions, calibrate
from buddymoe_ray.config import EngineConfig
from buddymoe_ray.engine.engine import Engine
from buddymoe_ray.engine.in_flight import AHEAD
from buddymoe_ray.engine.llm import LLM
from buddymoe_ray.engine.recorded import PIECES, REPLAYED, RecordedDecode, _RecordedStep
from buddymoe_ray.engine.runner import PackedRunner
from buddymoe_ray.moe import DeviceTables, MoEBlock, OnDevice, RecordedLayer
from buddymoe_ray.residency import standin_setup, tier
from buddymoe_ray.types import GenerationRequest, SamplingParams, TokenEvent, Usage

DEVICE = "cuda" if torch.cuda.is_available() else "interpret"
SIZES = {
    **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1},
    **{"num_experts_per_tok": 2, "num_experts": 8, "moe_intermediate_size": 32},
}
MODES = ("exact", "bounded", "fast")
Answers = dict[str, tuple[list[int], Usage]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random, calibrated."""
    folder = build_checkpoint("qwen3_moe", tmp_path_factory.mktemp("model"), **SIZES)
    options = CalibrationOptions(
        config=EngineConfig(model=str(folder), memory="100%", dtype="float32"),
        ids=random_ids(1400),
        out=folder / "p.profile",
        kinds=("lowbit4",),
        window=64,
        compensated=False,
        losses=LossOptions(memories=(50.0,), budgets=(0.01,), tokens=128),
    )
    calibrate(options, progress=silent)
    return folder


@pytest.fixture(autouse=True)
def two_wave_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where experts are too large to be read on the spot, on GPUs and beside them."""
    for module in (standin_setup, tier):
        monkeypatch.setattr(module, "READ_ON_THE_SPOT", 0)


@contextmanager
def opened(model: Path, device: str, *, recorded: bool = True, memory: str = "50%", **more: Any) -> Iterator[Engine]:
    options: dict[str, Any] = {"mode": "bounded", "budget": 0.05, "profile": str(model / "p.profile")} | more
    with LLM(
        str(model), dtype="float32", device=device, memory=memory, max_running=4, guard_share=0.0, **options
    ) as llm:
        runner = llm.engine._runner
        assert isinstance(runner, PackedRunner)
        runner.recorded = runner.recorded if recorded else None
        yield llm.engine


def answers(engine: Engine, *, steps: int, modes: tuple[str, ...] = MODES, record: bool = False) -> Answers:
    """Of a request of each mode, beside each other."""
    for at, mode in enumerate(modes):
        sampling = SamplingParams(temperature=0.0, max_tokens=steps, ignore_eos=True)
        ids = (5 + at, 17, 90)
        request = GenerationRequest(request_id=mode, prompt_token_ids=ids, sampling=sampling, record=record)
        engine.add(replace(request, mode=mode))
    tokens, usages = dict[str, list[int]](), dict[str, Usage]()
    for event in engine.drain():
        tokens.setdefault(event.request_id, []).extend(event.token_ids)
        usages |= {} if event.usage is None else {event.request_id: event.usage}
    engine.cache.check_integrity()
    return {mode: (tokens[mode], usages[mode]) for mode in modes}


def counted(monkeypatch: pytest.MonkeyPatch, seen: Counter[str]) -> None:
    """Note who is called from now on, and how often."""

    def note(owner: type, name: str) -> None:
        called: Callable[..., Any] = getattr(owner, name)

        def noting(*args: Any, **kwargs: Any) -> Any:
            seen[name] += 1
            return called(*args, **kwargs)

        monkeypatch.setattr(owner, name, noting)

    for owner, name in ((RecordedLayer, "bring"), (MoEBlock, "answered"), (MoEBlock, "__call__")):
        note(owner, name)


def test_steps_of_all_modes_are_the_eager_engines(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """42 tokens, with hits, fetches into other experts' slots, stand-ins and stalls between replays."""
    with opened(model, "cpu") as engine:
        expected = {mode: tokens for mode, (tokens, _) in answers(engine, steps=14).items()}
    with opened(model, DEVICE, recorded=False) as engine:
        eager = answers(engine, steps=14)
    seen, tables = Counter[str](), set[bytes]()
    with opened(model, DEVICE) as engine:
        counted(monkeypatch, seen)
        renew = DeviceTables.renew

        def renewed(self: DeviceTables) -> None:
            renew(self)
            tables.add(self.at_E.cpu().numpy().tobytes())

        monkeypatch.setattr(DeviceTables, "renew", renewed)
        replayed = answers(engine, steps=14)
    assert {mode: tokens for mode, (tokens, _) in replayed.items()} == expected
    usages, others = ([usage for _, usage in answered.values()] for answered in (replayed, eager))
    for usage, other in zip(usages, others, strict=True):  # sums are of other bits beside a row of padding
        assert replace(usage, expected_rise=other.expected_rise) == other, (
            "hits, fetches, stand-ins, none of them twice"
        )
        assert usage.expected_rise == pytest.approx(other.expected_rise, rel=1e-4)
    assert {mode: tokens for mode, (tokens, _) in eager.items()} == expected
    assert [usage.hits + usage.fetched + usage.standins.total for usage in usages] == 3 * [13 * 2 * 2]
    assert all(usage.hits and usage.fetched for usage in usages) and all(u.standins.lowbit for u in usages[1:])
    assert seen["bring"] > 5 and seen["answered"] > 2 and seen["bring"] + seen["answered"] == 13 * 2
    assert len(tables) > 10, "experts moved between replays"
    assert seen["__call__"] <= 2 * 2 * 2, "the model's Python ran for the prompts, and for a recording"


def test_fast_rows_never_wait_and_are_answered_on_the_device(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Counter[str]()
    with opened(model, DEVICE, recorded=False) as engine:
        eager = answers(engine, steps=6, modes=("fast",), record=True)
    with opened(model, DEVICE) as engine:
        counted(monkeypatch, seen)
        assert answers(engine, steps=6, modes=("fast",), record=True) == eager
    usage = eager["fast"][1]
    assert usage.standins.lowbit > 0 and usage.record is not None and seen["bring"] == 0


def test_resident_experts_are_one_piece(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Counter[str]()
    with opened(model, "cpu", memory="100%") as engine:
        expected = answers(engine, steps=6, modes=("exact",))["exact"][0]
    with opened(model, DEVICE, memory="100%") as engine:
        counted(monkeypatch, seen)
        found, usage = answers(engine, steps=6, modes=("exact",))["exact"]
    assert found == expected and usage.hits == 5 * 2 * 2 and not seen["bring"] + seen["answered"]


def test_behind_a_stall_little_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of eight layers, half of which miss something, about one piece more than two lots of one, as steps are by then:
    lots of four have 105 pieces in vain, of 21 stalls."""
    folder, found = build_checkpoint("qwen3_moe", tmp_path, **SIZES | {"num_hidden_layers": 8}), list[list[int]]()
    for device in ("cpu", DEVICE):
        before, seen = PIECES.copy(), Counter[str]()
        with LLM(str(folder), dtype="float32", device=device, memory="40%") as llm, monkeypatch.context() as patched:
            counted(patched, seen)
            [result] = llm.generate([[5, 17, 90]], max_tokens=6)
            found.append(list(result.token_ids))
        ran, vain = (PIECES - before)["ran"], (PIECES - before)["in vain"]
        if device == DEVICE:
            assert seen["bring"] > 15 and 0 < vain <= 3 * seen["bring"]
            assert 5 * 8 <= ran - vain <= 5 * 9, "each piece once"
    assert found[0] == found[1]


def played(model: Path, modes: tuple[str, ...], memory: str, *, ahead: bool) -> tuple[list[TokenEvent], Counter[str]]:
    """All that is told of requests of such modes, each with settings of its own; one ends at a token, one by length,
    one is cancelled. Of exact ones, whose answers do not depend on what is there meanwhile, one comes later, and one
    has its blocks taken away. And what was counted."""
    settings: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0, "top_p": 0.9, "seed": 6, "stop_token_ids": tuple(range(0, 128, 6))},
        {"temperature": 0.7, "top_k": 9, "min_p": 0.05, "seed": 2, "max_tokens": 3},
        {"temperature": 1.5, "seed": 3, "max_tokens": 40},
        {"temperature": 0.9, "seed": 4, "max_tokens": 2},
    ]
    events, before, exact = list[TokenEvent](), AHEAD.copy(), modes == ("exact",)
    with opened(model, DEVICE, memory=memory) as engine:
        runner: Any = engine._runner
        runner.recorded.ahead = ahead
        for at, how in enumerate(settings[: 5 if exact else 4]):
            sampling = SamplingParams(**{"max_tokens": 8} | how)
            request = GenerationRequest(request_id=str(at), prompt_token_ids=(5 + at, 17, 90), sampling=sampling)
            engine.add(replace(request, mode=modes[at % len(modes)]))
            for _ in range(5 if at == 3 else 0):
                events += engine.step()
        engine.cancel("3")
        events += engine.step()
        scheduler = engine._scheduler
        if exact:
            scheduler._preempt(scheduler._admitted["0"])
        events += engine.drain()
        scheduler.check_integrity()
        assert scheduler.free_blocks == scheduler.num_blocks
    return events, AHEAD - before


@pytest.mark.parametrize(("modes", "memory"), [(("fast",), "50%"), (("exact",), "88%")])
def test_steps_begun_ahead_of_the_host_change_nothing(model: Path, modes: tuple[str, ...], memory: str) -> None:
    """Neither where all come through, which never lets the device wait, nor beside stalls."""
    expected, without = played(model, modes, memory, ahead=False)
    found, counts = played(model, modes, memory, ahead=True)
    assert without["begun"] == 0 and len(found) == len(expected)
    for event, other in zip(found, expected, strict=True):
        usages = [one.usage and replace(one.usage, expected_rise=0.0) for one in (event, other)]
        assert usages[0] == usages[1] and replace(event, usage=None) == replace(other, usage=None)
        if event.usage is not None and other.usage is not None:
            assert event.usage.expected_rise == pytest.approx(other.usage.expected_rise, rel=1e-4)
    reasons = {event.request_id: event.finish_reason for event in found if event.finish_reason}
    assert reasons["2"] == reasons["0"] == "length" and reasons["3"] == "cancelled"
    if modes == ("fast",):
        assert reasons["1"] == "stop", "in the middle"
        assert counts == {"begun": 6, "taken": 6, "waits": 2}, "for the first step's layers, and the last one's tokens"
    else:
        assert counts["begun"] > counts["taken"] > 0 and sum(e.usage.fetched for e in found if e.usage) > 2


def test_what_a_row_could_not_have_paid_is_computed_again(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that is begun ahead knows no row's balance; who did not look would spend more than there is."""

    def answered(*, ahead: bool) -> tuple[list[TokenEvent], Counter[str]]:
        before = AHEAD.copy()
        with opened(model, DEVICE) as engine:
            runner: Any = engine._runner
            runner.recorded.ahead = ahead
            for at in range(2):
                sampling = SamplingParams(temperature=1.0, seed=at, max_tokens=8)
                request = GenerationRequest(request_id=str(at), prompt_token_ids=(5 + at, 17, 90), sampling=sampling)
                engine.add(replace(request, mode="bounded", budget=0.01))
            return engine.drain(), AHEAD - before

    (expected, _), (found, counts) = answered(ahead=False), answered(ahead=True)
    assert found == expected and counts["begun"] > counts["taken"] > 0
    assert all(e.usage.standins.total > 10 for e in found if e.usage) and any(e.usage.fetched for e in found if e.usage)
    monkeypatch.setattr("buddymoe_ray.engine.recorded.affordable", lambda *_: True)
    assert any(event.finish_reason == "error" for event in answered(ahead=True)[0])


def test_what_was_begun_before_others_stand_in_is_dropped(model: Path) -> None:
    with opened(model, DEVICE) as engine:
        sampling = SamplingParams(temperature=0.0, max_tokens=5)
        engine.add(GenerationRequest(request_id="0", prompt_token_ids=(5, 17, 90), sampling=sampling, mode="fast"))
        blocks, taken = engine._experts.blocks, [AHEAD["taken"]]
        for at in range(4):
            if at == 3:
                others = copy(blocks[0].standins)
                assert others is not None
                for block in blocks:
                    block.begin_standing_in(others)
            engine.step()
            taken.append(AHEAD["taken"])
        engine.drain()
    assert [after - before for before, after in pairwise(taken)] == [0, 0, 1, 0]


@pytest.mark.parametrize("forgotten", ["the table", "the lengths"])
def test_what_a_recording_took_as_it_was_is_seen(model: Path, forgotten: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Addresses of experts, or lengths of texts, that were the recording's own."""
    if forgotten == "the table":
        table = OnDevice.table
        monkeypatch.setattr(OnDevice, "table", lambda *args: table(*args).clone())
    else:
        fill = _RecordedStep.fill

        def filled(self: _RecordedStep, *args: Any) -> None:
            self._lengths_T = self._lengths_T.clone()  # before they are written
            fill(self, *args)

        monkeypatch.setattr(_RecordedStep, "fill", filled)
    with opened(model, "cpu") as engine:
        expected = answers(engine, steps=12, modes=("exact",))["exact"][0]
    with opened(model, DEVICE) as engine:
        assert answers(engine, steps=12, modes=("exact",))["exact"][0] != expected


def test_what_cannot_be_recorded_says_why_and_is_computed_all_the_same(
    model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(model, DEVICE) as engine:
        runner: Any = engine._runner
        recorded: RecordedDecode = runner.recorded
        compute = recorded.compute
        recorded.compute = lambda ids, *rest: compute(ids + 0 * ids.max().item(), *rest)  # type: ignore[method-assign]
        with caplog.at_level("WARNING"):
            found = answers(engine, steps=3, modes=("exact",))["exact"][0]
    assert "decode steps are not recorded" in caplog.text and caplog.text.count("not recorded") == 1
    with opened(model, "cpu") as engine:
        assert found == answers(engine, steps=3, modes=("exact",))["exact"][0]


def test_recordings_take_no_more_memory_than_is_planned(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Steps of so many rows that theirs would are computed without."""
    found, before = list[Answers](), REPLAYED.copy()
    for device in (DEVICE, "cpu"):
        with opened(model, device, memory="100%") as engine:
            answers(engine, steps=2, modes=("exact",))
            recorded: RecordedDecode | None = engine._runner.recorded
            if recorded is not None:
                [made] = recorded._steps.values()
                assert made.nbytes > made._recording.nbytes > sum(part.nbytes for part in made.logits)
                recorded.sizes = replace(recorded.sizes, most_bytes=2 * made.nbytes)
            found.append(answers(engine, steps=3, modes=MODES))
            assert recorded is None or [*recorded._steps] == [1]
    assert "decode steps of 4 rows and more are not recorded" in caplog.text and (REPLAYED - before).keys() == {1}
    assert [ids for ids, _ in found[0].values()] == [ids for ids, _ in found[1].values()]


@pytest.mark.parametrize("family", ["jamba", "qwen3_next"])
def test_states_that_layers_carry_are_each_rows_own(family: str, tmp_path: Path) -> None:
    """Of three rows beside one of padding."""
    build_checkpoint(family, tmp_path)
    found, before = list[list[tuple[int, ...]]](), REPLAYED.copy()
    for device in ("cpu", DEVICE):
        with LLM(str(tmp_path), dtype="float32", device=device, memory="75%", max_running=3, guard_share=0.0) as llm:
            results = llm.generate([[5, 17, 90], [44, 7, 31, 8], [9, 9]], max_tokens=4)
            found.append([result.token_ids for result in results])
    assert found[0] == found[1] and (REPLAYED - before)[4] > 1


def test_misses_beside_a_slow_link_are_computed_by_the_host(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rows of `bounded` that no stand-in may answer, where the layer stalled; those of `exact` wait, as ever."""

    def slow(self: HostTier, slot: int, _seconds: float) -> None:
        self.copy_seconds = 1e3
        self.release(slot)

    monkeypatch.setattr(HostTier, "copied", slow)
    terms: dict[str, Any] = {"budget": 1e-9, "host_memory": "100%"}
    with opened(model, "cpu", **terms) as engine:
        expected, other = answers(engine, steps=14, modes=("bounded",))["bounded"]
    seen = Counter[str]()
    with opened(model, DEVICE, **terms) as engine:
        answers(engine, steps=14, modes=("exact",))  # its experts come by the host's memory, and stay there
        counted(monkeypatch, seen)
        found = answers(engine, steps=14, modes=("bounded",)) | answers(engine, steps=14, modes=("exact",))
        spent = engine.snapshot()
    assert [tokens for tokens, _ in found.values()] == [expected, expected]
    usage, exact = found["bounded"][1], found["exact"][1]
    assert usage.host > 5 > usage.fetched and usage.host + usage.hits + usage.fetched == 13 * 2 * 2
    assert exact.fetched > 5 and not exact.host and spent.access_host == usage.host
    assert seen["bring"] > 5 and not other.host, "a CPU's own memory has nothing to compute beside"
