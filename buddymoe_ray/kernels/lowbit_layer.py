"""All low-bit experts of one layer and step in one call.

At decode a step has a few rows for each of many experts: one call per expert would spend more on calling than on
arithmetic. Does not know which accesses a policy gave to stand-ins, nor the router's weights. Invariant: an output is
bit for bit that of `lowbit_forward` on its row alone.

Legend: T tokens, K experts per token, N = T*K accesses, E experts, B bytes, D hidden, F ffn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch
from torch import Tensor

from buddymoe_ray.kernels.lowbit_cpu import PARTS, experts_kernel, scale_steps
from buddymoe_ray.kernels.lowbit_format import LowbitFormat, Matrix, Places
from buddymoe_ray.types import SlotTensor

__all__ = ["LowbitLayer"]

THREADED_WEIGHTS = 1 << 20
"""Fewer weights than this (about .2 ms) are not worth waking a thread for."""


class LowbitLayer:
    """Computes plain experts (`is_plain`) on a CPU from records laid out by `record_tensors`; serves every layer.

    `threads` share the records of a call; the bits do not depend on it. Machine code is made here (seconds at the first
    time on a machine, then .5 s), not in the first step.
    """

    def __init__(self, *, layout: Sequence[SlotTensor], fmt: LowbitFormat, threads: int = 1) -> None:
        assert threads >= 1, f"threads is {threads}, must be at least 1"
        named = {tensor.name: tensor for tensor in layout}
        self._first, self._down = (_matrix(named, name, fmt) for name in ("gate_up_proj", "down_proj"))
        self._threads, self._weights = threads, 3 * self._first.K * self._down.K
        self._nbytes = max(tensor.offset + tensor.nbytes for tensor in layout)
        self._kernel, self._table = experts_kernel(), scale_steps()

    def __call__(self, x_TD: Tensor, records_B: Tensor, at_E: Tensor, expert_TK: Tensor, out_ND: Tensor) -> None:
        """Write `out_ND[n] = expert expert_TK.flat[n] over x_TD[n // K]` where the expert has a record.

        `records_B` uint8 holds records at any multiples of 4 bytes; that of expert e begins at byte `at_E[e]` (int64,
        negative: no record of this layout). `expert_TK` int64 is negative for accesses that others answer. Rows of
        `out_ND` (dtype of `x_TD`) that have no record are left alone.
        """
        (T, K), D = expert_TK.shape, x_TD.shape[1]
        assert out_ND.shape == (T * K, D), f"out is {tuple(out_ND.shape)}, must be {(T * K, D)}"
        if T == 0:
            return
        expert_N, begin_E = expert_TK.reshape(-1).numpy(), at_E.contiguous().numpy()
        most, last = expert_N.max(), begin_E.max()
        assert most < len(begin_E), f"expert is {most}, must be below {len(begin_E)}"
        assert last < 0 or last + self._nbytes <= records_B.shape[0], (
            f"the last record ends at byte {last + self._nbytes}, must be at most {records_B.shape[0]}"
        )
        wide = x_TD.dtype == torch.float32
        x, out = x_TD.float().contiguous(), out_ND if wide else out_ND.float()  # rows not ours go back as they came
        assert out.is_contiguous() and records_B.is_contiguous(), "outputs and records must be contiguous"
        addresses = (x.data_ptr(), records_B.data_ptr(), out.data_ptr())

        def run(share: int, shares: int) -> None:
            self._kernel(Places(*addresses, share, shares), expert_N, begin_E, K, self._first, self._down, self._table)

        threads = 1 if self._weights * len(expert_N) < THREADED_WEIGHTS else self._threads
        helping = [_helpers(threads - 1).submit(run, share, threads) for share in range(1, threads)]
        run(0, threads)
        for helper in helping:
            helper.result()
        if not wide:
            out_ND.copy_(out)


def _matrix(named: Mapping[str, SlotTensor], name: str, fmt: LowbitFormat) -> Matrix:
    """Where a matrix is within a record."""
    N, row_bytes = named[f"{name}.codes"].shape
    K = row_bytes * 8 // fmt.bits
    codes, scales, base = (named[f"{name}.{part}"].offset for part in PARTS)
    return Matrix(codes, scales, base, N=N, K=K, bits=fmt.bits, group=fmt.group_of(K))


@cache
def _helpers(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="lowbit")
