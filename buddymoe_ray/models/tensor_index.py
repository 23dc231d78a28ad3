"""Where every tensor of a safetensors checkpoint lies: read from the headers alone, validated, no weights touched.

Knows neither torch nor transformers nor what an expert is. Invariant: every returned location lies inside its file.
Neighbours: `experts_index` turns locations into expert pieces, `dense` reads the rest.
"""

from __future__ import annotations

import json
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from buddymoe_ray.errors import CheckpointError

__all__ = [
    "DTYPE_BYTES",
    "INDEX_NAME",
    "SINGLE_NAME",
    "TensorLocation",
    "has_weights",
    "named_weights",
    "read_index",
    "read_json",
    "shard_names",
    "weights_name",
]

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
    "F8_E8M0": ("float8_e8m0fnu", 1),
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
    return weights_name(folder) is not None


def weights_name(folder: Path) -> str | None:
    """File that transformers would load or whose shards it would: what config.json names, else a single file, else an
    index; a single file leaves an index beside it unread."""
    named = named_weights(folder)
    names = (SINGLE_NAME, INDEX_NAME) if named is None else (named,)
    return next((name for name in names if (folder / name).is_file()), None)


def named_weights(folder: Path) -> str | None:
    """The weights file that config.json names (`transformers_weights`), if it does. Raises CheckpointError."""
    config = folder / "config.json"
    named = read_json(config).get("transformers_weights") if config.exists() else None
    return None if named is None else _inside(config, named)


def read_index(folder: Path) -> dict[str, TensorLocation]:
    """Locate every tensor of the checkpoint in `folder`. An index only names the shards: what they hold counts; of a
    key in several the last shard's, by name, as in transformers.

    Raises:
        CheckpointError: a file is missing, truncated or not safetensors.
    """
    folder = folder.resolve()
    name = weights_name(folder)
    if name is None:
        raise CheckpointError(_no_weights_message(folder))
    if not name.endswith(".json"):
        return _read_header(folder / name)
    names = shard_names(folder / name)
    missing = [shard for shard in names if not (folder / shard).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder / missing[0]} is missing ({len(missing)} of {len(names)} shards are), must be there. "
            "hint: finish the download"
        )
    found: dict[str, TensorLocation] = {}
    for shard in names:
        found |= _read_header(folder / shard)
    return found


def shard_names(index: Path) -> list[str]:
    """Shards that an index names, sorted. Raises CheckpointError."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index} has no usable weight_map, must map keys to files. hint: download it again")
    return sorted({_inside(index, name) for name in weight_map.values()})


def _inside(path: Path, name: object) -> str:
    if not isinstance(name, str) or not name or Path(name).name != name:
        raise CheckpointError(f"{path} names {name!r}, must be a name in the same folder. hint: download it again")
    return name


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
