"""Tokens of rows of logits without sorting them and without the GIL: the twin of `sample.choose_by_sort`, token for
token. Imports numba at the top: only `sample` may import this module, and late.

A row is read once for its largest (of every block, which is where a top-k looks), once for its weights, which are added
up by steps of likeliness too, and once for the tokens of the step in which the choice falls; those are cut in halves.

Legend: V vocabulary.
"""

from __future__ import annotations

from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numba import carray, float32, float64, int32, int64, njit, uint16, uint64

from buddymoe_ray.kernels.expert_calls import OK
from buddymoe_ray.kernels.expert_rows import (
    double_bits,
    float_bits,
    floats_at,
    from_bits,
    from_double_bits,
    ints_at,
)
from buddymoe_ray.kernels.numba_calls import compiled, items, stamp_of
from buddymoe_ray.kernels.sample_calls import (
    FARTHEST,
    LN2_HIGH,
    LN2_LOW,
    LOG2_E,
    ROUNDER,
    SERIES,
    UNIT,
    SampleCall,
    SampleRow,
)

__all__ = ["compile_sample"]

CALL, ROW = (0,) * len(SampleCall._fields), (0,) * len(SampleRow._fields)
BLOCK, STEPS = 128, 2048
REACH = 31.2  # nats: what is less likely than that has no weight
WHOLE, WHOLE_BITS = 2.0**52, 0x4330000000000000  # added to an integer, the last bits are the integer
LOWEST, INFINITE = -0x7F800001, 0x7F800000  # the infinities, `_ordered`; beyond them are no numbers
MULTIPLIERS = np.array([0xD2E7470EE14C6C93, 0xCA5A826395121157], np.uint64)
BUMPS = np.array([0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B], np.uint64)


class Room(NamedTuple):
    """Where a call works, for one row after the other."""

    logits: Any
    tops: Any
    kept: Any
    ids: Any
    weights: Any
    steps: Any
    sums: Any
    active: Any


@njit
def _high(a: Any, b: Any) -> Any:
    """Upper half of the product of two uint64."""
    half, low = uint64(32), uint64(0xFFFFFFFF)
    first = (a >> half) * (b & low) + (((a & low) * (b & low)) >> half)
    second = (a & low) * (b >> half) + (first & low)
    return (a >> half) * (b >> half) + (first >> half) + (second >> half)


@njit
def uniform(seed: Any, position: Any) -> Any:
    """`sample.uniform`: the first number of Philox4x64 after 10 rounds."""
    a, b, c, d = uint64(position) + uint64(1), uint64(0), uint64(0), uint64(0)
    key, other = uint64(seed), uint64(0)
    for _ in range(10):
        x, y = MULTIPLIERS[0] * a, MULTIPLIERS[1] * c
        a, b, c, d = _high(MULTIPLIERS[1], c) ^ b ^ key, y, _high(MULTIPLIERS[0], a) ^ d ^ other, x
        key, other = key + BUMPS[0], other + BUMPS[1]
    return float64(int64(a >> uint64(11))) / 2.0**53


@njit
def _ordered(bits: Any) -> Any:
    """The bits of a float32 as an int32 of the same order, and back: what is not a number is beyond the infinities, and
    a largest int32 is found with vectors."""
    return int32(bits ^ int32(int32(bits >> int32(31)) & int32(0x7FFFFFFF)))


@njit
def _survey(x: Any, tops: Any) -> Any:
    """The smallest and the largest, `_ordered`; `tops` become the largest of every block."""
    V, low, high = x.shape[0], int32(0x7FFFFFFF), int32(-0x80000000)
    for block in range(tops.shape[0]):
        top = int32(-0x80000000)
        for i in range(block * BLOCK, min(V, block * BLOCK + BLOCK)):
            key = _ordered(float_bits(x[i]))
            top, low = max(top, key), min(low, key)
        tops[block], high = from_bits(_ordered(top)), max(high, top)
    return low, high


@njit
def _first(x: Any, tops: Any, value: Any) -> Any:
    """Where the largest is for the first time."""
    block = 0
    while tops[block] != value:
        block += 1
    i = block * BLOCK
    while x[i] != value:
        i += 1
    return i


@njit
def _found(x: Any, weights: Any, active: Any, before: Any, target: Any) -> Any:
    """In falling order of `x`, of equal ones the first first: the first of the `active` whose running sum of weights,
    which begins at `before`, is above `target`; and that sum. Their weights are not 0; they are cut in halves."""
    n = active.shape[0]
    while True:
        low = high = x[active[0]]
        for a in range(1, n):
            low, high = min(low, x[active[a]]), max(high, x[active[a]])
        if low == high:
            weight = weights[active[0]]
            at = (target - before) // weight
            return active[at], before + (at + 1) * weight
        middle, upper = (float64(low) + float64(high)) / 2.0, int64(0)
        for a in range(n):
            upper += weights[active[a]] if x[active[a]] > middle else 0
        above, count = before + upper > target, 0
        for a in range(n):
            i = active[a]
            active[count] = i
            count += (x[i] > middle) == above
        n, before = count, before if above else before + upper


@njit
def _keep_best(x: Any, room: Any, top_k: Any) -> Any:
    """`kept` and `ids` become the `top_k` largest and all that equal the last of them; how many there are. As many
    blocks have one at least as large as the `top_k`-th largest of `tops`: nothing below it is one of them."""
    V, count, least = x.shape[0], room.tops.shape[0], float32(-np.inf)
    for i in range(count):
        room.kept[i] = room.tops[i]
    for all_of_them in range(0 if top_k <= count else 1, 2):
        if all_of_them:
            count = 0
            for block in range(room.tops.shape[0]):
                if room.tops[block] >= least:
                    for i in range(block * BLOCK, min(V, block * BLOCK + BLOCK)):
                        room.kept[count], room.ids[count] = x[i], i
                        count += x[i] >= least
        for i in range(count):
            room.active[i], room.weights[i] = i, 1
        least = room.kept[_found(room.kept, room.weights, room.active[:count], int64(0), top_k - 1)[0]]
    left = 0
    for i in range(count):
        room.kept[left], room.ids[left] = room.kept[i], room.ids[i]
        left += room.kept[i] >= least
    return left, least


@njit
def _exponential_64(s: Any) -> Any:
    """`sample.exponential_64` of one number."""
    shifted = s * LOG2_E + ROUNDER
    n = shifted - ROUNDER
    r = (s - n * LN2_HIGH) - n * LN2_LOW
    p = SERIES[0]
    for i in range(1, len(SERIES)):
        p = p * r + SERIES[i]
    return p * from_double_bits((double_bits(shifted) - double_bits(ROUNDER) + 1023) << 52)


@njit
def _weigh(x: Any, room: Any, largest: Any, least: Any, temperature: Any, min_p: Any) -> Any:
    """Weights and steps of `x`, and the weights' sum; `sums` become those of the steps, from the likeliest on."""
    n, total = x.shape[0], int64(0)
    reach = min(-(float64(least) - largest) / temperature, REACH)
    scale = min(STEPS / reach, 1e300) if reach > 0.0 else 0.0  # likeliness is 0 at the largest, and 0 * inf no step
    weights, steps = room.weights, room.steps
    for i in range(n):
        s = max((float64(x[i]) - largest) / temperature, FARTHEST)
        e = _exponential_64(s)
        weight = double_bits(e * UNIT + WHOLE) - WHOLE_BITS
        weight = weight if e >= min_p else 0
        weights[i], steps[i] = weight, uint16(int32(min(-s * scale, STEPS - 1.0)))
        total += weight
    room.sums[:] = 0
    for i in range(n):
        room.sums[steps[i]] += weights[i]
    return total


@njit
def _at(x: Any, room: Any, target: Any) -> Any:
    """As `_found`, of all of `x`, with the weights that it has in `room`."""
    step, before = 0, int64(0)
    while before + room.sums[step] <= target:
        before += room.sums[step]
        step += 1
    count = 0
    for i in range(x.shape[0]):
        room.active[count] = i
        count += (room.steps[i] == step) & (room.weights[i] > 0)
    return _found(x, room.weights, room.active[:count], before, target)


@njit
def _choose(x: Any, room: Any, row: Any) -> Any:
    """The token of a row; -1 of one that is no distribution."""
    low, high = _survey(x, room.tops)
    if low < LOWEST or high >= INFINITE or high == LOWEST:
        return -1
    temperature, top_p = from_double_bits(row.temperature), from_double_bits(row.top_p)
    largest, least, values = from_bits(_ordered(high)), from_bits(_ordered(low)), x
    if temperature == 0.0:
        return _first(x, room.tops, largest)
    best = 0 < row.top_k < x.shape[0]
    if best:
        count, least = _keep_best(x, room, row.top_k)
        values = room.kept[:count]
    total, at = _weigh(values, room, float64(largest), least, temperature, from_double_bits(row.min_p)), int64(0)
    for drawn in range(0 if top_p < 1.0 else 1, 2):  # once for both: what is inlined twice is compiled twice
        if drawn:
            target = int64(uniform(row.seed, row.position) * float64(total))
        else:  # the last that is kept has less than top_p before it
            target = max(int64(ceil(top_p * float64(total))) - 1, 0)
        at, total = _at(values, room, min(target, total - 1))
    return room.ids[at] if best else at


@njit
def _shift(x: Any, row: Any) -> Any:
    """`sample._shifted` of one row, in place; whether all its ids lie in it."""
    ids, biases = carray(ints_at(row.bias_ids), (row.bias_count,)), carray(floats_at(row.biases), (row.bias_count,))
    inside = True
    for i in range(row.bias_count):
        inside &= 0 <= ids[i] < x.shape[0]
        if inside:
            x[ids[i]] += biases[i]
    repetition, presence = float32(from_double_bits(row.repetition)), float32(from_double_bits(row.presence))
    frequency = float32(from_double_bits(row.frequency))
    ids, often = carray(ints_at(row.seen_ids), (row.seen_count,)), carray(floats_at(row.often), (row.seen_count,))
    for i in range(row.seen_count):
        inside &= 0 <= ids[i] < x.shape[0]
        if inside:
            was = x[ids[i]]
            was = was / repetition if was > 0 else was * repetition
            x[ids[i]] = was - (presence + frequency * often[i]) if often[i] > 0 else was
    return inside


@njit
def sample_rows(call_at: Any, plan_at: Any) -> Any:
    """All rows of a call."""
    call = SampleCall(*items(call_at, CALL))
    V, blocks = call.V, (call.V + BLOCK - 1) // BLOCK
    room = Room(
        np.empty(V, np.float32),
        np.empty(blocks, np.float32),
        np.empty(V, np.float32),
        np.empty(V, np.int32),
        np.empty(V, np.int64),
        np.empty(V, np.uint16),
        np.empty(STEPS, np.int64),
        np.empty(V, np.int32),
    )
    rows, tokens = carray(ints_at(call.rows), (call.B,)), carray(ints_at(call.tokens), (call.B,))
    for b in range(call.B):
        row = SampleRow(*items(rows[b], ROW))
        x, fine = carray(floats_at(call.logits + 4 * call.stride * b), (V,)), True
        if row.bias_count or row.seen_count:
            for i in range(V):  # an assignment of all takes 5 seconds to compile
                room.logits[i] = x[i]
            x, fine = room.logits, _shift(room.logits, row)
        tokens[b] = _choose(x, room, row) if fine else -1
    return OK


def compile_sample(folder: Path | None) -> int:
    """The address of `sample_rows`, from `folder` when an earlier process left it there; None keeps none."""
    stamp = stamp_of("sample_calls", "sample_numba")

    def kernel(call_at: Any, plan_at: Any) -> Any:
        return sample_rows(call_at, plan_at) if stamp >= 0 else OK

    return compiled(kernel, folder)
