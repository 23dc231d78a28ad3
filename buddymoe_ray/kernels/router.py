"""Routers that choose the K largest of a softmax, on a CPU. Knows tensors, not modules.

Legend: T rows, D hidden, E experts, K experts per token.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from buddymoe_ray.kernels.cpu import CpuLinear, Kernel
from buddymoe_ray.kernels.router_calls import RouterCall, RouterPlan

__all__ = ["CpuRouter"]


class CpuRouter:
    """Logits, weights and ids of rows that do not see each other, in the dtype of `weight_ED`: float32 or bfloat16.

    With `normalised` the weights of a row sum to 1. They are of `weight_dtype`, float32 or bfloat16, in falling order;
    of equal logits the first expert's is taken. `plan_at` is what the machine code reads, for as long as the router
    lives.
    """

    def __init__(self, weight_ED: Tensor, K: int, *, normalised: bool, weight_dtype: torch.dtype) -> None:
        self.linear, self.E, self.K = CpuLinear(weight_ED, None, weight_ED.dtype, None), len(weight_ED), K
        self.weight_dtype, self._kernel = weight_dtype, router_kernel()
        plan = RouterPlan(self.E, K, int(normalised), weight_dtype.itemsize)
        self._plan = np.array(plan, dtype=np.int64)
        self.plan_at = self._plan.ctypes.data

    def __call__(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`[T, D] -> [T, E], [T, K], [T, K] int64`."""
        logits_TE = self.linear(x_TD)
        ids_TK = torch.empty((len(x_TD), self.K), dtype=torch.int64)
        weight_TK = torch.empty((len(x_TD), self.K), dtype=self.weight_dtype)
        call = (logits_TE.data_ptr(), ids_TK.data_ptr(), weight_TK.data_ptr(), len(x_TD), logits_TE.itemsize)
        self._kernel(call, self.plan_at)
        return logits_TE, weight_TK, ids_TK


@cache
def router_kernel() -> Kernel:
    """The choice; made, or loaded, by the first call."""
    from buddymoe_ray.kernels.numba_calls import kernel
    from buddymoe_ray.kernels.router_numba import compile_router

    return kernel(compile_router, len(RouterCall._fields))
