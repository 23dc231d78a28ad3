"""Lazy tensors read what safetensors reads, privately, and refuse what is damaged; conversions that are no copy too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import build_checkpoint, stock_logits
from safetensors.torch import load_file, save_file
from slot_oracle import attach_oracle
from transformers.core_model_loading import MergeModulelist, Transpose, WeightConverter

from buddymoe_ray.errors import CheckpointError, UnsupportedModel
from buddymoe_ray.models import hf_loading
from buddymoe_ray.models.dense import read_tensor
from buddymoe_ray.models.load import load_model
from buddymoe_ray.models.shape import describe
from buddymoe_ray.models.tensor_index import SINGLE_NAME, TensorLocation, read_index


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.float8_e4m3fn]
)
@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (0, 3)])
def test_reads_what_safetensors_reads(dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path) -> None:
    tensor = (torch.randn(shape) * 3).to(dtype)
    save_file({"before": torch.ones(7, dtype=torch.uint8), "x": tensor}, tmp_path / SINGLE_NAME)
    got = read_tensor(read_index(tmp_path)["x"])
    assert got.dtype is dtype and got.shape == tensor.shape
    assert torch.equal(got.view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8))
    got.zero_()  # a private copy: the file is not touched
    assert torch.equal(
        load_file(tmp_path / SINGLE_NAME)["x"].view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_bad_number_is_found(dtype: torch.dtype, value: float, tmp_path: Path) -> None:
    tensor = torch.randn(1000).to(dtype)
    tensor[613] = value
    save_file({"w": tensor}, tmp_path / SINGLE_NAME)
    with pytest.raises(CheckpointError, match=r"key 'w' in .*model\.safetensors has NaN or infinite"):
        read_tensor(read_index(tmp_path)["w"])


def test_large_finite_numbers_pass(tmp_path: Path) -> None:
    save_file({"w": torch.full((10,), 3e38)}, tmp_path / SINGLE_NAME)
    assert read_tensor(read_index(tmp_path)["w"]).max() == 3e38


def test_file_that_shrank_after_the_index_is_named(tmp_path: Path) -> None:
    save_file({"w": torch.ones(100)}, tmp_path / SINGLE_NAME)
    place = read_index(tmp_path)["w"]
    (tmp_path / SINGLE_NAME).write_bytes((tmp_path / SINGLE_NAME).read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"key 'w' .* ends after 300 bytes, must be 400"):
        read_tensor(place)


def test_unreadable_file_is_named(tmp_path: Path) -> None:
    place = TensorLocation(key="w", path=str(tmp_path / "gone"), dtype="float32", shape=(1,), offset=0, nbytes=4)
    with pytest.raises(CheckpointError, match=r"key 'w' .* cannot be read"):
        read_tensor(place)


def test_experts_converted_by_more_than_a_copy_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_transpose(model: Any, **_: Any) -> list[WeightConverter]:
        down = WeightConverter(
            "mlp.experts.*.down_proj.weight", "mlp.experts.down_proj", [MergeModulelist(0), Transpose(1, 2)]
        )
        return [down]

    folder = build_checkpoint("olmoe", tmp_path)
    monkeypatch.setattr(hf_loading, "get_model_conversion_mapping", with_transpose)
    with pytest.raises(UnsupportedModel, match=r"experts\.0\.down_proj\.weight' is converted by Transpose.*hint"):
        describe(folder)


def test_prediction_layers_that_transformers_ignores_are_ignored(tmp_path: Path) -> None:
    folder = build_checkpoint("deepseek_v3", tmp_path)
    tensors = load_file(folder / SINGLE_NAME)
    before = describe(folder)
    tensors["model.layers.61.mlp.experts.0.gate_proj.weight"] = torch.ones(24, 48)
    tensors["model.layers.61.eh_proj.weight"] = torch.full((3,), float("nan"))  # never read, so never judged
    save_file(tensors, folder / SINGLE_NAME, metadata={"format": "pt"})
    assert describe(folder) == before
    loaded = load_model(folder)
    attach_oracle(loaded)
    ids = torch.arange(3, 20)[None]
    with torch.inference_mode():
        assert torch.equal(loaded.model(input_ids=ids, use_cache=False).logits, stock_logits(folder, ids))


def test_fused_stacks_of_a_per_expert_family_load_too(tmp_path: Path) -> None:
    """A checkpoint may hold `[E, ...]` stacks where the family usually stores one tensor per expert."""
    folder = build_checkpoint("olmoe", tmp_path)
    ids = torch.arange(3, 20)[None]
    want = stock_logits(folder, ids)
    tensors = load_file(folder / SINGLE_NAME)
    for layer in range(3):
        at = f"model.layers.{layer}.mlp.experts"
        gate, up, down = (
            torch.stack([tensors.pop(f"{at}.{e}.{part}_proj.weight") for e in range(8)])
            for part in ("gate", "up", "down")
        )
        tensors[f"{at}.gate_up_proj"], tensors[f"{at}.down_proj"] = torch.cat([gate, up], dim=1), down
    save_file(tensors, folder / SINGLE_NAME, metadata={"format": "pt"})
    loaded = load_model(folder)
    attach_oracle(loaded)
    with torch.inference_mode():
        assert torch.equal(loaded.model(input_ids=ids, use_cache=False).logits, want)
