"""A linear map of low rank that answers for an expert: `y = up @ (down @ x) + bias`.

Does not know how the map was fitted (calibrate). Invariant: the same row gives the same bits however many rows are
beside it (`rowwise_linear`).

Legend: R rows, D hidden, r rank.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from buddymoe_ray.kernels.reference import ENTERED
from buddymoe_ray.kernels.rowwise import rowwise_linear

__all__ = ["lowrank_forward", "mean_forward"]


def lowrank_forward(x_RD: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """`[R, D] -> [R, D]` in the dtype of `x_RD`; sums are taken in float32.

    `tensors`: `down` [r, D], `up` [D, r], `bias` [D] (the answer to x = 0), of any float dtype.
    """
    ENTERED["lowrank_forward"] += 1
    down, up, bias = (tensors[name].float() for name in ("down", "up", "bias"))
    assert down.shape == (up.shape[1], x_RD.shape[1]), (
        f"down is {tuple(down.shape)}, must be {(up.shape[1], x_RD.shape[1])}"
    )
    hidden_Rr = rowwise_linear(x_RD.float(), down)
    return rowwise_linear(hidden_Rr, up, bias).to(x_RD.dtype)


def mean_forward(x_RD: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """The expert's mean output for every row: `bias` [D], the rank-0 map."""
    return tensors["bias"].to(x_RD.dtype).expand_as(x_RD).clone()
