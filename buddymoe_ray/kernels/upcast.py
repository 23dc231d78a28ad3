"""Widen one expert's stored weights to the compute dtype, into memory allocated once.

Used when slots hold bfloat16 and the engine computes in float32 (exact: every bfloat16 is a float32). Knows neither
cache nor model. Its bytes count against the budget (`nbytes_for`).

Tried and dropped: keeping slots in float32 (half as many experts in the same bytes).
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor

__all__ = ["UpcastScratch"]


class UpcastScratch:
    """Scratch for one expert. `shapes` maps parameter names to shapes; `stored` and `compute` are dtypes."""

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], *, stored: torch.dtype, compute: torch.dtype, device: torch.device
    ) -> None:
        self.needed = stored != compute
        self._wide: dict[str, Tensor] = {}
        if self.needed:
            self._wide = {name: torch.empty(shape, dtype=compute, device=device) for name, shape in shapes.items()}

    @staticmethod
    def nbytes_for(shapes: Mapping[str, tuple[int, ...]], *, stored: torch.dtype, compute: torch.dtype) -> int:
        """Bytes the scratch takes: 0 when no widening is needed."""
        return 0 if stored == compute else sum(prod(shape) for shape in shapes.values()) * compute.itemsize

    def widen(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The same weights in the compute dtype; valid until the next call."""
        if not self.needed:
            return weights
        for name, wide in self._wide.items():
            wide.copy_(weights[name])
        return self._wide
