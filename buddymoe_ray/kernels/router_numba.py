"""A router's choice without the GIL: softmax over the experts and the K largest shares of each row, with sums in rising
order, so that the bits of a row depend on that row alone. Imports numba at the top: only `router` may import this
module, and late.

Legend: T rows, E experts, K experts per token.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numba import carray, float32, njit

from buddymoe_ray.kernels.expert_calls import OK
from buddymoe_ray.kernels.expert_rows import exponential, ints_at, read_row, write_row
from buddymoe_ray.kernels.numba_calls import compiled, items, stamp_of
from buddymoe_ray.kernels.router_calls import RouterCall, RouterPlan

__all__ = ["compile_router"]

CALL, PLAN = (0,) * len(RouterCall._fields), (0,) * len(RouterPlan._fields)


@njit
def _choose(scores: Any, ids: Any, weights: Any, normalised: Any) -> None:
    """A row's K largest softmax shares in falling order, of equal ones the first, and their experts. `scores` are
    logits and lost."""
    E, top = scores.shape[0], scores[0]
    for e in range(E):
        top = max(top, scores[e])
    total = float32(0.0)
    for e in range(E):
        scores[e] = exponential(scores[e] - top)
        total += scores[e]
    chosen = float32(0.0)
    for k in range(ids.shape[0]):
        best = 0
        for e in range(1, E):
            if scores[e] > scores[best]:
                best = e
        ids[k], weights[k] = best, scores[best] / total
        chosen += weights[k]
        scores[best] = float32(-1.0)  # of a row that is not a number the ids may repeat; they are ids all the same
    if normalised:
        for k in range(ids.shape[0]):
            weights[k] /= chosen


@njit
def choose(call_at: Any, plan_at: Any) -> Any:
    """All rows of a call."""
    call, plan = RouterCall(*items(call_at, CALL)), RouterPlan(*items(plan_at, PLAN))
    scores, weights = np.empty(plan.E, np.float32), np.empty(plan.K, np.float32)
    for t in range(call.T):
        read_row(call.logits + call.item_bytes * t * plan.E, call.item_bytes, scores)
        _choose(scores, carray(ints_at(call.ids + 8 * t * plan.K), (plan.K,)), weights, plan.normalised)
        write_row(weights, call.weights + plan.weight_bytes * t * plan.K, plan.weight_bytes)
    return OK


def compile_router(folder: Path | None) -> int:
    """The address of `choose`, from `folder` when an earlier process left it there; None keeps none."""
    stamp = stamp_of("router_calls", "router_numba")

    def kernel(call_at: Any, plan_at: Any) -> Any:
        return choose(call_at, plan_at) if stamp >= 0 else OK

    return compiled(kernel, folder)
