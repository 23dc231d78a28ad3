"""Decode steps recorded once and replayed, on a GPU or its twin: the tokens and accounts of the eager engine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from calibration_rig import random_ids, silent
from families import build_checkpoint

from buddymoe_ray.calibrate.expected_loss import LossOptions
from buddymoe_ray.calibrate.run import CalibrationOptions, calibrate
from buddymoe_ray.config import EngineConfig
from buddymoe_ray.engine.engine import Engine
from buddymoe_ray.engine.llm import LLM
from buddymoe_ray.engine.recorded import REPLAYED, RecordedDecode, _RecordedStep
from buddymoe_ray.engine.runner import PackedRunner
from buddymoe_ray.moe import DeviceTables, MoEBlock, OnDevice, RecordedLayer
from buddymoe_ray.types import GenerationRequest, SamplingParams, Usage

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


@contextmanager
def opened(model: Path, device: str, *, recorded: bool = True, memory: str = "50%") -> Iterator[Engine]:
    options: dict[str, Any] = {"mode": "bounded", "budget": 0.05, "profile": str(model / "p.profile")}
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
    """66 tokens, with hits, fetches into other experts' slots, stand-ins and stalls between replays."""
    with opened(model, "cpu") as engine:
        expected = {mode: tokens for mode, (tokens, _) in answers(engine, steps=22).items()}
    with opened(model, DEVICE, recorded=False) as engine:
        eager = answers(engine, steps=22)
    seen, tables = Counter[str](), set[bytes]()
    with opened(model, DEVICE) as engine:
        counted(monkeypatch, seen)
        renew = DeviceTables.renew

        def renewed(self: DeviceTables) -> None:
            renew(self)
            tables.add(self.at_E.cpu().numpy().tobytes())

        monkeypatch.setattr(DeviceTables, "renew", renewed)
        replayed = answers(engine, steps=22)
    assert {mode: tokens for mode, (tokens, _) in replayed.items()} == expected
    usages, others = ([usage for _, usage in answered.values()] for answered in (replayed, eager))
    for usage, other in zip(usages, others, strict=True):  # sums are of other bits beside a row of padding
        assert replace(usage, expected_rise=other.expected_rise) == other, (
            "hits, fetches, stand-ins, none of them twice"
        )
        assert usage.expected_rise == pytest.approx(other.expected_rise, rel=1e-4)
    assert {mode: tokens for mode, (tokens, _) in eager.items()} == expected
    assert [usage.hits + usage.fetched + usage.standins.total for usage in usages] == 3 * [21 * 2 * 2]
    assert all(usage.hits and usage.fetched for usage in usages) and all(u.standins.lowbit for u in usages[1:])
    assert seen["bring"] > 5 and seen["answered"] > 1 and seen["bring"] + seen["answered"] == 21 * 2
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


def test_what_ran_ahead_of_a_stall_leaves_nothing_behind(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However far the host looks ahead."""
    with opened(model, DEVICE, recorded=False) as engine:
        eager = answers(engine, steps=8, modes=MODES[:2])
    monkeypatch.setattr(_RecordedStep, "_reach", property(lambda _: 99, lambda *_: None), raising=False)
    seen = Counter[str]()
    with opened(model, DEVICE) as engine:
        counted(monkeypatch, seen)
        assert answers(engine, steps=8, modes=MODES[:2]) == eager
    assert seen["bring"] > 2 and eager["bounded"][1].standins.lowbit > 0


@pytest.mark.parametrize("forgotten", ["the table", "the lengths"])
def test_what_a_recording_took_as_it_was_is_seen(model: Path, forgotten: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Addresses of experts, or lengths of texts, that were the recording's own."""
    if forgotten == "the table":
        table = OnDevice.table
        monkeypatch.setattr(OnDevice, "table", lambda *args: table(*args).clone())
    else:
        from buddymoe_ray.engine.recorded import PackedPass

        fixed = PackedPass.fixed
        monkeypatch.setattr(PackedPass, "fixed", lambda slots, blocks, lengths: fixed(slots, blocks, lengths.clone()))
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
