"""Records, errors and pair tables against brute force on stock transformers' own experts; resuming; bad disks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calibration_rig import Seen, opened, random_ids, silent, stock_trace, traced, write_checkpoint
from torch import Tensor

from buddymoe_ray.calibrate.fitting import Fitting, energy_of
from buddymoe_ray.calibrate.layers import LayerTables, make_layers
from buddymoe_ray.calibrate.samples import ExpertSample, walk_layer
from buddymoe_ray.engine.parts import EngineParts
from buddymoe_ray.errors import BuddyMoEError
from buddymoe_ray.kernels import ExpertMath, LowbitFormat, lowbit_forward, lowrank_forward, mean_forward
from buddymoe_ray.models import shard_writer
from buddymoe_ray.models.expert_math import expert_math
from buddymoe_ray.models.reference import reference_model
from buddymoe_ray.models.standin_files import standin_layouts, verify_standins
from buddymoe_ray.types import ExpertKey, ExpertLayout

WINDOW, TOKENS, HASH = 60, 480, "ab" * 32
ALL = ("lowbit2", "lowbit4", "lowbit8", "lowrank", "mean", "buddy")


class Case:
    """A checkpoint, its stock experts and what the router sent them."""

    def __init__(self, family: str, folder: Path) -> None:
        self.folder = write_checkpoint(family, folder)
        self.ids = random_ids(TOKENS)
        self.seen = stock_trace(self.folder, self.ids, WINDOW)
        named = reference_model(self.folder).named_modules()
        self.experts = [m for name, m in named if name.endswith(".experts") and hasattr(m, "down_proj")]

    def answer(self, layer: int, expert: int, x_RD: Tensor) -> Tensor:
        """The stock expert's output, by routing every row to it alone."""
        ids = torch.full((len(x_RD), 1), expert)
        with torch.no_grad():
            return self.experts[layer](x_RD, ids, torch.ones(len(x_RD), 1))

    def rows(self, layer: int, expert: int) -> tuple[Tensor, Tensor]:
        """Inputs that the router sent an expert, in order, and their slot weights."""
        seen: Seen = self.seen[layer]
        tokens, slots = (seen.ids_TK == expert).nonzero(as_tuple=True)
        return seen.hidden_TD[tokens], seen.weight_TK[tokens, slots].float()


def make(
    parts: EngineParts,
    case: Case,
    out: Path,
    *,
    kinds: tuple[str, ...] = ALL,
    progress: Callable[..., Iterable[Any]] = silent,
    **options: Any,
) -> LayerTables:
    fitting = Fitting(**({"rank": 4, "fitted_on": "text"} | options))
    with traced(parts, case.ids, WINDOW, out) as trace:
        return make_layers(
            parts,
            trace,
            kinds=kinds,
            folder=out / "p.standins",
            model_hash=HASH,
            fitting=fitting,
            progress=progress,
        )


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case("qwen3_moe", tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="module")
def made(case: Case, tmp_path_factory: pytest.TempPathFactory) -> tuple[LayerTables, Path]:
    out = tmp_path_factory.mktemp("made")
    with opened(case.folder, memory="40%") as parts:  # records are made within a budget
        return make(parts, case, out), out / "p.standins"


def record_of(layouts: dict[str, ExpertLayout], kind: str, key: ExpertKey) -> dict[str, Tensor]:
    """Read as the server does: the piece of one expert, cut by the layout."""
    (piece,) = layouts[kind].pieces[key]
    raw = torch.from_numpy(np.fromfile(piece.path, np.uint8, piece.nbytes, offset=piece.offset))
    return {
        t.name: raw[t.offset : t.offset + t.nbytes].view(getattr(torch, t.dtype)).view(t.shape)
        for t in layouts[kind].tensors
    }


def weighted(value_RD: Tensor, weight_R: Tensor) -> float:
    squared = [float(w) ** 2 for w in weight_R]
    norms = [float((row.double() ** 2).sum()) for row in value_RD]
    return sum(n * s for n, s in zip(norms, squared, strict=True)) / sum(squared)


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v2", "jamba", "minimax_m2"])
def test_samples_are_the_routers_rows_and_the_experts_answers(family: str, tmp_path: Path) -> None:
    """Transposed and biased weights, dense layers in between, solo runners: the same rows, weights and outputs."""
    case = Case(family, tmp_path / "model")
    with opened(case.folder) as parts, traced(parts, case.ids, WINDOW, tmp_path) as trace:
        for layer, module in enumerate(parts.loaded.experts):
            for sample in walk_layer(
                parts.experts.cache, trace, layer, expert_math(module, parts.experts.cache.layout)
            ):
                x_RD, weight_R = case.rows(layer, sample.expert)
                assert sample.own == len(x_RD)
                torch.testing.assert_close(sample.inputs()[: sample.own], x_RD, rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(sample.weight_R[: sample.own], weight_R, rtol=1e-4, atol=1e-5)
                all_RD = sample.inputs()
                truth_RD = case.answer(layer, sample.expert, all_RD)
                torch.testing.assert_close(sample.answers(all_RD), truth_RD, rtol=1e-3, atol=1e-4)
                assert sample.own >= 64 or len(all_RD) > sample.own, "few rows must be filled up"


def test_energies_and_errors_are_those_of_what_lies_on_disk(case: Case, made: tuple[LayerTables, Path]) -> None:
    """Every fifth row the router sent was not fitted on; errors weigh each by its squared slot weight."""
    tables, folder = made
    layouts = standin_layouts(folder, HASH)
    with opened(case.folder) as parts:
        maths = [expert_math(module, parts.experts.cache.layout) for module in parts.loaded.experts]
    checked = 0
    for layer in range(3):
        for expert in range(8):
            x_RD, weight_R = case.rows(layer, expert)
            if len(x_RD) < 20:
                continue
            checked += 1
            x_RD, weight_R = x_RD[4::5], weight_R[4::5]
            truth_RD = case.answer(layer, expert, x_RD)
            assert tables.energy_LE[layer, expert] == pytest.approx(weighted(truth_RD, weight_R), rel=1e-3)
            for kind in ("lowbit2", "lowbit4", "lowbit8", "lowrank", "mean"):
                record = record_of(layouts, kind, ExpertKey(layer, expert))
                if kind == "lowrank":
                    ours_RD = lowrank_forward(x_RD, record)
                elif kind == "mean":
                    ours_RD = mean_forward(x_RD, record)
                else:
                    ours_RD = lowbit_forward(x_RD, record, LowbitFormat(bits=int(kind[-1])), maths[layer])
                found = weighted(ours_RD - truth_RD, weight_R)
                assert tables.errors[kind][layer, expert] == pytest.approx(found, rel=0.02, abs=1e-7), (kind, layer)
    assert checked >= 20, f"only {checked} experts had rows"


def test_more_bits_err_less_and_a_map_beats_a_constant(made: tuple[LayerTables, Path]) -> None:
    tables, _ = made
    mean = {kind: float(error.mean()) for kind, error in tables.errors.items()}
    assert mean["lowbit8"] < mean["lowbit4"] / 20 < mean["lowbit2"] / 100
    assert mean["lowbit2"] < mean["mean"] < 1.1 * float(tables.energy_LE.mean()) and mean["lowrank"] < mean["mean"]
    sizes = tables.record_bytes
    assert sizes["mean"] < sizes["lowrank"] and sizes["lowbit2"] < sizes["lowbit4"] < sizes["lowbit8"]


@pytest.mark.parametrize("family", ["gpt_oss", "granitemoe"])
def test_other_families_make_records_that_answer(family: str, tmp_path: Path) -> None:
    case = Case(family, tmp_path / "model")
    with opened(case.folder) as parts:
        tables = make(parts, case, tmp_path, kinds=("lowbit4", "mean"))
        maths = [expert_math(module, parts.experts.cache.layout) for module in parts.loaded.experts]
    layouts = standin_layouts(tmp_path / "p.standins", HASH)
    assert float((tables.errors["lowbit4"] / tables.energy_LE).mean()) < 0.05
    for layer in range(len(maths)):
        x_RD, weight_R = case.rows(layer, 1)
        record = record_of(layouts, "lowbit4", ExpertKey(layer, 1))
        ours_RD = lowbit_forward(x_RD, record, LowbitFormat(bits=4), maths[layer])
        truth_RD = case.answer(layer, 1, x_RD)
        assert weighted(ours_RD - truth_RD, weight_R) < 0.1 * weighted(truth_RD, weight_R)


def test_compensated_rounding_errs_less_than_plain(case: Case, tmp_path: Path, made: tuple[LayerTables, Path]) -> None:
    with opened(case.folder) as parts:
        plain = make(parts, case, tmp_path, kinds=("lowbit2",), compensated=False)
    assert float(made[0].errors["lowbit2"].mean()) < 0.9 * float(plain.errors["lowbit2"].mean())


def test_the_worst_experts_are_compensated_first_and_time_ends_it(case: Case, tmp_path: Path) -> None:
    """On a clock that ticks at every look two experts of the first layer have their turn, then one of each."""
    ticks = count()
    for name in ("plain", "some"):
        (tmp_path / name).mkdir()
    with opened(case.folder) as parts:
        plain = make(parts, case, tmp_path / "plain", kinds=("lowbit2",), compensated=False)
        some = make(parts, case, tmp_path / "some", kinds=("lowbit2",), minutes=0.1, clock=lambda: float(next(ticks)))
        again = make(parts, case, tmp_path / "some", kinds=("lowbit2",), minutes=0.1, clock=lambda: 0.0)
    better_LE = some.errors["lowbit2"] < plain.errors["lowbit2"]
    assert better_LE.sum(axis=1).tolist() == [2, 1, 1] and (some.errors["lowbit2"] <= plain.errors["lowbit2"]).all()
    for layer, better_E in enumerate(better_LE):
        use_E = np.array([float(case.rows(layer, e)[1].square().sum()) for e in range(len(better_E))])
        loss_E = use_E * plain.errors["lowbit2"][layer]
        assert loss_E[better_E].min() > loss_E[~better_E].max()
    np.testing.assert_allclose(again.errors["lowbit2"], some.errors["lowbit2"], rtol=1e-6)  # kept, as they were


def test_pairs_are_least_squares(case: Case, made: tuple[LayerTables, Path]) -> None:
    """Row i: up to 64 tokens routed to i; column j answers with the scale that errs least."""
    tables, _ = made
    for layer, i in ((0, 0), (1, 3), (2, 7)):
        x_RD, _ = case.rows(layer, i)
        if not len(x_RD):
            continue
        x_RD = x_RD[torch.linspace(0, len(x_RD) - 1, 64).long().unique()]
        y_RD = case.answer(layer, i, x_RD).double()
        for j in range(8):
            theirs_RD = case.answer(layer, j, x_RD).double()
            solved = torch.linalg.lstsq(theirs_RD.reshape(-1, 1), y_RD.reshape(-1, 1)).solution
            error = float((y_RD - float(solved) * theirs_RD).square().sum()) / len(x_RD)
            assert tables.pair_scale_LEE[layer, i, j] == pytest.approx(float(solved), rel=1e-3, abs=1e-4)
            assert tables.pair_error_LEE[layer, i, j] == pytest.approx(error, rel=1e-3, abs=1e-5)
        assert tables.pair_scale_LEE[layer, i, i] == pytest.approx(1, abs=1e-4)


def test_without_buddies_no_pairs_are_measured(case: Case, tmp_path: Path) -> None:
    with opened(case.folder) as parts:
        tables = make(parts, case, tmp_path, kinds=("mean",))
    assert tables.pair_error_LEE.size == 0 == tables.pair_scale_LEE.size and set(tables.errors) == {"mean"}


def test_experts_that_few_tokens_reach_have_their_layers_mean_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    case = Case("qwen3_moe", tmp_path / "model")
    case.ids = case.ids[:WINDOW]
    with opened(case.folder) as parts:
        tables = make(parts, case, tmp_path, kinds=("lowbit2", "mean"))
        with traced(parts, case.ids, WINDOW, tmp_path) as trace:
            counts_LE = np.stack([np.bincount(trace.ids(la).reshape(-1), minlength=8) for la in range(3)])
    rare_LE = counts_LE < 20
    assert rare_LE.any() and (~rare_LE).any(axis=1).all(), "the case must have both"
    for table in (*tables.errors.values(), tables.energy_LE):
        for layer in range(3):
            mean = table[layer][~rare_LE[layer]].mean()
            np.testing.assert_allclose(table[layer][rare_LE[layer]], mean, rtol=1e-5)
    assert f"{rare_LE.sum()} of 24 experts got fewer than 20 tokens" in caplog.text


def sample_of(inputs_RD: Tensor) -> ExpertSample:
    """An expert that answers its input, used by every row alike."""
    D = inputs_RD.shape[1]
    return ExpertSample(
        expert=0,
        weights={"up_proj": torch.eye(D), "down_proj": torch.eye(D)},
        math=ExpertMath(activate=lambda x: x, gated=False),
        hidden_TD=inputs_RD,
        token_R=torch.arange(len(inputs_RD)),
        weight_R=torch.ones(len(inputs_RD)),
        own=len(inputs_RD),
    )


def test_an_error_takes_as_many_rows_as_it_needs() -> None:
    """Even rows are known after 128 of the held ones, uneven ones from all 512; rows are spread over the text."""
    even, uneven = torch.ones(4000, 4), torch.ones(4000, 4)
    uneven[4::160] = 100.0
    for inputs, blocks in ((even, 2), (uneven, 8)):
        sample = sample_of(inputs)
        energy = energy_of(sample)
        assert len(sample._blocks) == blocks
        if blocks == 2:
            assert energy == pytest.approx(4)
    x_nD, y_nD, weight_n = next(sample_of(torch.arange(4000.0)[:, None]).held())
    assert len(x_nD) == len(y_nD) == len(weight_n) == 64 and torch.equal(x_nD, y_nD)
    assert float(x_nD.max() - x_nD.min()) > 3800 and not (x_nD[:, 0] % 5 != 4).any(), "held rows, from all over"
    few = sample_of(torch.ones(19, 4))
    assert len(few.fitted()) == 19 == len(next(few.held())[0]), "too few to hold any back"


def test_threads_change_nothing(case: Case, tmp_path: Path) -> None:
    bytes_of = {}
    for threads in (1, 3):
        (tmp_path / str(threads)).mkdir()
        with opened(case.folder, threads=threads) as parts:
            tables = make(parts, case, tmp_path / str(threads), kinds=("lowbit3", "mean", "buddy"), compensated=False)
        files = sorted((tmp_path / str(threads) / "p.standins").iterdir())
        bytes_of[threads] = [tables.pair_error_LEE.tobytes(), *(path.read_bytes() for path in files)]
    assert bytes_of[1] == bytes_of[3]


class Interrupted(Exception):
    pass


def break_at(count: int):  # type: ignore[no-untyped-def]
    def progress(items: Iterable[Any], **options: Any) -> Iterable[Any]:
        for at, item in enumerate(items):
            if options["desc"] == "stand-ins" and at == count:
                raise Interrupted
            yield item

    return progress


def stamps(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}


def test_an_interrupted_run_goes_on_where_it_stopped(case: Case, tmp_path: Path) -> None:
    kinds = ("lowbit2", "lowrank")
    folder = tmp_path / "p.standins"
    with opened(case.folder) as parts:
        with pytest.raises(Interrupted):
            make(parts, case, tmp_path, kinds=kinds, progress=break_at(35))  # in the third layer of eight experts
        assert parts.step.observer is None and [p.name for p in tmp_path.iterdir()] == ["p.standins"]
        before = stamps(folder)
        assert set(before) == {"lowbit2-00.safetensors", "lowbit2-01.safetensors"} | {
            "lowrank-00.safetensors",
            "lowrank-01.safetensors",
        }
        resumed = make(parts, case, tmp_path, kinds=kinds)
        after = stamps(folder)
        assert len(after) == 6 and {name: after[name] for name in before} == before, "finished layers must be kept"
        (tmp_path / "fresh").mkdir()
        fresh = make(parts, case, tmp_path / "fresh", kinds=kinds)
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / "fresh" / "p.standins" / path.name).read_bytes()
    for kind in kinds:  # measured again from what was kept, which is rounded to its stored dtype
        np.testing.assert_allclose(resumed.errors[kind], fresh.errors[kind], rtol=0.02)


def test_layers_of_another_text_recipe_or_model_are_made_again(case: Case, tmp_path: Path) -> None:
    kinds, folder = ("lowbit2", "mean"), tmp_path / "p.standins"
    with opened(case.folder) as parts:
        make(parts, case, tmp_path, kinds=kinds)
        first = stamps(folder)
        make(parts, case, tmp_path, kinds=kinds)
        assert stamps(folder) == first, "the same again must keep everything"
        make(parts, case, tmp_path, kinds=kinds, fitted_on="other text")
        second = stamps(folder)
        assert all(second[name] != first[name] for name in first)
        make(parts, case, tmp_path, kinds=kinds, fitted_on="other text", compensated=False)
        third = stamps(folder)
        assert {name for name in third if third[name] != second[name]} == {f"lowbit2-0{la}.safetensors" for la in "012"}
        make(parts, case, tmp_path, kinds=("lowbit2",), fitted_on="a third text", compensated=False)
        assert stamps(folder) == third, "plain rounding needs no text"


def test_a_damaged_layer_is_made_again(case: Case, tmp_path: Path) -> None:
    folder = tmp_path / "p.standins"
    with opened(case.folder) as parts:
        make(parts, case, tmp_path, kinds=("lowbit2",))
        whole = {path.name: path.read_bytes() for path in folder.iterdir()}
        flipped = bytearray(whole["lowbit2-01.safetensors"])
        flipped[-1] ^= 255
        (folder / "lowbit2-01.safetensors").write_bytes(flipped)
        (folder / "lowbit2-02.safetensors").write_bytes(whole["lowbit2-02.safetensors"][:-9])
        make(parts, case, tmp_path, kinds=("lowbit2",))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole
    verify_standins(folder)


def test_a_disk_that_cannot_take_all_records_is_refused_at_once(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(case.folder) as parts, traced(parts, case.ids, WINDOW, tmp_path) as trace:
        monkeypatch.setattr(shard_writer.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 20_000})())
        with pytest.raises(BuddyMoEError, match=r"must have .*hint: free some space"):
            make_layers(
                parts,
                trace,
                kinds=("lowbit4",),
                folder=tmp_path / "p.standins",
                model_hash=HASH,
                fitting=Fitting(compensated=False),
                progress=silent,
            )
    assert not list(tmp_path.glob("p.standins/*")), "one layer would have fitted, all three do not"


def test_matrices_of_any_size_are_packed(tmp_path: Path) -> None:
    """20 inputs are no multiple of anything: the group is filled up, and nothing is lost by it."""
    folder = write_checkpoint("qwen3_moe", tmp_path / "model", moe_intermediate_size=20)
    ids = random_ids(2 * WINDOW)
    with opened(folder) as parts, traced(parts, ids, WINDOW, tmp_path) as trace:
        options: dict[str, Any] = {
            "folder": tmp_path / "p.standins",
            "model_hash": HASH,
            "fitting": Fitting(compensated=False, rank=4),
            "progress": silent,
        }
        tables = make_layers(parts, trace, kinds=("lowbit4", "lowbit8"), **options)
    assert float((tables.errors["lowbit4"] / tables.energy_LE).mean()) < 0.05
    assert float((tables.errors["lowbit8"] / tables.energy_LE).mean()) < 1e-3
