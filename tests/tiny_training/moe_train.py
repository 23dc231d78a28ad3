"""The training-time expert kernel: tokens sorted by expert, one loop over experts forward and one backward.

Reference twin: the eager experts of transformers (`Qwen3MoeExperts.forward`); the tests compare outputs and all
gradients. The routing weight is applied inside the expert (on F, not D, numbers a row), so the combine is a plain sum
of K gathered rows.
Shape suffixes: T tokens, K top-k, S = T*K assignments sorted by expert, E experts, D hidden, F ffn, G = 2F gate and
up.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

IMPLEMENTATION = "tiny_sorted"


def expert_bounds(index_TK: Tensor, experts: int) -> tuple[Tensor, list[tuple[int, int]]]:
    """Assignment order sorted by expert, and each expert's range in it."""
    order_S = torch.argsort(index_TK.flatten(), stable=True)
    ends = torch.bincount(index_TK.flatten(), minlength=experts).cumsum(0).tolist()
    return order_S, list(zip([0, *ends[:-1]], ends, strict=True))


def _sum_rows(rows_SD: Tensor, place_TK: Tensor) -> Tensor:
    """Sum the K rows of each token: a fused gather and sum without an index_add."""
    return functional.embedding_bag(place_TK, rows_SD, mode="sum")


class SortedExperts(torch.autograd.Function):
    """SwiGLU experts on sorted tokens; silu and products are recomputed in the backward pass."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, x_TD: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor, index_TK: Tensor, weight_TK: Tensor
    ) -> Tensor:
        order_S, bounds = expert_bounds(index_TK, gate_up_EGD.shape[0])
        token_S = order_S // index_TK.shape[1]
        place_TK = torch.empty_like(order_S).scatter_(0, order_S, torch.arange(order_S.numel())).view_as(index_TK)
        weight_S1 = weight_TK.flatten()[order_S].unsqueeze(1)
        gate_up_SG = x_TD.new_empty(order_S.numel(), gate_up_EGD.shape[1])
        y_SD = x_TD.new_empty(order_S.numel(), x_TD.shape[1])
        for expert, (low, high) in enumerate(bounds):
            torch.mm(x_TD.index_select(0, token_S[low:high]), gate_up_EGD[expert].t(), out=gate_up_SG[low:high])
            gate, up = gate_up_SG[low:high].chunk(2, dim=1)
            h = functional.silu(gate).mul_(up).mul_(weight_S1[low:high])
            torch.mm(h, down_EDF[expert].t(), out=y_SD[low:high])
        ctx.save_for_backward(x_TD, gate_up_EGD, down_EDF, token_S, place_TK, order_S, weight_S1, gate_up_SG)
        ctx.bounds = bounds  # type: ignore[attr-defined]
        return _sum_rows(y_SD, place_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # type: ignore[attr-defined]
        x_TD, gate_up_EGD, down_EDF, token_S, place_TK, order_S, weight_S1, gate_up_SG = saved
        dgate_up_EGD, ddown_EDF = torch.empty_like(gate_up_EGD), torch.empty_like(down_EDF)
        dx_SD = x_TD.new_empty(order_S.numel(), x_TD.shape[1])
        dweight_S = torch.empty_like(weight_S1).squeeze(1)
        for expert, (low, high) in enumerate(ctx.bounds):  # type: ignore[attr-defined]
            tokens, weight = token_S[low:high], weight_S1[low:high]
            dy, gate_up = dy_TD.index_select(0, tokens), gate_up_SG[low:high]
            gate, up = gate_up.chunk(2, dim=1)
            act = functional.silu(gate)
            h = act * up
            dh = dy @ down_EDF[expert]
            torch.sum(h * dh, dim=1, out=dweight_S[low:high])
            torch.mm(dy.t(), h.mul_(weight), out=ddown_EDF[expert])
            dh.mul_(weight)
            dgate_up = torch.empty_like(gate_up)
            dgate, dup = dgate_up.chunk(2, dim=1)
            torch.mul(dh, act, out=dup)
            dgate.copy_(torch.ops.aten.silu_backward(dh.mul_(up), gate))
            torch.mm(dgate_up.t(), x_TD.index_select(0, tokens), out=dgate_up_EGD[expert])
            torch.mm(dgate_up, gate_up_EGD[expert], out=dx_SD[low:high])
        dweight_TK = dweight_S[place_TK]
        return _sum_rows(dx_SD, place_TK), dgate_up_EGD, ddown_EDF, None, dweight_TK


def sorted_experts(module: nn.Module, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """The function registered with transformers."""
    output: Tensor = SortedExperts.apply(x_TD, module.gate_up_proj, module.down_proj, index_TK, weight_TK)
    return output


def register() -> str:
    """Make the kernel known to transformers; returns the name for `experts_implementation`."""
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, sorted_experts)
    return IMPLEMENTATION
