"""The packed low-bit format of a matrix, and how an expert's packed matrices lie in one record.

    value[n, k] = scale[n, k // group] * (q[n, k] - (2**bits - 1) / 2)      q in 0 .. 2**bits - 1 (mid-rise, symmetric)
    scale[n, g] = base * 2 ** (-code[n, g] / 24)                            code uint8, base one float32 per matrix

Does not know how codes are chosen (calibrate) nor who reads records. Invariant: `unpack` inverts `pack`.
Codes are planar per row, so that unpacking runs over contiguous bytes:
    8 bit  K bytes
    4 bit  K/2 bytes, byte i = q[i] | q[i + K/2] << 4
    2 bit  K/4 bytes, byte i = sum over j < 4 of q[i + j K/4] << 2j
    3 bit  the low two bits as in 2 bit, then K/8 bytes, byte i bit j = high bit of q[i + j K/8]

Legend: N outputs, K inputs of a matrix (always stored [out, in]), G groups of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from buddymoe_ray.types import SlotTensor

__all__ = [
    "LowbitFormat",
    "Matrix",
    "PackedMatrix",
    "Places",
    "dequantise",
    "pack",
    "record_tensors",
    "scale_table",
    "unpack",
]

ALIGN = 64
STEPS_PER_OCTAVE = 24


class Matrix(NamedTuple):
    """A packed matrix as kernels take it: where its codes, scales and base are (addresses, or bytes of a record), and
    its sizes."""

    codes: int
    scales: int
    base: int
    N: int
    K: int
    bits: int
    group: int


class Places(NamedTuple):
    """Addresses of rows, records and outputs; of every `shares` experts in turn the kernel computes the `share`-th."""

    x: int
    records: int
    out: int
    share: int = 0
    shares: int = 1


@dataclass(frozen=True, kw_only=True)
class LowbitFormat:
    """Bits of a code (2, 3, 4 or 8) and the inputs that share a scale (`group`, see `group_of`)."""

    bits: int
    group: int = 32

    def __post_init__(self) -> None:
        assert self.bits in (2, 3, 4, 8), f"bits is {self.bits}, must be 2, 3, 4 or 8"
        assert self.group >= 1, f"group is {self.group}, must be at least 1"

    @property
    def levels(self) -> int:
        """Number of values a code can take."""
        return 1 << self.bits

    def row_bytes(self, K: int) -> int:
        """Bytes of a row's codes. K must be a multiple of 8."""
        assert K > 0 and K % 8 == 0, f"K is {K}, must be a positive multiple of 8"
        return K * self.bits // 8

    def group_of(self, K: int) -> int:
        """Inputs per scale in a row of K: `group` where it divides K, else K's largest divisor below it."""
        return next(size for size in range(min(self.group, K), 0, -1) if K % size == 0)


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedMatrix:
    """`codes` uint8 [N, row_bytes(K)], `scales` uint8 [N, G], `base` float32 [1]."""

    codes: Tensor
    scales: Tensor
    base: Tensor


def pack(q_NK: Tensor, code_NG: Tensor, base: float, fmt: LowbitFormat) -> PackedMatrix:
    """Pack codes (uint8, each below `fmt.levels`) and scale codes (uint8) of one matrix."""
    N, K = q_NK.shape
    groups = K // fmt.group_of(K)
    assert q_NK.dtype == code_NG.dtype == torch.uint8, f"codes are {q_NK.dtype}, {code_NG.dtype}, must be uint8"
    assert code_NG.shape == (N, groups), f"scale codes are {tuple(code_NG.shape)}, must be {(N, groups)}"
    assert int(q_NK.max()) < fmt.levels, f"largest code is {int(q_NK.max())}, must be below {fmt.levels}"
    planes = [(q_NK & 3, 2), (q_NK >> 2, 1)] if fmt.bits == 3 else [(q_NK, fmt.bits)]
    codes = torch.cat([_to_plane(part, width) for part, width in planes], dim=1)
    assert codes.shape[1] == fmt.row_bytes(K)
    return PackedMatrix(
        codes=codes, scales=code_NG.clone(), base=torch.tensor([base], dtype=torch.float32, device=q_NK.device)
    )


def unpack(packed: PackedMatrix, fmt: LowbitFormat) -> tuple[Tensor, Tensor]:
    """`(q uint8 [N, K], code uint8 [N, G])` of a packed matrix."""
    codes = packed.codes
    if fmt.bits != 3:
        return _from_plane(codes, fmt.bits), packed.scales.clone()
    low, high = codes.tensor_split([codes.shape[1] * 2 // 3], dim=1)
    return _from_plane(low, 2) | _from_plane(high, 1) << 2, packed.scales.clone()


def dequantise(packed: PackedMatrix, fmt: LowbitFormat) -> Tensor:
    """The matrix as float32 [N, K]: the spec that every kernel is tested against."""
    q_NK, code_NG = unpack(packed, fmt)
    N, K = q_NK.shape
    scale_NG = packed.base * scale_table(packed.base.device)[code_NG.long()]
    centred = q_NK.float() - (fmt.levels - 1) / 2
    return (centred.view(N, code_NG.shape[1], -1) * scale_NG.unsqueeze(-1)).view(N, K)


@cache
def scale_table(device: torch.device) -> Tensor:
    """`2 ** (-code / 24)` for each scale code, float32 [256]: scales are `base` times its entries, in every twin."""
    exponent = -torch.arange(256, dtype=torch.float64) / STEPS_PER_OCTAVE
    return torch.exp2(exponent).float().to(device)


def record_tensors(
    shapes: Mapping[str, tuple[int, ...]], fmt: LowbitFormat, bias_dtype: torch.dtype = torch.bfloat16
) -> tuple[tuple[SlotTensor, ...], int]:
    """The layout of one expert's record and its bytes (a multiple of 64).

    `shapes` maps parameter names to shapes as computed with (`[out, in]`, transposed families untransposed). A matrix
    `m` becomes `m.codes`, `m.scales`, `m.base`; a vector keeps its name and is stored in `bias_dtype`.
    """
    made: list[SlotTensor] = []
    at = 0

    def add(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        nonlocal at
        nbytes = prod(shape) * dtype.itemsize
        text = str(dtype).removeprefix("torch.")
        made.append(SlotTensor(name=name, shape=shape, dtype=text, offset=at, nbytes=nbytes))
        at += -(-nbytes // ALIGN) * ALIGN

    for name, shape in shapes.items():
        assert len(shape) in (1, 2), f"{name} has shape {shape}, must be a matrix or a vector"
        if len(shape) == 1:
            add(name, shape, bias_dtype)
            continue
        N, K = shape
        add(f"{name}.codes", (N, fmt.row_bytes(K)), torch.uint8)
        add(f"{name}.scales", (N, K // fmt.group_of(K)), torch.uint8)
        add(f"{name}.base", (1,), torch.float32)
    return tuple(made), at


def _to_plane(q_NK: Tensor, width: int) -> Tensor:
    """`width`-bit codes into bytes: byte i holds code `i + j * K * width / 8` at bit `j * width`."""
    per_byte = 8 // width
    parts = q_NK.reshape(q_NK.shape[0], per_byte, -1)
    byte = parts[:, 0].clone()
    for j in range(1, per_byte):
        byte |= parts[:, j] << j * width
    return byte


def _from_plane(bytes_NB: Tensor, width: int) -> Tensor:
    mask = (1 << width) - 1
    return torch.cat([bytes_NB >> j * width & mask for j in range(8 // width)], dim=1)
