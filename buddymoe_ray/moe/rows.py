"""Which rows each expert runs over: the accesses of a layer, grouped by expert.

Legend: T tokens, K experts per token, N = T*K accesses, R rows of one expert.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["Rows", "group"]

Rows = dict[int, tuple[Tensor, Tensor]]
"""Of every expert named its rows `[R]` (indices into N) and their tokens `[R]`, both int64, experts rising."""


def group(expert_TK: npt.NDArray[np.int64], device: torch.device, only_TK: npt.NDArray[np.bool_] | None = None) -> Rows:
    """The rows of every expert named (where `only_TK`), on `device`."""
    expert_N = expert_TK.reshape(-1)
    chosen_N = np.arange(len(expert_N)) if only_TK is None else np.flatnonzero(only_TK)
    order_N = chosen_N[expert_N[chosen_N].argsort(kind="stable")]
    named_N = expert_N[order_N]
    bounds = [0, *(np.flatnonzero(named_N[1:] != named_N[:-1]) + 1).tolist(), len(order_N)] if len(order_N) else [0]
    sizes = [b - a for a, b in pairwise(bounds)]
    rows_N = torch.from_numpy(order_N).to(device)
    tokens_N = rows_N // expert_TK.shape[1]
    named = named_N[bounds[:-1]].tolist()
    return dict(zip(named, zip(rows_N.split(sizes), tokens_N.split(sizes), strict=True), strict=True))
