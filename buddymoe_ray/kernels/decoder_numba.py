"""Decoder layers without the GIL: norm, attention, residual, norm, router, and experts, up to the first layer whose
experts are neither all resident nor answered by records that the rows can pay.

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

from buddymoe_ray.kernels.decoder_calls import DecoderCall, DecoderPlan, StandinPlan
from buddymoe_ray.kernels.expert_calls import ANYWHERE, OK
from buddymoe_ray.kernels.expert_rows import floats_at, ints_at, read_row, rounded_row, tinies_at, write_row
from buddymoe_ray.kernels.numba_calls import answered, ask_native, compiled, items, stamp_of
from buddymoe_ray.types import BOUNDED, EXACT, FAST

__all__ = ["compile_decoder"]

_ask: Any = ask_native
CALL, PLAN, STANDINS = ((0,) * len(kind._fields) for kind in (DecoderCall, DecoderPlan, StandinPlan))


class _Scratch(NamedTuple):
    """Rows as bytes: normed, queries, keys, values, what attention answers, router logits, experts' outputs, their
    sum; float32 rows, router weights and expected losses of one; where records are; weights of a guess; room for a
    call."""

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
    losses: Any
    record_E: Any
    guess_weights: Any
    args: Any


class _Layer(NamedTuple):
    """A `DecoderCall` as one layer sees it: `accesses`, `losses` and `allowances` begin with what was before it."""

    hidden: Any
    attended: Any
    normed: Any
    ids: Any
    weights: Any
    out: Any
    cos: Any
    sin: Any
    rotated: Any
    T: Any
    spans: Any
    blocks: Any
    S: Any
    at_E: Any
    next_at_E: Any
    guess: Any
    words: Any
    accesses: Any
    columns: Any
    modes: Any
    prices: Any
    losses: Any
    allowances: Any


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
def _carry(call: Any) -> None:
    """What is counted after this layer begins with what was before."""
    T, size = call.T, call.T * call.columns
    counts = carray(ints_at(call.accesses), (2 * size,))
    for n in range(size):
        counts[size + n] = counts[n]
    if call.modes != 0:
        losses, left = carray(floats_at(call.losses), (2 * T,)), carray(floats_at(call.allowances), (2 * T,))
        for t in range(T):
            losses[T + t], left[T + t] = losses[t], left[t]


@njit
def _sum(x: Any) -> Any:
    """Of at most 128 float32s, in the order in which numpy adds them."""
    n, total = x.shape[0], float32(0.0)
    begin = n - n % 8
    if begin:
        r = x[:8].copy()
        for i in range(8, begin):
            r[i % 8] += x[i]
        total = ((r[0] + r[1]) + (r[2] + r[3])) + ((r[4] + r[5]) + (r[6] + r[7]))
    for i in range(begin, n):
        total += x[i]
    return total


@njit
def _row_is_paid(t: Any, call: Any, plan: Any, standins: Any, scratch: Any) -> Any:
    """Whether stand-ins may answer every miss of a row: as `Ladder.resolve`, where it finds that all can be paid. If so
    its accesses are counted and charged."""
    T, K, E, weights, loss = call.T, plan.K, plan.E, scratch.weights, scratch.losses
    at_E, ids = carray(ints_at(call.at_E), (E,)), carray(ints_at(call.ids + 8 * t * K), (K,))
    kinds, columns = carray(ints_at(standins.kinds), (E,)), carray(ints_at(standins.columns), (E,))
    losses = carray(floats_at(standins.losses), (E,))
    counts = carray(ints_at(call.accesses + 8 * (T + t) * call.columns), (call.columns,))
    spent, left = carray(floats_at(call.losses), (2 * T,)), carray(floats_at(call.allowances), (2 * T,))
    mode, price = carray(tinies_at(call.modes + t), (1,))[0], carray(floats_at(call.prices + 4 * t), (1,))[0]
    read_row(call.weights + plan.weight_bytes * t * K, plan.weight_bytes, weights)
    exact_sum = float64(0.0)
    for k in range(K):
        e = ids[k]
        if at_E[e] >= 0:
            counts[0], loss[k] = counts[0] + 1, float32(0.0)
            continue
        counts[columns[e]] += 1
        loss[k] = weights[k] * weights[k] * losses[e]
        if mode == EXACT or kinds[e] < 0 or not (mode == FAST or loss[k] <= price):
            return False
        exact_sum += loss[k]
    if mode == BOUNDED and not exact_sum <= left[t]:
        return False
    row_loss = _sum(loss)
    spent[T + t], left[T + t] = spent[t] + row_loss, left[t] - row_loss
    return True


@njit
def _stand_in(call: Any, plan: Any, scratch: Any) -> Any:
    """The records' answers to all misses; False, with nothing done, where rows cannot pay them."""
    if plan.standins == 0 or call.modes == 0:
        return False
    standins = StandinPlan(*items(plan.standins, STANDINS))
    for t in range(call.T):
        if not _row_is_paid(t, call, plan, standins, scratch):
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
    """Whether a layer's output is there; else its experts are the caller's."""
    _attend(call, plan, scratch)
    if plan.router == 0:
        return False
    resident = _route(call, plan, scratch)
    if call.guess != 0 and _guess(call, plan, scratch):
        return False
    if call.at_E == 0 or plan.computes == 0:
        return False
    _carry(call)
    if resident:
        counts = carray(ints_at(call.accesses), (2, call.T, call.columns))
        counts[1, :, 0] += plan.K
    elif not _stand_in(call, plan, scratch):
        return False
    if not _run_experts(call, plan, scratch):
        return False
    if call.words == 0:
        return True
    return _call(plan.unchanged, (call.ids, call.T * plan.K, call.words, plan.E), 0, scratch.args) == OK


@njit
def _layer(n: Any, call: Any, plan: Any) -> Any:
    """The call as the n-th layer sees it: each reads what the one before has written."""
    T, rows, choice = call.T, call.T * plan.D * plan.item_bytes, call.T * plan.K
    places = carray(ints_at(call.places), (call.layers,))
    next_places, words = carray(ints_at(call.next_places), (call.layers,)), carray(ints_at(call.words), (call.layers,))
    next_at = next_places[n] if call.next_places and plan.next_router else 0
    return _Layer(
        call.out + (n - 1) * rows if n else call.hidden,
        call.attended + n * rows,
        call.normed + n * rows,
        call.ids + n * choice * 8,
        call.weights + n * choice * plan.weight_bytes,
        call.out + n * rows,
        call.cos,
        call.sin,
        call.rotated,
        T,
        call.spans,
        call.blocks,
        call.S,
        places[n] if call.places else 0,
        next_at,
        call.guess + n * choice * 8 if next_at else 0,
        words[n] if call.words else 0,
        call.accesses + n * T * call.columns * 8,
        call.columns,
        call.modes,
        call.prices,
        call.losses + n * T * 4,
        call.allowances + n * T * 4,
    )


@njit
def _layers(call_at: Any, plans_at: Any) -> Any:
    """How many layers have their output, and 1."""
    call = DecoderCall(*items(call_at, CALL))
    plans, T = carray(ints_at(plans_at), (call.layers,)), call.T
    plan = DecoderPlan(*items(plans[0], PLAN))  # all are of one shape
    item_bytes = plan.item_bytes
    y_rows = T if plan.computes and call.places else 0
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
        np.empty(plan.K, np.float32),
        np.empty(plan.E, np.int64),
        np.empty(T * plan.K if call.guess else 0, np.float32),
        np.empty(16, np.int64),
    )
    for n in range(call.layers):
        plan = DecoderPlan(*items(plans[n], PLAN))
        if not _run(_layer(n, call, plan), plan, scratch):
            return 1 + n
    return 1 + call.layers


def compile_decoder(folder: Path | None) -> int:
    """The address of the layers' kernel, from `folder` when an earlier process left it there; None keeps none."""
    stamp = stamp_of("decoder_calls", "decoder_numba")

    def kernel(call_at: Any, plan_at: Any) -> Any:
        return _layers(call_at, plan_at) if stamp >= 0 else 1

    return compiled(kernel, folder)
