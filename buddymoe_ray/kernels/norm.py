"""Root-mean-square norms on a CPU in one call. Knows tensors, not modules.

Legend: R rows, n items of a row.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from buddymoe_ray.kernels.cpu import Kernel

__all__ = ["CpuNorm"]


class CpuNorm:
    """`y = w x / sqrt(mean(x ** 2) + eps)` of rows in float32 or bfloat16, which do not see each other.

    Sums are float32; what is multiplied with `weight_n` is rounded to the rows' dtype first, as Llama has it. `plan_at`
    is what the machine code reads, for as long as the norm lives.
    """

    def __init__(self, weight_n: Tensor, eps: float) -> None:
        self._weight = weight_n.detach().float().contiguous()
        self.n, self._kernel = len(self._weight), norm_kernel()
        self._plan = np.array((self._weight.data_ptr(), self.n, int(np.float32(eps).view(np.int32))), np.int64)
        self.plan_at = self._plan.ctypes.data

    @staticmethod
    def covers(x: Tensor) -> bool:
        """Whether rows like these are computed here."""
        return x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16)

    def __call__(self, x: Tensor) -> Tensor:
        """`[..., n]` of what `covers` says yes to."""
        x = x.contiguous()
        assert x.shape[-1] == self.n, f"rows have {x.shape[-1]} items, must have {self.n}"
        out = torch.empty_like(x)
        self._kernel((x.data_ptr(), out.data_ptr(), x.numel() // self.n, x.itemsize), self.plan_at)
        return out


@cache
def norm_kernel() -> Kernel:
    """Addresses of rows and of what becomes of them, how many, the bytes of an item; a plan has the address of the
    weights (float32), how many, and the bits of the float32 epsilon."""
    from buddymoe_ray.kernels.norm_numba import compile_norm
    from buddymoe_ray.kernels.numba_calls import kernel

    return kernel(compile_norm, 4)
