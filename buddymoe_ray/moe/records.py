"""Computes with stand-in records, a whole layer and step at a time.

Low-bit records go to the kernel that takes a layer at once; low-rank maps and mean vectors run expert by expert. Does
not know which uses a policy gave to stand-ins.

Legend: T tokens, K experts per token, N = T*K uses, E experts, B bytes of all records, D hidden, R rows of one expert.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from buddymoe_ray.cache import slot_views
from buddymoe_ray.errors import ProfileError
from buddymoe_ray.kernels import ExpertMath, LowbitFormat, LowbitLayer, lowrank_forward, mean_forward
from buddymoe_ray.moe.standins import RecordCompute
from buddymoe_ray.types import ExpertLayout

__all__ = ["record_compute"]

_SIMPLE: Mapping[str, Callable[[Tensor, Mapping[str, Tensor]], Tensor]] = {
    "lowrank": lowrank_forward,
    "mean": mean_forward,
}


def record_compute(
    kind: str, layout: ExpertLayout, maths: Sequence[ExpertMath], threads: int, device: torch.device
) -> RecordCompute:
    """The arithmetic of records of `kind`, `maths[l]` for each layer. Raises ProfileError for an unknown kind."""
    if kind.startswith("lowbit"):
        return _Lowbit(kind, layout, maths, threads, device)
    if kind not in _SIMPLE:
        raise ProfileError(f"record kind is {kind!r}, must be lowbitN, lowrank or mean. hint: profile the model again")
    return _Simple(_SIMPLE[kind], layout)


class _Lowbit:
    """One kernel call per layer and step."""

    def __init__(
        self, kind: str, layout: ExpertLayout, maths: Sequence[ExpertMath], threads: int, device: torch.device
    ) -> None:
        fmt = LowbitFormat(bits=int(kind.removeprefix("lowbit")))
        self._layers = [LowbitLayer(layout=layout.tensors, fmt=fmt, math=math, threads=threads) for math in maths]
        self._layers[0].prepare(device)  # compiling takes seconds: at the start, not in the first request

    def __call__(
        self, layer: int, x_TD: Tensor, records_B: Tensor, at_E: Tensor, expert_TK: Tensor, out_ND: Tensor
    ) -> None:
        self._layers[layer](x_TD, records_B, at_E, expert_TK, out_ND)


class _Simple:
    """Expert by expert."""

    def __init__(self, forward: Callable[[Tensor, Mapping[str, Tensor]], Tensor], layout: ExpertLayout) -> None:
        self._forward, self._layout = forward, layout

    def __call__(
        self, layer: int, x_TD: Tensor, records_B: Tensor, at_E: Tensor, expert_TK: Tensor, out_ND: Tensor
    ) -> None:
        expert_N = expert_TK.reshape(-1)
        for expert in torch.unique(expert_N[expert_N >= 0]).tolist():
            start = int(at_E[expert])
            if start >= 0:
                record = slot_views(records_B[start : start + self._layout.slot_bytes], self._layout)
                rows_R = (expert_N == expert).nonzero()[:, 0]
                x_RD = x_TD.index_select(0, rows_R // expert_TK.shape[1])
                out_ND.index_copy_(0, rows_R, self._forward(x_RD, record))
