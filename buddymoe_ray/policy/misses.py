"""The words of a miss: what a layer knows when experts are missing, and what is decided for each access.

An access is one (token, slot) pair: the router named an expert for it and gave it a weight. Numpy arrays on the host: a
decode step has few accesses, and the experts are leased there anyway. Torch's calls cost 3 to 5 times as much: deciding
about one token of builtin:tiny took .46 ms a layer with them.
Knows no bytes and no model. Neighbours: `moe.standins` asks a `MissPolicy` and the block does what it says.

Legend: T tokens (rows), K slots of a token, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

import numpy as np
import numpy.typing as npt

__all__ = ["Action", "Bools", "Floats", "Ints", "MissPolicy", "Misses", "Reason", "Resolution", "RowBudgets", "Tiny"]

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Tiny = npt.NDArray[np.int8]
Bools = npt.NDArray[np.bool_]


class Action(IntEnum):
    """Who answers an access: the resident expert, the expert once fetched, its own stand-in record, another resident
    expert, or nobody."""

    HIT = 0
    FETCH = 1
    OWN = 2
    BUDDY = 3
    DROP = 4


class Reason(IntEnum):
    """Why an access is answered as it is."""

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

    `mode_T`: EXACT, BOUNDED or FAST of `types`. `allowance_T`: nats left for this step; inf when fast, 0 when exact.
    `price_T`: largest expected loss (nats) of one access that is worth taking.
    """

    mode_T: Tiny
    allowance_T: Floats
    price_T: Floats


@dataclass(frozen=True, kw_only=True)
class Misses:
    """One layer's uses: `ids_TK` and `weight_TK` as the router gave them, `resident_E`, `score_TE` router scores where
    a policy asked for them."""

    layer: int
    ids_TK: Ints
    weight_TK: Floats
    resident_E: Bools
    score_TE: Floats | None
    rows: RowBudgets


@dataclass(frozen=True, kw_only=True)
class Resolution:
    """What is decided for each access, all `[T, K]`.

    `action_TK` (`Action`), `expert_TK` (whose weights or record run: the router's own choice unless a buddy answers),
    `weight_TK` (the weight its output is combined with; the very array of the misses where none changes), `loss_TK`
    (nats; 0 unless stood in for), `reason_TK` (`Reason`).
    """

    action_TK: Tiny
    expert_TK: Ints
    weight_TK: Floats
    loss_TK: Floats
    reason_TK: Tiny


class MissPolicy(Protocol):
    """Decides each access of a layer in one decode step. Pure."""

    def resolve(self, misses: Misses) -> Resolution:
        """One decision per access."""
