"""Rounds a group of a matrix's inputs with error feedback on a CPU, some outputs at a time.

Sums may be taken in another order than by torch: of two codes that are equally near, either may be chosen.
A weight of a group takes 7 to 21 ns with its trellis' search (4, 2 and 3 bits), 17 to 45 less than by torch, an input
or a quad at a time. What errors far away cost, a product of the matrix's size, is as much again.
Imports numba at the top: only `feedback` may import this module, and late.

Legend: S inputs of a group, s a quad of them, N outputs, n some of them, P positions of a ring.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numba import carray, float32, int32, njit, uint8

from buddymoe_ray.kernels.expert_calls import OK
from buddymoe_ray.kernels.expert_rows import floats_at, tinies_at
from buddymoe_ray.kernels.feedback_calls import FeedbackCall, FeedbackPlan
from buddymoe_ray.kernels.lowbit_format import GROUP
from buddymoe_ray.kernels.numba_calls import call_native, compiled, items, stamp_of
from buddymoe_ray.kernels.trellis_rings import LANES
from buddymoe_ray.kernels.trellis_tables import QUAD, RINGS, WINDOW

__all__ = ["compile_feedback"]

OUTPUTS = 256
"""At a time: a group of them stays in the first-level cache, and they are whole rings in all lanes."""
_TINY = 1e-30
CALL, PLAN = (0,) * len(FeedbackCall._fields), (0,) * len(FeedbackPlan._fields)
_native: Any = call_native
_RINGS = np.array([RINGS.get(bits, 0) for bits in range(4)], np.int64)


@njit
def _nearest(w_n: Any, scale_n: Any, bits: Any, code_n: Any, error_n: Any) -> None:
    """Codes of one input that choose alone, and what they miss it by."""
    half = float32(1 << bits) * float32(0.5)
    for n in range(w_n.shape[0]):
        code = int32(min(max(w_n[n] / scale_n[n] + half, float32(0.0)), half + half - float32(0.5)))
        code_n[n] = uint8(code)
        error_n[n] = w_n[n] - (float32(code) + float32(0.5) - half) * scale_n[n]


@njit
def _in_rings(w_sn: Any, scale_n: Any, count_s: Any, plan: Any, code_sn: Any, error_sn: Any) -> None:
    """Trellis codes of a quad, and what they miss it by. What is beyond the outputs has code 0, and is left out."""
    P = _RINGS[plan.bits]
    outputs, N = P // QUAD, w_sn.shape[1]
    turns = (N + outputs * LANES - 1) // (outputs * LANES)
    x, weight = np.zeros((turns, P, LANES), np.float32), np.zeros((turns, P, LANES), np.float32)
    codes = np.zeros((turns, P, LANES), np.uint8)
    for ring in range(turns * LANES):
        turn, lane, first = ring // LANES, ring % LANES, ring * outputs
        for n in range(first, first + outputs):
            for s in range(QUAD):
                p = (n - first) * QUAD + s
                weight[turn, p, lane] = -1.0
                if n < N:
                    x[turn, p, lane] = w_sn[s, n] / scale_n[n]
                    weight[turn, p, lane] = count_s[s] * max(scale_n[n] * scale_n[n], float32(_TINY))
    at = (x.ctypes.data, weight.ctypes.data, codes.ctypes.data, plan.table)
    _native(plan.search, (*at, P // 2, 1, plan.scratch, turns))
    _native(plan.search, (*at, 0, 0, plan.scratch, turns))
    table, back = carray(floats_at(plan.table), (1 << WINDOW,)), WINDOW - plan.bits
    for ring in range(turns * LANES):
        turn, lane, first, window = ring // LANES, ring % LANES, ring * outputs, 0
        for p in range(P - WINDOW, P):
            window = window >> plan.bits | int(codes[turn, p, lane]) << back
        for n in range(first, min(first + outputs, N)):
            for s in range(QUAD):
                code = codes[turn, (n - first) * QUAD + s, lane]
                window = window >> plan.bits | int(code) << back
                code_sn[s, n] = code
                error_sn[s, n] = w_sn[s, n] - table[window] * scale_n[n]


@njit
def _solve(factor_ss: Any, error_sn: Any) -> None:
    """What was missed to what the inputs still to come are told of it: the upper factor's transpose, inverted."""
    for i in range(error_sn.shape[0]):
        for j in range(i):
            share = factor_ss[j, i]
            for n in range(error_sn.shape[1]):
                error_sn[i, n] -= share * error_sn[j, n]
        inverse = float32(1.0) / factor_ss[i, i]
        for n in range(error_sn.shape[1]):
            error_sn[i, n] *= inverse


@njit
def _tell(factor_S: Any, error_n: Any, w_Sn: Any) -> None:
    """Subtract an input's error from those behind it."""
    for j in range(w_Sn.shape[0]):
        share, row = factor_S[j], w_Sn[j]
        for n in range(row.shape[0]):
            row[n] -= share * error_n[n]


@njit(error_model="numpy")
def feedback(call_at: Any, plan_at: Any) -> Any:
    """One group of all outputs."""
    call, plan = FeedbackCall(*items(call_at, CALL)), FeedbackPlan(*items(plan_at, PLAN))
    w = carray(floats_at(call.weights), (GROUP, call.N))
    errors, codes = carray(floats_at(call.errors), (GROUP, call.N)), carray(tinies_at(call.codes), (GROUP, call.N))
    scale, counts = carray(floats_at(call.scale), (call.N,)), carray(floats_at(call.counts), (GROUP,))
    factor, size = carray(floats_at(call.factor), (GROUP, GROUP)), QUAD if plan.search else 1
    for first in range(0, call.N, OUTPUTS):
        last = min(first + OUTPUTS, call.N)
        scale_n = scale[first:last]
        for at in range(0, GROUP, size):
            to = at + size
            w_sn, error_sn = w[at:to, first:last], errors[at:to, first:last]
            code_sn = codes[at:to, first:last].view(np.uint8)
            if plan.search:
                _in_rings(w_sn, scale_n, counts[at:to], plan, code_sn, error_sn)
            else:
                _nearest(w_sn[0], scale_n, plan.bits, code_sn[0], error_sn[0])
            _solve(factor[at:to, at:to], error_sn)
            for i in range(at, to):
                _tell(factor[i, to:], errors[i, first:last], w[to:, first:last])
    return OK


def compile_feedback(folder: Path | None) -> int:
    """The address of `feedback`, from `folder` when an earlier process left it there; None keeps none."""
    stamp = stamp_of("feedback_calls", "feedback_numba", "trellis_rings", "trellis_tables")

    def kernel(call_at: Any, plan_at: Any) -> Any:
        return feedback(call_at, plan_at) if stamp >= 0 else OK

    return compiled(kernel, folder)
