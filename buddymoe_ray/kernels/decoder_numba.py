"""A decoder layer without the GIL: norm, attention, residual, norm, router, and its experts where all are resident or
answered by records that the rows can pay.

The parts are the kernels that the layer's modules call one by one, called by their addresses in the same order, with
the same roundings between them, so the bits are the same. Scratch that is reached by address belongs to the
caller of the function that does so, as expert_numba.py says. Imports numba at the top: only `decoder` may import this
module, and late.

Legend: T rows of a pass, D hidden, Q query heads, H key-value heads, d key size, dv value size, E experts, K experts
per token.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numba import carray, float32, float64, int64, njit, uint8

from buddymoe_ray.kernels.decoder_calls import DONE, ROUTED, STOOD_IN, DecoderCall, DecoderPlan, StandinPlan
from buddymoe_ray.kernels.expert_calls import ANYWHERE, OK
from buddymoe_ray.kernels.expert_rows import floats_at, ints_at, read_row, rounded_row, tinies_at, write_row
from buddymoe_ray.kernels.numba_calls import answered, ask_native, compiled, items, stamp_of
from buddymoe_ray.types import BOUNDED, EXACT, FAST

__all__ = ["compile_decoder"]

_ask: Any = ask_native
CALL, PLAN, STANDINS = ((0,) * len(kind._fields) for kind in (DecoderCall, DecoderPlan, StandinPlan))


class _Scratch(NamedTuple):
    """Rows as bytes: normed, queries, keys, values, what attention answers, router logits, experts' outputs, their
    sum; float32 rows, router weights of one; where records are; weights of a guess; room for a call."""

    x: Any
    q: Any
    k: Any
    v: Any
    answers: Any
    logits: Any
    y: Any
    total: Any
    rows: Any
    weights: Any
    record_E: Any
    guess_weights: Any
    args: Any


@njit
def _place(scratch: Any) -> Any:
    """numba has addresses as unsigned, and tuples of both kinds are no tuples of int64s."""
    return int64(scratch.ctypes.data)


@njit
def _call(kernel: Any, ints: Any, plan_at: Any, args: Any) -> Any:
    """Call a kernel with these int64s; `args` has room for them and belongs to the caller of the caller."""
    for i in range(len(ints)):
        args[i] = ints[i]
    return answered(_ask(kernel, (args.ctypes.data, plan_at)))


@njit
def _dense(x: Any, plan_at: Any, out: Any, call: Any, plan: Any, args: Any) -> None:
    """One linear layer, from rows at one address to rows at another."""
    _call(plan.linear, (x, out, 0, ANYWHERE, plan.item_bytes, 0, 0, call.T, 1, 0, 0, 1), plan_at, args)


@njit
def _norm(x: Any, norm_at: Any, out: Any, rows: Any, plan: Any, args: Any) -> None:
    _call(plan.norm, (x, out, rows, plan.item_bytes), norm_at, args)


@njit
def _rotate(heads: Any, count: Any, d: Any, call: Any, item_bytes: Any, rows: Any) -> None:
    """Rotary embedding of `heads` [T, count, d], in place: `x cos + rotate_half(x) sin` of the first `rotated` items,
    each operation rounded to the dtype of the rows."""
    n = call.rotated
    half, x, cos, sin = n // 2, rows[0], rows[1], rows[2]
    for t in range(call.T):
        read_row(call.cos + item_bytes * t * n, item_bytes, cos[:n])
        read_row(call.sin + item_bytes * t * n, item_bytes, sin[:n])
        for h in range(count):
            place = heads + item_bytes * (t * count + h) * d
            turned, straight = rows[3, :n], rows[4, :n]
            read_row(place, item_bytes, x[:n])
            for i in range(half):
                turned[i], turned[i + half] = -x[i + half] * sin[i], x[i] * sin[i + half]
            for i in range(n):
                straight[i] = x[i] * cos[i]
            if item_bytes == 2:
                rounded_row(turned)
                rounded_row(straight)
            for i in range(n):
                straight[i] += turned[i]
            write_row(straight, place, item_bytes)


@njit
def _add(x: Any, y: Any, out: Any, sizes: Any, rows: Any) -> None:
    """`out = x + y` of T rows of D items."""
    T, D, item_bytes = sizes
    a, b = rows[0, :D], rows[1, :D]
    for t in range(T):
        place = item_bytes * t * D
        read_row(x + place, item_bytes, a)
        read_row(y + place, item_bytes, b)
        for i in range(D):
            a[i] += b[i]
        write_row(a, out + place, item_bytes)


@njit
def _attend(call: Any, plan: Any, scratch: Any) -> None:
    """Up to what the feed-forward reads."""
    T, D, item_bytes = call.T, plan.D, plan.item_bytes
    Q, H, d, dv = plan.Q, plan.H, plan.d, plan.dv
    x, answers, rows, args = _place(scratch.x), _place(scratch.answers), scratch.rows, scratch.args
    q, k, v = _place(scratch.q), _place(scratch.k), _place(scratch.v)
    _norm(call.hidden, plan.norm_before, x, T, plan, args)
    _dense(x, plan.q, q, call, plan, args)
    _dense(x, plan.k, k, call, plan, args)
    _dense(x, plan.v, v, call, plan, args)
    if plan.q_norm:
        _norm(q, plan.q_norm, q, T * Q * d // plan.q_norm_n, plan, args)
        _norm(k, plan.k_norm, k, T * H * d // plan.k_norm_n, plan, args)
    _rotate(q, Q, d, call, item_bytes, rows)
    _rotate(k, H, d, call, item_bytes, rows)
    strides = (d, Q * d, d, H * d, dv, H * dv)
    _call(plan.attention, (q, k, v, answers, *strides, call.spans, call.blocks, call.S, 0, 1), plan.attends, args)
    _dense(answers, plan.o, call.attended, call, plan, args)
    _add(call.hidden, call.attended, call.attended, (T, D, item_bytes), rows)
    _norm(call.attended, plan.norm_after, call.normed, T, plan, args)


@njit
def _route(call: Any, plan: Any, scratch: Any) -> Any:
    """The router's choice for all rows; whether all of it is resident, which nobody says who gives no addresses."""
    logits = _place(scratch.logits)
    _dense(call.normed, plan.router, logits, call, plan, scratch.args)
    _call(plan.choose, (logits, call.ids, call.weights, call.T, plan.item_bytes), plan.chooses, scratch.args)
    if call.at_E == 0:
        return False
    at_E, ids = carray(ints_at(call.at_E), (plan.E,)), carray(ints_at(call.ids), (call.T * plan.K,))
    resident = True
    for n in range(ids.shape[0]):
        resident = resident and at_E[ids[n]] >= 0
    return resident


@njit
def _guess(call: Any, plan: Any, scratch: Any) -> Any:
    """The next layer's choice, were this its input; whether it names an expert that is not there."""
    logits, T = _place(scratch.logits), call.T
    _dense(call.normed, plan.next_router, logits, call, plan, scratch.args)
    guess = (logits, call.guess, _place(scratch.guess_weights), T, plan.item_bytes)
    _call(plan.choose, guess, plan.next_chooses, scratch.args)
    at_E, ids = carray(ints_at(call.next_at_E), (plan.next_E,)), carray(ints_at(call.guess), (T * plan.K,))
    missing = False
    for n in range(ids.shape[0]):
        missing = missing or at_E[ids[n]] < 0
    return missing


@njit
def _row_is_paid(t: Any, call: Any, plan: Any, standins: Any, weights: Any) -> Any:
    """Whether stand-ins may answer every miss of a row: as `Ladder.resolve`, where it finds that all can be paid."""
    K, E = plan.K, plan.E
    at_E, ids = carray(ints_at(call.at_E), (E,)), carray(ints_at(call.ids + 8 * t * K), (K,))
    kinds, columns = carray(ints_at(standins.kinds), (E,)), carray(ints_at(standins.columns), (E,))
    losses = carray(floats_at(standins.losses), (E,))
    answers, loss = carray(ints_at(call.answers + 8 * t * K), (K,)), carray(floats_at(call.losses + 4 * t * K), (K,))
    mode, price = carray(tinies_at(call.modes + t), (1,))[0], carray(floats_at(call.prices + 4 * t), (1,))[0]
    read_row(call.weights + plan.weight_bytes * t * K, plan.weight_bytes, weights)
    spent = float64(0.0)
    for k in range(K):
        e = ids[k]
        answers[k], loss[k] = 0, float32(0.0)
        if at_E[e] >= 0:
            continue
        answers[k], loss[k] = columns[e], weights[k] * weights[k] * losses[e]
        if mode == EXACT or kinds[e] < 0 or not (mode == FAST or loss[k] <= price):
            return False
        spent += loss[k]
    return mode != BOUNDED or spent <= carray(floats_at(call.allowances + 4 * t), (1,))[0]


@njit
def _stand_in(call: Any, plan: Any, standins: Any, scratch: Any) -> Any:
    """The records' answers to all misses; False, with nothing done, where rows cannot pay them."""
    for t in range(call.T):
        if not _row_is_paid(t, call, plan, standins, scratch.weights):
            return False
    N, K, E = call.T * plan.K, plan.K, plan.E
    at_E, ids, record_E = carray(ints_at(call.at_E), (E,)), carray(ints_at(call.ids), (N,)), scratch.record_E
    kinds, records = carray(ints_at(standins.kinds), (E,)), carray(ints_at(standins.records), (E,))
    computes, y = carray(ints_at(standins.computes), (standins.kind_count,)), _place(scratch.y)
    for kind in range(standins.kind_count):
        count = 0
        record_E[:] = -1
        for n in range(N):
            if at_E[ids[n]] < 0 and kinds[ids[n]] == kind:
                record_E[ids[n]] = records[ids[n]]
                count += 1
        if count:
            rows = (call.normed, y, 0, ANYWHERE, plan.item_bytes, call.ids, _place(record_E), N, K, E, 0, 1)
            if _call(plan.experts, rows, computes[kind], scratch.args) != OK:
                return False
    return True


@njit
def _run_experts(call: Any, plan: Any, scratch: Any) -> Any:
    """Those that are resident, and the sum over all."""
    T, D, K, item_bytes = call.T, plan.D, plan.K, plan.item_bytes
    y, total = _place(scratch.y), _place(scratch.total)
    rows = (call.normed, y, 0, ANYWHERE, item_bytes, call.ids, call.at_E, T * K, K, plan.E, 0, 1)
    if _call(plan.experts, rows, plan.computes, scratch.args) != OK:
        return False  # whoever computes it will say what is wrong
    _call(plan.combine, (y, call.weights, total, T, K, D, item_bytes, plan.weight_bytes), 0, scratch.args)
    _add(call.attended, total, call.out, (T, D, item_bytes), scratch.rows)
    return True


@njit
def _run(call: Any, plan: Any, scratch: Any) -> Any:
    _attend(call, plan, scratch)
    if plan.router == 0:
        return ROUTED
    status, resident = DONE, _route(call, plan, scratch)
    if call.guess != 0 and _guess(call, plan, scratch):
        return ROUTED
    if not resident:
        if call.at_E == 0 or plan.standins == 0 or call.modes == 0 or plan.computes == 0:
            return ROUTED
        if not _stand_in(call, plan, StandinPlan(*items(plan.standins, STANDINS)), scratch):
            return ROUTED
        status = STOOD_IN
    return status if plan.computes and _run_experts(call, plan, scratch) else ROUTED


@njit
def _layer(call_at: Any, plan_at: Any) -> Any:
    call, plan = DecoderCall(*items(call_at, CALL)), DecoderPlan(*items(plan_at, PLAN))
    T, item_bytes = call.T, plan.item_bytes
    y_rows = T if plan.computes and call.at_E else 0
    scratch = _Scratch(
        np.empty(T * plan.D * item_bytes, uint8),
        np.empty(T * plan.Q * plan.d * item_bytes, uint8),
        np.empty(T * plan.H * plan.d * item_bytes, uint8),
        np.empty(T * plan.H * plan.dv * item_bytes, uint8),
        np.empty(T * plan.Q * plan.dv * item_bytes, uint8),
        np.empty(T * max(plan.E, plan.next_E) * item_bytes, uint8),
        np.empty(y_rows * plan.K * plan.D * item_bytes, uint8),
        np.empty(y_rows * plan.D * item_bytes, uint8),
        np.empty((5, max(plan.D, plan.d)), np.float32),
        np.empty(plan.K, np.float32),
        np.empty(plan.E if plan.standins else 0, np.int64),
        np.empty(T * plan.K if call.guess else 0, np.float32),
        np.empty(16, np.int64),
    )
    return _run(call, plan, scratch)


def compile_decoder(folder: Path | None) -> int:
    """The address of a layer's kernel, from `folder` when an earlier process left it there; None keeps none."""
    stamp = stamp_of("decoder_calls", "decoder_numba")

    def kernel(call_at: Any, plan_at: Any) -> Any:
        return _layer(call_at, plan_at) if stamp >= 0 else ROUTED

    return compiled(kernel, folder)
