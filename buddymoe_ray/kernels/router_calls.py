"""What goes into a call of the router's machine code. Knows neither torch nor numba: both sides import it.

Legend: T rows, E experts, K experts per token.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["RouterCall", "RouterPlan"]


class RouterCall(NamedTuple):
    """Addresses of logits [T, E] with items of `item_bytes`, and of ids [T, K] int64 and weights [T, K] to write."""

    logits: int
    ids: int
    weights: int
    T: int
    item_bytes: int


class RouterPlan(NamedTuple):
    """`normalised` says whether the weights of a row are made to sum to 1; they are written with `weight_bytes`."""

    E: int
    K: int
    normalised: int
    weight_bytes: int
