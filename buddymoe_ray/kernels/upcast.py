"""Widen one expert's stored weights to the compute dtype, into memory allocated once.

Used when slots hold bfloat16 and the engine computes in float32 (exact: every bfloat16 is a float32). A matrix is
widened when it is asked for, and all matrices share one buffer, so the scratch is as large as the largest of them.
Knows neither cache nor model. Its bytes count against the budget (`nbytes_for`).

Tried and dropped: keeping slots in float32 (half as many experts in the same bytes); room for all of an expert's
matrices at once (half as much again, for nothing).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod

import torch
from torch import Tensor

__all__ = ["UpcastScratch"]


class UpcastScratch(Mapping[str, Tensor]):
    """Scratch for one expert, read by name. `shapes` maps names to shapes; `stored` and `compute` are dtypes."""

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], *, stored: torch.dtype, compute: torch.dtype, device: torch.device
    ) -> None:
        self.needed = stored != compute
        self._wide: dict[str, Tensor] = {}
        self._stored: Mapping[str, Tensor] = {}
        if self.needed:
            shared = torch.empty(_largest_matrix(shapes), dtype=compute, device=device)
            for name, shape in shapes.items():
                own = len(shape) < 2
                self._wide[name] = (
                    torch.empty(shape, dtype=compute, device=device) if own else shared[: prod(shape)].view(shape)
                )

    @staticmethod
    def nbytes_for(shapes: Mapping[str, tuple[int, ...]], *, stored: torch.dtype, compute: torch.dtype) -> int:
        """Bytes the scratch takes: 0 when no widening is needed."""
        if stored == compute:
            return 0
        vectors = sum(prod(shape) for shape in shapes.values() if len(shape) < 2)
        return (_largest_matrix(shapes) + vectors) * compute.itemsize

    def widen(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The same weights in the compute dtype; each matrix is valid until another one is asked for."""
        if not self.needed:
            return weights
        self._stored = weights
        return self

    def __getitem__(self, name: str) -> Tensor:
        return self._wide[name].copy_(self._stored[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def _largest_matrix(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return max((prod(shape) for shape in shapes.values() if len(shape) > 1), default=0)
