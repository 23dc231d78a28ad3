"""The packed low-bit format of a matrix, and how an expert's packed matrices lie in one record.

    value[n, k] = scale[n, k // 32] * (level[n, k] - midpoint)
    scale[n, g] = base * 2 ** (-code[n, g] / 24)                        code uint8, base one float32 per matrix
    scale[n, g] = base[code[n, g]]   of 1 to 3 bits                     code 4 bits, base 16 float32 per matrix

The level of a code of 4 or 8 bits is the code q, the midpoint (2**bits - 1) / 2 (mid-rise, symmetric). Codes of 1 to 3
bits are a trellis: a byte looked up by 7 bits, this code and those before it in its ring (trellis.py).

A matrix lies as the kernels read it: in tiles of 16 outputs and 32 inputs (one group), those of 16 outputs one behind
the other. Quad j of a tile is its inputs 4j .. 4j + 3; its codes are ordered so that 4n + i is that of output n, input
4j + i. The 64 * bits bytes of a tile are
    8 bit  vectors of 64: vector j = quad j, a byte to a code
    4 bit  vector j = quad j | quad j+4 << 4
    else   one string of bits, quad by quad, the lowest bit of a byte first; a ring is 16, 8 or 4 outputs of a quad
Scale codes of a tile lie together: a byte to an output, or of 4 bits byte n is that of output n | output n+8 << 4.
Matrices are padded to whole tiles with code 0: the inputs there are zeros, the outputs are nobody's.

Does not know how codes are chosen (calibrate) nor who reads records. Invariant: `unpack` inverts `pack`.

Legend: N outputs, K inputs of a matrix (always stored [out, in]), G groups of a row, A tiles of 16 outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from buddymoe_ray.kernels.trellis import values
from buddymoe_ray.kernels.trellis_tables import MIDPOINT, RINGS, WINDOW
from buddymoe_ray.types import SlotTensor

__all__ = [
    "BLOCK",
    "GROUP",
    "PARTS",
    "LowbitFormat",
    "Matrix",
    "PackedMatrix",
    "dequantise",
    "groups_of",
    "matrix_at",
    "pack",
    "pack_scales",
    "packed_parts",
    "packed_shapes",
    "record_tensors",
    "scale_table",
    "scales_of",
    "unpack",
    "values_of",
]

ALIGN = 64
STEPS_PER_OCTAVE = 24
GROUP = 32
"""Inputs that share a scale."""
BLOCK = 16
"""Outputs of a tile."""
_PLACES = torch.arange(8, dtype=torch.uint8)
PARTS = ("codes", "scales", "base", "sizes")
"""What a matrix `m` is in a record: `m.codes`, `m.scales`, …"""


class Matrix(NamedTuple):
    """A packed matrix as kernels take it: where its codes, scales and base are (addresses, or bytes of a record), and
    its sizes without padding."""

    codes: int
    scales: int
    base: int
    N: int
    K: int


@dataclass(frozen=True, kw_only=True)
class LowbitFormat:
    """Bits of a code: 1, 2, 3, 4 or 8. `down` are those of an expert's second projection, where it has others."""

    bits: int
    down: int = 0

    def __post_init__(self) -> None:
        assert {self.bits, self.down or self.bits} <= {1, 2, 3, 4, 8}, f"bits are {self}, must be 1, 2, 3, 4 or 8"

    @classmethod
    def of_kind(cls, kind: str) -> LowbitFormat:
        """Of records named so: `lowbit3`; `lowbit24` has 2 bits, and 4 in the second projection."""
        bits, *down = map(int, kind.removeprefix("lowbit"))
        return cls(bits=bits, down=down[0] if down else 0)

    def of(self, name: str) -> LowbitFormat:
        """That of an expert's matrix alone."""
        return LowbitFormat(bits=self.down) if self.down and name == "down_proj" else LowbitFormat(bits=self.bits)

    @property
    def levels(self) -> int:
        """Number of values that a code can take."""
        return 1 << self.bits

    @property
    def trellis(self) -> bool:
        """Whether a weight's level is looked up by more than its own code."""
        return self.bits in RINGS

    @property
    def scale_bits(self) -> int:
        """Bits of a scale code. Beside codes of 1 to 3 bits a byte would be a twelfth of the matrix and more."""
        return 4 if self.trellis else 8

    @property
    def weight_bits(self) -> float:
        """Bits of a weight of a matrix, its share of a scale included."""
        return self.bits + self.scale_bits / GROUP

    @property
    def midpoint(self) -> float:
        """Of the levels: what is 0 lies there."""
        return MIDPOINT if self.trellis else (self.levels - 1) / 2

    def sizes(self, N: int, K: int) -> tuple[int, ...]:
        """The shape that says a matrix's size, and how it is packed."""
        return (N, K, 0, WINDOW) if self.trellis else (N, K, 0)

    @property
    def tile_bytes(self) -> int:
        """Bytes of a tile's codes."""
        return BLOCK * GROUP * self.bits // 8


def groups_of(K: int) -> int:
    """Scales of a row of K inputs; the last group may be short."""
    return -(-K // GROUP)


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedMatrix:
    """`codes` uint8 [A, G, tile bytes], `scales` uint8 [A, G, 16], `base` float32 [1]; with scale codes of 4 bits
    `scales` uint8 [A, G, 8], `base` float32 [16].

    `sizes` uint8 [N, K, 0] is empty and takes no bytes: its shape is the matrix's, which padding hides. Of a trellis it
    is [N, K, 0, WINDOW]: what was packed otherwise is not taken for it.
    """

    codes: Tensor
    scales: Tensor
    base: Tensor
    sizes: Tensor

    def named(self, name: str) -> dict[str, Tensor]:
        """The parts under the names they have in a record."""
        return {f"{name}.{part}": getattr(self, part) for part in PARTS}


def packed_parts(tensors: Mapping[str, Tensor], name: str) -> PackedMatrix:
    """Matrix `name` of a record's tensors."""
    return PackedMatrix(**{part: tensors[f"{name}.{part}"] for part in PARTS})


def pack(q_NK: Tensor, code_NG: Tensor, base: Tensor, fmt: LowbitFormat) -> PackedMatrix:
    """Pack codes (uint8, each below `fmt.levels`) and scale codes (uint8) of one matrix; `base` as it is stored."""
    N, K = q_NK.shape
    G = groups_of(K)
    assert q_NK.dtype == code_NG.dtype == torch.uint8, f"codes are {q_NK.dtype}, {code_NG.dtype}, must be uint8"
    assert code_NG.shape == (N, G), f"scale codes are {tuple(code_NG.shape)}, must be {(N, G)}"
    assert int(q_NK.max()) < fmt.levels, f"largest code is {int(q_NK.max())}, must be below {fmt.levels}"
    (bases,), _ = packed_shapes(N, K, fmt)["base"]
    assert base.shape == (bases,), f"base has shape {tuple(base.shape)}, must be {(bases,)}"
    q = pad(q_NK, (0, -K % GROUP, 0, -N % BLOCK))
    quads = q.view(-1, BLOCK, G, 8, 4).permute(0, 2, 3, 1, 4).reshape(-1, G, 8, 64)
    codes = _string_of(quads, fmt.bits) if fmt.trellis else _fold(quads, fmt.bits)
    return PackedMatrix(
        codes=codes.flatten(2),
        scales=pack_scales(pad(code_NG, (0, 0, 0, -N % BLOCK)), fmt),
        base=base.float(),
        sizes=q.new_empty(fmt.sizes(N, K)),
    )


def pack_scales(code_NG: Tensor, fmt: LowbitFormat) -> Tensor:
    """Scale codes of whole tiles as they lie."""
    scales = code_NG.view(-1, BLOCK, code_NG.shape[1]).transpose(1, 2).contiguous()
    if fmt.scale_bits == 8:
        return scales
    assert int(code_NG.max()) < 16, f"largest scale code is {int(code_NG.max())}, must be below 16"
    return scales[:, :, : BLOCK // 2] | scales[:, :, BLOCK // 2 :] << 4


def unpack(packed: PackedMatrix, fmt: LowbitFormat) -> tuple[Tensor, Tensor]:
    """`(q uint8 [N, K], code uint8 [N, G])` of a packed matrix."""
    (A, G, _), (N, K, *_) = packed.codes.shape, packed.sizes.shape
    quads = (_codes_of if fmt.trellis else _unfold)(packed.codes.view(A, G, fmt.bits, 64), fmt.bits)
    q = quads.view(A, G, 8, BLOCK, 4).permute(0, 3, 1, 2, 4).reshape(A * BLOCK, G * GROUP)
    scales = packed.scales if fmt.scale_bits == 8 else torch.cat([packed.scales & 15, packed.scales >> 4], dim=2)
    code = scales.transpose(1, 2).reshape(A * BLOCK, G)
    return q[:N, :K].contiguous(), code[:N].contiguous()


def dequantise(packed: PackedMatrix, fmt: LowbitFormat) -> Tensor:
    """The matrix as float32 [N, K]: the spec that every kernel is tested against."""
    q_NK, code_NG = unpack(packed, fmt)
    scale_NG = scales_of(packed.base)[code_NG.long()]
    return values_of(q_NK, fmt) * scale_NG.repeat_interleave(GROUP, dim=1)[:, : q_NK.shape[1]]


def values_of(q_NK: Tensor, fmt: LowbitFormat) -> Tensor:
    """float32 `[N, K]`: the levels of a matrix's codes, less the midpoint."""
    return values(q_NK, fmt.bits) if fmt.trellis else q_NK.float() - fmt.midpoint


def scales_of(base: Tensor) -> Tensor:
    """The scale of every scale code, float32 [16 or 256]."""
    return base if len(base) > 1 else base * scale_table(base.device)


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
    `m` becomes `m.codes`, `m.scales`, `m.base`, `m.sizes`; a vector keeps its name and is stored in `bias_dtype`.
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
        for part, (sized, dtype) in packed_shapes(shape[0], shape[1], fmt.of(name)).items():
            add(f"{name}.{part}", sized, dtype)
    return tuple(made), at


def matrix_at(layout: Sequence[SlotTensor], name: str, fmt: LowbitFormat) -> Matrix:
    """Where matrix `name` lies in records of this layout. Raises ValueError when it is not packed as `pack` does."""
    named = {tensor.name: tensor for tensor in layout}
    sizes = named.get(f"{name}.sizes")
    found = () if sizes is None else sizes.shape
    if len(found) < 3 or min(found[:2]) < 1 or found != fmt.of(name).sizes(*found[:2]):
        like = ", ".join(map(str, fmt.of(name).sizes(0, 0)[2:]))
        raise ValueError(f"{name}.sizes is {found or None}, must be [outputs, inputs, {like}]")
    N, K = found[:2]
    for part, (shape, dtype) in packed_shapes(N, K, fmt.of(name)).items():
        tensor = named.get(f"{name}.{part}")
        is_so = None if tensor is None else (tensor.dtype, tensor.shape)
        wanted = (str(dtype).removeprefix("torch."), shape)
        if is_so != wanted:
            raise ValueError(f"{name}.{part} is {is_so}, must be {wanted}")
    codes, scales, base = (named[f"{name}.{part}"].offset for part in PARTS[:3])
    return Matrix(codes, scales, base, N, K)


def packed_shapes(N: int, K: int, fmt: LowbitFormat) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each part of a packed matrix."""
    A, G = -(-N // BLOCK), groups_of(K)
    return {
        "codes": ((A, G, fmt.tile_bytes), torch.uint8),
        "scales": ((A, G, BLOCK * fmt.scale_bits // 8), torch.uint8),
        "base": ((16 if fmt.scale_bits == 4 else 1,), torch.float32),
        "sizes": (fmt.sizes(N, K), torch.uint8),
    }


def _fold(quads: Tensor, width: int) -> Tensor:
    """`[A, G, 8, 64]` codes of `width` bits into `[A, G, width, 64]` bytes: vector j holds quad `j + i * width` at bit
    `i * width`."""
    parts = quads.view(*quads.shape[:2], 8 // width, width, 64)
    vectors = parts[:, :, 0].clone()
    for i in range(1, 8 // width):
        vectors |= parts[:, :, i] << i * width
    return vectors


def _unfold(vectors: Tensor, width: int) -> Tensor:
    mask = (1 << width) - 1
    return torch.cat([vectors >> i * width & mask for i in range(8 // width)], dim=2)


def _string_of(quads: Tensor, bits: int) -> Tensor:
    """`[A, G, 8, 64]` codes, one behind the other, as bytes."""
    each = (quads.unsqueeze(-1) >> torch.arange(bits, dtype=torch.uint8, device=quads.device)) & 1
    return (each.view(*quads.shape[:2], 8 * bits, 8, 8) << _PLACES.to(quads.device)).sum(dim=4, dtype=torch.uint8)


def _codes_of(string: Tensor, bits: int) -> Tensor:
    """Back to `[A, G, 8, 64]`."""
    each = (string.unsqueeze(-1) >> _PLACES.to(string.device)) & 1
    places = torch.arange(bits, dtype=torch.uint8, device=string.device)
    return (each.view(*string.shape[:2], 8, 64, bits) << places).sum(dim=4, dtype=torch.uint8)
