"""The seam to whoever else computes missing experts on our rows: other workers that have them, or a GPU's host.

Knows neither sockets nor threads; `residency.peering` and `residency.host_compute` do. Invariant: an answer is the
expert's own or absent; whether it has the very bits that it would have here, `exact` says.

Legend: R rows of one expert, D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

__all__ = ["PeerAnswers", "PeerExperts"]


class PeerAnswers(Protocol):
    """Questions that are under way."""

    def collect(self) -> Mapping[int, Tensor]:
        """`[R, D]` of every expert that was answered in time; waits no longer than that is worth. Called once, whatever
        has happened meanwhile."""


class PeerExperts(Protocol):
    """Others that compute experts; where they are not `exact` they are asked for no row that has to be."""

    @property
    def exact(self) -> bool: ...
    def able(self, layer: int, accesses_of: Mapping[int, int]) -> Sequence[int]:
        """Which of the experts, each with the number of its accesses, would be answered sooner than fetched."""

    def ask(self, layer: int, rows_of: Mapping[int, Tensor]) -> PeerAnswers:
        """Have each expert's rows `[R, D]` computed; does not wait."""
