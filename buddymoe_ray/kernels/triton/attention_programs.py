"""Attention of decode rows over the paged KV cache, in Triton: keys and values are read where they are, once.

The grid is fixed by sequences, heads and splits, never by lengths, and a row's tokens are cut by its own length: so its
bits depend on nothing but the row, and a recorded launch serves every length. A split with nothing to do ends at once.
Products are of the cache's dtype, sums float32 (flash decoding: Dao et al. 2023).

Legend: B sequences, H key-value heads, G query heads of each, d key size, dv value size, M columns of the block table,
S splits, BN tokens of a tile; PG, PD, PV are G, d and dv up to what a tile takes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from buddymoe_ray.kernels.triton.programs import put

__all__ = ["attend", "join"]


@triton.jit
def attend(q, pools, context, parts, scale, window, SIZES: tl.constexpr):
    """A split's share of a head's softmax over `pools` of keys and values: `parts` are values `[B, H G, S, dv]` and
    `[B, H G, S, 2]` the largest score and the sum, `context` blocks, lengths and M; grid (S, H, B)."""
    k, v = pools
    blocks_BM, lengths_B, M = context
    part, stat = parts
    H: tl.constexpr = SIZES.H
    G: tl.constexpr = SIZES.G
    D: tl.constexpr = SIZES.d
    V: tl.constexpr = SIZES.dv
    s, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    length = tl.load(lengths_B + b)
    begin = tl.maximum(length - window, 0)
    tiles = tl.cdiv(length - begin, SIZES.BN)
    each = tl.cdiv(tiles, SIZES.S)
    g, d, dv, n = tl.arange(0, SIZES.PG), tl.arange(0, SIZES.PD), tl.arange(0, SIZES.PV), tl.arange(0, SIZES.BN)
    place = q + ((b * H + h) * G + g[:, None]) * D + d[None, :]
    asked = tl.load(place, mask=(g[:, None] < G) & (d[None, :] < D), other=0.0)
    top = tl.full([SIZES.PG], float("-inf"), tl.float32)
    norm = tl.full([SIZES.PG], 0.0, tl.float32)
    total = tl.full([SIZES.PG, SIZES.PV], 0.0, tl.float32)
    for tile in range(s * each, tl.minimum((s + 1) * each, tiles)):
        at = begin + tile * SIZES.BN + n
        inside = at < length
        block = tl.load(blocks_BM + b * M + at // SIZES.block_size, mask=inside, other=0)
        row = (block * SIZES.block_size + at % SIZES.block_size) * H + h
        keys = tl.load(k + (row[None, :] * D + d[:, None]), mask=inside[None, :] & (d[:, None] < D), other=0.0)
        values = tl.load(v + (row[:, None] * V + dv[None, :]), mask=inside[:, None] & (dv[None, :] < V), other=0.0)
        score = tl.where(inside[None, :], _dot(asked, keys, SIZES) * scale, float("-inf"))
        higher = tl.maximum(top, tl.max(score, axis=1))
        weight = tl.exp(score - higher[:, None])
        shrink = tl.exp(top - higher)
        norm = norm * shrink + tl.sum(weight, axis=1)
        total = total * shrink[:, None] + _dot(weight.to(values.dtype), values, SIZES)
        top = higher
    out = ((b * H + h) * G + g) * SIZES.S + s
    tl.store(part + out[:, None] * V + dv[None, :], total, mask=(g[:, None] < G) & (dv[None, :] < V))
    tl.store(stat + out * 2, top, mask=g < G)
    tl.store(stat + out * 2 + 1, norm, mask=g < G)


@triton.jit
def _dot(x, y, SIZES: tl.constexpr):
    """In float32; the interpreter computes with no bfloat16."""
    if SIZES.interpreted:
        product = tl.dot(x.to(tl.float32), y.to(tl.float32), input_precision="ieee")
    else:
        product = tl.dot(x, y, input_precision="ieee")
    return product


@triton.jit
def join(part, stat, sinks, out, SIZES: tl.constexpr):
    """`out [B, H G, dv]`: splits in their order, and with them the sink, which has no value; grid (H, B)."""
    H: tl.constexpr = SIZES.H
    G: tl.constexpr = SIZES.G
    V: tl.constexpr = SIZES.dv
    h, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    g, dv = tl.arange(0, SIZES.PG), tl.arange(0, SIZES.PV)
    row = (b * H + h) * G + g
    top = tl.full([SIZES.PG], float("-inf"), tl.float32)
    norm = tl.full([SIZES.PG], 0.0, tl.float32)
    if sinks is not None:
        top = tl.load(sinks + h * G + g, mask=g < G, other=0.0).to(tl.float32)
        norm += 1.0
    total = tl.full([SIZES.PG, SIZES.PV], 0.0, tl.float32)
    for s in range(SIZES.S):
        at = row * SIZES.S + s
        theirs = tl.load(stat + at * 2, mask=g < G, other=0.0)
        count = tl.load(stat + at * 2 + 1, mask=g < G, other=0.0)
        values = tl.load(part + at[:, None] * V + dv[None, :], mask=(g[:, None] < G) & (dv[None, :] < V), other=0.0)
        higher = tl.maximum(top, theirs)
        shrink, share = _share(top, higher, norm), _share(theirs, higher, count)
        norm = norm * shrink + count * share
        total = total * shrink[:, None] + values * share[:, None]
        top = higher
    answer = total / tl.where(norm == 0, 1.0, norm)[:, None]
    put(out + row[:, None] * V + dv[None, :], answer, (g[:, None] < G) & (dv[None, :] < V))


@triton.jit
def _share(top, higher, count):
    """Of what was summed below `top`; 0 where nothing was."""
    return tl.where(count == 0, 0.0, tl.exp(top - higher))
