"""Streams tensors into safetensors shards: headers first, then bytes, never a whole tensor in memory.

Knows names, shapes and sizes, not what a tensor means. The index is written last, so that an interrupted write leaves
no folder that looks complete.
"""

from __future__ import annotations

import errno
import json
import math
import shutil
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from buddymoe_ray.errors import CheckpointError
from buddymoe_ray.models.tensor_index import INDEX_NAME

__all__ = ["StoredTensor", "check_space", "write_shards"]

SHARD_BYTES = 2_000_000_000

Progress = Callable[[int, int], None]  # bytes written, bytes in all


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor to write. `dtype` is safetensors' name; `of` is the bfloat16 tensor whose codes or scales it is."""

    key: str
    shape: tuple[int, ...]
    nbytes: int
    dtype: str = "BF16"
    of: StoredTensor | None = None


def check_space(folder: Path, nbytes: int) -> None:
    """Raise CheckpointError when the disk under `folder` cannot take `nbytes` more."""
    existing = next(p for p in (folder, *folder.resolve().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < nbytes:
        raise CheckpointError(
            f"{existing} has {free / 1e9:.2f} GB free, must have {nbytes / 1e9:.2f} GB. "
            "hint: free some space or choose another disk"
        )


def write_shards(
    folder: Path,
    tensors: Iterable[StoredTensor],
    content: Callable[[StoredTensor], Iterable[memoryview]],
    *,
    progress: Progress | None = None,
) -> None:
    """Write `tensors` in order; `content` yields each one's bytes in pieces.

    Raises:
        CheckpointError: the disk is full; the shards written so far are removed.
    """
    shards = _split(tensors)
    total, done = sum(t.nbytes for shard in shards for t in shard), 0
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    try:
        for name, shard in zip(names, shards, strict=True):
            with (folder / name).open("wb", buffering=0) as file:
                file.write(_header(shard))
                for tensor in shard:
                    before = done
                    for piece in content(tensor):
                        done += _write_all(file.write, piece)
                        if progress is not None:
                            progress(done, total)
                    assert done - before == tensor.nbytes, (
                        f"{tensor.key} got {done - before} bytes, must get {tensor.nbytes}"
                    )
        weight_map = {t.key: name for name, shard in zip(names, shards, strict=True) for t in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=1), encoding="utf-8")
    except OSError as error:
        for name in names:
            (folder / name).unlink(missing_ok=True)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise CheckpointError(
            f"{folder} is full after {done} bytes, must take {total}. hint: free some space or choose another disk"
        ) from error


def _split(tensors: Iterable[StoredTensor]) -> list[list[StoredTensor]]:
    shards: list[list[StoredTensor]] = [[]]
    held = 0
    for tensor in tensors:
        if shards[-1] and held + tensor.nbytes > SHARD_BYTES:
            shards.append([])
            held = 0
        shards[-1].append(tensor)
        held += tensor.nbytes
    # as safetensors' own writer: the widest items first
    return [sorted(shard, key=lambda tensor: -tensor.nbytes // max(1, math.prod(tensor.shape))) for shard in shards]


def _header(shard: list[StoredTensor]) -> bytes:
    entries: dict[str, Mapping[str, object]] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in shard:
        entries[tensor.key] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [at, at + tensor.nbytes]}
        at += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _write_all(write: Callable[[memoryview], int | None], piece: memoryview) -> int:
    view = piece.cast("B")
    done = 0
    while done < len(view):
        done += write(view[done:]) or 0
    return done
