"""Which rows each expert runs over: the accesses of a layer, and their grouping by expert where somebody needs it.

Legend: T tokens, K experts per token, N = T*K accesses, R rows of one expert.
"""

from __future__ import annotations

from functools import cached_property
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from buddymoe_ray.device import upload

__all__ = ["Accesses", "Rows"]

Rows = dict[int, tuple[Tensor, Tensor]]
"""Of every expert named its rows `[R]` (indices into N) and their tokens `[R]`, both int64, experts rising."""


class Accesses:
    """The accesses of a layer that experts themselves answer: `expert_TK` names them, negative where others do."""

    def __init__(self, expert_TK: npt.NDArray[np.int64], device: torch.device) -> None:
        self.expert_TK, self._device = expert_TK, device

    @cached_property
    def experts(self) -> list[int]:
        """Those named, rising."""
        named = np.unique(self.expert_TK)
        experts: list[int] = named[named >= 0].tolist()
        return experts

    @cached_property
    def named_TK(self) -> Tensor:
        """`expert_TK` on the device."""
        return upload(torch.from_numpy(self.expert_TK), self._device)

    @cached_property
    def rows(self) -> Rows:
        """The rows of every expert named, on the device."""
        expert_N = self.expert_TK.reshape(-1)
        order_N = expert_N.argsort(kind="stable")
        order_N = order_N[np.count_nonzero(expert_N < 0) :]
        named_N = expert_N[order_N]
        bounds = [0, *(np.flatnonzero(named_N[1:] != named_N[:-1]) + 1).tolist(), len(order_N)] if len(order_N) else [0]
        sizes = [b - a for a, b in pairwise(bounds)]
        rows_N = upload(torch.from_numpy(order_N), self._device)
        tokens_N = rows_N // self.expert_TK.shape[1]
        named = named_N[bounds[:-1]].tolist()
        return dict(zip(named, zip(rows_N.split(sizes), tokens_N.split(sizes), strict=True), strict=True))
