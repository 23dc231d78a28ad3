"""The two losses of training: next-token loss without a full logit matrix, and the routers' balance.

Reference twin of the first: `torch.nn.functional.cross_entropy` on the whole logits; the tests compare value and
gradients.
Shape suffixes: T tokens, C tokens of one chunk, V vocabulary, D hidden, E experts, K top-k. Neighbour: trainer.py
adds them up.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func


class ChunkedCrossEntropy(torch.autograd.Function):
    """Mean next-token loss from hidden states; logits exist for one chunk at a time, gradients are made on the way."""

    @staticmethod
    def forward(ctx: FunctionCtx, hidden_TD: Tensor, head_VD: Tensor, target_T: Tensor, chunk: int) -> Tensor:
        loss = hidden_TD.new_zeros(())
        dhidden_TD, dhead_VD = torch.empty_like(hidden_TD), torch.zeros_like(head_VD)
        room_CV = hidden_TD.new_empty(min(chunk, hidden_TD.shape[0]), head_VD.shape[0])
        for low in range(0, hidden_TD.shape[0], chunk):
            hidden, target_C1 = hidden_TD[low : low + chunk], target_T[low : low + chunk].unsqueeze(1)
            logits_CV = torch.mm(hidden, head_VD.t(), out=room_CV[: hidden.shape[0]])
            logits_CV.sub_(logits_CV.amax(dim=1, keepdim=True))
            loss -= logits_CV.gather(1, target_C1).sum()
            total_C1 = logits_CV.exp_().sum(dim=1, keepdim=True)
            loss += total_C1.log().sum()
            dlogits_CV = logits_CV.div_(total_C1)
            dlogits_CV.scatter_add_(1, target_C1, dlogits_CV.new_full((1, 1), -1.0).expand_as(target_C1))
            torch.mm(dlogits_CV, head_VD, out=dhidden_TD[low : low + chunk])
            dhead_VD.addmm_(dlogits_CV.t(), hidden)
        scale = 1.0 / hidden_TD.shape[0]
        ctx.save_for_backward(dhidden_TD.mul_(scale), dhead_VD.mul_(scale))
        return loss * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dloss: Tensor) -> tuple[Tensor | None, ...]:
        dhidden_TD, dhead_VD = ctx.saved_tensors  # type: ignore[attr-defined]
        return dhidden_TD * dloss, dhead_VD * dloss, None, None


def balance_loss(router_logits: tuple[Tensor, ...], top_k: int) -> Tensor:
    """Mean over layers of E * sum_e(load share of e * mean router probability of e); 1.0 when balanced."""
    # transformers counts every one of a token's K choices, and all layers as one
    terms = (load_balancing_loss_func((logits_TE,), logits_TE.shape[1], top_k) for logits_TE in router_logits)
    return torch.stack([torch.as_tensor(term) for term in terms]).mean() / top_k
