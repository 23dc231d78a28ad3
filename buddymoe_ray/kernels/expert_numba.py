"""An expert around its matrix products: which rows, which record, what comes between.

`experts` computes all accesses of a layer's step in one call, `linear` one matrix; both without the GIL. Works on raw
addresses, knows no torch: the products themselves are native functions whose addresses come in (lowbit_tiles.py,
stored_tiles.py), and expert_rows.py does the rest of the arithmetic.
Invariant: the bits of an access depend on its row and its record alone.
Rows of at most CHUNK accesses of an expert go together, so scratch is bounded.
numba frees an array after the last statement that names it, and an address of it is no name: scratch that is reached by
address belongs to the caller of the function that does so. Imports numba at the top: only `cpu` may import this
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
from numba import carray, float32, njit, types
from numba.core import config as numba_config
from numba.extending import intrinsic

from buddymoe_ray.kernels.expert_calls import NO_SUCH_EXPERT, NO_SUCH_RECORD, OK, Call, Expert, Product
from buddymoe_ray.kernels.expert_rows import activate, add_bias, floats_at, ints_at, read_row, write_row
from buddymoe_ray.kernels.lowbit_format import BLOCK, GROUP
from buddymoe_ray.kernels.vector_ir import I64, VOID

__all__ = ["call_native", "compile_combine", "compile_experts", "compile_linear", "compiled", "stamp_of"]

CHUNK = 64
"""Rows computed at once: 64 rows of 2,048 inputs stay in the second-level cache."""


class _Scratch(NamedTuple):
    """One row as read, rows as multiplied, their and their outputs' addresses, outputs and inputs of the activation."""

    row: Any
    rows: Any
    pairs: Any
    x_at: Any
    both: Any
    hidden: Any
    out: Any


@intrinsic
def call_native(typing: Any, address: Any, arguments: Any) -> Any:
    """Call a native function of int64s that returns nothing."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        values = [builder.extract_value(args[1], i) for i in range(arguments.count)]
        kind = ir.FunctionType(VOID, [I64] * arguments.count)
        builder.call(builder.inttoptr(args[0], ir.PointerType(kind)), values)
        return context.get_dummy_value()

    return types.void(types.int64, arguments), emit


_native: Any = call_native


@njit
def _groups(K: Any) -> Any:
    return (K + GROUP - 1) // GROUP


@njit
def _whole(N: Any) -> Any:
    """Outputs with padding."""
    return (N + BLOCK - 1) // BLOCK * BLOCK


@njit
def _stride(K: Any) -> Any:
    """Bytes from one row as multiplied to the next; 64 more than a row, so that rows do not share cache sets."""
    return (_groups(K) * 4 * GROUP + 127) // 64 * 64


@njit
def _multiply(product: Any, record: Any, rows_of: Any, scratch: Any, out: Any) -> None:
    """`out[r] = W @ x[r] + bias` of rows at addresses `scratch.x_at`; rows of `out` are padded to whole blocks.

    `rows_of` are how many there are and the bytes of their items.
    """
    R, item_bytes = rows_of
    K, G = product.K, _groups(product.K)
    width, stride = _whole(product.N), _stride(K)
    row, rows, row_at, out_at = scratch.row, scratch.rows.ctypes.data, scratch.row.ctypes.data, out.ctypes.data
    row[K:] = float32(0.0)
    for r in range(R):
        place = rows + r * stride
        if product.quantise != 0:
            read_row(scratch.x_at[r], item_bytes, row[:K])
            _native(product.quantise, (row_at, G, place))
        else:
            copy = carray(floats_at(place), (G * GROUP,))
            read_row(scratch.x_at[r], item_bytes, copy[:K])
            copy[K:] = float32(0.0)
        scratch.pairs[r, 0], scratch.pairs[r, 1] = place, out_at + 4 * r * width
    codes, scales, base = record + product.codes, record + product.scales, record + product.base
    _native(product.project, (codes, scales, base, K, product.N, scratch.pairs.ctypes.data, R))
    if product.bias_bytes:
        for r in range(R):
            add_bias(out[r * width : r * width + product.N], record + product.bias, product.bias_bytes)


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
    plan = carray(ints_at(plan_at), (20,))
    expert, first, down = Expert(plan[0], plan[1]), _product_at(plan, 2), _product_at(plan, 11)
    expert_N, at_E = carray(ints_at(call.expert_N), (call.N,)), carray(ints_at(call.at_E), (call.E,))
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
        np.empty(most * _whole(first.N), np.float32),
        np.empty(most * F, np.float32),
        np.empty(most * _whole(D), np.float32),
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
    both_row, out_row = _whole(first.N), _whole(D)
    for r in range(R):
        scratch.x_at[r] = call.x + call.item_bytes * (order[r] // call.K * D)
    _multiply(first, record, (R, call.item_bytes), scratch, scratch.both)
    for r in range(R):
        hidden = scratch.hidden[r * F : (r + 1) * F]
        activate(activation, scratch.both[r * both_row : r * both_row + first.N], F, hidden)
        scratch.x_at[r] = scratch.hidden.ctypes.data + 4 * r * F
    _multiply(down, record, (R, 4), scratch, scratch.out)
    for r in range(R):
        out = scratch.out[r * out_row : r * out_row + D]
        write_row(out, call.out + call.item_bytes * order[r] * D, call.item_bytes)


@njit
def _linear(c: Any, plan_at: Any, i: Any) -> None:
    """`out[call.N, N] = x[call.N, K] @ W.T + bias`, both contiguous, with the product at `plan[i]`."""
    call = Call(c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7], c[8], c[9], c[10], c[11])
    product = _product_at(carray(ints_at(plan_at), (20,)), i)
    K, row = product.K, _whole(product.N)
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
    K, N, row = product.K, product.N, _whole(product.N)
    for r in range(R):
        scratch.x_at[r] = call.x + call.item_bytes * (start + r) * K
    _multiply(product, call.records, (R, call.item_bytes), scratch, scratch.both)
    for r in range(R):
        place = call.out + call.item_bytes * (start + r) * N
        write_row(scratch.both[r * row : r * row + N], place, call.item_bytes)


@njit
def _combine(y: Any, weight: Any, out: Any, sizes: Any) -> None:
    """`out[t] = sum over k of weight[t, k] * y[t, k]`, in rising order of k. Items of y and out, and of weights, have
    `item_bytes` and `weight_bytes`."""
    T, K, D, item_bytes, weight_bytes = sizes
    row, total, weights = np.empty(D, np.float32), np.empty(D, np.float32), np.empty(K, np.float32)
    for t in range(T):
        read_row(weight + weight_bytes * t * K, weight_bytes, weights)
        total[:] = float32(0.0)
        for k in range(K):
            read_row(y + item_bytes * (t * K + k) * D, item_bytes, row)
            share = weights[k]
            for i in range(D):
                total[i] += share * row[i]
        write_row(total, out + item_bytes * t * D, item_bytes)


_CALL = types.UniTuple(types.int64, len(Call._fields))


def compile_experts(folder: Path | None) -> Callable[..., int]:
    """Machine code of `_experts`, from `folder` when an earlier process left it there; None keeps none."""
    stamp = stamp_of()

    def experts(call: Any, plan_at: Any) -> Any:
        if stamp >= 0:
            return _experts(call, plan_at)
        return OK

    return compiled(types.int64(_CALL, types.int64), experts, folder)


def compile_linear(folder: Path | None) -> Callable[..., None]:
    """Machine code of `_linear`; `folder` as above."""
    stamp = stamp_of()

    def linear(call: Any, plan_at: Any, i: Any) -> None:
        if stamp >= 0:
            _linear(call, plan_at, i)

    return compiled(types.void(_CALL, types.int64, types.int64), linear, folder)


def compile_combine(folder: Path | None) -> Callable[..., None]:
    """Machine code of `_combine`; `folder` as above."""
    stamp = stamp_of()

    def combine(y: Any, weight: Any, out: Any, sizes: Any) -> None:
        if stamp >= 0:
            _combine(y, weight, out, sizes)

    i64 = types.int64
    return compiled(types.void(i64, i64, i64, types.UniTuple(i64, 5)), combine, folder)


def compiled(signature: Any, function: Callable[..., Any], folder: Path | None) -> Any:
    """numba's own cache, in our folder. It is told of the folder in a variable of its module, read while decorating."""
    config: Any = numba_config
    before = config.CACHE_DIR
    config.CACHE_DIR = "" if folder is None else str(folder)
    try:
        return njit(signature, cache=folder is not None, nogil=True)(function)
    finally:
        config.CACHE_DIR = before


def stamp_of(*names: str) -> int:
    """Checksum of the sources of some modules here. numba's cache knows the entry points' closures but not the code
    that they call."""
    common = ("expert_calls", "expert_numba", "expert_rows", "lowbit_format", "vector_ir")
    return crc32(b"".join(Path(__file__).with_name(f"{name}.py").read_bytes() for name in (*common, *names)))
