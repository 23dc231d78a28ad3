"""All low-bit experts of one layer and step in one call.

At decode a step has a few rows for each of many experts: one call per expert would spend more on calling than on
arithmetic. Does not know which uses a policy gave to stand-ins, nor the router's weights. Invariant: a use's output is
bit for bit that of `lowbit_forward` on its row alone.

Legend: T tokens, K experts per token, N = T*K uses, E experts, B bytes, D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from buddymoe_ray.kernels.lowbit import lowbit_forward
from buddymoe_ray.kernels.lowbit_cpu import PlainRecord, available, is_plain, layer, prepare
from buddymoe_ray.kernels.lowbit_format import LowbitFormat
from buddymoe_ray.kernels.reference import ExpertMath
from buddymoe_ray.types import SlotTensor

__all__ = ["LowbitLayer"]


class LowbitLayer:
    """Computes uses from records laid out by `record_tensors`; serves every layer of the same arithmetic.

    `threads` share the records of a call on a CPU; the bits do not depend on it.
    """

    def __init__(self, *, layout: Sequence[SlotTensor], fmt: LowbitFormat, math: ExpertMath, threads: int = 1) -> None:
        assert threads >= 1, f"threads is {threads}, must be at least 1"
        self._layout, self._fmt, self._math, self._threads = tuple(layout), fmt, math, threads
        named = {tensor.name: tensor for tensor in layout}
        self._nbytes = max(tensor.offset + tensor.nbytes for tensor in layout)
        self._ffn = named["down_proj.codes"].shape[1] * 8 // fmt.bits
        self._plain: PlainRecord | None = None

    def __call__(self, x_TD: Tensor, records_B: Tensor, at_E: Tensor, expert_TK: Tensor, out_ND: Tensor) -> None:
        """Write `out_ND[n] = expert expert_TK.flat[n] over x_TD[n // K]` for uses whose expert has a record.

        `records_B` uint8 holds records at any multiples of 4 bytes; that of expert e begins at byte `at_E[e]` (int64,
        negative: no record of this layout). `expert_TK` int64 is negative for uses that others answer. Rows of
        `out_ND` (dtype of `x_TD`) that have no record are left alone.
        """
        expert_N, K = expert_TK.reshape(-1), expert_TK.shape[1]
        assert out_ND.shape == (len(expert_N), x_TD.shape[1]), (
            f"out is {tuple(out_ND.shape)}, must be {(len(expert_N), x_TD.shape[1])}"
        )
        if len(expert_N) == 0:
            return
        most, last = int(expert_N.cpu().numpy().max()), int(at_E.cpu().numpy().max())
        assert most < len(at_E), f"expert is {most}, must be below {len(at_E)}"
        assert last < 0 or last + self._nbytes <= len(records_B), (
            f"the last record ends at byte {last + self._nbytes}, must be at most {len(records_B)}"
        )
        if x_TD.device.type == "cpu" and available() and is_plain(self._math, self._ffn):
            self._fused(x_TD, records_B, at_E, expert_N, out_ND)
            return
        for expert in torch.unique(expert_N[expert_N >= 0]).tolist():
            at = int(at_E[expert])
            if at >= 0:
                rows_R = (expert_N == expert).nonzero().squeeze(1)
                x_RD = x_TD.index_select(0, rows_R // K)
                out_ND[rows_R] = lowbit_forward(x_RD, self.views(records_B[at:]), self._fmt, self._math)

    def prepare(self, device: torch.device) -> None:
        """Make the machine code now (seconds at the first time on a machine, then .5 s), not in the first step."""
        if device.type == "cpu" and available():
            prepare(is_plain(self._math, self._ffn))

    def views(self, record_B: Tensor) -> Mapping[str, Tensor]:
        """The tensors of one record, by name, without a copy."""
        return {
            t.name: record_B[t.offset : t.offset + t.nbytes].view(getattr(torch, t.dtype)).view(t.shape)
            for t in self._layout
        }

    def _fused(self, x_TD: Tensor, records_B: Tensor, at_E: Tensor, expert_N: Tensor, out_ND: Tensor) -> None:
        self._plain = self._plain or PlainRecord.of(self._layout, self._fmt)
        rest = (self._plain, self._threads)
        if x_TD.dtype == torch.float32:
            layer(x_TD, records_B, at_E, expert_N, out_ND, *rest)
            return
        wide_ND = out_ND.float()  # a copy: rows that are not ours go back as they came
        layer(x_TD.float(), records_B, at_E, expert_N, wide_ND, *rest)
        out_ND.copy_(wide_ND)
