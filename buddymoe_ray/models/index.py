"""Where every tensor of a safetensors checkpoint lies: read from the headers alone, validated, no weights touched.

Knows neither torch nor transformers nor what an expert is. Invariant: every returned location lies inside its file.
Neighbours: `experts_index` turns locations into expert pieces, `dense` reads the rest.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from buddymoe_ray.errors import CheckpointError

__all__ = ["DTYPE_BYTES", "INDEX_NAME", "SINGLE_NAME", "TensorLocation", "has_weights", "read_index", "read_json"]

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000  # the format's own limit

# safetensors' name -> (torch's name, bytes per element)
_DTYPES: dict[str, tuple[str, int]] = {
    "BOOL": ("bool", 1),
    "U8": ("uint8", 1),
    "I8": ("int8", 1),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "I16": ("int16", 2),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I32": ("int32", 4),
    "F32": ("float32", 4),
    "I64": ("int64", 8),
    "F64": ("float64", 8),
}
DTYPE_BYTES: dict[str, int] = dict(_DTYPES.values())


@dataclass(frozen=True, kw_only=True)
class TensorLocation:
    """One stored tensor: `offset` and `nbytes` count bytes in the file, `dtype` is torch's name without the prefix."""

    key: str
    path: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def has_weights(folder: Path) -> bool:
    """Whether the folder claims to hold safetensors weights (they may still be broken)."""
    return (folder / INDEX_NAME).exists() or (folder / SINGLE_NAME).exists()


def read_index(folder: Path) -> dict[str, TensorLocation]:
    """Locate every tensor of the checkpoint in `folder`.

    Raises:
        CheckpointError: a file is missing, truncated or not safetensors, or headers and index disagree.
    """
    folder = folder.resolve()
    if (folder / INDEX_NAME).exists():
        return _read_sharded(folder)
    if (folder / SINGLE_NAME).exists():
        return _read_header(folder / SINGLE_NAME)
    raise CheckpointError(_no_weights_message(folder))


def read_json(path: Path) -> dict[str, Any]:
    """Parse a JSON object, as CheckpointError when it is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing, must be there. hint: is this a checkpoint folder?") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is unreadable ({error}), must be JSON. hint: download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is a JSON {type(value).__name__}, must be an object. hint: download it again")
    return value


def _read_sharded(folder: Path) -> dict[str, TensorLocation]:
    index = folder / INDEX_NAME
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index} has no usable weight_map, must map keys to files. hint: download it again")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(f"{index} names {name!r}, must be a name in the same folder. hint: fix the index")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder / missing[0]} is missing ({len(missing)} of {len(names)} shards are), must be there. "
            "hint: finish the download"
        )
    found: dict[str, TensorLocation] = {}
    for name in names:
        _merge(found, _read_header(folder / name))
    _check_map(index, weight_map, found)
    return found


def _merge(found: dict[str, TensorLocation], shard: Mapping[str, TensorLocation]) -> None:
    for key, location in shard.items():
        if key in found:
            raise CheckpointError(
                f"key {key!r} is in {found[key].path} and in {location.path}, must be in one file. "
                "hint: remove the stale shard and its entry in the index"
            )
        found[key] = location


def _check_map(index: Path, weight_map: Mapping[str, str], found: Mapping[str, TensorLocation]) -> None:
    for key, name in weight_map.items():
        if key not in found or Path(found[key].path).name != name:
            raise CheckpointError(
                f"{index.parent / name} has no key {key!r}, must have it as {index.name} says. hint: download it again"
            )
    for key, location in found.items():
        if key not in weight_map:
            raise CheckpointError(
                f"{location.path} has key {key!r} that {index.name} lacks. hint: download the index again"
            )


def _read_header(path: Path) -> dict[str, TensorLocation]:
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
            if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(
                    f"{path} has {size} bytes and a header of {length}, must be a whole safetensors file. "
                    "hint: it is truncated or another format; download it again"
                )
            header = json.loads(file.read(length), object_pairs_hook=_unique_pairs)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} has an unreadable header ({error}). hint: download it again") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} has a header that is no object. hint: download it again")
    header.pop("__metadata__", None)
    base = 8 + length
    locations = {key: _location(path, key, entry, base) for key, entry in header.items()}
    end = max((place.offset + place.nbytes for place in locations.values()), default=base)
    if end != size:
        what = "truncated" if size < end else "longer than its header says"
        raise CheckpointError(f"{path} has {size} bytes, must be {end}: it is {what}. hint: download it again")
    return locations


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} twice")
    return unique


def _location(path: Path, key: str, entry: Any, base: int) -> TensorLocation:
    try:
        dtype, shape = entry["dtype"], tuple(int(n) for n in entry["shape"])
        begin, end = (int(n) for n in entry["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} describes key {key!r} wrongly ({error!r}). hint: download it again") from error
    if dtype not in _DTYPES:
        raise CheckpointError(
            f"key {key!r} in {path} is stored as {dtype}, must be one of {', '.join(_DTYPES)}. hint: convert it"
        )
    name, itemsize = _DTYPES[dtype]
    if begin < 0 or end - begin != math.prod(shape) * itemsize or any(n < 0 for n in shape):
        raise CheckpointError(
            f"key {key!r} in {path} has bytes [{begin}, {end}), must be {math.prod(shape) * itemsize} bytes for "
            f"{name} {shape}. hint: download it again"
        )
    return TensorLocation(key=key, path=str(path), dtype=name, shape=shape, offset=base + begin, nbytes=end - begin)


def _no_weights_message(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder} is no folder, must be a checkpoint folder. hint: check the path"
    suffixes = {path.suffix for path in folder.iterdir()}
    for suffix in (".gguf", ".bin", ".pt", ".pth"):
        if suffix in suffixes:
            return f"{folder} has {suffix} weights, must have safetensors. hint: save it with transformers again"
    if ".safetensors" in suffixes:
        return f"{folder} has shards but neither {SINGLE_NAME} nor {INDEX_NAME}. hint: download {INDEX_NAME}"
    return f"{folder} has no weights, must have {SINGLE_NAME} or {INDEX_NAME}. hint: check the path"
