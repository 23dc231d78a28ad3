"""Tensors as raw bytes and back, byte for byte, whatever their dtype.

An array travels as its expert's number, dtype name and shape in the header and its bytes in the payload, each padded
to 64 bytes so that a tensor can be a view of what was received. Knows no sockets. Invariant: announced shapes are
checked against the payload's length before a tensor is made.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from buddymoe_ray.errors import LinkError

__all__ = ["DTYPES", "ArraySpec", "cut", "gather", "parse_specs", "view_of"]

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "uint8", "int64")}
"""The dtypes that may travel."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGN = 64
_MOST_DIMENSIONS = 4
_ZEROS = memoryview(bytes(_ALIGN))


@dataclass(frozen=True, kw_only=True)
class ArraySpec:
    """One array of a payload: expert `key`, `dtype` by name, `shape`."""

    key: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the array, without padding."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def packed(self) -> list[object]:
        """The msgpack form."""
        return [self.key, self.dtype, list(self.shape)]


def gather(tensors: Mapping[int, Tensor]) -> tuple[tuple[ArraySpec, ...], list[memoryview]]:
    """Announce tensors and view their bytes; those not contiguous or not in host memory are copied.

    Returns:
        The specs and the payload in pieces. The pieces keep the memory they view alive.

    Raises:
        LinkError: a dtype that may not travel, more than 4 dimensions.
    """
    specs, parts = [], []
    for key, tensor in tensors.items():
        if tensor.dtype not in _NAMES or tensor.dim() > _MOST_DIMENSIONS:
            raise LinkError(
                f"rows of expert {key} are {tensor.dtype} {list(tensor.shape)}, "
                f"must be one of {sorted(DTYPES)} of at most {_MOST_DIMENSIONS} dimensions"
            )
        specs.append(ArraySpec(key=key, dtype=_NAMES[tensor.dtype], shape=tuple(tensor.shape)))
        if tensor.numel():
            parts.append(view_of(tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)))
            parts.append(_ZEROS[: -parts[-1].nbytes % _ALIGN])
    return tuple(specs), parts


def parse_specs(values: Sequence[object]) -> tuple[ArraySpec, ...]:
    """Specs from a peer's header. Raises LinkError for anything that `packed` does not make."""
    specs = tuple(_parse(value) for value in values)
    if len({spec.key for spec in specs}) != len(specs):
        raise LinkError("arrays of a frame name an expert twice, must name each once")
    return specs


def cut(specs: Sequence[ArraySpec], payload_B: Tensor) -> dict[int, Tensor]:
    """The arrays of a payload (uint8, 1-D) as views of it.

    Raises:
        LinkError: the payload is longer or shorter than what was announced.
    """
    total = sum(spec.nbytes + -spec.nbytes % _ALIGN for spec in specs)
    if total != payload_B.numel():
        raise LinkError(f"arrays of {total} bytes are announced, must be the payload's {payload_B.numel()}")
    found, at = {}, 0
    for spec in specs:
        raw_B = payload_B[at : at + spec.nbytes]
        try:
            found[spec.key] = raw_B.view(DTYPES[spec.dtype]).view(spec.shape)
        except RuntimeError as error:  # an empty array of absurd sizes
            raise LinkError(f"an array is announced with shape {list(spec.shape)}, must be one that exists") from error
        at += spec.nbytes + -spec.nbytes % _ALIGN
    return found


def view_of(bytes_B: Tensor) -> memoryview:
    """A host uint8 tensor as a writable buffer."""
    return bytes_B.numpy().data.cast("B") if bytes_B.numel() else memoryview(bytearray())


def _parse(value: object) -> ArraySpec:
    if not isinstance(value, list) or len(value) != 3:
        raise LinkError(f"an array is announced as {value!r:.50}, must be [expert, dtype, shape]")
    key, dtype, shape = value
    if not _is_whole(key) or not isinstance(dtype, str) or dtype not in DTYPES:
        raise LinkError(f"an array is announced as {value!r:.50}, must be of an expert and one of {sorted(DTYPES)}")
    if not isinstance(shape, list) or len(shape) > _MOST_DIMENSIONS or not all(_is_whole(size) for size in shape):
        raise LinkError(f"an array is announced with shape {shape!r:.50}, must be up to {_MOST_DIMENSIONS} sizes")
    return ArraySpec(key=key, dtype=dtype, shape=tuple(shape))


def _is_whole(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**48
