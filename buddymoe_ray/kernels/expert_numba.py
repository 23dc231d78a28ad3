"""An expert around its matrix products: which rows, which record, what comes between.

`experts` computes all accesses of a layer's step in one call, `linear` one matrix; both without the GIL. Works on raw
addresses, knows no torch: the products themselves are native functions whose addresses come in (lowbit_tiles.py,
stored_tiles.py, those of coded.py), and expert_rows.py does the rest of the arithmetic.
Invariant: the bits of an access depend on its row and its record alone.
Rows of at most CHUNK accesses of an expert go together, so scratch is bounded.
numba frees an array after the last statement that names it, and an address of it is no name: scratch that is reached by
address belongs to the caller of the function that does so. Imports numba at the top: only `cpu` may import this
module, and late.

Legend: N outputs and K inputs of a matrix, G groups of 32 inputs, R rows (at most CHUNK at once). In `experts`: K
experts per token, N accesses (token, slot), E experts, D hidden, F ffn.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numba import carray, float32, njit

from buddymoe_ray.kernels.expert_calls import (
    LINE,
    NO_SUCH_EXPERT,
    NO_SUCH_RECORD,
    OK,
    Call,
    CombineCall,
    Expert,
    Product,
)
from buddymoe_ray.kernels.expert_rows import activate, add_bias, floats_at, ints_at, read_row, write_row
from buddymoe_ray.kernels.lowbit_format import BLOCK, GROUP
from buddymoe_ray.kernels.numba_calls import call_native, compiled, items, stamp_of

__all__ = ["compile_combine", "compile_experts", "compile_linear"]

CHUNK = 128
"""Rows computed at once: 128 rows of 2,048 inputs of two bytes stay in a second-level cache of 1 MB. By 64, prompts in
bfloat16 take 8 % longer; float32 rows would take 2 % less."""


class _Scratch(NamedTuple):
    """One row as read, rows as multiplied, their and their outputs' addresses, outputs and inputs of the activation."""

    row: Any
    rows: Any
    pairs: Any
    x_at: Any
    both: Any
    hidden: Any
    out: Any


_native: Any = call_native
CALL, COMBINE, PRODUCT = ((0,) * len(kind._fields) for kind in (Call, CombineCall, Product))
PLAN = (0,) * len((*Expert._fields, *Product._fields, *Product._fields))
DOWN = len((*Expert._fields, *Product._fields))


@njit
def _groups(K: Any) -> Any:
    return (K + GROUP - 1) // GROUP


@njit
def _whole(N: Any) -> Any:
    """Outputs with padding."""
    return (N + BLOCK - 1) // BLOCK * BLOCK


@njit
def _stride(K: Any) -> Any:
    """Bytes from one row as multiplied to the next; 64 more than four groups at a time take, so that rows do not share
    cache sets."""
    return (_groups(K) + 3) // 4 * 16 * GROUP + 64


@njit
def _rows_bytes(R: Any, product: Any) -> Any:
    """Of rows as multiplied, in whole panels, and of room to begin them with a cache line."""
    return (R + product.panel - 1) // product.panel * product.panel * _stride(product.K) + LINE


@njit
def _lay(product: Any, rows_of: Any, scratch: Any) -> None:
    """Rows at addresses `scratch.x_at` as they are multiplied; `rows_of` are how many there are and the bytes of their
    items."""
    R, item_bytes = rows_of
    K, G, stride = product.K, _groups(product.K), _stride(product.K)
    row, row_at = scratch.row, scratch.row.ctypes.data
    rows = (scratch.rows.ctypes.data + LINE - 1) // LINE * LINE
    row[K:] = float32(0.0)
    for r in range(R):
        place = rows + r // product.panel * product.panel * stride + r % product.panel * LINE
        if product.quantise != 0:
            read_row(scratch.x_at[r], item_bytes, row[:K])
            _native(product.quantise, (row_at, G, place))
        else:
            copy = carray(floats_at(place), (G * GROUP,))
            read_row(scratch.x_at[r], item_bytes, copy[:K])
            copy[K:] = float32(0.0)
        scratch.pairs[r, 0] = place


@njit
def _multiply_part(product: Any, record: Any, part: Any, scratch: Any, places: Any) -> None:
    """`W_part @ x[r] + bias` of R rows that were laid out, to rows of an array, from a column on."""
    R, out, width, column = places
    N, pairs, out_at = product.N // product.parts, scratch.pairs, out.ctypes.data
    for r in range(R):
        pairs[r, 1] = out_at + 4 * (r * width + column)
    codes, scales = record + product.codes + part * product.code_step, record + product.scales
    base = record + product.base + part * product.base_step
    stored = (codes, scales + part * product.scale_step, base)
    _native(product.project, (*stored, product.K, N, pairs.ctypes.data, R))
    if product.bias_bytes:
        bias = record + product.bias + product.bias_bytes * part * N
        for r in range(R):
            begin = r * width + column
            add_bias(out[begin : begin + N], bias, product.bias_bytes)


@njit
def _multiply(product: Any, record: Any, rows_of: Any, scratch: Any, out: Any) -> None:
    """`out[r] = W @ x[r] + bias` of rows as `_lay` takes them; rows of `out` are padded to whole blocks."""
    _lay(product, rows_of, scratch)
    for part in range(product.parts):
        places = (rows_of[0], out, _whole(product.N), part * (product.N // product.parts))
        _multiply_part(product, record, part, scratch, places)


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
def experts(call_at: Any, plan_at: Any) -> Any:
    """`out[n] = expert expert_N[n] over x[n // K]` where it has a record; rows of others are left alone.

    At `call_at` are the fields of a `Call`, at `plan_at` is a plan.
    """
    call, plan = Call(*items(call_at, CALL)), items(plan_at, PLAN)
    expert, first, down = Expert(*plan[:2]), Product(*plan[2:DOWN]), Product(*plan[DOWN:])
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
        np.empty(max(_rows_bytes(most, first), _rows_bytes(most, down)), np.uint8),
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
def linear(call_at: Any, product_at: Any) -> Any:
    """`out[call.N, N] = x[call.N, K] @ W.T + bias`, both contiguous, with the product at an address within a plan."""
    call, product = Call(*items(call_at, CALL)), Product(*items(product_at, PRODUCT))
    K, row = product.K, _whole(product.N // product.parts)
    most, none = min(CHUNK, call.N), np.empty(0, np.float32)
    scratch = _Scratch(
        np.empty(_groups(K) * GROUP, np.float32),
        np.empty(_rows_bytes(most, product), np.uint8),
        np.empty((most, 2), np.int64),
        np.empty(most, np.int64),
        np.empty(most * row, np.float32),
        none,
        none,
    )
    for start in range(0, call.N, CHUNK):
        _linear_rows(call, product, start, min(CHUNK, call.N - start), scratch)
    return OK


@njit
def _linear_rows(call: Any, product: Any, start: Any, R: Any, scratch: Any) -> None:
    """A part of the outputs after the other: a head's for all rows would be new pages in every call."""
    K, N = product.K, product.N // product.parts
    row = _whole(N)
    for r in range(R):
        scratch.x_at[r] = call.x + call.item_bytes * (start + r) * K
    _lay(product, (R, call.item_bytes), scratch)
    for part in range(product.parts):
        _multiply_part(product, call.records, part, scratch, (R, scratch.both, row, 0))
        for r in range(R):
            place = call.out + call.item_bytes * ((start + r) * product.N + part * N)
            write_row(scratch.both[r * row : r * row + N], place, call.item_bytes)


@njit
def combine(call_at: Any, _: Any) -> Any:
    """`out[t] = sum over k of weight[t, k] * y[t, k]`, in rising order of k: see `CombineCall`."""
    call = CombineCall(*items(call_at, COMBINE))
    K, D = call.K, call.D
    row, total, weights = np.empty(D, np.float32), np.empty(D, np.float32), np.empty(K, np.float32)
    for t in range(call.T):
        read_row(call.weight + call.weight_bytes * t * K, call.weight_bytes, weights)
        total[:] = float32(0.0)
        for k in range(K):
            read_row(call.y + call.item_bytes * (t * K + k) * D, call.item_bytes, row)
            share = weights[k]
            for i in range(D):
                total[i] += share * row[i]
        write_row(total, call.out + call.item_bytes * t * D, call.item_bytes)
    return OK


_SOURCES = ("expert_numba",)


def compile_experts(folder: Path | None) -> int:
    """The address of `experts`, from `folder` when an earlier process left it there; None keeps none."""
    stamp = stamp_of(*_SOURCES)

    def kernel(call_at: Any, plan_at: Any) -> Any:
        return experts(call_at, plan_at) if stamp >= 0 else OK

    return compiled(kernel, folder)


def compile_linear(folder: Path | None) -> int:
    """The address of `linear`; `folder` as above."""
    stamp = stamp_of(*_SOURCES)

    def kernel(call_at: Any, plan_at: Any) -> Any:
        return linear(call_at, plan_at) if stamp >= 0 else OK

    return compiled(kernel, folder)


def compile_combine(folder: Path | None) -> int:
    """The address of `combine`; `folder` as above."""
    stamp = stamp_of(*_SOURCES)

    def kernel(call_at: Any, plan_at: Any) -> Any:
        return combine(call_at, plan_at) if stamp >= 0 else OK

    return compiled(kernel, folder)
