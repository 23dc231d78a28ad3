"""One MoE layer, from the router's choice to the summed output. The page to read first.

    route    the router named K experts per token (transformers computed ids and weights)
    group    rows of the same expert together
    ensure   the cache streams leases: resident experts first, missing ones as their bytes arrive
    matmul   each leased expert runs over its rows
    combine  per-slot outputs are weighted and summed in slot order

Does not know files, tiers or requests. Invariant: outputs are kept per (token, slot) until all are there, so neither
the order of arrival nor the number of waves changes a bit.

Legend: T tokens, K experts per token, N = T*K uses, D hidden.
"""

from __future__ import annotations

from contextlib import closing

import torch
from torch import Tensor

from buddymoe_ray.cache import ExpertCache
from buddymoe_ray.kernels import ExpertMath, UpcastScratch, combine, expert_forward
from buddymoe_ray.moe.step import Phase, StepState

__all__ = ["MoEBlock"]


class MoEBlock:
    """Replaces the experts module of MoE layer `layer`. Called as `block(hidden_TD, ids_TK, weights_TK) -> [T, D]`."""

    def __init__(
        self, *, layer: int, cache: ExpertCache, math: ExpertMath, scratch: UpcastScratch, step: StepState
    ) -> None:
        self.layer = layer
        self._cache, self._math, self._scratch, self._step = cache, math, scratch, step

    def __call__(self, hidden_TD: Tensor, ids_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """Raises CacheError when an expert's bytes cannot be read; the cache stays usable."""
        if self._step.phase is Phase.PROBE:
            return torch.zeros_like(hidden_TD)
        T, K = ids_TK.shape
        rows_of = self._group(ids_TK)
        if self._step.phase is Phase.DECODE:
            self._step.count(self._cache.resident_mask(self.layer)[ids_TK.cpu()])
        y_ND = hidden_TD.new_empty(T * K, hidden_TD.shape[1])
        protect = self._step.phase is Phase.PREFILL
        with closing(self._cache.stream(self.layer, list(rows_of), protect_residency=protect)) as waves:
            for leases in waves:
                for lease in leases:
                    rows_R, tokens_R = rows_of[lease.key.expert]
                    weights = self._scratch.widen(lease.tensors())
                    x_RD = hidden_TD.index_select(0, tokens_R)
                    y_ND.index_copy_(0, rows_R, expert_forward(x_RD, weights, self._math))
        return combine(y_ND.view(T, K, -1), weight_TK).to(hidden_TD.dtype)

    def _group(self, ids_TK: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
        """Rows (indices into T*K) and tokens of every expert named, in ascending order of expert."""
        sorted_N, order_N = torch.sort(ids_TK.reshape(-1), stable=True)
        named, counts = torch.unique_consecutive(sorted_N, return_counts=True)
        sizes = counts.tolist()
        rows, tokens = order_N.split(sizes), (order_N // ids_TK.shape[1]).split(sizes)
        return dict(zip(named.tolist(), zip(rows, tokens, strict=True), strict=True))
