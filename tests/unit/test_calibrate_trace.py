"""The trace is what stock transformers feeds its experts, row for row, at any budget, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from calibration_rig import opened, random_ids, silent, stock_trace, traced, write_checkpoint

from buddymoe_ray.calibrate.trace import Trace, record_trace
from buddymoe_ray.errors import BuddyMoEError
from buddymoe_ray.models import shard_writer

WINDOW = 40


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("qwen3_moe", tmp_path_factory.mktemp("qwen"))


# packed and solo runners, dense layers between MoE layers, biases and transposed weights
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v2", "jamba"])
def test_rows_are_what_transformers_feeds_its_experts(family: str, tmp_path: Path) -> None:
    folder = write_checkpoint(family, tmp_path / "model")
    ids = random_ids(3 * WINDOW)
    expected = stock_trace(folder, ids, WINDOW)
    with opened(folder) as parts, traced(parts, ids, WINDOW, tmp_path) as trace:
        assert trace.tokens == 3 * WINDOW and trace.window == WINDOW
        for layer, seen in enumerate(expected):
            torch.testing.assert_close(trace.hidden(layer), seen.hidden_TD, rtol=1e-4, atol=1e-4)
            assert torch.equal(trace.ids(layer).sort(dim=1).values, seen.ids_TK.sort(dim=1).values)
            weight_TK = seen.weight_TK.gather(1, seen.ids_TK.argsort(dim=1))
            ours_TK = trace.weights(layer).gather(1, trace.ids(layer).argsort(dim=1))
            torch.testing.assert_close(ours_TK, weight_TK.float(), rtol=1e-4, atol=1e-5)


def test_the_budget_does_not_change_a_bit(qwen: Path, tmp_path: Path) -> None:
    ids, kept = random_ids(2 * WINDOW), []
    for memory in ("100%", "30%"):
        with opened(qwen, memory=memory) as parts, traced(parts, ids, WINDOW, tmp_path) as trace:
            kept.append([(trace.hidden(la).clone(), trace.ids(la), trace.weights(la).clone()) for la in range(3)])
    for all_TD, some_TD in zip(*kept, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(all_TD, some_TD, strict=True))


def test_hidden_states_keep_the_compute_dtype(qwen: Path, tmp_path: Path) -> None:
    with opened(qwen, dtype="bfloat16") as parts, traced(parts, random_ids(WINDOW), WINDOW, tmp_path) as trace:
        assert trace.hidden(0).dtype == torch.bfloat16 and trace.weights(0).dtype == torch.float32
        assert bool(trace.hidden(0).isfinite().all()) and trace.ids(0).dtype == torch.int64


def test_files_are_gone_afterwards(qwen: Path, tmp_path: Path) -> None:
    with opened(qwen) as parts:
        with traced(parts, random_ids(WINDOW), WINDOW, tmp_path):
            assert parts.step.observer is None
        assert list(tmp_path.iterdir()) == []


def test_a_trace_that_is_broken_off_leaves_nothing(qwen: Path, tmp_path: Path) -> None:
    def broken(items: Iterable[Any], **_: Any) -> Iterable[Any]:
        yield next(iter(items))
        raise KeyboardInterrupt

    windows = [random_ids(WINDOW, seed=seed) for seed in range(3)]
    with opened(qwen) as parts:
        with pytest.raises(KeyboardInterrupt):
            record_trace(parts, windows, tmp_path, progress=broken)
        assert parts.step.observer is None and list(tmp_path.iterdir()) == []
        with record_trace(parts, windows, tmp_path, progress=silent) as trace:
            assert trace.tokens == 3 * WINDOW


def test_progress_counts_windows(qwen: Path, tmp_path: Path) -> None:
    told: list[dict[str, Any]] = []

    def watch(items: Iterable[Any], **options: Any) -> Iterable[Any]:
        told.append(options)
        return items

    windows = [random_ids(WINDOW, seed=seed) for seed in range(3)]
    with opened(qwen) as parts, record_trace(parts, windows, tmp_path, progress=watch):
        assert [(one["total"], one["desc"]) for one in told] == [(3, "trace")]


def test_a_disk_too_small_is_refused_before_anything_runs(
    qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_writer.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with opened(qwen) as parts, pytest.raises(BuddyMoEError, match=r"must have .*hint: free some space"):
        record_trace(parts, [random_ids(WINDOW)], tmp_path, progress=silent)
    assert list(tmp_path.iterdir()) == []


def test_layers_are_filled_independently(tmp_path: Path) -> None:
    """Passes may be cut anywhere: rows are appended per layer."""
    whole = {layer: torch.randn(10, 6) for layer in (0, 1)}
    ids, weights = torch.randint(0, 300, (10, 2)), torch.rand(10, 2)
    with Trace(tmp_path, layers=2, tokens=10, window=5, hidden=6, top_k=2, dtype=torch.float32) as trace:
        for begin, end in ((0, 3), (3, 4), (4, 10)):
            for layer in (1, 0):
                trace.observe(layer, whole[layer][begin:end], ids[begin:end], weights[begin:end])
        for layer in (0, 1):
            assert torch.equal(trace.hidden(layer), whole[layer])
            assert torch.equal(trace.ids(layer), ids) and torch.equal(trace.weights(layer), weights)
