"""A model's hash: the same for the same weights however stored, another for anything that changes what they compute."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from buddymoe_ray.errors import CheckpointError
from buddymoe_ray.models import fingerprint
from buddymoe_ray.models.fingerprint import model_hash
from buddymoe_ray.models.resolve import resolve_model
from buddymoe_ray.models.tensor_index import INDEX_NAME, SINGLE_NAME

MIB = 1 << 20


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "large": torch.randint(0, 250, (MIB + 5000,), dtype=torch.uint8, generator=generator),
        "limit": torch.randint(0, 250, (MIB,), dtype=torch.uint8, generator=generator),
        "small": torch.randn(8, 16, generator=generator),
        "none": torch.empty(0, 4),
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "model"
    made.mkdir()
    (made / "config.json").write_text('{"model_type": "x"}')
    save_file(tensors(), made / SINGLE_NAME)
    return made


def changed(folder: Path, **tensors_to_set: Tensor) -> str:
    """The hash after some tensors are replaced (or added)."""
    save_file(load_file(folder / SINGLE_NAME) | tensors_to_set, folder / SINGLE_NAME)
    return model_hash(folder)


def test_it_is_a_sha256_and_stable(folder: Path) -> None:
    first = model_hash(folder)
    assert len(first) == 64 and int(first, 16) >= 0
    assert model_hash(folder) == first


def test_where_the_folder_is_does_not_count(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "elsewhere" / "a")
    assert model_hash(tmp_path / "elsewhere" / "a") == model_hash(folder)


@pytest.mark.parametrize("split", [{"large": "z"}, {"small": "a", "none": "b"}, {"limit": "0"}])
def test_how_tensors_are_spread_over_shards_does_not_count(folder: Path, split: dict[str, str], tmp_path: Path) -> None:
    other = tmp_path / "sharded"
    other.mkdir()
    shutil.copy(folder / "config.json", other)
    shards: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors().items():
        shards.setdefault(f"{split.get(key, 'm')}.safetensors", {})[key] = tensor
    for name, held in shards.items():
        save_file(held, other / name)
    weight_map = {key: name for name, held in shards.items() for key in held}
    (other / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    assert model_hash(other) == model_hash(folder)


@pytest.mark.parametrize("key", ["large", "limit", "small"])
@pytest.mark.parametrize("at", [0, -1])
def test_either_end_of_a_tensor_counts(folder: Path, key: str, at: int) -> None:
    before = model_hash(folder)
    tensor = tensors()[key]
    tensor.view(-1)[at] += 1
    assert changed(folder, **{key: tensor}) != before


@pytest.mark.parametrize(("key", "counts"), [("limit", True), ("small", True), ("large", False)])
def test_the_middle_counts_in_tensors_up_to_a_mebibyte(folder: Path, key: str, counts: bool) -> None:
    before = model_hash(folder)
    tensor = tensors()[key]
    tensor.view(-1)[tensor.numel() // 2] += 1
    assert (changed(folder, **{key: tensor}) != before) is counts


def test_shape_dtype_name_and_config_count(folder: Path) -> None:
    seen = {model_hash(folder)}
    small = tensors()["small"]
    seen.add(changed(folder, small=small.view(16, 8).contiguous()))
    seen.add(changed(folder, small=small.view(torch.int32)))
    seen.add(changed(folder, small=small, more=torch.zeros(1)))
    save_file({("renamed" if key == "small" else key): t for key, t in tensors().items()}, folder / SINGLE_NAME)
    seen.add(model_hash(folder))
    (folder / "config.json").write_text('{"model_type": "y"}')
    seen.add(model_hash(folder))
    assert len(seen) == 6


def test_two_tensors_that_change_places_count(folder: Path) -> None:
    before = changed(folder, a=torch.zeros(4), b=torch.ones(4))
    assert changed(folder, a=torch.ones(4), b=torch.zeros(4)) != before


def test_other_files_do_not_count(folder: Path) -> None:
    before = model_hash(folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "buddymoe.profile").write_bytes(b"x")
    assert model_hash(folder) == before


def test_little_is_read_of_large_tensors(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, sample = [], fingerprint._sample

    def counted(file: BinaryIO, offset: int, nbytes: int) -> bytes:
        read.append(len(sample(file, offset, nbytes)))
        return sample(file, offset, nbytes)

    monkeypatch.setattr(fingerprint, "_sample", counted)
    model_hash(folder)
    assert sorted(read) == [0, 8 * 16 * 4, 2 * 4096, MIB]


def test_what_is_no_checkpoint_is_said(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config.json cannot be read .* must be there\. hint: "):
        model_hash(tmp_path)
    (folder / SINGLE_NAME).write_bytes((folder / SINGLE_NAME).read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="truncated"):
        model_hash(folder)
    (folder / SINGLE_NAME).unlink()
    with pytest.raises(CheckpointError, match="has no weights"):
        model_hash(folder)


def test_the_shipped_model_has_one() -> None:
    assert len(model_hash(resolve_model("builtin:tiny"))) == 64
