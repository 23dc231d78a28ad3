"""What goes into a call of the attention's machine code. Knows neither torch nor numba: both sides import it.

Legend: S sequences of a pass, T rows, Q query heads, H key-value heads, d key size, dv value size.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["AttentionCall", "AttentionPlan"]


class AttentionPlan(NamedTuple):
    """What is the same in all calls of a layer: pools [tokens, H, d] and [tokens, H, dv] with items of `item_bytes`
    (bfloat16 or float32), a window in tokens (0: none), a logit per query head that takes part in the softmax (address
    of float32, 0: none), the bits of the float32 scale, and the native functions that multiply with stored numbers."""

    keys: int
    values: int
    block_size: int
    item_bytes: int
    Q: int
    H: int
    d: int
    dv: int
    window: int
    sinks: int
    scale_bits: int
    project_strided: int
    blend: int
    spread: int


class AttentionCall(NamedTuple):
    """Addresses of a pass's queries [Q, T, d], keys [H, T, d], values [H, T, dv] and outputs [T, Q, dv], whose last
    dimension lies together; strides are in items. `spans` are S rows (first row, how many, position of the first, where
    its blocks begin in `blocks`), int64. Of every `shares` key-value heads in turn the kernel computes the `share`-th.
    """

    q: int
    k: int
    v: int
    out: int
    q_head: int
    q_row: int
    k_head: int
    k_row: int
    v_head: int
    v_row: int
    spans: int
    blocks: int
    S: int
    share: int
    shares: int
