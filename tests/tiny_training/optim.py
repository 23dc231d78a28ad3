"""Muon for the weight matrices: momentum whose singular values are set to one before it is applied.

Stacks of expert matrices are orthogonalised in one batch. Embeddings, norms and routers are AdamW's; train.py makes
the groups. Knows nothing of the model. Invariant: a step depends on parameters, gradients and momenta alone, so
resumed runs are bit-identical.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

QUINTIC = (3.4445, -4.7750, 2.0315)


def _fused(add: Tensor, left: Tensor, right: Tensor, beta: float, alpha: float) -> Tensor:
    """beta * add + alpha * left @ right on [batch, rows, cols], in one pass."""
    fused: Tensor = torch.baddbmm(add, left, right, beta=beta, alpha=alpha)
    return fused


def newton_schulz(matrix: Tensor, steps: int = 5) -> Tensor:
    """Bring the singular values of each matrix in [..., rows, cols] near one with a quintic iteration."""
    a, b, c = QUINTIC
    wide = matrix if matrix.shape[-2] <= matrix.shape[-1] else matrix.mT
    wide = wide.reshape(-1, *wide.shape[-2:])
    x: Tensor = wide / (wide.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = _fused(x, _fused(gram, gram, gram, b, c), x, a, 1.0)
    x = x if matrix.shape[-2] <= matrix.shape[-1] else x.mT
    return x.reshape(matrix.shape)


def halves(matrix: Tensor) -> Tensor:
    """View fused gate and up stacks [E, 2F, D] as [E, 2, F, D], so that each is orthogonalised by itself."""
    return matrix.view(*matrix.shape[:-2], 2, -1, matrix.shape[-1])


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised; decoupled weight decay; the update's scale grows with rows/cols."""

    def __init__(
        self,
        params: Iterable[Tensor] | list[dict[str, Any]],
        *,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "fused_halves": False})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, group)
        return loss

    def _update(self, param: Tensor, group: dict[str, Any]) -> None:
        lr, momentum, decay = group["lr"], group["momentum"], group["weight_decay"]
        assert param.grad is not None, "step() updates only parameters that have a gradient"
        state = self.state[param]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(param)
        buffer: Tensor = state["momentum"]
        buffer.lerp_(param.grad, 1.0 - momentum)
        update = param.grad.lerp(buffer, momentum)
        update = halves(update) if group["fused_halves"] else update
        scale = max(1.0, update.shape[-2] / update.shape[-1]) ** 0.5
        update = newton_schulz(update).reshape(param.shape)
        param.mul_(1.0 - lr * decay).add_(update, alpha=-lr * scale)
