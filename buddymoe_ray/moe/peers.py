"""The seam to other workers: experts that a peer has may be computed there, on our rows.

Knows neither sockets nor who the peers are; `residency.peering` does. Invariant: an answer is exact or absent.

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
        """`[R, D]` of every expert that was answered in time; waits no longer than the peer is worth."""


class PeerExperts(Protocol):
    """Other workers' experts."""

    def able(self, layer: int, experts: Sequence[int]) -> Sequence[int]:
        """Which of the experts a peer has and would answer sooner than they could be fetched."""

    def ask(self, layer: int, rows_of: Mapping[int, Tensor]) -> PeerAnswers:
        """Send each expert's rows `[R, D]` to a peer that has it; does not wait."""
