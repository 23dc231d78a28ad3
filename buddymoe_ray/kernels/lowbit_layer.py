"""All low-bit experts of one layer and step in one call.

At decode a step has a few rows for each of many experts: one call per expert would spend more on calling than on
arithmetic. Does not know which accesses a policy gave to stand-ins, nor the router's weights. Invariant: an output is
bit for bit that of `lowbit_forward` on its row alone.

Legend: T tokens, K experts per token, N = T*K accesses, E experts, B bytes, D hidden, F ffn.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from buddymoe_ray.kernels.lowbit_cpu import PARTS, THREADED_WEIGHTS, experts_kernel, helpers, scale_steps
from buddymoe_ray.kernels.lowbit_format import LowbitFormat
from buddymoe_ray.types import SlotTensor

__all__ = ["LowbitLayer"]


class LowbitLayer:
    """Computes plain experts (`is_plain`) on a CPU from records laid out by `record_tensors`; serves every layer.

    `threads` share the records of a call; the bits do not depend on it. Machine code is made here (seconds at the first
    time on a machine, then .5 s), not in the first step.
    """

    def __init__(self, *, layout: Sequence[SlotTensor], fmt: LowbitFormat, threads: int = 1) -> None:
        assert threads >= 1, f"threads is {threads}, must be at least 1"
        named = {tensor.name: tensor for tensor in layout}
        D, F = (named[f"{name}.codes"].shape[1] * 8 // fmt.bits for name in ("gate_up_proj", "down_proj"))
        self._threads, self._weights = threads, 3 * D * F
        self._nbytes = max(tensor.offset + tensor.nbytes for tensor in layout)
        self._offsets = tuple(
            named[f"{name}.{part}"].offset for name in ("gate_up_proj", "down_proj") for part in PARTS
        )
        self._sizes, self._groups = (fmt.bits, D, F), (fmt.group_of(D), fmt.group_of(F))
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
        expert_N, places = expert_TK.reshape(-1).numpy(), at_E.contiguous().numpy()
        most, last = expert_N.max(), places.max()
        assert most < len(places), f"expert is {most}, must be below {len(places)}"
        assert last < 0 or last + self._nbytes <= records_B.shape[0], (
            f"the last record ends at byte {last + self._nbytes}, must be at most {records_B.shape[0]}"
        )
        wide = x_TD.dtype == torch.float32
        x, out = x_TD.float().contiguous(), out_ND if wide else out_ND.float()  # rows not ours go back as they came
        assert out.is_contiguous() and records_B.is_contiguous(), "outputs and records must be contiguous"
        where = (x.data_ptr(), expert_N, places, (*self._sizes, K, *self._groups), records_B.data_ptr())

        def run(share: int, shares: int) -> None:
            self._kernel(*where, (*self._offsets, share, shares), out.data_ptr(), self._table)

        threads = 1 if self._weights * len(expert_N) < THREADED_WEIGHTS else self._threads
        helping = [helpers(threads - 1).submit(run, share, threads) for share in range(1, threads)]
        run(0, threads)
        for helper in helping:
            helper.result()
        if not wide:
            out_ND.copy_(out)
