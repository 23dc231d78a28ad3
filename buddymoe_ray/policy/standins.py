"""What can answer for a missing expert, behind one seam: each stand-in says who answers each use and at what harm.

`Own`: the expert's own record (low-bit copy, low-rank map, mean vector). `Buddy`: another resident expert, chosen by
co-activation, output error, live router score or at random. `Drop`: nobody. Pure; knows no budgets (`ladder`).
Invariant: a token never gets one expert twice, its own resident experts and earlier substitutes included.

Legend: T rows, K slots, L layers, E experts, H candidates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from buddymoe_ray.policy.misses import Action, Misses

__all__ = ["Answers", "Buddy", "Drop", "Own", "RandomBuddy", "RouterBuddy", "Standin"]


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What a stand-in offers for each use `[T, K]`; meaningful where the expert is missing and `found_TK`."""

    action_TK: Tensor
    expert_TK: Tensor
    weight_TK: Tensor
    harm_TK: Tensor
    found_TK: Tensor


class Standin(Protocol):
    """One way to answer without the expert."""

    kind: str

    def answer(self, misses: Misses) -> Answers:
        """Who would answer each missing use."""

    def weights(self, misses: Misses, answers: Answers, take_TK: Tensor) -> Tensor:
        """Slot weights `[T, K]` when the uses in `take_TK` are stood in for."""


class Own:
    """The expert's own record. Harm of a use: squared slot weight × `harm_LE`; `has_LE` says who has a record."""

    def __init__(self, kind: str, *, harm_LE: Tensor, has_LE: Tensor) -> None:
        self.kind, self._harm_LE, self._has_LE = kind, harm_LE, has_LE

    def answer(self, misses: Misses) -> Answers:
        ids_TK = misses.ids_TK
        return Answers(
            action_TK=torch.full_like(ids_TK, Action.OWN, dtype=torch.int8),
            expert_TK=ids_TK,
            weight_TK=misses.weight_TK,
            harm_TK=misses.weight_TK.float().square() * self._harm_LE[misses.layer][ids_TK],
            found_TK=self._has_LE[misses.layer][ids_TK],
        )

    def weights(self, misses: Misses, answers: Answers, take_TK: Tensor) -> Tensor:
        return misses.weight_TK


class Drop:
    """Nobody answers. With `renormalise` (the model's own `norm_topk_prob`) the survivors keep the row's sum."""

    kind = "drop"

    def __init__(self, *, harm_LE: Tensor, renormalise: bool) -> None:
        self._harm_LE, self._renormalise = harm_LE, renormalise

    def answer(self, misses: Misses) -> Answers:
        ids_TK = misses.ids_TK
        return Answers(
            action_TK=torch.full_like(ids_TK, Action.DROP, dtype=torch.int8),
            expert_TK=ids_TK,
            weight_TK=torch.zeros_like(misses.weight_TK),
            harm_TK=misses.weight_TK.float().square() * self._harm_LE[misses.layer][ids_TK],
            found_TK=torch.ones_like(ids_TK, dtype=torch.bool),
        )

    def weights(self, misses: Misses, answers: Answers, take_TK: Tensor) -> Tensor:
        kept_TK = torch.where(take_TK, 0.0, misses.weight_TK)
        return _same_sum(misses, kept_TK, take_TK) if self._renormalise else kept_TK


class Buddy:
    """The best resident expert of a fixed ranking: by co-activation, or by output error with its fitted scale.

    Args:
        rank_LEH: candidates of each expert, best first, -1 beyond the last.
        harm_LEE: harm of a use per squared slot weight, when column j answers for row i.
        scale_LEE: what j's output is multiplied with when it answers for i; None is 1 (the paper: original weight).
    """

    def __init__(self, signal: str, *, rank_LEH: Tensor, harm_LEE: Tensor, scale_LEE: Tensor | None = None) -> None:
        self.kind = f"buddy:{signal}"
        self._rank_LEH, self._harm_LEE, self._scale_LEE = rank_LEH, harm_LEE, scale_LEE

    def answer(self, misses: Misses) -> Answers:
        candidates_TKH = self._rank_LEH[misses.layer][misses.ids_TK]
        score_TKH = -torch.arange(candidates_TKH.shape[2], device=candidates_TKH.device).float()
        expert_TK, found_TK = pick_unique(misses, candidates_TKH, score_TKH.expand(candidates_TKH.shape))
        weight_TK = misses.weight_TK
        if self._scale_LEE is not None:
            weight_TK = weight_TK * self._scale_LEE[misses.layer][misses.ids_TK, expert_TK].to(weight_TK.dtype)
        harm_TK = misses.weight_TK.float().square() * self._harm_LEE[misses.layer][misses.ids_TK, expert_TK]
        return _buddies(misses, expert_TK, weight_TK, harm_TK, found_TK)

    def weights(self, misses: Misses, answers: Answers, take_TK: Tensor) -> Tensor:
        return torch.where(take_TK, answers.weight_TK, misses.weight_TK)


class RouterBuddy:
    """The resident expert that the router itself scores highest, with its own score as weight.

    With `renormalise` the row keeps its sum, as the model's `norm_topk_prob` would have it; without, the scores are
    brought to the scale of the router's weights.
    """

    kind = "buddy:router"

    def __init__(self, *, harm_LEE: Tensor, renormalise: bool) -> None:
        self._harm_LEE, self._renormalise = harm_LEE, renormalise

    def answer(self, misses: Misses) -> Answers:
        assert misses.score_TE is not None, (
            "buddy:router needs the router's scores: attach_router_scores was not called"
        )
        T, K = misses.ids_TK.shape
        score_TE = misses.score_TE
        every_TKE = torch.arange(score_TE.shape[1], device=score_TE.device).expand(T, K, -1)
        expert_TK, found_TK = pick_unique(misses, every_TKE, score_TE[:, None, :].expand(T, K, -1))
        weight_TK = score_TE.gather(1, expert_TK) * _per_score(misses)
        harm_TK = misses.weight_TK.float().square() * self._harm_LEE[misses.layer][misses.ids_TK, expert_TK]
        return _buddies(misses, expert_TK, weight_TK.to(misses.weight_TK.dtype), harm_TK, found_TK)

    def weights(self, misses: Misses, answers: Answers, take_TK: Tensor) -> Tensor:
        weight_TK = torch.where(take_TK, answers.weight_TK, misses.weight_TK)
        return _same_sum(misses, weight_TK, take_TK) if self._renormalise else weight_TK


class RandomBuddy:
    """Any resident expert, drawn from a hash of the row's routing: the null that every other buddy must beat."""

    kind = "random"

    def __init__(self, *, harm_LEE: Tensor, seed: int = 0) -> None:
        self._harm_LEE, self._seed = harm_LEE, seed

    def answer(self, misses: Misses) -> Answers:
        T, K = misses.ids_TK.shape
        E = len(misses.resident_E)
        every_E = torch.arange(E, device=misses.ids_TK.device)
        mixed_TKE = (
            misses.ids_TK[:, :, None] * 7919 + every_E * 104729 + misses.ids_TK.sum(dim=1)[:, None, None] * 31337
        )
        mixed_TKE = (mixed_TKE + self._seed + misses.layer * 65537) * 2654435761 % 4294967291
        expert_TK, found_TK = pick_unique(misses, every_E.expand(T, K, -1), (mixed_TKE % 1000003).float())
        harm_TK = misses.weight_TK.float().square() * self._harm_LEE[misses.layer][misses.ids_TK, expert_TK]
        return _buddies(misses, expert_TK, misses.weight_TK, harm_TK, found_TK)

    def weights(self, misses: Misses, answers: Answers, take_TK: Tensor) -> Tensor:
        return torch.where(take_TK, answers.weight_TK, misses.weight_TK)


def pick_unique(misses: Misses, candidates_TKH: Tensor, score_TKH: Tensor) -> tuple[Tensor, Tensor]:
    """For each missing use the resident candidate of highest score that its token does not use yet, slot by slot.

    Returns `(expert_TK, found_TK)`; where nothing is found the expert is the router's own. Candidates below 0 are none.
    Ties go to the earlier candidate.
    """
    ids_TK, resident_E = misses.ids_TK, misses.resident_E
    T, K = ids_TK.shape
    used_TE = torch.zeros(T, len(resident_E), dtype=torch.bool, device=ids_TK.device)
    used_TE.scatter_(1, ids_TK, True)  # resident ones are taken; missing ones cannot answer anyway
    open_TKH = (candidates_TKH >= 0) & resident_E[candidates_TKH.clamp_min(0)]
    expert_TK, found_TK = ids_TK.clone(), torch.zeros_like(ids_TK, dtype=torch.bool)
    missing_TK = ~resident_E[ids_TK]
    for k in range(K):
        candidates_TH = candidates_TKH[:, k].clamp_min(0)
        free_TH = open_TKH[:, k] & ~used_TE.gather(1, candidates_TH)
        best_T = torch.where(free_TH, score_TKH[:, k], -torch.inf).argmax(dim=1, keepdim=True)
        found_T = free_TH.gather(1, best_T)[:, 0] & missing_TK[:, k]
        chosen_T = candidates_TH.gather(1, best_T)[:, 0]
        expert_TK[:, k] = torch.where(found_T, chosen_T, ids_TK[:, k])
        found_TK[:, k] = found_T
        used_TE.scatter_(1, expert_TK[:, k : k + 1], True)
    return expert_TK, found_TK


def _buddies(misses: Misses, expert_TK: Tensor, weight_TK: Tensor, harm_TK: Tensor, found_TK: Tensor) -> Answers:
    action_TK = torch.full_like(misses.ids_TK, Action.BUDDY, dtype=torch.int8)
    return Answers(action_TK=action_TK, expert_TK=expert_TK, weight_TK=weight_TK, harm_TK=harm_TK, found_TK=found_TK)


def _same_sum(misses: Misses, weight_TK: Tensor, take_TK: Tensor) -> Tensor:
    """Scale each row that is stood in for to the sum the router gave it; a row without survivors stays zero.

    Other rows keep their bits: two sums of the same weights may differ in the last one where memory order differs.
    """
    wanted_T1, sum_T1 = misses.weight_TK.sum(dim=1, keepdim=True), weight_TK.sum(dim=1, keepdim=True)
    scaled_T1 = take_TK.any(dim=1, keepdim=True) & (sum_T1 > 0)
    return torch.where(scaled_T1, weight_TK * (wanted_T1 / sum_T1.where(scaled_T1, 1.0)), weight_TK)


def _per_score(misses: Misses) -> Tensor:
    """The factor between the router's scores and its slot weights, per row `[T, 1]`."""
    assert misses.score_TE is not None
    score_T1 = misses.score_TE.gather(1, misses.ids_TK).sum(dim=1, keepdim=True)
    return misses.weight_TK.float().sum(dim=1, keepdim=True) / score_T1.clamp_min(1e-20)
