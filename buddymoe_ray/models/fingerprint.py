"""A checkpoint's identity: what a calibration is bound to.

Hashes the config, every tensor's name, dtype and shape, and the ends of its bytes (small tensors whole), so that 13 GB
take a second and a retrained, requantised or cut checkpoint is another model. Not hashed: how tensors are spread over
shards, where the folder is, and the middle of large tensors. Builds nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from buddymoe_ray.errors import CheckpointError
from buddymoe_ray.models.tensor_index import TensorLocation, read_index

__all__ = ["model_hash"]

_WHOLE = 1 << 20
_END = 4096


def model_hash(folder: Path) -> str:
    """sha256 as 64 hex digits. Raises CheckpointError when the checkpoint is incomplete or damaged."""
    config = folder / "config.json"
    try:
        digest = hashlib.sha256(config.read_bytes())
    except OSError as error:
        raise CheckpointError(
            f"{config} cannot be read ({error.strerror}), must be there. hint: is this a checkpoint folder?"
        ) from error
    by_path: dict[str, list[TensorLocation]] = {}
    for location in read_index(folder).values():
        by_path.setdefault(location.path, []).append(location)
    tensors = [found for path, locations in by_path.items() for found in _tensor_hashes(path, locations)]
    for key, tensor in sorted(tensors):  # by key: the same weights in other shards are the same model
        digest.update(f"{len(key)}:{key}".encode() + tensor)
    return digest.hexdigest()


def _tensor_hashes(path: str, locations: Iterable[TensorLocation]) -> list[tuple[str, bytes]]:
    """(key, sha256 of dtype, shape and sampled bytes) of each tensor in one file."""
    found = []
    try:
        with open(path, "rb") as file:
            for at in sorted(locations, key=lambda location: location.offset):
                tensor = hashlib.sha256(f"{at.dtype}{list(at.shape)}".encode())
                tensor.update(_sample(file, at.offset, at.nbytes))
                found.append((at.key, tensor.digest()))
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror}), must be a whole shard. hint: check the disk"
        ) from error
    return found


def _sample(file: BinaryIO, offset: int, nbytes: int) -> bytes:
    """All bytes of a small tensor, both ends of a large one."""
    file.seek(offset)
    if nbytes <= _WHOLE:
        return file.read(nbytes)
    first = file.read(_END)
    file.seek(offset + nbytes - _END)
    return first + file.read(_END)
