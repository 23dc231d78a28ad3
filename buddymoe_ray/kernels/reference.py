"""The spec of expert arithmetic, in plain torch; every faster kernel is tested against it.

Does not know where weights come from. Invariant: the same rows and weights give the same bits, whichever slot holds the
weights and whichever wave computes them, so residency cannot change a token.

Legend: R rows routed to one expert, T tokens, K experts per token, D hidden, F ffn.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["ENTERED", "ExpertMath", "combine", "expert_forward"]

ENTERED: Counter[str] = Counter()
"""How often the plain arithmetic here and beside its other kernels ran: in decode never, where there are kernels."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ExpertMath:
    """What distinguishes one family's experts from another's.

    `activate` maps the first projection `[R, 2F]` (gated) or `[R, F]` to `[R, F]`; `transposed` weights are stored
    `[in, out]`; `post_norm`, when there is one, is applied to each expert's output before the router weight.
    """

    activate: Callable[[Tensor], Tensor]
    gated: bool = True
    bias: bool = False
    transposed: bool = False
    post_norm: Callable[[Tensor], Tensor] | None = None

    @property
    def first(self) -> str:
        """Parameter name of the first projection."""
        return "gate_up_proj" if self.gated else "up_proj"


def expert_forward(x_RD: Tensor, weights: Mapping[str, Tensor], math: ExpertMath) -> Tensor:
    """One expert over its rows: `[R, D] -> [R, D]`, before the router weight, in the dtype of `x_RD`."""
    ENTERED["expert_forward"] += 1
    hidden_RF = math.activate(_project(x_RD, weights, math.first, math))
    y_RD = _project(hidden_RF, weights, "down_proj", math)
    return y_RD if math.post_norm is None else math.post_norm(y_RD)


def _project(x: Tensor, weights: Mapping[str, Tensor], name: str, math: ExpertMath) -> Tensor:
    weight = weights[name]
    bias = weights[f"{name}_bias"] if math.bias else None
    if not math.transposed:
        return functional.linear(x, weight, bias)
    return torch.mm(x, weight) if bias is None else torch.addmm(bias, x, weight)


def combine(y_TKD: Tensor, weight_TK: Tensor) -> Tensor:
    """Weight each expert's output and sum them in float32: `[T, K, D], [T, K] -> [T, D]` in the dtype of `y_TKD`.

    The order is that of the router's ids, never that of arrival, so waves and residency leave the bits alone.
    """
    ENTERED["combine"] += 1
    return (y_TKD.float() * weight_TK.float().unsqueeze(-1)).sum(dim=1).to(y_TKD.dtype)
