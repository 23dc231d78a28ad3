"""What an expert's machine code does to one row at a time: reads and writes it, adds a bias, activates.

Elementwise throughout, with operations that are rounded once each in a written order, so that the bits do not depend on
how LLVM vectorises. It does so only where a division looks for no zero, as numpy's (an activation took 17 times as
long). Knows addresses and types of items, neither records nor experts. Imports numba at the top: only `expert_numba`
may import this module.

Legend: n items of a row, F ffn.
"""

from __future__ import annotations

from typing import Any

from numba import carray, float32, int32, njit, types, uint16, uint32
from numba.extending import intrinsic

from buddymoe_ray.kernels.vector_ir import F32, F64, I32, I64

__all__ = [
    "activate",
    "add_bias",
    "copy_items",
    "double_bits",
    "exponential",
    "float_bits",
    "floats_at",
    "from_bits",
    "from_double_bits",
    "ints_at",
    "read_row",
    "rounded_row",
    "tinies_at",
    "write_row",
]

SILU, GELU, CLAMPED = 0, 1, 2  # places in `cpu.FORMULAS`; what is left is the last


def _pointer_to(item: Any) -> Any:
    @intrinsic
    def pointer(typing: Any, address: Any) -> Any:
        """A raw address as a typed pointer for `carray`."""

        def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

        return types.CPointer(item)(types.int64), emit

    return pointer


def _bitcast(source: Any, target: Any, code: Any) -> Any:
    @intrinsic
    def bitcast(typing: Any, value: Any) -> Any:
        """The same bits as another type."""
        return target(source), lambda context, builder, signature, args: builder.bitcast(args[0], code)

    return bitcast


floats_at, ints_at, halves_at, words_at, tinies_at = (
    _pointer_to(item) for item in (types.float32, types.int64, types.uint16, types.uint32, types.int8)
)
float_bits, from_bits = _bitcast(types.float32, types.int32, I32), _bitcast(types.int32, types.float32, F32)
double_bits, from_double_bits = _bitcast(types.float64, types.int64, I64), _bitcast(types.int64, types.float64, F64)


@njit
def _widened(half: Any) -> Any:
    """A bfloat16 is the upper half of a float32."""
    return from_bits(int32(uint32(half) << uint32(16)))


@njit
def read_row(address: Any, item_bytes: Any, out: Any) -> None:
    """float32 or bfloat16 (2 bytes) into float32."""
    n = out.shape[0]
    if item_bytes == 4:
        floats = carray(floats_at(address), (n,))
        for i in range(n):
            out[i] = floats[i]
    else:
        halves = carray(halves_at(address), (n,))
        for i in range(n):
            out[i] = _widened(halves[i])


@njit
def write_row(x: Any, address: Any, item_bytes: Any) -> None:
    """float32 into float32, or into the nearest bfloat16."""
    n = x.shape[0]
    if item_bytes == 4:
        out = carray(floats_at(address), (n,))
        for i in range(n):
            out[i] = x[i]
    else:
        halves = carray(halves_at(address), (n,))
        for i in range(n):
            halves[i] = uint16(_nearest(x[i]))


@njit
def _nearest(x: Any) -> Any:
    """The bits of the nearest bfloat16."""
    bits = uint32(float_bits(x))
    even = uint32(0x7FFF) + ((bits >> uint32(16)) & uint32(1))
    return uint32(0x7FC0) if x != x else (bits + even) >> uint32(16)


@njit
def rounded_row(x: Any) -> None:
    """float32 to the nearest bfloat16, in place."""
    for i in range(x.shape[0]):
        x[i] = _widened(_nearest(x[i]))


@njit
def copy_items(source: Any, target: Any, n: Any, item_bytes: Any) -> None:
    """Items of 2 or 4 bytes as they are."""
    if item_bytes == 4:
        wide, words = carray(words_at(target), (n,)), carray(words_at(source), (n,))
        for i in range(n):
            wide[i] = words[i]
    else:
        out, halves = carray(halves_at(target), (n,)), carray(halves_at(source), (n,))
        for i in range(n):
            out[i] = halves[i]


@njit
def add_bias(out: Any, bias: Any, item_bytes: Any) -> None:
    n = out.shape[0]
    if item_bytes == 4:
        floats = carray(floats_at(bias), (n,))
        for i in range(n):
            out[i] += floats[i]
    else:
        halves = carray(halves_at(bias), (n,))
        for i in range(n):
            out[i] += _widened(halves[i])


@njit
def exponential(x: Any) -> Any:
    """As Cephes' expf (2 ulp) between -87 and 87, which it does not leave; it vectorises."""
    x = min(max(x, float32(-87.0)), float32(87.0))
    shifted = x * float32(1.44269504088896341) + float32(12582912.0)  # rounds to an integer in the low bits
    n = shifted - float32(12582912.0)
    r = (x - n * float32(0.693359375)) + n * float32(2.12194440e-4)
    p = float32(1.9875691500e-4)
    p = p * r + float32(1.3981999507e-3)
    p = p * r + float32(8.3334519073e-3)
    p = p * r + float32(4.1665795894e-2)
    p = p * r + float32(1.6666665459e-1)
    p = p * r + float32(5.0000001201e-1)
    power = from_bits((float_bits(shifted) - int32(0x4B400000) + int32(127)) << int32(23))
    return (p * r * r + r + float32(1.0)) * power


@njit(error_model="numpy")
def _sigmoid(z: Any) -> Any:
    return float32(1.0) / (float32(1.0) + exponential(-z))


@njit
def activate(kind: Any, both: Any, F: Any, hidden: Any) -> None:
    """`hidden` [F] of the first product's outputs, as `cpu.FORMULAS` says."""
    gates, ups = both[:F], both[F:]
    if kind == SILU:
        for i in range(F):
            hidden[i] = gates[i] * _sigmoid(gates[i]) * ups[i]
    elif kind == GELU:  # (1 + tanh(u)) / 2 is the sigmoid of 2 u
        for i in range(F):
            gate = gates[i]
            cubed = float32(0.044715) * gate * gate * gate
            hidden[i] = gate * _sigmoid(float32(1.5957691216) * (gate + cubed)) * ups[i]
    elif kind == CLAMPED:
        for i in range(F):
            gate, up = min(both[2 * i], float32(7.0)), both[2 * i + 1]
            up = min(max(up, float32(-7.0)), float32(7.0))
            hidden[i] = (up + float32(1.0)) * (gate * _sigmoid(float32(1.702) * gate))
    else:
        for i in range(F):
            x = max(gates[i], float32(0.0))
            hidden[i] = x * x
