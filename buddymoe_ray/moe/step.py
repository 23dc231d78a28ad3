"""What the MoE blocks of one forward pass share: the phase, and the count of hits and misses per row.

Written by the runner before a pass, read after it. Knows neither requests nor the model.

Legend: T rows of the pass.
"""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor

__all__ = ["Phase", "StepState"]


class Phase(Enum):
    """What a pass computes. PROBE learns the KV shapes: experts answer zero and nothing is loaded."""

    PROBE = "probe"
    PREFILL = "prefill"
    DECODE = "decode"


class StepState:
    """Mutable state of the pass in progress; one per engine, shared by all its MoE blocks."""

    def __init__(self) -> None:
        self.phase = Phase.PROBE
        self.hits_T: Tensor = torch.zeros(0, dtype=torch.int64)
        self.uses_per_row = 0

    def begin(self, phase: Phase, rows: int) -> None:
        """Start a pass of `rows` rows."""
        self.phase = phase
        self.hits_T = torch.zeros(rows, dtype=torch.int64)
        self.uses_per_row = 0

    def count(self, hit_TK: Tensor) -> None:
        """Add one layer's hits; `hit_TK` is True where the expert was resident when the layer began."""
        self.hits_T += hit_TK.sum(dim=1)
        self.uses_per_row += hit_TK.shape[1]
