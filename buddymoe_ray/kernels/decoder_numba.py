"""A decoder layer without the GIL: norm, attention, residual, norm, router, and its experts where all are resident.

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
from numba import carray, int64, njit, uint8

from buddymoe_ray.kernels.decoder_calls import DONE, ROUTED, DecoderCall, DecoderPlan
from buddymoe_ray.kernels.expert_calls import ANYWHERE, OK
from buddymoe_ray.kernels.expert_rows import ints_at, read_row, rounded_row, write_row
from buddymoe_ray.kernels.numba_calls import answered, ask_native, compiled, items, stamp_of

__all__ = ["compile_decoder"]

_ask: Any = ask_native
CALL, PLAN = (0,) * len(DecoderCall._fields), (0,) * len(DecoderPlan._fields)


class _Scratch(NamedTuple):
    """Rows as bytes: normed, queries, keys, values, what attention answers, router logits, experts' outputs, their
    sum; float32 rows; room for a call."""

    x: Any
    q: Any
    k: Any
    v: Any
    answers: Any
    logits: Any
    y: Any
    total: Any
    rows: Any
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
def _run_experts(call: Any, plan: Any, scratch: Any) -> Any:
    T, D, K, item_bytes = call.T, plan.D, plan.K, plan.item_bytes
    y, total = _place(scratch.y), _place(scratch.total)
    rows = (call.normed, y, 0, ANYWHERE, item_bytes, call.ids, call.at_E, T * K, K, plan.E, 0, 1)
    if _call(plan.experts, rows, plan.computes, scratch.args) != OK:
        return ROUTED  # whoever computes it will say what is wrong
    _call(plan.combine, (y, call.weights, total, T, K, D, item_bytes, plan.weight_bytes), 0, scratch.args)
    _add(call.attended, total, call.out, (T, D, item_bytes), scratch.rows)
    return DONE


@njit
def _run(call: Any, plan: Any, scratch: Any) -> Any:
    _attend(call, plan, scratch)
    if plan.router == 0 or not _route(call, plan, scratch) or plan.computes == 0:
        return ROUTED
    return _run_experts(call, plan, scratch)


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
        np.empty(T * plan.E * item_bytes, uint8),
        np.empty(y_rows * plan.K * plan.D * item_bytes, uint8),
        np.empty(y_rows * plan.D * item_bytes, uint8),
        np.empty((5, max(plan.D, plan.d)), np.float32),
        np.empty(16, np.int64),
    )
    return _run(call, plan, scratch)


def compile_decoder(folder: Path | None) -> int:
    """The address of a layer's kernel, from `folder` when an earlier process left it there; None keeps none."""
    stamp = stamp_of("decoder_calls", "decoder_numba")

    def kernel(call_at: Any, plan_at: Any) -> Any:
        return _layer(call_at, plan_at) if stamp >= 0 else ROUTED

    return compiled(kernel, folder)
