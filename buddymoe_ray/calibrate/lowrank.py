"""Fits the linear map of low rank that answers best for an expert on the inputs that the router sends it.

Does not know how the map is computed with (kernels.lowrank) or where it is kept. Invariant: before rounding to `dtype`,
no map of the same rank has a smaller penalised weighted error on the rows given.

Legend: R rows (tokens), D hidden, r rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["fit_lowrank"]


def fit_lowrank(
    x_RD: Tensor,
    y_RD: Tensor,
    weight_R: Tensor,
    rank: int,
    *,
    ridge: float = 0.01,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Tensor]:
    """`{"down": [r, D], "up": [D, r], "bias": [D]}` with y ~ up (down x) + bias; rank 0 is the mean output.

    Reduced-rank regression (Izenman 1975; Reinsel & Velu 1998, eq. 2.15 with the identity as output metric): the ridge
    solution B of the centred weighted problem, projected on the leading eigenvectors of B (Cxx + ridge) B^T.

    Args:
        x_RD, y_RD: inputs and exact outputs of the expert, float.
        weight_R: slot weight of each row; a row counts by its square.
        ridge: share of the mean input variance added to every input's, and divided by R / D: few rows, more damping.
    """
    rows, width = x_RD.shape
    assert 0 <= rank <= width, f"rank is {rank}, must be in 0..{width}"
    assert rows > 0, "x_RD has 0 rows, must have at least one"
    share = weight_R.double().square()
    share = share / share.sum().clamp_min(1e-300)
    x, y = x_RD.double(), y_RD.double()
    mean_x, mean_y = share @ x, share @ y
    x, y = (x - mean_x) * share.sqrt().unsqueeze(1), (y - mean_y) * share.sqrt().unsqueeze(1)
    Cxx = x.T @ x
    damping = ridge * float(Cxx.diagonal().mean()) * max(1.0, width / rows) + 1e-12
    Cxx.diagonal().add_(damping)
    B = torch.linalg.solve(Cxx, x.T @ y).T
    _, vectors = torch.linalg.eigh(B @ Cxx @ B.T)
    up = vectors[:, width - rank :].flip(1)
    down = up.T @ B
    size = down.norm(dim=1).clamp_min(1e-12).sqrt()  # both factors of a direction alike: safe in half precision
    up, down = up * size, down / size.unsqueeze(1)
    bias = mean_y - up @ (down @ mean_x)
    return {"down": down.to(dtype), "up": up.to(dtype), "bias": bias.to(dtype)}
