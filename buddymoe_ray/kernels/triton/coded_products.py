"""Some outputs of a quantised matrix as a checkpoint stores it times a row, in Triton; see kernels/coded.py for codes.

As in products.py a program has a fixed tile and its own order of summation, in float32, and sees one row. A code
becomes a float32 by its bits, exactly: the lowest of 2**23, or for fp8 and fp4 sign, exponent and fraction where
float32 has them, times a power of two. Codes of fp8 that are no number count as 480.

    rows        all others: a lane has 16 bytes of each of four outputs, which share its loads of inputs
    words_down  gptq: a lane has 16 bytes of a row of words, eight inputs of four outputs that lie side by side
    words_along awq: a lane has 16 bytes, an input of 32 outputs that lie side by side

Legend: B outputs of a program, C lanes, V bytes; `FORM` is a `coded_forms.CodedForm`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from buddymoe_ray.kernels.triton.products import pointer

__all__ = ["rows", "words_along", "words_down"]

ONE: tl.constexpr = tl.constexpr(0x4B000000)  # 2**23, whose last bit is 1
MIDDLE: tl.constexpr = tl.constexpr(8388608.0)


@triton.jit
def _scale(place, mask, FORM: tl.constexpr):
    """float32 of scales, 0 where there are none."""
    DTYPE: tl.constexpr = FORM.scale
    if DTYPE == "float8_e4m3fn":
        code = tl.load(place.to(tl.pointer_type(tl.uint8)), mask=mask, other=0)
        scale = _value(code.to(tl.int32), 0.0, "fp8")
    elif DTYPE == "e8m0":
        power = tl.load(place.to(tl.pointer_type(tl.uint8)), mask=mask, other=0).to(tl.int32)
        scale = tl.where(power == 0, 0x400000, power << 23).to(tl.float32, bitcast=True)
    else:
        scale = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    return scale


@triton.jit
def _value(code, middle, CODES: tl.constexpr):
    """float32 of codes in the lowest bits of int32s."""
    if CODES == "fp8":
        bits = ((code & 0x80) << 24) | ((code & 0x7F) << 20)
        value = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2**120
    elif CODES == "mxfp4" or CODES == "nvfp4":
        bits = ((code & 8) << 28) | ((code & 7) << 22)
        value = bits.to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2**126
    elif CODES == "int8":
        value = ((code & 255) ^ 128 | ONE).to(tl.float32, bitcast=True) - (MIDDLE + 128.0)
    else:
        value = (code & 15 | ONE).to(tl.float32, bitcast=True) - middle
    return value


@triton.jit
def _words(base, n, lane, FORM: tl.constexpr):
    """Four int32 [B, C], neighbours in the rows n [B] of codes, from each of the words `lane` [C] on."""
    WORDS: tl.constexpr = FORM.words
    four = tl.arange(0, 4)
    at = (lane[None, :, None] + four[None, None, :]) + n.to(tl.int64)[:, None, None] * WORDS
    inside = (lane[None, :, None] + four[None, None, :] < WORDS) & (n < FORM.N)[:, None, None]
    held = tl.load(base + at, mask=inside, other=0, eviction_policy="evict_first")
    B: tl.constexpr = n.shape[0]
    C: tl.constexpr = lane.shape[0]
    even, odd = tl.split(tl.reshape(held, [B, C, 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _rows_scale(record, n, lane, AT: tl.constexpr, FORM: tl.constexpr):
    """Scale and what is taken from codes, float32 [B, C], of those from the AT-th of a lane's scales on."""
    PART: tl.constexpr = FORM.N // FORM.parts
    ROWS: tl.constexpr = (PART + FORM.block_outputs - 1) // FORM.block_outputs
    COLUMNS: tl.constexpr = (FORM.K + FORM.block_inputs - 1) // FORM.block_inputs
    DTYPE: tl.constexpr = FORM.scale
    part, within = n // PART, n % PART
    g = (lane * FORM.per_word // FORM.block_inputs + AT)[None, :]
    inside = (n < FORM.N)[:, None] & (lane < FORM.words)[None, :]
    if FORM.scales_of_lane > 1:
        inside &= g < COLUMNS
    at = (part * ROWS + within // FORM.block_outputs)[:, None] * COLUMNS + g
    place = tl.max_contiguous(pointer(record + FORM.scales, DTYPE) + at, [1, 1])  # see products.transposed
    scale = _scale(place, inside, FORM)
    middle = tl.full([n.shape[0], lane.shape[0]], MIDDLE + 8.0, tl.float32)
    if FORM.zeros >= 0:
        at = (part * ((PART + 7) // 8) + within // 8)[:, None] * COLUMNS + g
        place = tl.max_contiguous(pointer(record + FORM.zeros, "int32") + at, [1, 1])
        word = tl.load(place, mask=inside, other=0)
        middle = (word >> (4 * (within % 8))[:, None] & 15).to(tl.float32) + MIDDLE
    return scale, middle


@triton.jit
def _part(words, middle, inputs, Q: tl.constexpr, FORM: tl.constexpr):
    """Products [B, C, 4] with the Q-th four inputs of each lane."""
    WIDTH: tl.constexpr = 32 // FORM.per_word
    CODES: tl.constexpr = FORM.weights
    shift = (Q * 4 % FORM.per_word + tl.arange(0, 4)) * WIDTH
    code = words[Q * 4 // FORM.per_word][:, :, None] >> shift[None, None, :]
    return _value(code, middle[:, :, None], CODES) * inputs


@triton.jit
def rows(record, n, x, FORM: tl.constexpr):
    """float32 [B, 2, 2] of outputs n, n + B, n + 2 B and n + 3 B, the second of the last axis being the later two."""
    C: tl.constexpr = FORM.lanes
    B: tl.constexpr = FORM.outputs // 4
    K: tl.constexpr = FORM.K
    QUADS: tl.constexpr = FORM.per_word
    SCALES: tl.constexpr = FORM.scales_of_lane
    EACH: tl.constexpr = QUADS // SCALES
    base, every = pointer(record + FORM.codes, "int32"), n[:, None, None] * 0
    a, b, c, d = (tl.full([B, C], 0.0, tl.float32),) * 4
    for begin in tl.range(0, FORM.words, C * 4, loop_unroll_factor=1):
        lane = begin + 4 * tl.arange(0, C)
        wa, wb = _words(base, n, lane, FORM), _words(base, n + B, lane, FORM)
        wc, wd = _words(base, n + 2 * B, lane, FORM), _words(base, n + 3 * B, lane, FORM)
        for at in tl.static_range(SCALES):
            sa, ma = _rows_scale(record, n, lane, at, FORM)
            sb, mb = _rows_scale(record, n + B, lane, at, FORM)
            sc, mc = _rows_scale(record, n + 2 * B, lane, at, FORM)
            sd, md = _rows_scale(record, n + 3 * B, lane, at, FORM)
            pa, pb, pc, pd = (tl.full([B, C, 4], 0.0, tl.float32),) * 4
            for q in tl.static_range(EACH):
                k = (lane * QUADS + 4 * (at * EACH + q))[None, :, None] + tl.arange(0, 4)[None, None, :] + every
                inputs = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
                pa += _part(wa, ma, inputs, at * EACH + q, FORM)
                pb += _part(wb, mb, inputs, at * EACH + q, FORM)
                pc += _part(wc, mc, inputs, at * EACH + q, FORM)
                pd += _part(wd, md, inputs, at * EACH + q, FORM)
            a += tl.sum(pa, axis=2) * sa
            b += tl.sum(pb, axis=2) * sb
            c += tl.sum(pc, axis=2) * sc
            d += tl.sum(pd, axis=2) * sd
    early = tl.join(_whole(record, n, a, FORM), _whole(record, n + B, b, FORM))
    return tl.join(early, tl.join(_whole(record, n + 2 * B, c, FORM), _whole(record, n + 3 * B, d, FORM)))


@triton.jit
def _whole(record, n, y, FORM: tl.constexpr):
    """float32 [B] of what lanes have of outputs n, by the scale of all of a part's scales where there is one."""
    y = tl.sum(y, axis=1)
    if FORM.whole >= 0:
        part = tl.minimum(n * FORM.parts // FORM.N, FORM.parts - 1)
        scale = tl.load(pointer(record + FORM.whole, "float32") + part)
        y = y / scale if FORM.divides else y * scale
    return y


@triton.jit
def words_down(record, part, n, x, FORM: tl.constexpr):
    """float32 [B] of neighbouring outputs n [B] of a part."""
    N: tl.constexpr = FORM.N // FORM.parts
    C: tl.constexpr = FORM.lanes
    GROUPS: tl.constexpr = (FORM.K + FORM.block_inputs - 1) // FORM.block_inputs
    CODES: tl.constexpr = FORM.weights
    DTYPE: tl.constexpr = FORM.scale
    total = tl.full([C, FORM.outputs], 0.0, tl.float32)
    there, every = (n < N)[None, :], n[None, :] * 0
    codes = pointer(record + FORM.codes, "int32") + part.to(tl.int64) * (FORM.words * N)
    scales = pointer(record + FORM.scales, DTYPE) + part * (GROUPS * N) + n[None, :]
    zeros = pointer(record + FORM.zeros, "int32") + part * (GROUPS * (N // 8)) + (n // 8)[None, :]
    for begin in tl.range(0, FORM.words, C, loop_unroll_factor=1):
        r = (begin + tl.arange(0, C))[:, None]
        inside, g = (r < FORM.words) & there, r * 8 // FORM.block_inputs
        held = tl.load(codes + (r * N + n[None, :]), mask=inside, other=0, eviction_policy="evict_first")
        zero = tl.load(zeros + g * (N // 8), mask=inside, other=0) >> (4 * (n % 8))[None, :] & 15
        middle, product = zero.to(tl.float32) + (MIDDLE + 1.0), tl.full([C, FORM.outputs], 0.0, tl.float32)
        for j in tl.static_range(8):
            place = tl.max_contiguous(x + (r * 8 + j + every), [1, 1])  # see products.transposed
            inputs = tl.load(place, mask=r * 8 + j < FORM.K, other=0.0).to(tl.float32)
            product += _value(held >> (4 * j), middle, CODES) * inputs
        total += product * _scale(scales + g * N, inside, FORM)
    return tl.sum(total, axis=0)


@triton.jit
def words_along(record, part, first, x, FORM: tl.constexpr):
    """float32 [V, 2] of a part's outputs from `first` on, in the order of `outputs_along`."""
    N: tl.constexpr = FORM.N // FORM.parts
    C: tl.constexpr = FORM.lanes
    V: tl.constexpr = FORM.outputs // 2
    GROUPS: tl.constexpr = (FORM.K + FORM.block_inputs - 1) // FORM.block_inputs
    CODES: tl.constexpr = FORM.weights
    DTYPE: tl.constexpr = FORM.scale
    v = (first // 2 + tl.arange(0, V))[None, :]
    early, late = (tl.full([C, V], 0.0, tl.float32),) * 2
    every, there = (tl.arange(0, C) * 0)[:, None], v < N // 2
    codes = (record + FORM.codes) + part.to(tl.int64) * (FORM.K * (N // 2)) + v
    scales = pointer(record + FORM.scales, DTYPE) + part * (GROUPS * N) + outputs_along(v) + every
    zeros = (record + FORM.zeros) + part * (GROUPS * (N // 2)) + v + every
    for g in tl.range(0, GROUPS, loop_unroll_factor=1):
        middles = tl.load(zeros + g * (N // 2), mask=there & (every == 0), other=0)
        low, high = (middles & 15).to(tl.float32) + MIDDLE, (middles >> 4).to(tl.float32) + MIDDLE
        low_part, high_part = (tl.full([C, V], 0.0, tl.float32),) * 2
        for begin in tl.range(0, FORM.block_inputs, C, loop_unroll_factor=1):
            k = (g * FORM.block_inputs + begin + tl.arange(0, C))[:, None]
            held = tl.load(codes + k * (N // 2), mask=(k < FORM.K) & there, other=0, eviction_policy="evict_first")
            place = tl.max_contiguous(x + (k + v * 0), [1, 1])
            inputs = tl.load(place, mask=k < FORM.K, other=0.0).to(tl.float32)
            low_part += _value(held.to(tl.int32), low, CODES) * inputs
            high_part += _value(held.to(tl.int32) >> 4, high, CODES) * inputs
        early += low_part * _scale(scales + g * N, there & (every == 0), FORM)
        late += high_part * _scale(scales + g * N + 2, there & (every == 0), FORM)
    return tl.join(tl.sum(early, axis=0), tl.sum(late, axis=0))


@triton.jit
def outputs_along(v):
    """Of a part, that of the lower half of byte v: coded_format.AWQ_ORDER; that of the upper half is two further."""
    return v // 4 * 8 + v % 2 * 4 + v % 4 // 2
