"""One Triton launch from router logits to what each slot computes: top-k, residency, buddies without repetition.

The tensor-op version takes dozens of launches a layer; this one takes one, with a token a program. Does not know gates,
budgets or how candidates were ranked; a slot that finds no buddy is left to be fetched. Invariant: a token never gets
one expert twice. Imports triton at the top: import this module where a GPU (or the interpreter) is at hand, not before.

Ties go to the lower expert id. `torch.topk` promises no order of ties; a stable descending sort has this one.

Legend: T tokens, K slots of a token, E experts, H candidates per expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["BUDDY", "FETCH", "HIT", "Remapped", "Score", "remap"]

Score = Literal["softmax", "sigmoid"]
HIT, FETCH, BUDDY = 0, 1, 3
"""Values of `action_TK`, those of the policy's Action."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Remapped:
    """`expert_TK` int32 computes slot k of token t, `action_TK` int32 says why, `weight_TK` float32 is the router's.

    A buddy inherits the weight of the slot it answers. A slot to be fetched keeps its own expert.
    """

    expert_TK: Tensor
    action_TK: Tensor
    weight_TK: Tensor


def remap(
    logits_TE: Tensor,
    slot_of_E: Tensor,
    candidate_EH: Tensor,
    *,
    top_k: int,
    score: Score = "softmax",
    renormalise: bool = False,
    most: int | None = None,
) -> Remapped:
    """Route every token and give each slot whose expert is absent its best resident buddy.

    Args:
        logits_TE: the router's logits, float32. NaN counts as minus infinity.
        slot_of_E: int32, the slot that holds an expert, negative when none does.
        candidate_EH: int32, buddies of each expert, best first, padded with negative numbers.
        score: how logits become weights: softmax over all experts, or sigmoid.
        renormalise: divide a token's K weights by their sum.
        most: substitutions per token at most; slots are served in falling order of weight. None: no bound.
    """
    (T, E), H = logits_TE.shape, candidate_EH.shape[1]
    assert logits_TE.dtype == torch.float32, f"logits are {logits_TE.dtype}, must be float32"
    assert slot_of_E.dtype == candidate_EH.dtype == torch.int32, "slot_of_E and candidate_EH must be int32"
    assert slot_of_E.shape == (E,), f"slot_of_E has {tuple(slot_of_E.shape)}, must be {(E,)}"
    assert candidate_EH.shape[0] == E and H >= 1, f"candidates are {tuple(candidate_EH.shape)}, must be {(E, 'H >= 1')}"
    assert 1 <= top_k <= E, f"top_k is {top_k}, must be in 1 .. {E}"
    expert_TK = torch.empty((T, top_k), dtype=torch.int32, device=logits_TE.device)
    action_TK, weight_TK = torch.empty_like(expert_TK), expert_TK.new_empty((T, top_k), dtype=torch.float32)
    if T > 0:
        _remap_kernel[(T,)](
            logits_TE.contiguous(),
            slot_of_E.contiguous(),
            candidate_EH.contiguous(),
            expert_TK,
            action_TK,
            weight_TK,
            top_k if most is None else most,
            E=E,
            H=H,
            K=top_k,
            SIGMOID=score == "sigmoid",
            RENORMALISE=renormalise,
            PAD_E=triton.next_power_of_2(E),
            PAD_H=triton.next_power_of_2(H),
            PAD_K=triton.next_power_of_2(top_k),
        )
    return Remapped(expert_TK=expert_TK, action_TK=action_TK, weight_TK=weight_TK)


@triton.jit
def _remap_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,
    slot_ptr,
    candidate_ptr,
    expert_ptr,
    action_ptr,
    weight_ptr,
    most,
    E: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    SIGMOID: tl.constexpr,
    RENORMALISE: tl.constexpr,
    PAD_E: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_K: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    e, h, k = tl.arange(0, PAD_E), tl.arange(0, PAD_H), tl.arange(0, PAD_K)
    logit = tl.load(logits_ptr + token * E + e, mask=e < E, other=-float("inf"))
    logit = tl.where(logit == logit, logit, -float("inf"))
    resident = tl.load(slot_ptr + e, mask=e < E, other=-1) >= 0
    if SIGMOID:
        score = 1.0 / (1.0 + tl.exp(-logit))
    else:
        score = tl.exp(logit - tl.max(logit, axis=0))
        score = score / tl.sum(score, axis=0)

    # top-k: the best of those left, K times; `free` are resident experts that this token does not use yet
    left, free = e < E, resident
    wanted, weight = tl.zeros([PAD_K], dtype=tl.int32), tl.zeros([PAD_K], dtype=tl.float32)
    for i in tl.static_range(K):
        best = tl.max(tl.where(left, logit, -float("inf")), axis=0)
        chosen = tl.min(tl.where(left & (logit == best), e, PAD_E), axis=0)
        left = left & (e != chosen)
        free = free & (e != chosen)
        wanted = tl.where(k == i, chosen, wanted)
        weight = tl.where(k == i, tl.sum(tl.where(e == chosen, score, 0.0), axis=0), weight)
    if RENORMALISE:
        weight = weight / tl.sum(weight, axis=0)

    # slots in falling order of weight: the first candidate that is free
    expert, action, taken = wanted, tl.zeros([PAD_K], dtype=tl.int32), 0
    for i in tl.static_range(K):
        own = tl.sum(tl.where(k == i, wanted, 0), axis=0)
        hit = tl.sum(tl.where((e == own) & resident, 1, 0), axis=0) > 0
        candidate = tl.load(candidate_ptr + own.to(tl.int64) * H + h, mask=h < H, other=-1)
        usable = tl.sum(tl.where((candidate[:, None] == e[None, :]) & free[None, :], 1, 0), axis=1) > 0
        rank = tl.min(tl.where(usable, h, PAD_H), axis=0)
        found = (rank < PAD_H) & (taken < most) & (hit == 0)
        buddy = tl.sum(tl.where(h == rank, candidate, 0), axis=0)
        taken += found.to(tl.int32)
        free = free & ((e != buddy) | (found == 0))
        expert = tl.where((k == i) & found, buddy, expert)
        action = tl.where(k == i, tl.where(hit, 0, tl.where(found, 3, 1)), action)
    tl.store(expert_ptr + token * K + k, expert, mask=k < K)
    tl.store(action_ptr + token * K + k, action, mask=k < K)
    tl.store(weight_ptr + token * K + k, weight, mask=k < K)
