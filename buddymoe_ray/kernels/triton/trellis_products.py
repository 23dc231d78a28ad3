"""Some outputs of a matrix packed in trellis codes times a row, in Triton; see kernels/trellis.py for codes.

As in products.py a program has a fixed tile and its own order of summation, in float32, and sees one row. A lane has
all 16 outputs of one quad of inputs, or of 1 and 3 bits of two: 16 bytes, or three times as many, in which rings are
whole. A level is looked up in 256 bytes of bfloat16, which are exact: float32 would lie in twice as many cache lines.

Legend: A tiles of 16 outputs, C lanes; `FORM` is a `forms.Form`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from buddymoe_ray.kernels.triton.products import BLOCK, GROUP

__all__ = ["trellis"]


@triton.jit
def trellis(codes, scales, base, levels, tile, x, FORM: tl.constexpr):
    """float32 [A, 16] of tiles [A], of 1 to 3 bits; `base` are their scales, `levels` bfloat16 [128], above the
    midpoint. Windows come one after the other, so that the look-up of a level has the layout of the ring."""
    C: tl.constexpr = FORM.lanes
    BITS: tl.constexpr = FORM.bits
    A: tl.constexpr = FORM.outputs // BLOCK
    GROUPS: tl.constexpr = (FORM.K + GROUP - 1) // GROUP
    QUADS: tl.constexpr = 1 if BITS == 2 else 2
    MOST: tl.constexpr = GROUPS * 8 // QUADS
    qwords, every = codes.to(tl.pointer_type(tl.uint64)), (tile * 0)[:, None]
    eights = scales.to(tl.pointer_type(tl.uint64))
    first = (tile.to(tl.int64) * GROUPS)[:, None]
    y = (tl.full([A, C], 0.0, tl.float32),) * 16
    for begin in tl.range(0, MOST, C, loop_unroll_factor=1):
        at = begin + tl.arange(0, C)
        there = (at < MOST)[None, :] & (every == 0)
        place = first * (BITS * 8) + (at * (QUADS * BITS))[None, :]
        held = _two(qwords, place, there)
        if BITS == 3:
            held = held + _two(qwords, place + 2, there) + _two(qwords, place + 4, there)
        scale = tl.load(eights + (first + (at * QUADS // 8)[None, :]), mask=there, other=0)
        for quad in tl.static_range(QUADS):
            inputs = _inputs(x, (at * QUADS + quad) * 4, there, FORM.K)
            y = _outputs(y, _rings(held, quad, BITS), levels, inputs, (base, scale), BITS)
    return tl.reshape(tl.sum(_beside(y), axis=1), [A, 16])


@triton.jit
def _two(qwords, place, there):
    """Two uint64 [A, C] that lie side by side."""
    two = tl.arange(0, 2)[None, None, :]
    held = tl.load(qwords + (place[:, :, None] + two), mask=there[:, :, None], other=0, eviction_policy="evict_first")
    return tl.split(held)


@triton.jit
def _inputs(x, k, there, K: tl.constexpr):
    """Four float32 [A, C] that lie side by side, from each of k [C] on."""
    k = (k[None, :] + there.to(tl.int32) * 0)[:, :, None] + tl.arange(0, 4)[None, None, :]
    held = tl.load(x + k, mask=(k < K) & there[:, :, None], other=0.0).to(tl.float32)
    even, odd = tl.split(tl.reshape(held, [held.shape[0], held.shape[1], 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _rings(held, quad: tl.constexpr, BITS: tl.constexpr):
    """The rings of a quad of what a lane has, in their lowest bits: four of 48 bits, two or one of 64."""
    if BITS == 3:
        a, b, c = held[3 * quad], held[3 * quad + 1], held[3 * quad + 2]
        rings = a, (a >> 48) | (b << 16), (b >> 32) | (c << 32), c >> 16
    else:
        rings = held[quad : quad + 1] if BITS == 1 else held
    return rings


@triton.jit
def _outputs(y, rings, levels, inputs, scale, BITS: tl.constexpr):
    """`y` and the products of a quad's four inputs with 16 outputs, those of a ring after another's."""
    EACH: tl.constexpr = 16 // len(rings)
    base, codes = scale
    total = y[:0]
    for n in tl.static_range(16):
        dot = tl.full(codes.shape, 0.0, tl.float32)
        for i in tl.static_range(4):
            dot += _level(levels, rings[n // EACH], n % EACH * 4 + i, EACH, BITS) * inputs[i]
        code = (codes >> (n % 8 * 8 + n // 8 * 4)) & 15
        total += (y[n] + dot * tl.load(base + code.to(tl.int32)),)
    return total


@triton.jit
def _level(levels, ring, p: tl.constexpr, EACH: tl.constexpr, BITS: tl.constexpr):
    """float32 of position p of rings of so many outputs: its window is the 7 bits that end with its own, and at a
    ring's beginning those of its end, too."""
    BEFORE: tl.constexpr = 7 - BITS
    SIZE: tl.constexpr = 4 * EACH * BITS
    if p * BITS < BEFORE:
        window = (((ring << BEFORE) | ((ring >> (SIZE - BEFORE)) & ((1 << BEFORE) - 1))) >> (p * BITS)) & 127
    else:
        window = (ring >> (p * BITS - BEFORE)) & 127
    return tl.load(levels + window.to(tl.int32)).to(tl.float32)


@triton.jit
def _beside(y):
    """[A, C, 2, 2, 2, 2] of sixteen [A, C]."""
    eight = y[:0]
    for n in tl.static_range(8):
        eight += (tl.join(y[n], y[n + 8]),)
    four = y[:0]
    for n in tl.static_range(4):
        four += (tl.join(eight[n], eight[n + 4]),)
    return tl.join(tl.join(four[0], four[2]), tl.join(four[1], four[3]))
