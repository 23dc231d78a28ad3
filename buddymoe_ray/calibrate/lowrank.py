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
    if rank == 0:
        none = x.new_zeros(0, width, dtype=dtype)
        return {"down": none, "up": none.T, "bias": mean_y.to(dtype)}
    damping = ridge * float(x.square().sum()) / width * max(1.0, width / rows) + 1e-12
    up, down = (_by_rows if rank < rows < width else _by_inputs)(x, y, damping, rank)
    size = down.norm(dim=1).clamp_min(1e-12).sqrt()  # both factors of a direction alike: safe in half precision
    up, down = up * size, down / size.unsqueeze(1)
    bias = mean_y - up @ (down @ mean_x)
    return {"down": down.to(dtype), "up": up.to(dtype), "bias": bias.to(dtype)}


def _by_inputs(x: Tensor, y: Tensor, damping: float, rank: int) -> tuple[Tensor, Tensor]:
    """`up, down` from the second moment of the inputs [D, D]."""
    Cxx = x.T @ x
    Cxx.diagonal().add_(damping)
    B = torch.linalg.solve(Cxx, x.T @ y).T
    _, vectors = torch.linalg.eigh(B @ Cxx @ B.T)
    up = vectors[:, len(vectors) - rank :].flip(1)
    return up, up.T @ B


def _by_rows(x: Tensor, y: Tensor, damping: float, rank: int) -> tuple[Tensor, Tensor]:
    """The same from the rows' products [R, R], where there are fewer of them: B = y^T S^-1 x with S = x x^T + damping,
    and B (Cxx + damping) B^T = y^T A y with A = 1 - damping S^-1, whose eigenvectors are those of L^T y y^T L."""
    rows, one = len(x), torch.eye(len(x), dtype=x.dtype)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(x @ x.T + damping * one))
    L = torch.linalg.cholesky((1 + 1e-9) * one - damping * inverse)  # centred rows: one of A's eigenvalues is 0
    seen = L.T @ y
    size, vectors = torch.linalg.eigh(seen @ seen.T)
    kept = slice(rows - rank, rows)
    up = (seen.T @ (vectors[:, kept] / size[kept].clamp_min(1e-9 * float(size[-1]) + 1e-300).sqrt())).flip(1)
    return up, up.T @ (y.T @ inverse) @ x
