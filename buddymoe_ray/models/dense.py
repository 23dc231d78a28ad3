"""Lazy dense tensors: bytes are read when transformers' loader asks for them, and checked for NaN and infinity.

Knows nothing of models. A private copy, not a mapping of the file: a mapped page can be dropped under memory pressure
and read again in the middle of a decode step.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import EllipsisType

import torch
from torch import Tensor

from buddymoe_ray.errors import CheckpointError
from buddymoe_ray.models.tensor_index import TensorLocation

__all__ = ["LazyTensor", "read_tensor"]

_READ_BYTES = 64 << 20


class LazyTensor:
    """Stands for a stored tensor until `lazy[...]` reads it whole, the way a safetensors slice does."""

    def __init__(self, read: Callable[[], Tensor]) -> None:
        self._read = read

    def __getitem__(self, index: EllipsisType) -> Tensor:
        """Raises CheckpointError."""
        assert index is ..., f"index is {index!r}, must be ... : dense tensors are read whole"
        return self._read()


def read_tensor(place: TensorLocation) -> Tensor:
    """A stored tensor in its own dtype. Raises CheckpointError naming file and key on a short read, NaN or infinity."""
    tensor = _read(place).view(getattr(torch, place.dtype)).reshape(place.shape)
    if tensor.is_floating_point() and tensor.numel() and not _finite(tensor):
        raise CheckpointError(
            f"key {place.key!r} in {place.path} has NaN or infinite weights, must be finite. "
            "hint: the file is damaged; download it again"
        )
    return tensor


def _read(place: TensorLocation) -> Tensor:
    buffer = torch.empty(place.nbytes, dtype=torch.uint8)
    view = memoryview(buffer.numpy().data)
    try:
        with Path(place.path).open("rb", buffering=0) as file:
            file.seek(place.offset)
            done = 0
            while done < place.nbytes:
                count = file.readinto(view[done : done + _READ_BYTES])
                if not count:
                    raise CheckpointError(
                        f"key {place.key!r} in {place.path} ends after {done} bytes, must be {place.nbytes}. "
                        "hint: the file was truncated; download it again"
                    )
                done += count
    except OSError as error:
        raise CheckpointError(
            f"key {place.key!r} in {place.path} cannot be read ({error}), must be readable. hint: check the disk"
        ) from error
    return buffer


def _finite(tensor: Tensor) -> bool:
    # min and max carry NaN and infinity: one pass and no temporary of the tensor's size
    low, high = torch.aminmax(tensor.float() if tensor.dtype.itemsize == 1 else tensor)
    return bool(torch.isfinite(low) & torch.isfinite(high))
