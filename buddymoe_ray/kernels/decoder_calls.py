"""What goes into a call of decoder layers' machine code. Knows neither torch nor numba: both sides import it.

Legend: T rows of a pass, D hidden, Q query heads, H key-value heads, d key size, dv value size, E experts, K experts
per token.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["DecoderCall", "DecoderPlan", "StandinPlan"]


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
    unchanged: int
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
    """Addresses of a pass's rows [T, D] and of what becomes of them in `layers` layers, all contiguous.

    `attended` [layers, T, D] is the residual after attention, `normed` what the feed-forward reads, `ids` int64
    [layers, T, K] and `weights` the router's choice, `out` [layers, T, D] the layer's output where it comes to that.
    `cos` and `sin` are [T, rotated] with items of rows. `spans` and `blocks` are as in `AttentionCall`. `places` int64
    [layers] say where each layer's addresses of resident experts are (negative: none), 0 where the caller computes.
    `next_places` are those of the layer behind it, 0 where its experts are not to be guessed, and `guess` is where its
    router writes its choice on `normed`, ids int64 [layers, T, K]: if one of them is not there, experts are left to the
    caller, who may begin to read. `words` int64 [layers] are addresses of what slot_words.py looks at once a layer's
    experts are computed (0: nothing): the layer is not done where a slot was written meanwhile.
    What is counted are running totals, those from before the first layer to those after the last: `accesses` int64
    [layers + 1, T, columns], of what answered an access: the expert in column 0, else a record in its own; `losses`
    float32 [layers + 1, T] of expected loss, `allowances` of what is left to spend on it. `modes` int8 [T] and `prices`
    float32 [T] are the other terms of that, `modes` 0 where no record may answer.
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
    layers: int = 1
    places: int = 0
    next_places: int = 0
    guess: int = 0
    words: int = 0
    accesses: int = 0
    columns: int = 0
    modes: int = 0
    prices: int = 0
    losses: int = 0
    allowances: int = 0
