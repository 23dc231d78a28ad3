"""Attention of a decode pass over the paged KV cache on a device apart: sizes and launches.

Legend: B sequences, Q query heads, H key-value heads, G = Q / H, d key size, dv value size, M columns of a block table.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from buddymoe_ray.kernels.triton import launching
from buddymoe_ray.kernels.triton.forms import power_of_two

__all__ = ["Sizes", "decode_attention"]

_LEAST, _MOST = 16, 64  # tokens of a tile, and of a product's sides the least
_SHARED_BYTES, _STAGES = 64 << 10, 3  # for tiles that are on their way: GPUs have 99 KiB or more
_SPLITS, _EVERYTHING = 16, 1 << 30


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a program has to know when it is compiled; names are the legend's of `attention_programs`."""

    H: int
    G: int
    d: int
    dv: int
    PG: int
    PD: int
    PV: int
    block_size: int
    BN: int
    S: int
    interpreted: bool

    def __repr__(self) -> str:
        """As Triton has it in the name of a function."""
        return "_".join(str(int(part)) for part in astuple(self))


def decode_attention(
    q_BQd: Tensor,
    pools: tuple[Tensor, Tensor, int],
    context: tuple[Tensor, Tensor],
    *,
    scale: float,
    window: int | None,
    sinks_Q: Tensor | None,
    splits: int | None = None,
) -> Tensor:
    """`[B, Q, d] -> [B, Q, dv]`: what each row attends to, of keys and values that the cache has already.

    Args:
        pools: keys `[N, H, d]` and values `[N, H, dv]` in the rows' dtype, and how many tokens are a block.
        context: blocks of each row `[B, M]` and tokens in them `[B]`, its own included, both int64.
        window: tokens that a row sees, itself included; None for all. sinks_Q: logits without a value.
        splits: that share a row; None for what suits the machine.
    """
    from buddymoe_ray.kernels.triton.attention_programs import attend, join

    (keys, values, block_size), (blocks_BM, lengths_B) = pools, context
    interpreted = launching.interpreted()
    assert q_BQd.dtype == keys.dtype == values.dtype, f"rows are {q_BQd.dtype}, must be {keys.dtype}"
    (B, Q, d), (_, H, dv) = q_BQd.shape, values.shape
    PD, PV = (max(_LEAST, power_of_two(size)) for size in (d, dv))
    fitting = _SHARED_BYTES // (_STAGES * (PD + PV) * keys.itemsize)
    sizes = Sizes(
        H=H,
        G=Q // H,
        d=d,
        dv=dv,
        PG=max(_LEAST, power_of_two(Q // H)),
        PD=PD,
        PV=PV,
        block_size=block_size,
        BN=min(_MOST, max(_LEAST, power_of_two(fitting + 1) // 2)),
        S=splits or (1 if interpreted else _SPLITS),
        interpreted=interpreted,
    )
    part, stat = (q_BQd.new_empty(B, Q, sizes.S, size, dtype=torch.float32) for size in (dv, 2))
    out, asked, M = q_BQd.new_empty(B, Q, dv), q_BQd.contiguous(), blocks_BM.shape[1]
    seen = _EVERYTHING if window is None else window
    pointers = (asked, (keys, values), (blocks_BM.contiguous(), lengths_B, M), (part, stat))
    launching.launch(attend, (sizes.S, H, B), *pointers, scale, seen, sizes)
    launching.launch(join, (H, B), part, stat, sinks_Q, out, sizes)
    return out
