"""Some outputs of a matrix times a row, in Triton: plain weights `[out, in]` or `[in, out]`, or a packed record's.

A program has a fixed tile of outputs and its own order of summation, in float32, and sees one row: so the bits of an
output depend on its row and its weights alone. Weights come 16 bytes to a thread, past the first cache level, and
inputs in the layout of the weights, so that nothing is exchanged between threads inside a loop.

Tried and dropped: inputs in a layout of their own (shared memory, barriers in the loop, all 255 registers at 3 bit).

Legend: B outputs of a program, A tiles of 16 of them, C lanes of a row, G groups of inputs; `FORM` is a `forms.Form`.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["packed", "plain", "pointer", "transposed"]

GROUP: tl.constexpr = tl.constexpr(32)
BLOCK: tl.constexpr = tl.constexpr(16)
STEPS_PER_OCTAVE: tl.constexpr = tl.constexpr(24)


@triton.jit
def pointer(at, DTYPE: tl.constexpr):
    """Of a dtype, by torch's name; to bytes where it is another."""
    if DTYPE == "bfloat16":
        place = at.to(tl.pointer_type(tl.bfloat16))
    elif DTYPE == "float16":
        place = at.to(tl.pointer_type(tl.float16))
    elif DTYPE == "float32":
        place = at.to(tl.pointer_type(tl.float32))
    else:
        place = at.to(tl.pointer_type(tl.int32 if DTYPE == "int32" else tl.uint8))
    return place


@triton.jit
def plain(base, n, x, FORM: tl.constexpr):
    """float32 [B] of outputs n [B] of a matrix [N, K]."""
    N: tl.constexpr = FORM.N
    K: tl.constexpr = FORM.K
    C: tl.constexpr = FORM.lanes
    V: tl.constexpr = FORM.items
    B: tl.constexpr = FORM.outputs
    c, v = tl.arange(0, C), tl.arange(0, V)
    total = tl.full([B, C], 0.0, tl.float32)
    every = n[:, None, None] * 0
    row = n.to(tl.int64)[:, None, None] * K
    there = (n < N)[:, None, None]
    for begin in tl.range(0, K, C * V, loop_unroll_factor=1):
        k = begin + c[None, :, None] * V + v[None, None, :]
        inside = (begin + c * V < K)[None, :, None]
        weight = tl.load(base + (row + k), mask=inside & there, other=0.0, eviction_policy="evict_first")
        inputs = tl.load(x + (k + every), mask=inside, other=0.0)
        total += tl.sum(weight.to(tl.float32) * inputs.to(tl.float32), axis=2)
    return tl.sum(total, axis=1)


@triton.jit
def transposed(base, n, x, FORM: tl.constexpr):
    """float32 [B] of neighbouring outputs n [B] of a matrix [K, N]."""
    N: tl.constexpr = FORM.N
    K: tl.constexpr = FORM.K
    C: tl.constexpr = FORM.lanes
    B: tl.constexpr = FORM.outputs
    c = tl.arange(0, C)
    total = tl.full([C, B], 0.0, tl.float32)
    every = n[None, :] * 0
    there = (n < N)[None, :]
    for begin in tl.range(0, K, C, loop_unroll_factor=1):
        k = (begin + c)[:, None]
        at = k.to(tl.int64) * N + n[None, :]
        weight = tl.load(base + at, mask=(k < K) & there, other=0.0, eviction_policy="evict_first")
        place = tl.max_contiguous(x + (k + every), [1, 1])  # or it had a layout of its own, as in Triton 3.6 it has
        total += weight.to(tl.float32) * tl.load(place, mask=k < K, other=0.0).to(tl.float32)
    return tl.sum(total, axis=0)


@triton.jit
def packed(codes, scales, tile, x, FORM: tl.constexpr):
    """float32 [A, 16] of tiles [A] of 16 outputs, before `base`, of 4 or 8 bits; codes and scales lie as
    lowbit_format.py says.

    A lane has 16 bytes of a tile: of four outputs four inputs, and as many again in the bytes' higher bits.
    """
    K: tl.constexpr = FORM.K
    C: tl.constexpr = FORM.lanes
    BITS: tl.constexpr = FORM.bits
    A: tl.constexpr = FORM.outputs // BLOCK
    GROUPS: tl.constexpr = (K + GROUP - 1) // GROUP
    MIDDLE: tl.constexpr = 1048576.0 + ((1 << BITS) - 1) * 0.5
    c, v, four = tl.arange(0, C), tl.arange(0, 16), tl.arange(0, 4)
    total = tl.full([A, C, 4], 0.0, tl.float32)
    first = (tile.to(tl.int64) * GROUPS)[:, None, None]
    every = (tile * 0)[:, None, None]
    for begin in tl.range(0, GROUPS * BITS * 4, C, loop_unroll_factor=1):
        at = begin + c
        g, vector, quarter = at // (BITS * 4), at // 4 % BITS, at % 4
        inside = (g < GROUPS)[None, :, None]
        byte = codes + ((first + g[None, :, None]) * (BITS * 64) + (quarter * 16)[None, :, None] + v[None, None, :])
        low = tl.load(
            byte + (vector * 64)[None, :, None], mask=inside & (every == 0), other=0, eviction_policy="evict_first"
        )
        part = tl.full([A, C, 4], 0.0, tl.float32)
        for p in tl.static_range(8 // BITS):
            code = (low >> (p * BITS)) & ((1 << BITS) - 1)
            # 2**20 + code by its bits (an eighth is the last one there): exact, and no slow conversion
            value = (code.to(tl.int32) * 8 + 0x49800000).to(tl.float32, bitcast=True) - MIDDLE
            k = (g * GROUP + 4 * (vector + p * BITS))[None, :, None] + four[None, None, :] + every
            inputs = tl.load(x + k, mask=(k < K) & inside, other=0.0).to(tl.float32)
            part += tl.sum(tl.reshape(value, [A, C, 4, 4]) * inputs[:, :, None, :], axis=3)
        scale = scales + ((first + g[None, :, None]) * BLOCK + (quarter * 4)[None, :, None] + four[None, None, :])
        step = tl.load(scale, mask=inside & (every == 0), other=0).to(tl.float32) * (-1.0 / STEPS_PER_OCTAVE)
        total += part * tl.exp2(step)
    return tl.reshape(tl.sum(tl.reshape(total, [A, C // 4, 4, 4]), axis=1), [A, 16])
