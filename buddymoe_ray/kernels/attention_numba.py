"""Attention of a pass's rows over paged keys and values, read where they are, without the GIL.

A call writes the rows' own keys and values first. Rows of a sequence go through the products in small blocks, so that a
key is widened once for several queries; the bits of a row depend on its query and its keys alone, not on the block, on
how a prompt is cut into chunks, or on where blocks lie: scores are dot products in the order of stored_tiles.py, sums
of a softmax are taken by position modulo 16, values are added in rising order of position.

A softmax goes over slices, for LLVM makes vectors of no loop whose index may be below zero (1.5 us of 2,000 scores, not
8.2). Of 16 heads of 128, a row 2,000 tokens behind takes .12 ms; in blocks of 16 pairs instead of 24 .14, of 32 and 48
.13. Half is scores (168 GFLOP/s; 6 rows of 4 keys at once are no faster than 5), .4 values.
Imports numba at the top: only `paged_attention` may import this module, and late.

Legend: S sequences of a pass, Q query heads, H key-value heads, G = Q / H, d key size, dv value size, R rows of a block
times G.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numba import carray, float32, int32, njit

from buddymoe_ray.kernels.attention_calls import AttentionCall, AttentionPlan
from buddymoe_ray.kernels.expert_calls import OK
from buddymoe_ray.kernels.expert_rows import copy_items, exponential, floats_at, from_bits, ints_at, read_row, write_row
from buddymoe_ray.kernels.lowbit_format import GROUP
from buddymoe_ray.kernels.numba_calls import call_native, compiled, items, stamp_of

__all__ = ["compile_attention"]

PAIRS, NEAR_PAIRS = 24, 8
"""Rows of a block times the query heads of a key-value head, at most where that is more than one row; and of those
whose values are added together where not all of the block see them."""
LANES, NEAR_TOKENS = 16, 1024

_native: Any = call_native
CALL, PLAN = (0,) * len(AttentionCall._fields), (0,) * len(AttentionPlan._fields)


class _Block(NamedTuple):
    """One key-value head's queries: where they are and which positions they see. Row t sees as many as it has before
    it, itself included, or the last `window` of them."""

    head: Any
    row: Any
    count: Any
    start: Any
    table: Any


class _Scratch(NamedTuple):
    """Queries as multiplied, scores or shares, outputs, pairs of addresses, one row."""

    queries: Any
    scores: Any
    outputs: Any
    pairs: Any
    row: Any


@njit
def _groups(n: Any) -> Any:
    return (n + GROUP - 1) // GROUP * GROUP


@njit
def _seen(plan: Any, block: Any, t: Any) -> Any:
    """First and last position (exclusive) that row t of a block sees."""
    last = block.start + t + 1
    return (max(0, last - plan.window) if plan.window else 0), last


@njit
def _slot(plan: Any, blocks: Any, block: Any, at: Any) -> Any:
    size = plan.block_size
    return blocks[block.table + at // size] * size + at % size


@njit
def _following(block: Any, used: Any, nbytes: Any) -> Any:
    """Bytes from a head's keys or values to the next head's, if these may come by now: 0 for long contexts, whose would
    not stay in the cache, and where a head has more rows to come."""
    return nbytes if block.count == 1 and used <= NEAR_TOKENS else 0


@njit
def _run_end(plan: Any, blocks: Any, block: Any, at: Any, last: Any) -> Any:
    """Where the tokens that lie behind the one at `at` without a gap end, at most at `last`."""
    size = plan.block_size
    b = block.table + at // size
    end = (at // size + 1) * size
    while end < last and blocks[b + 1] == blocks[b] + 1:
        b, end = b + 1, end + size
    return min(end, last)


@njit
def _keep(call: Any, plan: Any, blocks: Any, block: Any) -> None:
    """Write a span's keys and values of one head into the pools."""
    for t in range(block.count):
        slot = _slot(plan, blocks, block, block.start + t) * plan.H + block.head
        k = call.k + plan.item_bytes * (block.head * call.k_head + (block.row + t) * call.k_row)
        v = call.v + plan.item_bytes * (block.head * call.v_head + (block.row + t) * call.v_row)
        copy_items(k, plan.keys + plan.item_bytes * slot * plan.d, plan.d, plan.item_bytes)
        copy_items(v, plan.values + plan.item_bytes * slot * plan.dv, plan.dv, plan.item_bytes)


@njit
def _queries(call: Any, plan: Any, block: Any, scratch: Any) -> None:
    """Read, scale and lay out the block's queries."""
    G, width, scale = plan.Q // plan.H, _groups(plan.d), from_bits(int32(plan.scale_bits))
    row = scratch.row
    for r in range(block.count * G):
        head, at = block.head * G + r % G, block.row + r // G
        read_row(call.q + plan.item_bytes * (head * call.q_head + at * call.q_row), plan.item_bytes, row[: plan.d])
        for i in range(plan.d):
            row[i] *= scale
        row[plan.d : width] = float32(0.0)
        target = scratch.queries[r * width : (r + 1) * width]
        if plan.spread:
            _native(plan.spread, (row.ctypes.data, width // GROUP, target.ctypes.data))
        else:
            for i in range(width):
                target[i] = row[i]


@njit
def _score(plan: Any, blocks: Any, block: Any, scratch: Any, span: Any) -> None:
    """Scores of all queries with all positions of `span` (begin of the scores, first, last)."""
    begin, first, last = span
    R, width = block.count * (plan.Q // plan.H), _groups(plan.d)
    stride = plan.item_bytes * plan.H * plan.d
    queries, scores, pairs = scratch.queries.ctypes.data, scratch.scores.ctypes.data, scratch.pairs
    long, at = scratch.scores.shape[1], first
    following = _following(block, last - first, plan.item_bytes * plan.d)
    while at < last:
        end = _run_end(plan, blocks, block, at, last)
        for r in range(R):
            pairs[r, 0], pairs[r, 1] = queries + 4 * r * width, scores + 4 * (r * long + at - begin)
        keys = plan.keys + plan.item_bytes * (_slot(plan, blocks, block, at) * plan.H + block.head) * plan.d
        _native(plan.project_strided, (keys, stride, plan.d, end - at, pairs.ctypes.data, R, following))
        at = end


@njit
def _softmax(scores: Any, first: Any, last: Any, sink: Any) -> Any:
    """Scores to unnormalised shares, zeros outside `first .. last`; returns their sum. `sink` is -inf for none."""
    seen = scores[first:last]
    top = _largest(seen, sink)
    for i in range(seen.shape[0]):
        seen[i] = exponential(seen[i] - top)
    scores[:first] = float32(0.0)
    scores[last:] = float32(0.0)
    sums = np.zeros(LANES, np.float32)
    for at in range(0, scores.shape[0], LANES):
        part = scores[at : at + LANES]
        for lane in range(LANES):
            sums[lane] += part[lane]
    total = exponential(sink - top) if sink > float32(-np.inf) else float32(0.0)
    for lane in range(LANES):
        total += sums[lane]
    return total


@njit
def _largest(x: Any, least: Any) -> Any:
    """Of `least` and all of x, by lanes."""
    tops, whole = np.full(LANES, least, np.float32), x.shape[0] // LANES * LANES
    for at in range(0, whole, LANES):
        part = x[at : at + LANES]
        for lane in range(LANES):
            tops[lane] = max(tops[lane], part[lane])
    top = least
    for lane in range(LANES):
        top = max(top, tops[lane])
    for i in range(whole, x.shape[0]):
        top = max(top, x[i])
    return top


@njit
def _blend(plan: Any, blocks: Any, block: Any, scratch: Any, span: Any) -> None:
    """Add the values of positions (begin of the scores, first, last) to the outputs of rows (first, last)."""
    begin, first, last, r0, r1 = span
    width, long = _groups(plan.dv), scratch.scores.shape[1]
    stride = plan.item_bytes * plan.H * plan.dv
    scores, outputs, pairs, at = scratch.scores.ctypes.data, scratch.outputs.ctypes.data, scratch.pairs, first
    following = _following(block, last - first, plan.item_bytes * plan.dv)
    while at < last:
        end = _run_end(plan, blocks, block, at, last)
        for r in range(r0, r1):
            pairs[r - r0, 0], pairs[r - r0, 1] = scores + 4 * (r * long + at - begin), outputs + 4 * r * width
        values = plan.values + plan.item_bytes * (_slot(plan, blocks, block, at) * plan.H + block.head) * plan.dv
        _native(plan.blend, (values, stride, plan.dv, end - at, pairs.ctypes.data, r1 - r0, following))
        at = end


@njit
def _blend_edge(plan: Any, blocks: Any, block: Any, scratch: Any, span: Any) -> None:
    """Add the values of positions (begin of the scores, first, last) to those rows of a block that see them: what some
    rows see in common at once, and what is left row by row, in rising order of position for each."""
    begin, first, last = span
    if first >= last:
        return
    G = plan.Q // plan.H
    near = max(1, NEAR_PAIRS // G)
    for t0 in range(0, block.count, near):
        t1 = min(t0 + near, block.count)
        common_from = min(max(first, _seen(plan, block, t1 - 1)[0]), last)
        common_to = max(common_from, min(last, _seen(plan, block, t0)[1]))
        for t in range(t0, t1):
            _blend(plan, blocks, block, scratch, _of_row(plan, block, t, (begin, first, common_from)))
        _blend(plan, blocks, block, scratch, (begin, common_from, common_to, t0 * G, t1 * G))
        for t in range(t0, t1):
            _blend(plan, blocks, block, scratch, _of_row(plan, block, t, (begin, common_to, last)))


@njit
def _of_row(plan: Any, block: Any, t: Any, span: Any) -> Any:
    """What row t sees of positions (begin of the scores, first, last), and its pairs."""
    G, seen = plan.Q // plan.H, _seen(plan, block, t)
    return span[0], max(span[1], seen[0]), min(span[2], seen[1]), t * G, (t + 1) * G


@njit
def _attend(call: Any, plan: Any, blocks: Any, block: Any, scratch: Any) -> None:
    """One block's outputs."""
    G, n = plan.Q // plan.H, block.count
    first, last = _seen(plan, block, 0)[0], _seen(plan, block, n - 1)[1]
    begin = first // LANES * LANES
    used = (last - begin + LANES - 1) // LANES * LANES
    _queries(call, plan, block, scratch)
    _score(plan, blocks, block, scratch, (begin, first, last))
    sums = np.empty(n * G, np.float32)
    for r in range(n * G):
        seen = _seen(plan, block, r // G)
        sink = float32(-np.inf)
        if plan.sinks:
            sink = carray(floats_at(plan.sinks), (plan.Q,))[block.head * G + r % G]
        sums[r] = _softmax(scratch.scores[r, :used], seen[0] - begin, seen[1] - begin, sink)
    scratch.outputs[:] = float32(0.0)
    all_from = _seen(plan, block, n - 1)[0]  # what all rows see, if there is any
    all_to = max(all_from, _seen(plan, block, 0)[1])
    _blend_edge(plan, blocks, block, scratch, (begin, first, all_from))
    _blend(plan, blocks, block, scratch, (begin, all_from, all_to, 0, n * G))
    _blend_edge(plan, blocks, block, scratch, (begin, all_to, last))
    for r in range(n * G):
        _write(call, plan, block, scratch, r, sums[r])


@njit(error_model="numpy")
def _write(call: Any, plan: Any, block: Any, scratch: Any, r: Any, total: Any) -> None:
    """Normalise a row's outputs of one query head and put them in order."""
    G, dv, width = plan.Q // plan.H, plan.dv, _groups(plan.dv)
    out, row = scratch.outputs[r * width : (r + 1) * width], scratch.row
    for i in range(width):
        row[i] = out[i] / total
    if plan.spread:  # odd ones of a group came first
        for g in range(0, width, GROUP):
            for i in range(GROUP // 2):
                out[g + 2 * i + 1], out[g + 2 * i] = row[g + i], row[g + GROUP // 2 + i]
    else:
        for i in range(width):
            out[i] = row[i]
    place = ((block.row + r // G) * plan.Q + block.head * G + r % G) * dv
    write_row(out[:dv], call.out + plan.item_bytes * place, plan.item_bytes)


@njit
def attention(call_at: Any, plan_at: Any) -> Any:
    call, plan = AttentionCall(*items(call_at, CALL)), AttentionPlan(*items(plan_at, PLAN))
    spans = carray(ints_at(call.spans), (call.S, 4))
    G, longest, most = plan.Q // plan.H, 0, 1
    rows = max(1, PAIRS // G)
    for s in range(call.S):
        longest = max(longest, spans[s, 1] + spans[s, 2])
        most = max(most, min(rows, spans[s, 1]))
    blocks = carray(ints_at(call.blocks), (1 << 40,))
    scratch = _Scratch(
        np.empty(most * G * _groups(plan.d), np.float32),
        np.empty((most * G, (longest + 2 * LANES - 1) // LANES * LANES), np.float32),
        np.empty(most * G * _groups(plan.dv), np.float32),
        np.empty((most * G, 2), np.int64),
        np.empty(_groups(max(plan.d, plan.dv)), np.float32),
    )
    for s in range(call.S):
        row, count, start, table = spans[s, 0], spans[s, 1], spans[s, 2], spans[s, 3]
        for head in range(call.share, plan.H, call.shares):
            _keep(call, plan, blocks, _Block(head, row, count, start, table))
            for t in range(0, count, rows):
                block = _Block(head, row + t, min(rows, count - t), start + t, table)
                _attend(call, plan, blocks, block, scratch)
    return OK


def compile_attention(folder: Path | None) -> int:
    """The address of `attention`, from `folder` when an earlier process left it there; None keeps none."""
    stamp = stamp_of("attention_calls", "attention_numba")

    def kernel(call_at: Any, plan_at: Any) -> Any:
        return attention(call_at, plan_at) if stamp >= 0 else OK

    return compiled(kernel, folder)
