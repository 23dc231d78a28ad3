"""The low-bit expert as machine code: packed codes are unpacked row by row into the first-level cache.

No float matrix is ever made: four rows of weights at a time are widened to float32 and multiplied with every x row.
Works on raw addresses, knows no torch. Invariant: the bits of a row's output do not depend on the rows beside it: its
sums are taken by `lowbit_vector.dot4` in one written order, everything else is elementwise.
numba frees an array after the last statement that names it, and an address of it is no name: scratch that is reached by
address belongs to a caller, whose name for it outlives the call, or to a loop that names it in every turn.
Addresses and sizes come in named tuples of int64 (`lowbit_format`), which cost a kernel nothing. Imports numba at
the top: only `lowbit_cpu` may import this module, and late.

Legend: N outputs and K inputs of a matrix, P is K padded to LANES, R rows (at most CHUNK at once). In `_experts`: K
experts per token, N accesses (token, slot), E experts, D hidden, F ffn.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from numba import carray, float32, int32, njit, types

from buddymoe_ray.kernels.lowbit_format import Matrix, Places
from buddymoe_ray.kernels.lowbit_vector import (
    LANES,
    SLACK,
    byte_pointer,
    dot4,
    dot4x4,
    float_bits,
    float_pointer,
    from_bits,
    unpack2,
    unpack3,
    unpack4,
    widen1,
    widen8,
    widen32,
)

__all__ = ["compile_experts", "compile_linear"]

CHUNK = 64
"""Rows computed per unpacking: 64 rows of 2,048 floats stay in the second-level cache."""

_TABLE = types.Array(types.float32, 1, "C", readonly=True)
_MATRIX = types.NamedUniTuple(types.int64, len(Matrix._fields), Matrix)
_PLACES = types.NamedUniTuple(types.int64, len(Places._fields), Places)


@njit
def _widen_row(row: Any, q: Any, scales: Any, table: Any, base: Any, matrix: Any, w: Any) -> None:
    """One row of codes into float32 weights. `q` (scratch, K + SLACK bytes) and `w` are addresses; `row` is the address
    of its codes and the place of its first scale in `scales` (a slice of them would cost 5 % of the kernel).
    """
    codes, first = row
    K, bits, group = matrix.K, matrix.bits, matrix.group
    if bits == 8:
        q = codes
    elif bits == 4:
        unpack4(codes, K, q)
    elif bits == 3:
        unpack3(codes, K, q)
    else:
        unpack2(codes, K, q)
    middle = float32(((1 << bits) - 1) / 2)
    for g in range(K // group):
        scale = table[scales[first + g]] * base
        at = g * group
        if group == 32:
            widen32(q + at, w + 4 * at, middle, scale)
        elif group % 8 == 0:
            for i in range(at, at + group, 8):
                widen8(q + i, w + 4 * i, middle, scale)
        else:
            for i in range(at, at + group):
                widen1(q + i, w + 4 * i, middle, scale)


@njit
def _project(x_at: Any, R: Any, matrix: Any, out: Any, out_at: Any, table: Any) -> None:
    """`out[out_at[r] + n] = sum over k of W[n, k] * x[r, k]`.

    `x_at` [R] are addresses of rows padded to LANES. N is a multiple of 4, being F, 2 F or D, which are the K of some
    matrix.
    """
    K, bits = matrix.K, matrix.bits
    P = (K + LANES - 1) // LANES * LANES
    spare = (np.zeros(K * bits // 8 + SLACK, np.uint8), np.empty(K + SLACK, np.uint8))
    floats = (np.zeros(4 * P, np.float32), np.empty(16, np.float32))
    _project_with(x_at, R, matrix, out, out_at, table, (spare[0], spare[1], floats[0], floats[1]))


@njit
def _project_with(x_at: Any, R: Any, matrix: Any, out: Any, out_at: Any, table: Any, scratch: Any) -> None:
    """`_project` with its scratch: for a row of codes packed, and one to a byte; for 4 rows of weights, and 16 sums."""
    copy, q, w, sums = scratch
    N, P = matrix.N, len(w) // 4
    row_bytes, groups = matrix.K * matrix.bits // 8, matrix.K // matrix.group
    base = carray(float_pointer(matrix.base), (1,))[0]
    codes = carray(byte_pointer(matrix.codes), (N * row_bytes,))
    scales = carray(byte_pointer(matrix.scales), (N * groups,))
    copy_at, q_at, w_at, sums_at = copy.ctypes.data, q.ctypes.data, w.ctypes.data, sums.ctypes.data
    for n in range(0, N, 4):
        for m in range(4):
            row = matrix.codes + (n + m) * row_bytes
            if (N - 1 - n - m) * row_bytes < SLACK:  # what follows the last rows is not ours to read
                row = copy_at
                for i in range(row_bytes):
                    copy[i] = codes[(n + m) * row_bytes + i]
            _widen_row((row, (n + m) * groups), q_at, scales, table, base, matrix, w_at + 4 * m * P)
        r = 0
        while r + 4 <= R:
            dot4x4(x_at[r], x_at[r + 1], x_at[r + 2], x_at[r + 3], w_at, P, sums_at)
            for i in range(4):
                for m in range(4):
                    out[out_at[r + i] + n + m] = sums[4 * i + m]
            r += 4
        while r < R:
            dot4(x_at[r], w_at, P, sums_at)
            for m in range(4):
                out[out_at[r] + n + m] = sums[m]
            r += 1


@njit
def _silu_times(both: Any, F: Any, hidden: Any) -> None:
    """`hidden[i] = silu(both[i]) * both[F + i]`; exp as in Cephes' expf (2 ulp), so that it vectorises."""
    gates, ups = both[:F], both[F:]
    for i in range(F):
        gate = gates[i]
        x = min(max(-gate, float32(-87.0)), float32(87.0))
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
        e = (p * r * r + r + float32(1.0)) * power
        hidden[i] = gate / (float32(1.0) + e) * ups[i]


@njit
def _row_addresses(x: Any, x_at: Any, R: Any, K: Any, padded: Any, at: Any) -> None:
    """Addresses of rows `x[x_at[r] : x_at[r] + K]`; copied into `padded` when K is no multiple of LANES."""
    P = (K + LANES - 1) // LANES * LANES
    for r in range(R):
        at[r] = x.ctypes.data + 4 * x_at[r]
        if P != K:
            at[r] = padded.ctypes.data + 4 * r * P
            for k in range(K):
                padded[r * P + k] = x[x_at[r] + k]


@njit
def _linear(x_address: Any, R: Any, matrix: Any, out_address: Any, table: Any) -> None:
    """`out[R, N] = x[R, K] @ W.T`, both contiguous float32."""
    K, N = matrix.K, matrix.N
    x, out = carray(float_pointer(x_address), (R * K,)), carray(float_pointer(out_address), (R * N,))
    padded, at = np.zeros(CHUNK * (K + LANES), np.float32), np.empty(CHUNK, np.int64)
    x_at, out_at = np.empty(CHUNK, np.int64), np.empty(CHUNK, np.int64)
    for start in range(0, R, CHUNK):
        rows = min(CHUNK, R - start)
        for r in range(rows):
            x_at[r], out_at[r] = (start + r) * K, (start + r) * N
        _row_addresses(x, x_at, rows, K, padded, at)
        _project(at, rows, matrix, out, out_at, table)


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
def _within(matrix: Any, record: Any) -> Any:
    """A matrix whose places count from the begin of a record."""
    codes, scales, base = record + matrix.codes, record + matrix.scales, record + matrix.base
    return Matrix(codes, scales, base, matrix.N, matrix.K, matrix.bits, matrix.group)


@njit
def _experts(places: Any, expert_N: Any, at_E: Any, K: Any, first: Any, down: Any, table: Any) -> None:
    """`out[n] = expert expert_N[n] over x[n // K]` where it has a record; gated SiLU without biases.

    `at_E` is the byte of each expert's record after `places.records`, negative for none. `first` and `down` say where
    both matrices are within a record.
    """
    D, F = first.K, down.K
    N, E, PF = expert_N.shape[0], at_E.shape[0], (F + LANES - 1) // LANES * LANES
    x, out = carray(float_pointer(places.x), (N // K * D,)), carray(float_pointer(places.out), (N * D,))
    starts, order = _group_accesses(expert_N, at_E)
    most = 1
    for e in range(E):
        most = max(most, min(CHUNK, starts[e + 1] - starts[e]))
    padded, at = np.zeros(most * (D + LANES), np.float32), np.empty(most, np.int64)
    both, hidden = np.empty(most * 2 * F, np.float32), np.zeros(most * PF, np.float32)
    x_at, out_at, both_at = np.empty(most, np.int64), np.empty(most, np.int64), np.arange(most) * (2 * F)
    turn = 0
    for e in range(E):
        if starts[e] == starts[e + 1]:
            continue
        turn += 1
        if turn % places.shares != places.share:
            continue
        record = places.records + at_E[e]
        for start in range(starts[e], starts[e + 1], CHUNK):
            R = min(CHUNK, starts[e + 1] - start)
            for r in range(R):
                x_at[r], out_at[r] = order[start + r] // K * D, order[start + r] * D
            _row_addresses(x, x_at, R, D, padded, at)
            _project(at, R, _within(first, record), both, both_at, table)
            for r in range(R):
                _silu_times(both[r * 2 * F : (r + 1) * 2 * F], F, hidden[r * PF : r * PF + F])
                at[r] = hidden.ctypes.data + 4 * r * PF
            _project(at, R, _within(down, record), out, out_at, table)


def compile_linear(*, cache: bool) -> Callable[..., None]:
    """Machine code of `_linear`; with `cache` from disk when an earlier process left it there.

    Raises RuntimeError when `cache` is asked for and no folder for it can be written.
    """
    stamp, i = _stamp(), types.int64

    def linear(x: Any, R: Any, matrix: Any, out: Any, table: Any) -> None:
        if stamp >= 0:
            _linear(x, R, matrix, out, table)

    return njit(types.void(i, i, _MATRIX, i, _TABLE), cache=cache, nogil=True)(linear)  # type: ignore[no-any-return]


def compile_experts(*, cache: bool) -> Callable[..., None]:
    """Machine code of `_experts`; `cache` as above."""
    stamp, int64s = _stamp(), types.Array(types.int64, 1, "C")

    def experts(places: Any, expert_N: Any, at_E: Any, K: Any, first: Any, down: Any, table: Any) -> None:
        if stamp >= 0:
            _experts(places, expert_N, at_E, K, first, down, table)

    signature = types.void(_PLACES, int64s, int64s, types.int64, _MATRIX, _MATRIX, _TABLE)
    return njit(signature, cache=cache, nogil=True)(experts)  # type: ignore[no-any-return]


def _stamp() -> int:
    """Checksum of the sources. The disk cache knows the entry points' closures but not the code that they call."""
    return crc32(
        b"".join(Path(__file__).with_name(f"lowbit_{name}.py").read_bytes() for name in ("format", "numba", "vector"))
    )
