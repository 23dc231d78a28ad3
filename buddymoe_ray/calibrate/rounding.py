"""Makes the low-bit record of one expert: both projections rounded, packed, ready for kernels.lowbit.

Does not know layers, corpora or files: an expert's weights, its inputs and their slot weights come in. Invariant: the
second projection is rounded for what the *rounded* first one feeds it.
Neighbours: kernels.rounding and rounding_compensated.py round a matrix.
Tried on builtin:tiny and left out (3 bits, thousandths of a nat of KL per token, 8.1 as it is): moments without
slot weights +3 %; inputs from already rounded layers -1 %; damping .001 / .05 -1 / -3 %; no corrected target +5 % (2
bits: +12 %); groups of 16 / 64 -21 / +10 %, less than the same bytes bring as wider codes for the worst experts.

Legend: R rows routed to the expert, D hidden, F ffn.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from buddymoe_ray.calibrate.rounding_compensated import moment, round_compensated, unbiased, weighted_error
from buddymoe_ray.kernels.lowbit import LowbitFormat, PackedMatrix, pack
from buddymoe_ray.kernels.reference import ExpertMath
from buddymoe_ray.kernels.rounding import Rounded, dequantise_rounded, round_plain
from buddymoe_ray.kernels.rounding_cpu import pack_plain

__all__ = [
    "Rounded",
    "dequantise_rounded",
    "moment",
    "quantise_expert",
    "quantise_expert_plain",
    "round_compensated",
    "round_plain",
    "unbiased",
    "weighted_error",
]

FEW_ROWS = 8.0  # damping is multiplied by 1 + FEW_ROWS * inputs / rows


def quantise_expert(
    weights: Mapping[str, Tensor],
    x_RD: Tensor,
    weight_R: Tensor,
    fmt: LowbitFormat,
    math: ExpertMath,
    *,
    damping: float = 0.01,
    passes: int = 4,
) -> dict[str, Tensor]:
    """The record of an expert by compensated rounding; plain where `x_RD` has no rows.

    Args:
        weights: matrices `[out, in]` (transposed families untransposed) and biases, under the module's names.
        x_RD: inputs that the router sent the expert.
        weight_R: slot weight of each row: its square is what an error of the row counts.
        damping: of the moments, where rows are many; more where they are few.
        passes: of refitting scales and codes after the error feedback; each costs about half as much as the feedback.
    """
    if x_RD.shape[0] == 0:
        return quantise_expert_plain(weights, fmt, math)
    x = x_RD.float()
    first = weights[math.first].float()
    more = damping * FEW_ROWS / _effective_rows(weight_R)  # what few rows say of K inputs is mostly chance
    dampings = [damping + more * x.shape[1], damping + more * weights["down_proj"].shape[1]]
    H_DD = moment(x, weight_R)
    rounded = unbiased(round_compensated(first, H_DD, fmt, damping=dampings[0], passes=passes), first, H_DD, fmt)
    bias = weights[f"{math.first}_bias"].float() if math.bias else None
    exact_RF = math.activate(functional.linear(x, first, bias))
    hidden_RF = math.activate(functional.linear(x, dequantise_rounded(rounded, fmt), bias))
    target = _corrected(weights["down_proj"].float(), exact_RF, hidden_RF, weight_R, dampings[1])
    H_FF = moment(hidden_RF, weight_R)
    down = unbiased(round_compensated(target, H_FF, fmt, damping=dampings[1], passes=passes), target, H_FF, fmt)
    return _named(weights, {math.first: pack(*rounded, fmt), "down_proj": pack(*down, fmt)})


def _effective_rows(weight_R: Tensor) -> float:
    """(sum w^2)^2 / sum w^4: how many rows of equal weight would say as much."""
    square = weight_R.double().square()
    return max(1.0, float(square.sum() ** 2 / square.square().sum().clamp_min(1e-300)))


def _corrected(W_DF: Tensor, exact_RF: Tensor, ours_RF: Tensor, weight_R: Tensor, damping: float) -> Tensor:
    """The second projection that best undoes the first one's error: least squares from `ours` to the exact outputs.

    W C (H + d)^-1 with C = E[exact ours^T] + d and H = E[ours ours^T] (as in GPTAQ, Li et al. 2025).
    """
    F = ours_RF.shape[1]
    H = moment(ours_RF, weight_R)
    ridge = damping * H.diagonal().mean().clamp_min(1e-30) * torch.eye(F, device=H.device)
    counted = weight_R.float().square().unsqueeze(1)
    cross = (exact_RF * counted).T @ ours_RF / counted.sum().clamp_min(1e-30)
    solution, failed = torch.linalg.solve_ex(H + ridge, cross.T + ridge)  # [F, F]: (C (H + d)^-1)^T
    return W_DF if int(failed) else W_DF @ solution.T


def quantise_expert_plain(weights: Mapping[str, Tensor], fmt: LowbitFormat, math: ExpertMath) -> dict[str, Tensor]:
    """The record of an expert by nearest rounding: needs no inputs, fast enough for large models."""
    return _named(weights, {name: pack_plain(weights[name], fmt) for name in (math.first, "down_proj")})


def _named(weights: Mapping[str, Tensor], packed: Mapping[str, PackedMatrix]) -> dict[str, Tensor]:
    """Tensors of a record under the names of `record_tensors`; vectors (biases) stay as they are."""
    made: dict[str, Tensor] = {}
    for name, weight in weights.items():
        made |= packed[name].named(name) if name in packed else {name: weight}
    return made
