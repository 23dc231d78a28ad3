"""What is run, in which groups, and what is made of it: sensitivities, scales, budget curve, and machines too small."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calibration_rig import random_ids, silent, write_checkpoint
from profiles import make_profile

from buddymoe_ray.calibrate import expected_loss
from buddymoe_ray.calibrate.bench import Bench, Footprint
from buddymoe_ray.calibrate.expected_loss import LossOptions
from buddymoe_ray.calibrate.run import CalibrationOptions, calibrate
from buddymoe_ray.config import EngineConfig
from buddymoe_ray.engine.evaluate import EvalResult, cut_windows

GB = 10**9


def result(kl: float, predicted: float, *, fetched: float = 0.0, dppl: float = 0.1) -> EvalResult:
    return EvalResult(
        ppl_exact=5.0,
        ppl=5.1,
        dppl_percent=dppl,
        dppl_se=0.01,
        kl=kl,
        top1_agreement=99.0,
        miss_rate=50.0,
        fetched_fraction=fetched,
        standin_fraction=100 - fetched,
        expected_rise=predicted,
        tokens=1000,
        windows=5,
    )


class Scripted(Bench):
    """Answers variants from a function instead of running engines; keeps what it was asked."""

    def __init__(self, answer: Any, *, hosted: bool = True, windows: int = 32) -> None:
        self._answer, self.hosted, self.windows = answer, hosted, [()] * windows
        self.asked: list[tuple[str, dict[str, Any], int]] = []

    def run(self, variants: Sequence[Mapping[str, Any]], what: str, *, every: int = 1) -> list[EvalResult | None]:
        self.asked += [(what, dict(variant), every) for variant in variants]
        return [self._answer(dict(variant)) for variant in variants]


def test_sensitivity_is_measured_over_predicted_layer_by_layer() -> None:
    bench = Scripted(lambda v: result(0.01 * (1 + int(v["standin_layers"])), 2.0))
    found_L = expected_loss._sensitivity(bench, make_profile(layers=3), "lowbit", (75.0, 25.0, 50.0))
    np.testing.assert_allclose(found_L, [0.005, 0.01, 0.015], rtol=1e-6)
    assert {v["memory"] for _, v, _ in bench.asked} == {"25.0%"} and {every for *_, every in bench.asked} == {1}


def test_a_layer_that_predicts_nothing_costs_as_much_as_the_costliest() -> None:
    """A layer whose experts were all resident has nothing to divide by."""
    expected = {"0": 2.0, "1": 0.0, "2": 1.0}
    bench = Scripted(lambda v: result(0.02, expected[v["standin_layers"]]))
    found_L = expected_loss._sensitivity(bench, make_profile(layers=3), "mean", (50.0,))
    np.testing.assert_allclose(found_L, [0.01, 0.02, 0.02], rtol=1e-6)


def test_the_least_memory_that_holds_the_probe_is_taken() -> None:
    bench = Scripted(lambda v: result(0.02, 2.0) if v["memory"] == "75.0%" else None)
    assert np.isfinite(expected_loss._sensitivity(bench, make_profile(layers=2), "lowbit4", (75.0, 25.0))).all()
    assert {v["memory"] for _, v, _ in bench.asked} == {"25.0%", "75.0%"}
    roomy = Scripted(lambda v: result(0.02, 2.0) if v["memory"] == "80.0%" else None)
    assert np.isfinite(expected_loss._sensitivity(roomy, make_profile(layers=2), "lowbit4", (50.0, 75.0))).all()
    assert [v["memory"] for _, v, _ in roomy.asked[::2]] == ["50.0%", "75.0%", "80.0%"]
    nothing = Scripted(lambda v: None)
    assert np.isnan(expected_loss._sensitivity(nothing, make_profile(layers=2), "lowbit4", (75.0, 25.0))).all()


def test_without_memory_for_other_layers_all_layers_share_one_number() -> None:
    bench = Scripted(lambda v: result(0.02, 4.0), hosted=False)
    np.testing.assert_allclose(expected_loss._sensitivity(bench, make_profile(layers=3), "lowbit", (25.0,)), 0.005)
    assert [v for _, v, _ in bench.asked] == [{"standin": "lowbit", "memory": "25.0%"}]


def test_deep_models_are_measured_on_fewer_windows() -> None:
    for windows, every in ((32, 4), (8, 1)):
        bench = Scripted(lambda v: result(0.02, 2.0), windows=windows)
        expected_loss._sensitivity(bench, make_profile(layers=12), "lowbit", (25.0,))
        assert {asked for *_, asked in bench.asked} == {every} and len(bench.asked) == 12


def test_scales_bring_all_rows_near_at_once() -> None:
    """One kind: the mean in the logarithm. What predicts nothing says nothing."""
    found = [
        ("lowbit3", 75.0, result(0.005, 0.01)),
        ("lowbit3", 25.0, result(0.04, 0.02)),
        ("mean", 50.0, result(0.1, 0.0)),
    ]
    scales, error = expected_loss._scales(found)
    assert scales == {"lowbit3": pytest.approx(1.0)} and error == pytest.approx(math.log(2))
    assert expected_loss._scales(found[2:]) == ({}, 0.0)


def test_a_mix_tells_about_its_kinds() -> None:
    """Every row is met where that can be; answers of nobody's record are the stand-in's."""
    mixed = {"lowbit2": 0.03, "lowbit4": 0.01}
    found = [
        ("lowbit", 50.0, replace(result(0.07, 0.04), expected_by_kind=mixed)),
        ("lowbit2", 50.0, replace(result(0.1, 0.05), expected_by_kind={"lowbit2": 0.05})),
        ("buddy:output", 50.0, replace(result(0.5, 0.25), expected_by_kind={"": 0.25})),
    ]
    scales, error = expected_loss._scales(found)
    assert scales == pytest.approx({"lowbit2": 2.0, "lowbit4": 1.0, "buddy:output": 2.0}, rel=1e-3)
    assert error < 1e-3


def test_a_budget_that_fetches_nothing_settles_the_larger_ones() -> None:
    def answer(variant: dict[str, Any]) -> EvalResult | None:
        if variant["memory"] == "12.0%":
            return None
        spends_all = variant["memory"] == "25.0%"
        return result(0.001, variant["budget"], fetched=50 - 1000 * variant["budget"] if spends_all else 0.0)

    bench = Scripted(answer)
    options = LossOptions(memories=(75.0, 25.0, 12.0), budgets=(0.001, 0.01, 0.003))
    curve = {(p.memory_percent, p.budget): p for p in expected_loss._budget_curve(bench, "auto", options)}
    assert set(curve) == {(m, b) for m in (75.0, 25.0) for b in (0.001, 0.003, 0.01)}
    assert len(bench.asked) == 3 + 2, "only 25 % had anything left to settle"
    assert all(curve[75.0, b].fetched_fraction == 0 for b in (0.001, 0.003, 0.01))
    assert [curve[25.0, b].fetched_fraction for b in (0.001, 0.003, 0.01)] == [49, 47, 40]
    assert all(v["mode"] == "bounded" and v["standin"] == "auto" for _, v, _ in bench.asked)


def test_nothing_within_the_budget_is_not_recommended() -> None:
    rows = {
        name: expected_loss._comparison(name, 50.0, result(kl, 1, dppl=d))
        for name, kl, d in (("a", 0.1, 9), ("b", 0.2, 8))
    }
    hopeless = expected_loss._recommend(replace(make_profile(), comparison=tuple(rows.values())))
    assert hopeless.recommended is None and hopeless.reason.startswith("a raises perplexity by 9.00 ± 0.01 % at 50 %")
    good = expected_loss._comparison("lowbit", 50.0, result(0.001, 1, dppl=0.2))
    better = expected_loss._recommend(replace(make_profile(), comparison=(*rows.values(), good)))
    assert better.recommended == "lowbit" and "the least of 3" in better.reason
    roomy = replace(good, memory_percent=75.0)
    above = expected_loss._recommend(replace(make_profile(), comparison=(*rows.values(), roomy)))
    assert above.recommended == "lowbit" and above.reason.endswith("; at 50 % all cost more than 0.3 %")
    tight = replace(good, memory_percent=25.0)
    below = expected_loss._recommend(replace(make_profile(), comparison=(*rows.values(), tight)))
    assert below.recommended is None and "50 % memory" in below.reason
    nothing = expected_loss._recommend(replace(make_profile(), comparison=()))
    assert nothing.recommended is None and nothing.reason


def bench_with(free: int, *, experts: int = GB, dense: int = 10**8) -> Bench:
    footprint = Footprint(experts=experts, dense=dense)
    return Bench(EngineConfig(), Path("p.profile"), [(1,) * 256], footprint, silent, free=free)


def test_engines_run_side_by_side_as_memory_allows() -> None:
    """In 0.8 of what is free, less the resident reference; with a host tier each where there is room."""
    variants = [EngineConfig(memory="25%")] * 40
    roomy, tight = bench_with(400 * GB), bench_with(3 * GB)
    assert roomy.hosted and [len(group) for group in roomy._groups(dict(enumerate(variants)))] == [16, 16, 8]
    assert not tight.hosted
    left = 0.8 * 3 * GB - (1.1 * GB + (64 << 20))
    each = 0.35 * GB + (64 << 20)
    assert next(len(group) for group in tight._groups(dict(enumerate(variants)))) == int(left // each)
    assert sorted(at for group in tight._groups(dict(enumerate(variants))) for at in group) == list(range(40))


def test_what_does_not_fit_the_machine_is_left_out_and_said(caplog: pytest.LogCaptureFixture) -> None:
    bench = bench_with(2 * GB)
    variants = [EngineConfig(memory="75%", mode="fast", standin="lowbit3"), EngineConfig(memory="12%")]
    with caplog.at_level(logging.WARNING):
        assert bench._groups(dict(enumerate(variants))) == [[1]]
    assert "lowbit3 at 75% takes 0.9 GB beside the exact engine, 0.4 are left: not measured. hint:" in caplog.text


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[EngineConfig, Path]:
    folder = write_checkpoint("olmoe", tmp_path_factory.mktemp("olmoe"), num_hidden_layers=1)
    config = EngineConfig(model=str(folder), memory="100%", dtype="float32")
    out = folder / "q.profile"
    options = CalibrationOptions(
        config=config, ids=random_ids(900), out=out, kinds=("lowbit4", "mean"), window=64, compensated=False, quick=True
    )
    calibrate(options)
    return config, out


def test_real_engines_are_compared_and_those_without_room_are_none(quick: tuple[EngineConfig, Path]) -> None:
    """Too small a budget for 4-bit records; one of two windows where only some are asked for."""
    config, out = quick
    windows = cut_windows(random_ids(512, seed=5), tokens=None)
    footprint = Footprint(experts=10**6, dense=10**6)
    bench = Bench(config, out, windows, footprint, silent)
    assert bench.hosted
    mean, low, exact = bench.run(
        [
            {"standin": "mean", "memory": "60%"},
            {"standin": "lowbit4", "memory": "15%"},
            {"mode": "exact", "memory": "60%", "profile": None},
        ],
        "try",
        every=2,
    )
    assert low is None
    assert mean is not None and exact is not None and mean.tokens == exact.tokens == 192
    assert mean.kl > 0 and mean.fetched_fraction == 0 and mean.expected_rise > 0
    assert exact.kl == pytest.approx(0, abs=1e-9) and exact.fetched_fraction in (0.0, 100.0)
    assert not math.isnan(mean.dppl_percent)
