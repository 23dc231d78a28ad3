"""The words of a miss: what a layer knows when experts are missing, and what is decided for each use.

A use is one (token, slot) pair: the router named an expert for it and gave it a weight. Tensors may be on any device.
Knows no bytes and no model. Neighbours: `moe.standins` asks a `MissPolicy` and the block does what it says.

Legend: T tokens (rows), K slots of a token, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

from torch import Tensor

__all__ = ["Action", "MissPolicy", "Misses", "Reason", "Resolution", "RowBudgets"]


class Action(IntEnum):
    """Who answers a use: the resident expert, the expert once fetched, its own stand-in record, another resident
    expert, or nobody."""

    HIT = 0
    FETCH = 1
    OWN = 2
    BUDDY = 3
    DROP = 4


class Reason(IntEnum):
    """Why a use is answered as it is."""

    RESIDENT = 0
    WANTED_EXACT = 1
    NO_STANDIN = 2
    OVER_PRICE = 3
    OVER_ALLOWANCE = 4
    GATED_TAE = 5
    GATED_MARGIN = 6
    GATED_DELTA = 7
    OVER_RHO = 8
    NO_BUDDY = 9
    SUBSTITUTED = 10
    SHARED_FETCH = 11


@dataclass(frozen=True, kw_only=True)
class RowBudgets:
    """What each row may spend.

    `mode_T` int8: 0 exact, 1 bounded, 2 fast. `allowance_T` float32: nats left for this step; inf when fast, 0 when
    exact. `price_T` float32: largest harm (nats) of one use that is worth taking.
    """

    mode_T: Tensor
    allowance_T: Tensor
    price_T: Tensor


@dataclass(frozen=True, kw_only=True)
class Misses:
    """One layer's uses: `ids_TK` int64 and `weight_TK` as the router gave them, `resident_E` bool, `score_TE` float32
    router scores where a policy asked for them."""

    layer: int
    ids_TK: Tensor
    weight_TK: Tensor
    resident_E: Tensor
    score_TE: Tensor | None
    rows: RowBudgets


@dataclass(frozen=True, kw_only=True)
class Resolution:
    """What is decided for each use, all `[T, K]`.

    `action_TK` int8 (`Action`), `expert_TK` int64 (whose weights or record run: the router's own choice unless a buddy
    answers), `weight_TK` (the weight its output is combined with), `harm_TK` float32 (nats; 0 unless stood in for),
    `reason_TK` int8 (`Reason`).
    """

    action_TK: Tensor
    expert_TK: Tensor
    weight_TK: Tensor
    harm_TK: Tensor
    reason_TK: Tensor


class MissPolicy(Protocol):
    """Decides each use of a layer in one decode step. Pure."""

    def resolve(self, misses: Misses) -> Resolution:
        """One decision per use."""
