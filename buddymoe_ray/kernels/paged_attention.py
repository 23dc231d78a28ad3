"""Attention of one layer over the paged KV cache on a CPU, in machine code. Knows tensors, not sequences.

Legend: T rows, Q query heads, H key-value heads, d key size, dv value size, N tokens of the pool, S sequences.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from buddymoe_ray.kernels.attention_calls import AttentionCall, AttentionPlan
from buddymoe_ray.kernels.cpu import Kernel, in_threads
from buddymoe_ray.kernels.stored import stored_functions, widens

__all__ = ["PagedLayer"]

THREADED_ITEMS = 1 << 20
"""Keys read times query heads, in items: fewer (about .2 ms) are not worth waking a thread for."""


class PagedLayer:
    """One layer's attention over its pools.

    Args:
        pools: keys `[N, H, d]` and values `[N, H, dv]` in bfloat16 or float32, and how many tokens are a block.
        queries: Q, a multiple of H.
        scale: of the scores. window: tokens that a row sees, itself included; None for all.
        sinks_Q: logits that take part in each head's softmax without a value.
        threads: share the key-value heads; the bits do not depend on it.

    `heads` are Q, H, d and dv, `plan_at` is what the machine code reads.
    """

    def __init__(
        self,
        pools: tuple[Tensor, Tensor, int],
        *,
        queries: int,
        scale: float,
        window: int | None,
        sinks_Q: Tensor | None,
        threads: int,
    ) -> None:
        keys_NHd, values_NHd, block_size = pools
        _, H, d = keys_NHd.shape
        sinks = None if sinks_Q is None else sinks_Q.detach().float().contiguous()
        self._held, self._dtype, self._threads = (pools, sinks), keys_NHd.dtype, min(threads, H)
        self._queries, self._value_dim, self._items = queries, values_NHd.shape[2], H * d
        self.heads = (queries, H, d, self._value_dim)
        native = stored_functions(keys_NHd.dtype)
        plan = AttentionPlan(
            keys=keys_NHd.data_ptr(),
            values=values_NHd.data_ptr(),
            block_size=block_size,
            item_bytes=keys_NHd.dtype.itemsize,
            Q=queries,
            H=H,
            d=d,
            dv=self._value_dim,
            window=window or 0,
            sinks=0 if sinks is None else sinks.data_ptr(),
            scale_bits=int(np.float32(scale).view(np.int32)),
            project_strided=native["project_strided"],
            blend=native["blend"],
            spread=native.get("spread", 0),
        )
        self._plan = np.array(plan, dtype=np.int64)
        self.plan_at, self._kernel = self._plan.ctypes.data, attention_kernel()

    @staticmethod
    def covers(dtype: torch.dtype, device: torch.device) -> bool:
        """Whether this machine has a kernel for pools of `dtype` on `device`."""
        return dtype in (torch.bfloat16, torch.float32) and device.type == "cpu" and widens(dtype)

    @staticmethod
    def prepare(dtype: torch.dtype) -> None:
        """Make the machine code, or read it from the user's folder (seconds at the first time on a machine)."""
        stored_functions(dtype)
        attention_kernel()

    def __call__(self, rows: tuple[Tensor, Tensor, Tensor], spans_S4: Tensor, blocks: Tensor, longest: int) -> Tensor:
        """`[Q, T, d], [H, T, d], [H, T, dv] -> [T, Q, dv]`: stores the rows' keys and values and attends.

        `spans_S4` int64 says of each sequence its first row, how many, the position of the first, and where in `blocks`
        (int64) the numbers of its blocks begin; `longest` is the largest context after the pass.
        """
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in rows)
        assert q.dtype == k.dtype == v.dtype == self._dtype, f"rows are {q.dtype}, must be {self._dtype}"
        T = q.shape[1]
        out = q.new_empty(T, self._queries, self._value_dim)
        call = (
            *(q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr()),
            *(q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1)),
            *(spans_S4.data_ptr(), blocks.data_ptr(), len(spans_S4)),
        )
        threads = self._threads if T * longest * self._items >= THREADED_ITEMS else 1
        if threads == 1:
            self._kernel((*call, 0, 1), self.plan_at)
        else:
            in_threads(self._kernel, [((*call, share, threads), self.plan_at) for share in range(threads)])
        return out


@cache
def attention_kernel() -> Kernel:
    """All rows of a pass."""
    from buddymoe_ray.kernels.attention_numba import compile_attention
    from buddymoe_ray.kernels.numba_calls import kernel

    return kernel(compile_attention, len(AttentionCall._fields))
