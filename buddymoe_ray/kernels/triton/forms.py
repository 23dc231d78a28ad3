"""What a program in Triton has to know of a matrix when it is compiled: where its parts are in a record, and its tile.

Knows neither torch nor triton. Invariant: a tile is chosen by the matrix alone, never by the number of rows.

Legend: N outputs, K inputs of a matrix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace

from buddymoe_ray.kernels.lowbit_format import BLOCK, LowbitFormat, matrix_at
from buddymoe_ray.types import SlotTensor

__all__ = ["THREADS", "WEIGHTS", "Form", "Use", "lanes_of", "power_of_two"]

WEIGHTS: Mapping[str, int] = {"bfloat16": 2, "float16": 2, "float32": 4}
"""Bytes of an item of plain weights and of biases, by torch's name of the dtype."""
THREADS = 128
"""Of a program."""
_LANES = 32
_ROWS_ACROSS = 16  # inputs that a tile of a transposed matrix has


@dataclass(frozen=True, kw_only=True)
class Use:
    """How a matrix is used: in records of so many `experts`, `shares` accesses to a row of inputs, at least so many
    `outputs` to a program."""

    experts: int
    shares: int
    outputs: int


@dataclass(frozen=True, kw_only=True)
class Form:
    """A matrix within a record of one of `E` experts, each row of whose inputs `shares` accesses have in common.

    `codes`, `scales`, `base` and `bias` are bytes from the record's begin; plain weights are the codes, in the dtype
    `weights`, which is empty where `bits` are packed, or there are none. `bias_dtype` is empty without one. A program
    computes `outputs` of a row, by `lanes` of it, with `items` weights of a lane beside each other.
    """

    E: int
    shares: int
    N: int
    K: int
    weights: str
    transposed: bool
    bits: int
    codes: int
    scales: int
    base: int
    bias: int
    bias_dtype: str
    outputs: int
    lanes: int
    items: int

    def __repr__(self) -> str:
        """As Triton has it in the name of a function."""
        return "_".join(str(part) for part in astuple(self))

    @property
    def kind(self) -> str:
        """Which product it is: `packed`, `constant`, `transposed`, `plain`, or that of codes."""
        if self.bits or not self.weights:
            return "packed" if self.bits else "constant"
        return "transposed" if self.transposed else "plain"

    @property
    def programs(self) -> int:
        """Of a row."""
        return -(-self.N // self.outputs)

    @classmethod
    def packed(
        cls, layout: Sequence[SlotTensor], name: str, fmt: LowbitFormat, bias: tuple[int, str], use: Use
    ) -> Form:
        """Of a matrix in a record laid out by `record_tensors`. Raises ValueError where it is packed otherwise."""
        matrix = matrix_at(layout, name, fmt)
        return cls(
            E=use.experts,
            shares=use.shares,
            N=matrix.N,
            K=matrix.K,
            weights="",
            transposed=False,
            bits=fmt.of(name).bits,
            codes=matrix.codes,
            scales=matrix.scales,
            base=matrix.base,
            bias=bias[0],
            bias_dtype=bias[1],
            outputs=max(BLOCK, min(use.outputs, power_of_two(matrix.N))),
            lanes=THREADS,
            items=4,
        )

    @classmethod
    def constant(cls, bias: SlotTensor, use: Use) -> Form:
        """Of no weights at all: outputs are the bias."""
        (N,), none = bias.shape, replace(bias, shape=(bias.shape[0], 0))
        return replace(cls.plain(none, (bias.offset, bias.dtype), use, transposed=False), N=N, weights="")

    @classmethod
    def plain(cls, tensor: SlotTensor, bias: tuple[int, str], use: Use, *, transposed: bool) -> Form:
        """Of a matrix as it is stored: `[out, in]`, or `[in, out]` where it is transposed."""
        N, K = tensor.shape[::-1] if transposed else tensor.shape
        items, lanes, least = 16 // WEIGHTS[tensor.dtype], _ROWS_ACROSS, THREADS
        if not transposed:
            while K % items:
                items //= 2
            lanes = lanes_of(K // items)
            least = max(4, THREADS // lanes)
        return cls(
            E=use.experts,
            shares=use.shares,
            N=N,
            K=K,
            weights=tensor.dtype,
            transposed=transposed,
            bits=0,
            codes=tensor.offset,
            scales=0,
            base=0,
            bias=bias[0],
            bias_dtype=bias[1],
            outputs=max(least, min(use.outputs, power_of_two(N))),
            lanes=lanes,
            items=items,
        )


def power_of_two(count: int) -> int:
    """The least that is not below `count`."""
    return 1 << max(0, count - 1).bit_length()


def lanes_of(chunks: int) -> int:
    """Of a row: the most that waste no more than a quarter of the loads."""
    lanes = _LANES
    while lanes > 1 and -(-chunks // lanes) * lanes * 3 > chunks * 4:
        lanes //= 2
    return lanes
