"""The kernels of a layer's experts, in Triton: resolve, project, activate, project again, combine in slot order.

The table `at_E` says where the record or slot of every expert begins, negative where it has none here: programs of
those accesses end at once, and what others answer is left alone. Launched by `experts`, which knows the formats.

Legend: N accesses, T tokens, E experts; `FORM` is a `forms.Form`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from buddymoe_ray.kernels.triton.coded_products import outputs_along, rows, words_along, words_down
from buddymoe_ray.kernels.triton.products import packed, plain, pointer, transposed
from buddymoe_ray.kernels.triton.trellis_products import trellis

__all__ = ["activate", "combine", "project", "put", "resolve"]

SILU: tl.constexpr = tl.constexpr(0)  # places in `cpu.FORMULAS`; what is left is the last
GELU: tl.constexpr = tl.constexpr(1)
CLAMPED: tl.constexpr = tl.constexpr(2)
BOUNDED: tl.constexpr = tl.constexpr(1)  # modes as `types` has them
FAST: tl.constexpr = tl.constexpr(2)
WIDTH: tl.constexpr = tl.constexpr(256)  # items that a program activates


@triton.jit
def _place(expert_N, at_E, n, E: tl.constexpr):
    """Where the record of access n begins, negative where it has none."""
    e = tl.load(expert_N + n)
    return tl.load(at_E + e, mask=(e >= 0) & (e < E), other=-1)


@triton.jit
def put(place, value, mask):
    """Store float32 rounded to the nearest of what is there; by hand to bfloat16, which the interpreter truncates."""
    if place.dtype.element_ty == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        near = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        near = tl.where(value != value, 0x7FC0, near)
        tl.store(place.to(tl.pointer_type(tl.int16)), near.to(tl.int16), mask=mask)
    else:
        tl.store(place, value.to(place.dtype.element_ty), mask=mask)


@triton.jit
def _finish(y, n, record, out, FORM: tl.constexpr):
    """Add the bias of outputs n and store them."""
    N: tl.constexpr = FORM.N
    DTYPE: tl.constexpr = FORM.bias_dtype
    if DTYPE != "":
        y += tl.load(pointer(record + FORM.bias, DTYPE) + n, mask=n < N, other=0.0).to(tl.float32)
    put(out + n, y, n < N)


@triton.jit
def project(x, records, levels, expert_N, at_E, out, FORM: tl.constexpr):
    """`out[n] = W x[n // shares] + bias`, [N] rows; grid (programs of a row, N). Records are at addresses, or in
    `records`, at bytes of it; `levels` are a trellis's, where it is one."""
    n = tl.program_id(1)
    begin = _place(expert_N, at_E, n, FORM.E)
    if begin >= 0:
        if records is not None:
            begin += records.to(tl.int64)
        record = tl.multiple_of(begin.to(tl.pointer_type(tl.uint8)), 16)
        row = x + (n // FORM.shares).to(tl.int64) * FORM.K
        some, y = _some(record, row, levels, FORM)
        _finish(y, some, record, out + n.to(tl.int64) * FORM.N, FORM)


@triton.jit
def _some(record, x, levels, FORM: tl.constexpr):
    """A program's outputs, before the bias: which of a row they are, and what they come to, of one shape."""
    B: tl.constexpr = FORM.outputs
    at = tl.program_id(0)
    KIND: tl.constexpr = FORM.kind
    if KIND == "packed":
        A: tl.constexpr = B // 16
        TILES: tl.constexpr = (FORM.N + 15) // 16
        tile = at * A + tl.arange(0, A)
        n = tile[:, None] * 16 + tl.arange(0, 16)[None, :]
        inside = tl.minimum(tile, TILES - 1)
        base = pointer(record + FORM.base, "float32")
        if levels is None:
            y = packed(record + FORM.codes, record + FORM.scales, inside, x, FORM) * tl.load(base)
        else:
            y = trellis(record + FORM.codes, record + FORM.scales, base, levels, inside, x, FORM)
    elif KIND == "rows":
        first, two = at * B + tl.arange(0, B // 4), tl.arange(0, 2)
        n = first[:, None, None] + (two[None, :, None] + 2 * two[None, None, :]) * (B // 4)
        y = rows(record, first, x, FORM)
    elif KIND == "gptq" or KIND == "awq":
        PART: tl.constexpr = FORM.N // FORM.parts
        EACH: tl.constexpr = FORM.programs // FORM.parts
        part, begin = at // EACH, at % EACH * B
        n = begin + tl.arange(0, B)
        if KIND == "gptq":
            y = words_down(record, part, n, x, FORM)
        else:
            v = begin // 2 + tl.arange(0, B // 2)
            n = outputs_along(v)[:, None] + 2 * tl.arange(0, 2)[None, :]
            y = words_along(record, part, begin, x, FORM)
        n = tl.where(n < PART, part * PART + n, FORM.N)
    else:
        n = at * B + tl.arange(0, B)
        WEIGHTS: tl.constexpr = FORM.weights
        base = pointer(record + FORM.codes, WEIGHTS)
        if KIND == "plain":
            y = plain(base, n, x, FORM)
        elif KIND == "transposed":
            y = transposed(base, n, x, FORM)
        else:
            y = tl.full([B], 0.0, tl.float32)
    return n, y


@triton.jit
def activate(both, expert_N, at_E, hidden, E: tl.constexpr, F: tl.constexpr, FORMULA: tl.constexpr):
    """`hidden [N, F]` of the first product's outputs, as `cpu.FORMULAS` says; grid (F / WIDTH, N)."""
    n = tl.program_id(1)
    if _place(expert_N, at_E, n, E) >= 0:
        f = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
        inside = f < F
        wide = n.to(tl.int64) * F
        if FORMULA > CLAMPED:
            x = tl.maximum(tl.load(both + wide + f, mask=inside, other=0.0), 0.0)
            y = x * x
        elif FORMULA == CLAMPED:  # gpt-oss: gates and ups interleaved
            gate = tl.minimum(tl.load(both + 2 * (wide + f), mask=inside, other=0.0), 7.0)
            up = tl.load(both + 2 * (wide + f) + 1, mask=inside, other=0.0)
            up = tl.minimum(tl.maximum(up, -7.0), 7.0)
            y = (up + 1.0) * (gate / (1.0 + tl.exp(-1.702 * gate)))
        else:
            gate = tl.load(both + 2 * wide + f, mask=inside, other=0.0)
            up = tl.load(both + 2 * wide + F + f, mask=inside, other=0.0)
            z = gate
            if FORMULA == GELU:  # (1 + tanh(u)) / 2 is the sigmoid of 2 u
                z = 1.5957691216 * (gate + 0.044715 * gate * gate * gate)
            y = gate / (1.0 + tl.exp(-z)) * up
        tl.store(hidden + wide + f, y, mask=inside)


@triton.jit
def combine(y, weight, out, D: tl.constexpr, K: tl.constexpr, BD: tl.constexpr):
    """`out[t]` is the sum over slots, in their order, of `weight[t, k] * y[t * K + k]` in float32; grid (D / BD, T)."""
    t = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    total = tl.full([BD], 0.0, tl.float32)
    for k in tl.static_range(K):
        part = tl.load(y + (t * K + k) * D + d, mask=d < D, other=0.0).to(tl.float32)
        total += tl.load(weight + t * K + k).to(tl.float32) * part
    put(out + t * D + d, total, d < D)


@triton.jit
def resolve(ids, weight, tables, rows, told, layer, SIZES: tl.constexpr):
    """Who answers a layer's accesses: see `resolve.resolve_on_device`; grid (1,)."""
    stalled, count, mode, price, left, lengths = rows
    at_E, can_E, loss_E = tables
    N: tl.constexpr = SIZES.T * SIZES.K
    t, k = tl.arange(0, SIZES.PT), tl.arange(0, SIZES.PK)
    place = t[:, None] * SIZES.K + k[None, :]
    inside = (t[:, None] < SIZES.T) & (k[None, :] < SIZES.K)
    e = tl.load(ids + place, mask=inside, other=-1)
    asked = inside & (t[:, None] < tl.load(count)) & (e >= 0) & (e < SIZES.E)
    there = tl.load(at_E + e, mask=asked, other=-1) >= 0
    missing = asked & (there == 0)
    first, row = tl.load(stalled + layer), t < SIZES.T
    if can_E is not None:
        modes, prices = tl.load(mode + t, mask=row, other=0), tl.load(price + t, mask=row, other=0.0)
        allowances = tl.load(left + layer * SIZES.T + t, mask=row, other=0.0)
        w = tl.load(weight + place, mask=missing, other=0.0)
        loss = tl.where(missing, w * w * tl.load(loss_E + e, mask=missing, other=0.0), 0.0)
        paid = (modes == FAST)[:, None] | ((modes == BOUNDED)[:, None] & (loss <= prices[:, None]))
        open_ = missing & ((tl.load(can_E + e, mask=missing, other=0) == 0) | (paid == 0))
        total = tl.sum(loss.to(tl.float64), axis=1) * SIZES.margin
        dear = (modes == BOUNDED) & (total > 0.0) & ((total <= allowances) == 0)
        unpaid = tl.sum(open_.to(tl.int32), axis=1) + dear.to(tl.int32)
    else:
        unpaid = tl.sum(missing.to(tl.int32), axis=1)
    stops = tl.sum(unpaid, axis=0) > 0
    runs = first > layer
    tl.store(stalled + layer + 1, tl.where(runs & stops, layer, first))  # elsewhere: other warps read what was
    answers = runs & (stops == 0)
    length = tl.load(lengths + layer * SIZES.T + t, mask=row, other=0)
    tl.store(lengths + (layer + 1) * SIZES.T + t, tl.where(answers, length, 0), mask=row)
    tl.store(told + place, e, mask=inside)
    tl.store(told + N + place, tl.where(there & runs, e, -1), mask=inside)
    tl.store(told + 2 * N + place, tl.where(missing & answers, e, -1), mask=inside)
    if can_E is not None:
        spent = tl.where(answers, tl.sum(loss, axis=1), 0.0)
        tl.store(left + (layer + 1) * SIZES.T + t, allowances - spent, mask=row)
