"""Computes with stand-in records, a whole layer and step at a time.

Low-bit records on a CPU, and all on a device apart, go to the kernels that take a layer at once, where these know the
experts' arithmetic; all others run expert by expert.
Does not know which accesses a policy gave to stand-ins.

Legend: T tokens, K experts per token, N = T*K accesses, E experts, B bytes of all records, D hidden, R rows of one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from buddymoe_ray.cache import slot_views
from buddymoe_ray.device import Device
from buddymoe_ray.errors import ProfileError
from buddymoe_ray.kernels import (
    ExpertLayer,
    ExpertMath,
    LowbitFormat,
    TritonExperts,
    lowbit_forward,
    lowrank_forward,
    matrix_at,
    mean_forward,
    prepare_lowbit,
)
from buddymoe_ray.types import ExpertLayout

__all__ = ["RecordCompute", "record_computes"]

_SIMPLE: Mapping[str, Callable[[Tensor, Mapping[str, Tensor]], Tensor]] = {
    "lowrank": lowrank_forward,
    "mean": mean_forward,
}


class RecordCompute(Protocol):
    """The arithmetic of one kind of record in one layer, for all of a step."""

    def __call__(self, x_TD: Tensor, records_B: Tensor, at_E: Tensor, expert_TK: Tensor, out_ND: Tensor) -> None:
        """Write `out_ND[n]` where `expert_TK.flat[n] >= 0` and that expert's record begins at byte `at_E >= 0`."""


def record_computes(
    kind: str,
    layout: ExpertLayout,
    maths: Sequence[ExpertMath],
    *,
    threads: int,
    device: Device,
    dtype: torch.dtype,
) -> list[RecordCompute]:
    """The arithmetic of records of `kind` in each layer, whose experts' own is `maths`, over rows of `dtype`.

    Raises ProfileError for an unknown kind, or records that another version packed.
    """
    if kind in _SIMPLE and device.apart:
        return [TritonExperts(layout=layout.tensors, fmt=None, math=None)] * len(maths)
    if kind in _SIMPLE:
        return [_OneByOne(_SIMPLE[kind], layout)] * len(maths)
    if not kind.startswith("lowbit"):
        raise ProfileError(f"record kind is {kind!r}, must be lowbitN, lowrank or mean. hint: profile the model again")
    fmt = LowbitFormat.of_kind(kind)
    try:
        for name in (maths[0].first, "down_proj"):
            matrix_at(layout.tensors, name, fmt)
    except ValueError as error:
        raise ProfileError(
            f"{kind} record's {error}, as this version packs. hint: run buddymoe profile again"
        ) from error
    if not device.apart and all(ExpertLayer.covers(layout.tensors, fmt, math) for math in maths):
        return [ExpertLayer(layout=layout.tensors, fmt=fmt, math=math, dtype=dtype, threads=threads) for math in maths]
    if device.apart and all(TritonExperts.covers(layout.tensors, fmt, math) for math in maths):
        return [TritonExperts(layout=layout.tensors, fmt=fmt, math=math) for math in maths]
    if device.torch.type == "cpu":
        prepare_lowbit(fmt, dtype)
    return [_OneByOne(partial(lowbit_forward, fmt=fmt, math=math), layout) for math in maths]


class _OneByOne:
    """Expert by expert."""

    def __init__(self, forward: Callable[[Tensor, Mapping[str, Tensor]], Tensor], layout: ExpertLayout) -> None:
        self._forward, self._layout = forward, layout

    def __call__(self, x_TD: Tensor, records_B: Tensor, at_E: Tensor, expert_TK: Tensor, out_ND: Tensor) -> None:
        expert_N = expert_TK.reshape(-1)
        for expert in torch.unique(expert_N[expert_N >= 0]).tolist():
            start = int(at_E[expert])
            if start >= 0:
                record = slot_views(records_B[start : start + self._layout.slot_bytes], self._layout)
                rows_R = (expert_N == expert).nonzero()[:, 0]
                x_RD = x_TD.index_select(0, rows_R // expert_TK.shape[1])
                out_ND.index_copy_(0, rows_R, self._forward(x_RD, record))
