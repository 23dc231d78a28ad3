"""Safetensors headers become locations; whatever is broken is named by file and key."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from buddymoe_ray.errors import CheckpointError
from buddymoe_ray.models.tensor_index import INDEX_NAME, SINGLE_NAME, has_weights, read_index, read_json


def write_raw(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def two_shards(folder: Path) -> Path:
    save_file({"a": torch.arange(6, dtype=torch.float32), "b": torch.ones(2, 3)}, folder / "s1.safetensors")
    save_file({"c": torch.zeros(4, dtype=torch.bfloat16)}, folder / "s2.safetensors")
    weight_map = {"a": "s1.safetensors", "b": "s1.safetensors", "c": "s2.safetensors"}
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.float64, torch.int32],
)
def test_locations_point_at_the_bytes(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {
        "x": torch.arange(12).reshape(3, 4).to(dtype),
        "scalar": torch.tensor(7).to(dtype),
        "none": torch.empty(0, 2).to(dtype),
    }
    save_file(tensors, tmp_path / SINGLE_NAME)
    index = read_index(tmp_path)
    assert set(index) == set(tensors)
    raw = (tmp_path / SINGLE_NAME).read_bytes()
    for key, tensor in tensors.items():
        place = index[key]
        assert place.shape == tuple(tensor.shape) and f"torch.{place.dtype}" == str(dtype) and place.key == key
        assert raw[place.offset : place.offset + place.nbytes] == bytes(
            tensor.contiguous().view(-1).view(torch.uint8).tolist()
        )


def test_sharded_checkpoint_is_read_whole(tmp_path: Path) -> None:
    index = read_index(two_shards(tmp_path))
    assert {key: Path(place.path).name for key, place in index.items()} == {
        "a": "s1.safetensors",
        "b": "s1.safetensors",
        "c": "s2.safetensors",
    }
    assert has_weights(tmp_path)


def test_shards_outside_the_index_are_ignored(tmp_path: Path) -> None:
    two_shards(tmp_path)
    (tmp_path / "consolidated.safetensors").write_bytes(b"not even a file")
    assert set(read_index(tmp_path)) == {"a", "b", "c"}


def test_missing_shard_is_named(tmp_path: Path) -> None:
    (two_shards(tmp_path) / "s2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"s2\.safetensors is missing \(1 of 2 shards are\).*hint"):
        read_index(tmp_path)


@pytest.mark.parametrize("cut", [1, 7])
def test_truncated_shard_is_named_with_both_sizes(cut: int, tmp_path: Path) -> None:
    path = two_shards(tmp_path) / "s1.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-cut])
    with pytest.raises(
        CheckpointError, match=rf"s1\.safetensors has {len(data) - cut} bytes, must be {len(data)}: it is truncated"
    ):
        read_index(tmp_path)


def test_shard_with_trailing_bytes_is_refused(tmp_path: Path) -> None:
    path = two_shards(tmp_path) / "s1.safetensors"
    path.write_bytes(path.read_bytes() + b"\0\0")
    with pytest.raises(CheckpointError, match="longer than its header says"):
        read_index(tmp_path)


@pytest.mark.parametrize("data", [b"", b"\x01\x02", struct.pack("<Q", 1 << 40) + b"{}", struct.pack("<Q", 90) + b"{}"])
def test_file_that_is_no_safetensors_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / SINGLE_NAME).write_bytes(data)
    with pytest.raises(CheckpointError, match="must be a whole safetensors file"):
        read_index(tmp_path)


@pytest.mark.parametrize("header", [b"{not json}", b"[1, 2]", b"\xff\xfe{}"])
def test_unreadable_header_is_refused(header: bytes, tmp_path: Path) -> None:
    write_raw(tmp_path / SINGLE_NAME, header)
    with pytest.raises(CheckpointError, match=r"model\.safetensors has"):
        read_index(tmp_path)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]},
        {"dtype": "F32", "shape": [1]},
        {"dtype": "F32", "data_offsets": [0, 4], "shape": "x"},
        "F32",
    ],
)
def test_wrong_entry_is_named_by_key(entry: object, tmp_path: Path) -> None:
    write_raw(tmp_path / SINGLE_NAME, {"bad.key": entry}, b"\0" * 4)
    with pytest.raises(CheckpointError, match=r"bad\.key"):
        read_index(tmp_path)


def test_unknown_dtype_is_named(tmp_path: Path) -> None:
    write_raw(tmp_path / SINGLE_NAME, {"k": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}, b"\0")
    with pytest.raises(CheckpointError, match="stored as F4"):
        read_index(tmp_path)


def test_key_twice_in_one_header_is_refused(tmp_path: Path) -> None:
    entry = '"k":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
    write_raw(tmp_path / SINGLE_NAME, f"{{{entry},{entry}}}".encode(), b"\0")
    with pytest.raises(CheckpointError, match="key 'k' twice"):
        read_index(tmp_path)


def test_of_a_key_in_two_shards_the_last_one_counts_as_in_transformers(tmp_path: Path) -> None:
    two_shards(tmp_path)
    save_file({"c": torch.zeros(4, dtype=torch.bfloat16), "a": torch.ones(1)}, tmp_path / "s2.safetensors")
    assert Path(read_index(tmp_path)["a"].path).name == "s2.safetensors"


def test_what_the_shards_hold_counts_not_what_the_index_says(tmp_path: Path) -> None:
    index = two_shards(tmp_path) / INDEX_NAME
    index.write_text(json.dumps({"weight_map": {**json.loads(index.read_text())["weight_map"], "d": "s2.safetensors"}}))
    save_file({"c": torch.zeros(4), "extra": torch.ones(1)}, tmp_path / "s2.safetensors")
    assert set(read_index(tmp_path)) == {"a", "b", "c", "extra"}


def test_single_file_wins_over_an_index_beside_it(tmp_path: Path) -> None:
    save_file({"new": torch.ones(2)}, two_shards(tmp_path) / SINGLE_NAME)
    assert set(read_index(tmp_path)) == {"new"}
    (tmp_path / "s1.safetensors").unlink()
    assert set(read_index(tmp_path)) == {"new"}


def test_file_that_the_config_names_wins_over_all(tmp_path: Path) -> None:
    save_file({"named": torch.ones(2)}, two_shards(tmp_path) / "special.safetensors")
    save_file({"new": torch.ones(2)}, tmp_path / SINGLE_NAME)
    (tmp_path / "config.json").write_text(json.dumps({"transformers_weights": "special.safetensors"}))
    assert set(read_index(tmp_path)) == {"named"}
    (tmp_path / "config.json").write_text(json.dumps({"transformers_weights": INDEX_NAME}))
    assert set(read_index(tmp_path)) == {"a", "b", "c"}
    (tmp_path / "config.json").write_text(json.dumps({"transformers_weights": "../special.safetensors"}))
    with pytest.raises(CheckpointError, match="must be a name in the same folder"):
        read_index(tmp_path)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors"])
def test_index_cannot_point_out_of_its_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": {"k": name}}))
    with pytest.raises(CheckpointError, match="must be a name in the same folder"):
        read_index(tmp_path)


@pytest.mark.parametrize("text", ["{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}', "[]", "{"])
def test_unusable_index_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / INDEX_NAME).write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        read_index(tmp_path)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("model.gguf", "gguf weights"),
        ("pytorch_model.bin", r"\.bin weights"),
        ("model-1.safetensors", "neither"),
        ("a.txt", "no weights"),
    ],
)
def test_folder_without_safetensors_says_what_it_has(name: str, hint: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"")
    assert not has_weights(tmp_path)
    with pytest.raises(CheckpointError, match=hint):
        read_index(tmp_path)


def test_no_folder_is_said_plainly(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no folder"):
        read_index(tmp_path / "nothing")


def test_read_json_names_the_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        read_json(tmp_path / "config.json")
