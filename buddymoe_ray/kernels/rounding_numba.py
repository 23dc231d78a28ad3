"""Plain rounding of a matrix on a CPU: searches a scale for every group, then writes the codes where kernels read them.

Sums over a group may be taken in any order: of two scales or codes that are equally near, machines may choose either.
Imports numba at the top: only `rounding_cpu` may import this module, and late.

Legend: N outputs, K inputs, G groups of a row, A tiles of 16 outputs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numba import carray, float32, int32, njit, uint8, uint32

from buddymoe_ray.kernels.expert_calls import OK
from buddymoe_ray.kernels.expert_rows import floats_at, read_row, words_at
from buddymoe_ray.kernels.lowbit_format import BLOCK, GROUP
from buddymoe_ray.kernels.numba_calls import compiled, items, stamp_of
from buddymoe_ray.kernels.rounding_calls import RoundingCall, RoundingPlan

__all__ = ["compile_rounding"]

CALL, PLAN = (0,) * len(RoundingCall._fields), (0,) * len(RoundingPlan._fields)
_UNORDERED = {"reassoc", "nsz", "contract"}


@njit(fastmath=_UNORDERED)
def _sums(w: Any, inverse: Any, top: Any, empty: Any) -> Any:
    """`<|w|, u>, <u, u>` of a group, with levels u of |w|: halves of odd numbers up to `top + 1/2`. `empty` of its
    inputs are not there."""
    dot, norm = float32(0.0), float32(0.0)
    for i in range(GROUP):
        size = abs(w[i])
        u = float32(int32(min(size * inverse, top))) + float32(0.5)
        dot += size * u
        norm += u * u
    return dot, norm - float32(0.25) * float32(empty)


@njit(fastmath=_UNORDERED)
def _largest_and_square(w: Any) -> Any:
    """`max |w|, <w, w>` of a group."""
    largest, square = float32(0.0), float32(0.0)
    for i in range(GROUP):
        largest = max(largest, abs(w[i]))
        square += w[i] * w[i]
    return largest, square


@njit
def _search(w: Any, empty: Any, half: Any, shares: Any) -> Any:
    """The least-squares scale of the best try, and that which keeps the group's projection on itself with the same
    codes."""
    tiny, top = float32(1e-30), half - float32(0.5)
    largest, square = _largest_and_square(w)
    gain, scale = float32(-1.0), float32(0.0)
    for share in range(len(shares)):
        dot, norm = _sums(w, half / shares[share] / max(largest, tiny), top, empty)
        norm = max(norm, tiny)  # 0 where none of the inputs is there
        if dot * dot / norm > gain:
            gain, scale = dot * dot / norm, dot / norm
    dot, norm = _sums(w, float32(1.0) / max(scale, tiny), top, empty)
    return scale, square / max(dot, tiny)


@njit
def _code(w: Any, count: Any, inverse: Any, half: Any, q: Any) -> None:
    """Nearest codes of a group's inputs."""
    for i in range(GROUP):
        nearest = int32(min(max(w[i] * inverse + half, float32(0.0)), half + half - float32(0.5)))
        q[i] = uint8(nearest if i < count else 0)


@njit
def _write(q: Any, g: Any, bits: Any, codes: Any) -> None:
    """Group g of a tile as `lowbit_format.pack` lays it: `q` has the codes of its outputs, four inputs to a word."""
    for j in range(bits):
        for n in range(BLOCK):
            word = uint32(0)
            for part in range(8 // bits):
                word |= q[n, 8 * g + j + part * bits] << uint32(part * bits)
            codes[j * BLOCK + n] = word


@njit
def rounding(call_at: Any, plan_at: Any) -> Any:
    """All of a matrix: its scales, or with `codes` its codes under the scales found before; see `rounding_cpu`."""
    call, plan = RoundingCall(*items(call_at, CALL)), RoundingPlan(*items(plan_at, PLAN))
    G, half = (call.K + GROUP - 1) // GROUP, float32(1 << plan.bits) * float32(0.5)
    A, words = (call.N + BLOCK - 1) // BLOCK, BLOCK * plan.bits
    shares = carray(floats_at(plan.shares), (plan.tries,))
    scale, kept = carray(floats_at(call.scale), (A * BLOCK, G)), carray(floats_at(call.kept), (A * BLOCK, G))
    w, q = np.zeros(G * GROUP, np.float32), np.zeros((BLOCK, G * GROUP), np.uint8)
    for n in range(A * BLOCK):
        if n < call.N:
            read_row(call.weights + call.item_bytes * n * call.K, call.item_bytes, w[: call.K])
        for g in range(G):
            at, count = g * GROUP, min(GROUP, call.K - g * GROUP) * (n < call.N)
            if call.codes == 0:
                scale[n, g], kept[n, g] = _search(w[at : at + GROUP], GROUP - count, half, shares)
            else:
                inverse = float32(1.0) / max(scale[n, g], float32(1e-30))
                _code(w[at : at + GROUP], count, inverse, half, q[n % BLOCK, at : at + GROUP])
        if call.codes != 0 and n % BLOCK == BLOCK - 1:
            for g in range(G):
                to = words_at(call.codes + 4 * words * ((n // BLOCK) * G + g))
                _write(q.view(np.uint32), g, plan.bits, carray(to, (words,)))
    return OK


def compile_rounding(folder: Path | None) -> int:
    """The address of `rounding`, from `folder` when an earlier process left it there; None keeps none."""
    stamp = stamp_of("rounding_calls", "rounding_numba")

    def kernel(call_at: Any, plan_at: Any) -> Any:
        return rounding(call_at, plan_at) if stamp >= 0 else OK

    return compiled(kernel, folder)
