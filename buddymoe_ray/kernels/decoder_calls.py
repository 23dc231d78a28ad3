"""What goes into a call of a decoder layer's machine code. Knows neither torch nor numba: both sides import it.

Legend: T rows of a pass, D hidden, Q query heads, H key-value heads, d key size, dv value size, E experts, K experts
per token.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["DONE", "ROUTED", "STOOD_IN", "DecoderCall", "DecoderPlan", "StandinPlan"]

DONE, ROUTED, STOOD_IN = 1, 2, 3
"""What a call comes to: the layer's output; as far as its feed-forward, which is left to the caller; or the output, for
which stand-ins answered."""


class DecoderPlan(NamedTuple):
    """What is the same in all calls of a layer. Items are of `item_bytes`: float32 or bfloat16.

    `norm` to `combine` are addresses of kernels, those behind them up to `computes` of plans: norms, of which those of
    queries and keys (0: none) go over `.._norm_n` items at once; linear layers, `router` with them (0: not known);
    `attends` of `PagedLayer`, `chooses` of `CpuRouter`, `computes` of `ExpertLayer` (0: the caller computes). Weights
    of the router have `weight_bytes`. `standins` is the address of a `StandinPlan` (0: no stand-in answers here).
    `next_router`, `next_chooses` and `next_E` are of the next layer's router, by which its experts are guessed.
    """

    D: int
    item_bytes: int
    Q: int
    H: int
    d: int
    dv: int
    norm: int
    linear: int
    attention: int
    choose: int
    experts: int
    combine: int
    norm_before: int
    norm_after: int
    q_norm: int
    q_norm_n: int
    k_norm: int
    k_norm_n: int
    q: int
    k: int
    v: int
    o: int
    attends: int
    router: int = 0
    chooses: int = 0
    computes: int = 0
    E: int = 0
    K: int = 0
    weight_bytes: int = 4
    standins: int = 0
    next_router: int = 0
    next_chooses: int = 0
    next_E: int = 0


class StandinPlan(NamedTuple):
    """Addresses of what may answer for the experts of a layer.

    By expert: `kinds` int64 (the number of its record's kind, -1: none), `records` int64 (where the record begins),
    `losses` float32 (expected loss of an access per squared weight), `columns` int64 (what an access counts as); and
    `computes`, int64 addresses of an `ExpertLayer`'s plan for each of the `kind_count` kinds.
    """

    kinds: int
    records: int
    losses: int
    columns: int
    computes: int
    kind_count: int


class DecoderCall(NamedTuple):
    """Addresses of a pass's rows [T, D] and of what becomes of them, all contiguous.

    `attended` is the residual after attention, `normed` what the feed-forward reads, `ids` [T, K] int64 and `weights`
    the router's choice, `out` the layer's output where it comes to that. `cos` and `sin` are [T, rotated] with items
    of rows. `spans` and `blocks` are as in `AttentionCall`. `at_E` are the addresses of resident experts (negative:
    none), 0 where the caller computes the experts.
    `modes` int8 [T], `allowances` and `prices` float32 [T] are what rows may spend on stand-ins, `modes` 0 where none
    may answer; `answers` int64 [T, K] and `losses` float32 [T, K] are written where they did.
    `guess` is where the next layer's router writes its choice on `normed`, ids int64 [T, K], 0 where it is not asked:
    if one of them is not at `next_at_E`, experts are left to the caller, who may begin to read.
    """

    hidden: int
    attended: int
    normed: int
    ids: int
    weights: int
    out: int
    cos: int
    sin: int
    rotated: int
    T: int
    spans: int
    blocks: int
    S: int
    at_E: int
    modes: int
    allowances: int
    prices: int
    answers: int
    losses: int
    guess: int
    next_at_E: int
