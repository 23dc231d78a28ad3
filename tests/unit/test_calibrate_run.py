"""Calibrations from corpus to profile: whole on a cut of builtin:tiny's text, quick on random models, and refused."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calibration_rig import opened, random_ids, silent, write_checkpoint
from coded_checkpoints import quantised

from buddymoe_ray.calibrate import run as calibration
from buddymoe_ray.calibrate.expected_loss import LossOptions
from buddymoe_ray.calibrate.pace import scored_tokens, traced_tokens
from buddymoe_ray.calibrate.run import KINDS, CalibrationOptions, calibrate
from buddymoe_ray.config import EngineConfig
from buddymoe_ray.engine.evaluate import EvalResult, cut_windows, evaluate_many
from buddymoe_ray.engine.llm import LLM
from buddymoe_ray.errors import BuddyMoEError, ConfigError, ProfileError
from buddymoe_ray.models.fingerprint import model_hash
from buddymoe_ray.models.profile import Profile, load_profile
from buddymoe_ray.models.resolve import resolve_model
from buddymoe_ray.models.standin_files import standin_layouts, standins_folder, verify_standins
from buddymoe_ray.models.tokenizer import load_tokenizer


def options_of(folder: Path, out: Path, **changes: Any) -> CalibrationOptions:
    """A quick calibration of a small random checkpoint."""
    chosen: dict[str, Any] = {
        "config": EngineConfig(model=str(folder), memory="100%", dtype="float32"),
        "ids": random_ids(900),
        "out": out,
        "kinds": ("lowbit4", "mean"),
        "window": 64,
        "compensated": False,
        "rank": 4,
        "quick": True,
    }
    return CalibrationOptions(**(chosen | changes))


@pytest.fixture(scope="module")
def olmoe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("olmoe", tmp_path_factory.mktemp("olmoe"))


def tiny_ids() -> list[int]:
    """The start of builtin:tiny's held-out Python (nothing here judges quality)."""
    folder = resolve_model("builtin:tiny")
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None
    text = (folder / "heldout" / "python.txt").read_text()[:14_000]
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False, verbose=False)[:3600]
    assert len(ids) == 3600
    return ids


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Profile, Path]:
    """Everything, on a few windows of text."""
    out = tmp_path_factory.mktemp("whole") / "cut.profile"
    options = CalibrationOptions(
        config=EngineConfig(memory="50%"),
        ids=tiny_ids(),
        out=out,
        kinds=("lowbit4", "mean"),
        window=128,
        compensated=False,
        losses=LossOptions(memories=(37.5,), budgets=(0.001,), tokens=384),
    )
    return calibrate(options, progress=silent), out


def test_the_whole_leaves_a_profile_with_expected_losses_in_nats(whole: tuple[Profile, Path]) -> None:
    profile, out = whole
    read = load_profile(out, model_hash=model_hash(resolve_model("builtin:tiny")))
    assert read.measured and read.reason == profile.reason and read.comparison == profile.comparison
    assert (read.layers, read.experts, read.top_k, read.norm_topk) == (4, 32, 4, True)
    assert (read.sensitivity_L > 0).all() and np.isfinite(read.sensitivity_L).all()
    assert read.calibration_tokens == 20 * 128 and read.counts_LE.sum() == 4 * 4 * read.calibration_tokens
    assert set(read.errors) == {"lowbit4", "mean", "drop"}
    assert sorted(path.name for path in out.parent.iterdir()) == ["cut.profile", "cut.standins"]
    verify_standins(standins_folder(out))
    assert set(standin_layouts(standins_folder(out), read.model_hash, layers=4)) == {"lowbit4", "mean"}


def test_stand_ins_are_compared_at_equal_bytes(whole: tuple[Profile, Path]) -> None:
    rows = {row.standin: row for row in whole[0].comparison}
    assert set(rows) == {"auto", "lowbit4", "mean", "drop"}
    for row in rows.values():
        assert (row.memory_percent, row.tokens) == (37.5, 384) and row.dppl_se > 0 and row.miss_rate > 0
    assert rows["lowbit4"].kl < rows["mean"].kl < rows["drop"].kl
    assert rows["auto"].kl < 1.05 * rows["lowbit4"].kl, "the mix by expected loss; of few tokens"
    assert rows["lowbit4"].top1_agreement > rows["drop"].top1_agreement
    for small in ("mean", "drop"):  # all means together are smaller than an expert
        assert rows["lowbit4"].miss_rate > rows[small].miss_rate, "records take room of full experts"


def test_scales_make_the_prediction_meet_the_measurement(whole: tuple[Profile, Path]) -> None:
    """Expected loss summed over an engine's uses, step by step, is the divergence; what was swept is nearly the same:
    now and then a step finds an expert in a slot that lent it to a prompt."""
    profile, out = whole
    held = tiny_ids()[20 * 128 :]
    config = EngineConfig(memory="37.5%", mode="fast", standin="mean", profile=str(out), guard_share=0.0)
    [result] = evaluate_many([config], cut_windows(held, tokens=384), batch=2)
    assert isinstance(result, EvalResult)
    row = next(row for row in profile.comparison if row.standin == "mean")
    assert result.miss_rate <= row.miss_rate <= result.miss_rate + 3
    assert result.kl == pytest.approx(row.kl, rel=0.05) and result.ppl_exact > 1
    assert result.expected_rise == pytest.approx(result.kl, rel=0.05)


def test_tokens_follow_from_the_model(olmoe: Path) -> None:
    """Small models take all that say something; of larger ones every expert still has some rows."""

    class Cut:
        def __init__(self, parts: Any, weights: int) -> None:
            self.experts, self.loaded = parts.experts, replace_model(parts.loaded, weights)

    def replace_model(loaded: Any, weights: int) -> Any:
        model = torch.nn.Linear(weights, 1, bias=False, device="meta")
        model.parameters = lambda: [torch.empty(1).expand(weights)]  # type: ignore[method-assign, assignment]
        return replace(loaded, model=model)

    with opened(olmoe) as parts:
        assert (traced_tokens(parts), scored_tokens(parts)) == (65_536, 6144)
        assert (traced_tokens(Cut(parts, 10**9)), scored_tokens(Cut(parts, 10**9))) == (4_999, 768)  # type: ignore[arg-type]
        experts, top_k = 8, parts.loaded.experts_per_token
        assert traced_tokens(Cut(parts, 10**12)) == 256 * experts // top_k  # type: ignore[arg-type]


def test_bounded_keeps_its_budget(whole: tuple[Profile, Path]) -> None:
    (point,) = whole[0].budget_curve
    assert (point.budget, point.memory_percent, point.tokens) == (0.001, 37.5, 384)
    assert 0 < point.expected_rise <= 0.001 and 0 < point.fetched_fraction < 100


def test_the_recommendation_says_why(whole: tuple[Profile, Path]) -> None:
    profile, _ = whole
    best = min(profile.comparison, key=lambda row: row.kl)
    assert best.standin in profile.reason and "37.5 % memory" in profile.reason
    assert profile.recommended in (best.standin, None)
    assert profile.reason.endswith("; expected losses are right to 0 %"), "one row a kind is met exactly"


def test_buddies_of_every_signal_are_measured(tmp_path: Path) -> None:
    """A random model of two layers: no records at all, live router scores included."""
    folder = write_checkpoint("qwen3_moe", tmp_path / "model", num_hidden_layers=2)
    losses = LossOptions(memories=(70.0,), budgets=(1.0,), tokens=384)
    options = options_of(
        folder, tmp_path / "p.profile", kinds=("buddy",), ids=random_ids(3000), quick=False, losses=losses
    )
    profile = calibrate(options)
    names = ["buddy:router", "buddy:output", "buddy:coactivation", "random", "drop"]
    assert [row.standin for row in profile.comparison] == names and set(profile.kind_scale) == set(names)
    assert profile.measured and not profile.record_bytes and profile.pair_error_LEE.shape == (2, 8, 8)
    assert all(row.kl > 0 and row.tokens == 384 for row in profile.comparison)
    (point,) = profile.budget_curve  # of the best buddy, since there are no records
    assert point.budget == 1.0 and point.fetched_fraction < 5


def test_quick_profiles_know_no_losses_and_serve_fast_only(olmoe: Path, tmp_path: Path) -> None:
    out = tmp_path / "q.profile"
    profile = calibrate(options_of(olmoe, out, kinds=("lowbit4", "lowrank", "mean", "buddy")))
    assert not profile.measured and np.isnan(profile.sensitivity_L).all() and not profile.comparison
    assert "--quick" in profile.reason and profile.recommended is None
    config = {"model": str(olmoe), "profile": str(out), "memory": "70%", "dtype": "float32"}
    with LLM(**config, mode="fast") as llm:
        fast = llm.generate([random_ids(12)], max_tokens=6)[0]
        bounded = llm.generate([random_ids(12)], max_tokens=6, mode="bounded")[0]
    assert fast.usage.mode == "fast" and fast.usage.fetched == 0
    assert (bounded.usage.mode, bounded.usage.standins.total) == ("exact", 0)


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v2", "jamba"])
def test_other_families(family: str, tmp_path: Path) -> None:
    folder = write_checkpoint(family, tmp_path / "model")
    profile = calibrate(options_of(folder, tmp_path / "p.profile"))
    assert profile.counts_LE.sum() == profile.layers * profile.top_k * profile.calibration_tokens
    assert float((profile.errors["lowbit4"] / profile.energy_LE).mean()) < 0.05


@pytest.mark.parametrize(("family", "scheme"), [("olmoe", "fp8"), ("qwen3_moe", "ct-nvfp4"), ("gpt_oss", "mxfp4")])
def test_stand_ins_of_quantised_experts_are_those_of_what_their_codes_mean(
    family: str, scheme: str, tmp_path: Path
) -> None:
    coded, plain = quantised(family, scheme, tmp_path, **({"hidden_size": 64} if family == "gpt_oss" else {}))
    made = [calibrate(options_of(folder, folder / "p.profile")) for folder in (coded, plain)]
    for kind in ("lowbit4", "mean"):
        np.testing.assert_allclose(made[0].errors[kind], made[1].errors[kind], rtol=2e-2)
    with LLM(str(coded), memory="60%", mode="fast", profile=str(coded / "p.profile"), dtype="float32") as llm:
        usage = llm.generate([random_ids(9)], max_tokens=12)[0].usage
    assert usage.standins.total > 0 and usage.fetched == 0


def test_an_interrupted_calibration_goes_on(olmoe: Path, tmp_path: Path) -> None:
    class Interrupted(Exception):
        pass

    def broken(items: Iterable[Any], **told: Any) -> Iterable[Any]:
        for at, item in enumerate(items):
            if told["desc"] == "stand-ins" and at == 17:
                raise Interrupted
            yield item

    options = options_of(olmoe, tmp_path / "p.profile")
    with pytest.raises(Interrupted):
        calibrate(options, progress=broken)
    assert [path.name for path in tmp_path.iterdir()] == ["p.standins"], "no half profile, no trace"
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "p.standins").iterdir()}
    assert len(kept) == 4, "two of three layers, two kinds"
    resumed = calibrate(options)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in kept.items())
    fresh = calibrate(replace(options, out=tmp_path / "fresh" / "p.profile"))
    assert resumed.corpus_sha == fresh.corpus_sha
    np.testing.assert_allclose(resumed.errors["lowbit4"], fresh.errors["lowbit4"], rtol=0.01)


def test_memory_does_not_change_the_calibration(olmoe: Path, tmp_path: Path) -> None:
    """A model larger than memory is calibrated within the budget, to the same numbers."""
    made = []
    for memory in ("100%", "40%"):
        config = EngineConfig(model=str(olmoe), memory=memory, dtype="float32")
        made.append(calibrate(options_of(olmoe, tmp_path / memory / "p.profile", config=config)))
    np.testing.assert_array_equal(made[0].counts_LE, made[1].counts_LE)
    np.testing.assert_array_equal(made[0].errors["lowbit4"], made[1].errors["lowbit4"])
    for path in (tmp_path / "100%" / "p.standins").iterdir():
        assert path.read_bytes() == (tmp_path / "40%" / "p.standins" / path.name).read_bytes()


@pytest.mark.parametrize(
    ("ids", "changes", "said"),
    [
        ([], {}, r"corpus is 0 tokens, must be at least 512 \(8 windows of 64\). hint: give more text"),
        (random_ids(500), {}, "corpus is 500 tokens, must be at least 512"),
        (random_ids(1200), {"quick": False}, r"corpus is 1200 tokens, must be at least 1280 \(20 windows of 64\)"),
        ([5] * 800 + [160], {}, "corpus holds token id 160, must be from 0 to 159 .*hint: encode the text"),
        ([5] * 800 + [-1], {}, "corpus holds token id -1, must be from 0 to 159"),
    ],
)
def test_a_corpus_that_cannot_do_is_refused(
    olmoe: Path, tmp_path: Path, ids: list[int], changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(ProfileError, match=said):
        calibrate(options_of(olmoe, tmp_path / "p.profile", ids=ids, **changes))
    assert list(tmp_path.iterdir()) == []


def test_the_smallest_corpus_that_does(olmoe: Path, tmp_path: Path) -> None:
    profile = calibrate(options_of(olmoe, tmp_path / "p.profile", ids=random_ids(512)))
    assert profile.calibration_tokens == 256, "four windows are kept apart"


def test_a_context_too_short_to_measure_losses_is_said(olmoe: Path, tmp_path: Path) -> None:
    config = EngineConfig(model=str(olmoe), memory="100%", max_model_len=128)
    with pytest.raises(ProfileError, match=r"model takes 128 tokens, must take 256.*hint: --quick"):
        calibrate(options_of(olmoe, tmp_path / "p.profile", config=config, quick=False, ids=random_ids(4000)))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kinds": ("lowbit5",)}, r"kinds are \['lowbit5'\], must be of lowbit12"),
        ({"kinds": ()}, r"kinds are \[\], must be of"),
        ({"tokens": 0}, "must be at least 1"),
        ({"window": 1}, "window is 1, must be at least 2"),
        ({"config": EngineConfig(expert_dtype="int8")}, "expert_dtype is int8, must be native"),
        ({"rounding_minutes": -1.0}, "rounding_minutes is -1"),
    ],
)
def test_bad_options_are_refused(olmoe: Path, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        options_of(olmoe, tmp_path / "p.profile", **changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"memories": ()}, r"memories are \[\], must be some"),
        ({"memories": (50.0, 0.0)}, r"memories are \[50.0, 0.0\], must be .* above 0 and up to 100"),
        ({"memories": (math.nan,)}, "memories are"),
        ({"budgets": (2.0,)}, r"budgets are \[2.0\], must be .* up to 1"),
        ({"tokens": 0}, "expected loss tokens are 0"),
    ],
)
def test_bad_options_of_measuring_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        LossOptions(**changes)


def test_an_output_that_cannot_be_written_is_said_before_the_work(olmoe: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "taken.profile").mkdir()
    for out in (tmp_path / "file" / "p.profile", tmp_path / "taken.profile", Path("/proc/p.profile")):
        with pytest.raises(ProfileError, match=r"--out is .*, must be .*hint:"):
            calibrate(options_of(olmoe, out, ids=[]))  # the corpus is looked at later


def test_a_full_disk_is_said(olmoe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from buddymoe_ray.models import shard_writer

    monkeypatch.setattr(shard_writer.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 100})())
    with pytest.raises(BuddyMoEError, match="hint: free some space"):
        calibrate(options_of(olmoe, tmp_path / "p.profile"))
    assert list(tmp_path.iterdir()) == []


def test_auto_rounding_compensates_as_long_as_it_may(olmoe: Path, tmp_path: Path) -> None:
    made = {}
    for minutes in (0.0, 1e9):
        out = tmp_path / str(minutes) / "p.profile"
        made[minutes] = calibrate(
            options_of(olmoe, out, kinds=("lowbit2",), compensated=None, rounding_minutes=minutes)
        )
    plain = calibrate(options_of(olmoe, tmp_path / "plain" / "p.profile", kinds=("lowbit2",)))
    np.testing.assert_array_equal(made[0.0].errors["lowbit2"], plain.errors["lowbit2"])
    assert float(made[1e9].errors["lowbit2"].mean()) < 0.95 * float(plain.errors["lowbit2"].mean())


def test_held_out_text_is_the_end_and_is_not_traced(olmoe: Path, tmp_path: Path) -> None:
    traced, held = calibration._split_corpus(options_of(olmoe, tmp_path, ids=list(range(1000)), window=20), 256, 65536)
    assert held == tuple(range(840, 1000)), "15 % of 50 windows are 8"
    assert [window[0] for window in traced] == list(range(0, 840, 20)) and all(len(w) == 20 for w in traced)
    fewer, _ = calibration._split_corpus(options_of(olmoe, tmp_path, ids=list(range(1000)), window=20), 256, 100)
    assert len(fewer) == 5 and fewer[0][0] == 0 and fewer[-1][-1] == 839, "a cap on tokens spreads over the corpus"
    limited, _ = calibration._split_corpus(options_of(olmoe, tmp_path, ids=list(range(9000)), window=None), 256, 65536)
    assert {len(window) for window in limited} == {255}, "a window fits the model's context"


def test_kinds_name_what_can_be_compared(olmoe: Path, tmp_path: Path) -> None:
    def names(*kinds: str) -> tuple[str, ...]:
        return calibration._standins(options_of(olmoe, tmp_path, kinds=kinds))

    assert names("lowbit3") == ("lowbit3", "drop") and names("mean") == ("mean", "drop")
    assert names("buddy") == ("buddy:router", "buddy:output", "buddy:coactivation", "random", "drop")
    everything = names(*KINDS)
    assert everything[0] == "lowbit" and len(everything) == len(set(everything)) == len(KINDS) + 5
    assert all(
        not math.isnan(len(name)) and EngineConfig(mode="fast", standin=name).standin == name for name in everything
    )
