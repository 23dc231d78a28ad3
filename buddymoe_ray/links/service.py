"""What a worker does for its peers: the seam between links and whoever has the experts.

Knows no sockets. Invariant of an implementation: an output is exact or absent, and bytes that were lent do not change
until they are given back.

Legend: R rows of one expert, D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

__all__ = ["ExpertService"]


class ExpertService(Protocol):
    """Called from several threads of the server; modes of torch that belong to a thread are the service's to set."""

    def compute(self, layer: int, expert_rows: Mapping[int, Tensor]) -> Mapping[int, Tensor]:
        """Outputs `[R, D]` for rows `[R, D]` in host memory, in their dtype; experts it cannot run now are left out.

        The outputs are the server's from then on: nothing may write to them again.
        """

    def read(self, layer: int, expert: int, segment: int) -> memoryview | None:
        """The bytes of a segment, which stay as they are until `release`; None when they are not here."""

    def release(self, layer: int, expert: int, segment: int) -> None:
        """The bytes of one `read` that gave some are not needed any more; called once for each, whatever happened."""
