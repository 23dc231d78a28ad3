"""The low-bit expert around its matrix products: which rows, which record, the activation between, biases.

`experts` computes all accesses of a layer's step in one call, `linear` one matrix; both without the GIL. Works on raw
addresses, knows no torch: the products themselves are native functions whose addresses come in (lowbit_tiles.py).
Invariant: the bits of an access depend on its row and its record alone. Rows of at most CHUNK accesses of an expert go
together, so scratch is bounded.
numba frees an array after the last statement that names it, and an address of it is no name: scratch that is reached by
address belongs to the caller of the function that does so. Imports numba at the top: only `lowbit_cpu` may import this
module, and late.

Legend: N outputs and K inputs of a matrix, G groups of 32 inputs, R rows (at most CHUNK at once). In `experts`: K
experts per token, N accesses (token, slot), E experts, D hidden, F ffn.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
from llvmlite import ir
from numba import carray, float32, int32, njit, types, uint16, uint32
from numba.core import config as numba_config
from numba.extending import intrinsic

from buddymoe_ray.kernels.lowbit_calls import Call, Expert, Product
from buddymoe_ray.kernels.vector_ir import F32, I32, I64, VOID

__all__ = ["compile_experts", "compile_linear"]

CHUNK = 64
"""Rows computed at once: 64 rows of 2,048 inputs stay in the second-level cache."""
GROUP = 32
OK, NO_SUCH_EXPERT, NO_SUCH_RECORD = 0, 1, 2
SILU, GELU, CLAMPED, RELU2 = 0, 1, 2, 3


class _Scratch(NamedTuple):
    """One row as read, rows as multiplied, their and their outputs' addresses, outputs and inputs of the activation."""

    row: Any
    rows: Any
    pairs: Any
    x_at: Any
    both: Any
    hidden: Any
    out: Any


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
        """The same 32 bits as another type."""
        return target(source), lambda context, builder, signature, args: builder.bitcast(args[0], code)

    return bitcast


_floats_at, _ints_at, _halves_at = (_pointer_to(item) for item in (types.float32, types.int64, types.uint16))
_float_bits, _from_bits = _bitcast(types.float32, types.int32, I32), _bitcast(types.int32, types.float32, F32)


@intrinsic
def _call_native(typing: Any, address: Any, arguments: Any) -> Any:
    """Call a native function of int64s that returns nothing."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        values = [builder.extract_value(args[1], i) for i in range(arguments.count)]
        kind = ir.FunctionType(VOID, [I64] * arguments.count)
        builder.call(builder.inttoptr(args[0], ir.PointerType(kind)), values)
        return context.get_dummy_value()

    return types.void(types.int64, arguments), emit


_native: Any = _call_native


@njit
def _groups(K: Any) -> Any:
    return (K + GROUP - 1) // GROUP


@njit
def _stride(K: Any) -> Any:
    """Bytes from one row as multiplied to the next; 64 more than a row, so that rows do not share cache sets."""
    return (_groups(K) * 4 * GROUP + 127) // 64 * 64


@njit
def _multiply(product: Any, record: Any, rows_of: Any, scratch: Any, out: Any) -> None:
    """`out[r] = W @ x[r] + bias` of rows at addresses `scratch.x_at`; rows of `out` are padded to blocks of 16.

    `rows_of` are how many there are and the bytes of their items.
    """
    R, item_bytes = rows_of
    K, G = product.K, _groups(product.K)
    blocks, stride = (product.N + 15) // 16, _stride(K)
    row, rows, row_at, out_at = scratch.row, scratch.rows.ctypes.data, scratch.row.ctypes.data, out.ctypes.data
    row[K:] = float32(0.0)
    for r in range(R):
        place = rows + r * stride
        if product.quantise != 0:
            _read(scratch.x_at[r], item_bytes, row[:K])
            _native(product.quantise, (row_at, G, place))
        else:
            copy = carray(_floats_at(place), (G * GROUP,))
            _read(scratch.x_at[r], item_bytes, copy[:K])
            copy[K:] = float32(0.0)
        scratch.pairs[r, 0], scratch.pairs[r, 1] = place, out_at + 64 * r * blocks
    codes, scales, base = record + product.codes, record + product.scales, record + product.base
    _native(product.project, (codes, scales, base, G, blocks, scratch.pairs.ctypes.data, R))
    if product.bias_bytes:
        for r in range(R):
            _add_bias(out[16 * r * blocks : 16 * r * blocks + product.N], record + product.bias, product.bias_bytes)


@njit
def _widened(half: Any) -> Any:
    """A bfloat16 is the upper half of a float32."""
    return _from_bits(int32(uint32(half) << uint32(16)))


@njit
def _read(address: Any, item_bytes: Any, out: Any) -> None:
    """float32 or bfloat16 (2 bytes) into float32."""
    n = out.shape[0]
    if item_bytes == 4:
        out[:] = carray(_floats_at(address), (n,))
    else:
        halves = carray(_halves_at(address), (n,))
        for i in range(n):
            out[i] = _widened(halves[i])


@njit
def _write(x: Any, address: Any, item_bytes: Any) -> None:
    """float32 into float32, or into the nearest bfloat16."""
    n = x.shape[0]
    if item_bytes == 4:
        out = carray(_floats_at(address), (n,))
        out[:] = x
    else:
        halves = carray(_halves_at(address), (n,))
        for i in range(n):
            bits = uint32(_float_bits(x[i]))
            even = uint32(0x7FFF) + ((bits >> uint32(16)) & uint32(1))
            rounded = uint32(0x7FC0) if x[i] != x[i] else (bits + even) >> uint32(16)
            halves[i] = uint16(rounded)


@njit
def _add_bias(out: Any, bias: Any, item_bytes: Any) -> None:
    n = out.shape[0]
    if item_bytes == 4:
        floats = carray(_floats_at(bias), (n,))
        for i in range(n):
            out[i] += floats[i]
    else:
        halves = carray(_halves_at(bias), (n,))
        for i in range(n):
            out[i] += _widened(halves[i])


@njit
def _sigmoid(z: Any) -> Any:
    """exp as in Cephes' expf (2 ulp), so that it vectorises."""
    x = min(max(-z, float32(-87.0)), float32(87.0))
    shifted = x * float32(1.44269504088896341) + float32(12582912.0)  # rounds to an integer in the low bits
    n = shifted - float32(12582912.0)
    r = (x - n * float32(0.693359375)) + n * float32(2.12194440e-4)
    p = float32(1.9875691500e-4)
    p = p * r + float32(1.3981999507e-3)
    p = p * r + float32(8.3334519073e-3)
    p = p * r + float32(4.1665795894e-2)
    p = p * r + float32(1.6666665459e-1)
    p = p * r + float32(5.0000001201e-1)
    power = _from_bits((_float_bits(shifted) - int32(0x4B400000) + int32(127)) << int32(23))
    e = (p * r * r + r + float32(1.0)) * power
    return float32(1.0) / (float32(1.0) + e)


@njit
def _activate(kind: Any, both: Any, F: Any, hidden: Any) -> None:
    """`hidden` [F] of the first product's outputs, as `lowbit_cpu.FORMULAS` says."""
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


@njit
def _group_accesses(expert_N: Any, at_E: Any) -> Any:
    """Accesses in order of expert (counting sort, stable): `starts[e] : starts[e + 1]` of `order` are those of expert
    e."""
    E = at_E.shape[0]
    starts = np.zeros(E + 1, np.int64)
    for n in range(expert_N.shape[0]):
        if expert_N[n] >= 0 and at_E[expert_N[n]] >= 0:
            starts[expert_N[n]] += 1
    for e in range(E):  # now the ends of the experts
        starts[e + 1] += starts[e]
    order = np.empty(starts[E], np.int64)
    for n in range(expert_N.shape[0] - 1, -1, -1):
        e = expert_N[n]
        if e >= 0 and at_E[e] >= 0:
            starts[e] -= 1
            order[starts[e]] = n
    return starts, order


@njit
def _fault(expert_N: Any, at_E: Any, room: Any) -> Any:
    """What would be read past an end."""
    for n in range(expert_N.shape[0]):
        if expert_N[n] >= at_E.shape[0]:
            return NO_SUCH_EXPERT
    for e in range(at_E.shape[0]):
        if at_E[e] >= 0 and at_E[e] > room:
            return NO_SUCH_RECORD
    return OK


@njit
def _product_at(plan: Any, i: Any) -> Any:
    p = plan[i : i + 9]
    return Product(p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7], p[8])


@njit
def _experts(c: Any, plan_at: Any) -> Any:
    """`out[n] = expert expert_N[n] over x[n // K]` where it has a record; rows of others are left alone.

    `c` are the fields of a `Call`, `plan_at` is the address of a plan.
    """
    call = Call(c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7], c[8], c[9], c[10], c[11])
    plan = carray(_ints_at(plan_at), (20,))
    expert, first, down = Expert(plan[0], plan[1]), _product_at(plan, 2), _product_at(plan, 11)
    expert_N, at_E = carray(_ints_at(call.expert_N), (call.N,)), carray(_ints_at(call.at_E), (call.E,))
    fault = _fault(expert_N, at_E, call.records_bytes - expert.nbytes)
    if fault != OK:
        return fault
    starts, order = _group_accesses(expert_N, at_E)
    most = 1
    for e in range(call.E):
        most = max(most, min(CHUNK, starts[e + 1] - starts[e]))
    D, F = first.K, down.K
    scratch = _Scratch(
        np.empty(max(_groups(D), _groups(F)) * GROUP, np.float32),
        np.empty(most * max(_stride(D), _stride(F)), np.uint8),
        np.empty((most, 2), np.int64),
        np.empty(most, np.int64),
        np.empty(most * ((first.N + 15) // 16 * 16), np.float32),
        np.empty(most * F, np.float32),
        np.empty(most * ((D + 15) // 16 * 16), np.float32),
    )
    turn = 0
    for e in range(call.E):
        if starts[e] == starts[e + 1]:
            continue
        turn += 1
        if turn % call.shares != call.share:
            continue
        for start in range(starts[e], starts[e + 1], CHUNK):
            some = order[start : min(start + CHUNK, starts[e + 1])]
            _expert(call, call.records + at_E[e], some, (expert.activation, first, down), scratch)
    return OK


@njit
def _expert(call: Any, record: Any, order: Any, expert: Any, scratch: Any) -> None:
    """Accesses `order` (at most CHUNK) of one expert."""
    activation, first, down = expert
    D, F, R = first.K, down.K, order.shape[0]
    both_row, out_row = (first.N + 15) // 16 * 16, (D + 15) // 16 * 16
    for r in range(R):
        scratch.x_at[r] = call.x + call.item_bytes * (order[r] // call.K * D)
    _multiply(first, record, (R, call.item_bytes), scratch, scratch.both)
    for r in range(R):
        hidden = scratch.hidden[r * F : (r + 1) * F]
        _activate(activation, scratch.both[r * both_row : r * both_row + first.N], F, hidden)
        scratch.x_at[r] = scratch.hidden.ctypes.data + 4 * r * F
    _multiply(down, record, (R, 4), scratch, scratch.out)
    for r in range(R):
        out = scratch.out[r * out_row : r * out_row + D]
        _write(out, call.out + call.item_bytes * order[r] * D, call.item_bytes)


@njit
def _linear(c: Any, plan_at: Any, i: Any) -> None:
    """`out[call.N, N] = x[call.N, K] @ W.T + bias`, both contiguous float32, with the product at `plan[i]`."""
    call = Call(c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7], c[8], c[9], c[10], c[11])
    product = _product_at(carray(_ints_at(plan_at), (20,)), i)
    K, row = product.K, (product.N + 15) // 16 * 16
    most, none = min(CHUNK, call.N), np.empty(0, np.float32)
    scratch = _Scratch(
        np.empty(_groups(K) * GROUP, np.float32),
        np.empty(most * _stride(K), np.uint8),
        np.empty((most, 2), np.int64),
        np.empty(most, np.int64),
        np.empty(most * row, np.float32),
        none,
        none,
    )
    for start in range(0, call.N, CHUNK):
        _linear_rows(call, product, start, min(CHUNK, call.N - start), scratch)


@njit
def _linear_rows(call: Any, product: Any, start: Any, R: Any, scratch: Any) -> None:
    K, N, row = product.K, product.N, (product.N + 15) // 16 * 16
    for r in range(R):
        scratch.x_at[r] = call.x + 4 * (start + r) * K
    _multiply(product, call.records, (R, 4), scratch, scratch.both)
    for r in range(R):
        out = carray(_floats_at(call.out + 4 * (start + r) * N), (N,))
        out[:] = scratch.both[r * row : r * row + N]


_CALL = types.UniTuple(types.int64, len(Call._fields))


def compile_experts(folder: Path | None) -> Callable[..., int]:
    """Machine code of `_experts`, from `folder` when an earlier process left it there; None keeps none."""
    stamp = _stamp()

    def experts(call: Any, plan_at: Any) -> Any:
        if stamp >= 0:
            return _experts(call, plan_at)
        return OK

    return _compiled(types.int64(_CALL, types.int64), experts, folder)


def compile_linear(folder: Path | None) -> Callable[..., None]:
    """Machine code of `_linear`; `folder` as above."""
    stamp = _stamp()

    def linear(call: Any, plan_at: Any, i: Any) -> None:
        if stamp >= 0:
            _linear(call, plan_at, i)

    return _compiled(types.void(_CALL, types.int64, types.int64), linear, folder)


def _compiled(signature: Any, function: Callable[..., Any], folder: Path | None) -> Any:
    """numba's own cache, in our folder. It is told of the folder in a variable of its module, read while decorating."""
    config: Any = numba_config
    before = config.CACHE_DIR
    config.CACHE_DIR = "" if folder is None else str(folder)
    try:
        return njit(signature, cache=folder is not None, nogil=True)(function)
    finally:
        config.CACHE_DIR = before


def _stamp() -> int:
    """Checksum of the sources. numba's cache knows the entry points' closures but not the code that they call."""
    names = ("lowbit_calls", "lowbit_numba", "vector_ir")
    return crc32(b"".join(Path(__file__).with_name(f"{name}.py").read_bytes() for name in names))
