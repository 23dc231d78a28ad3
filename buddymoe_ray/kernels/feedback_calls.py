"""What the machine code of error feedback is told, as int64s: addresses, sizes. Knows no numba."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["FeedbackCall", "FeedbackPlan"]


class FeedbackCall(NamedTuple):
    """Addresses of a group's weights float32 [32, N], read and changed, of its errors (float32) and codes (uint8)
    [32, N], of the outputs' scales float32 [N], of what an input's errors count float32 [32] (none where negative) and
    of the group's part of the factor float32 [32, 32]."""

    weights: int
    errors: int
    codes: int
    scale: int
    counts: int
    factor: int
    N: int


class FeedbackPlan(NamedTuple):
    """Bits of a code; of a trellis its search, as trellis_rings.py has it, the table of its levels above the midpoint
    (float32 [128]) and room for the search, else zeros."""

    bits: int
    search: int
    table: int
    scratch: int
