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
    losses = []
    for logits_TE in router_logits:
        probs_TE = logits_TE.float().softmax(dim=1)
        chosen_TK = probs_TE.topk(top_k, dim=1).indices
        load_E = torch.bincount(chosen_TK.flatten(), minlength=logits_TE.shape[1]).to(probs_TE) / chosen_TK.numel()
        losses.append(logits_TE.shape[1] * (load_E * probs_TE.mean(dim=0)).sum())
    return torch.stack(losses).mean()
