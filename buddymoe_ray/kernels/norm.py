"""Root-mean-square norms on a CPU in one call. Knows tensors, not modules.

Legend: R rows, n items of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor

__all__ = ["CpuNorm"]


class CpuNorm:
    """`y = w x / sqrt(mean(x ** 2) + eps)` of rows in float32 or bfloat16, which do not see each other.

    Sums are float32; what is multiplied with `weight_n` is rounded to the rows' dtype first, as Llama has it.
    """

    def __init__(self, weight_n: Tensor, eps: float) -> None:
        self._weight = weight_n.detach().float().contiguous()
        self._at, self._n = self._weight.data_ptr(), len(self._weight)
        self._eps_bits, self._kernel = int(np.float32(eps).view(np.int32)), _kernel()

    @staticmethod
    def covers(x: Tensor) -> bool:
        """Whether rows like these are computed here."""
        return x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16)

    def __call__(self, x: Tensor) -> Tensor:
        """`[..., n]` of what `covers` says yes to."""
        x = x.contiguous()
        assert x.shape[-1] == self._n, f"rows have {x.shape[-1]} items, must have {self._n}"
        out = torch.empty_like(x)
        self._kernel(
            x.data_ptr(), self._at, out.data_ptr(), (x.numel() // self._n, self._n, x.itemsize), self._eps_bits
        )
        return out


@cache
def _kernel() -> Callable[..., None]:
    from buddymoe_ray.kernels.machine_code import code_folder
    from buddymoe_ray.kernels.norm_numba import compile_norm

    return compile_norm(code_folder())
