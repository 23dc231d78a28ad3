"""What plain rounding's machine code is told, as int64s: addresses, sizes. Knows no numba."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["RoundingCall", "RoundingPlan"]


class RoundingCall(NamedTuple):
    """A matrix [N, K] of items of 4 (float32) or 2 bytes (bfloat16), float32 room for two tables of scales [A * 16, G]
    of it, and where its codes go; 0: the scales are to be found first."""

    weights: int
    item_bytes: int
    N: int
    K: int
    scale: int
    kept: int
    codes: int


class RoundingPlan(NamedTuple):
    """Bits of a code, and the shares (float32) of a group's largest value that its outermost level is tried at."""

    bits: int
    shares: int
    tries: int
