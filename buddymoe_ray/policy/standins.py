"""What can answer for a missing expert, behind one seam: each stand-in says who answers each access and at what
expected loss.

`Own`: the expert's own record (low-bit copy, low-rank map, mean vector). `Buddy`: another resident expert, chosen by
co-activation, output error, live router score or at random. `Drop`: nobody. Pure; knows no budgets (`ladder`).
Invariant: a token never gets one expert twice, its own resident experts and earlier substitutes included.

Legend: T rows, K slots, L layers, E experts, H candidates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from buddymoe_ray.policy.misses import Action, Bools, Floats, Ints, Misses, Tiny
from buddymoe_ray.policy.pick import first_free, pick_unique

__all__ = ["StandinAnswers", "Buddy", "Drop", "Own", "RandomBuddy", "RouterBuddy", "Standin"]


@dataclass(frozen=True, kw_only=True)
class StandinAnswers:
    """What a stand-in offers for each access `[T, K]`; meaningful where the expert is missing and `found_TK`. Elsewhere
    `expert_TK` is the router's own choice."""

    action_TK: Tiny
    expert_TK: Ints
    weight_TK: Floats
    loss_TK: Floats
    found_TK: Bools


class Standin(Protocol):
    """One way to answer without the expert."""

    kind: str

    def answer(self, misses: Misses) -> StandinAnswers:
        """Who would answer each missing use."""

    def weights(self, misses: Misses, answers: StandinAnswers, take_TK: Bools) -> Floats:
        """Slot weights `[T, K]` when the accesses in `take_TK` are stood in for."""


class Own:
    """The expert's own record. Expected loss of an access: squared slot weight × `loss_LE`; `has_LE` says who has a
    record."""

    def __init__(self, kind: str, *, loss_LE: Floats, has_LE: Bools) -> None:
        self.kind, self.loss_LE, self.has_LE = kind, loss_LE, has_LE

    def answer(self, misses: Misses) -> StandinAnswers:
        ids_TK = misses.ids_TK
        return StandinAnswers(
            action_TK=np.full(ids_TK.shape, Action.OWN, np.int8),
            expert_TK=ids_TK,
            weight_TK=misses.weight_TK,
            loss_TK=np.square(misses.weight_TK) * self.loss_LE[misses.layer][ids_TK],
            found_TK=self.has_LE[misses.layer][ids_TK],
        )

    def weights(self, misses: Misses, answers: StandinAnswers, take_TK: Bools) -> Floats:
        return misses.weight_TK


class Drop:
    """Nobody answers. With `renormalise` (the model's own `norm_topk_prob`) the survivors keep the row's sum."""

    kind = "drop"

    def __init__(self, *, loss_LE: Floats, renormalise: bool) -> None:
        self._loss_LE, self._renormalise = loss_LE, renormalise

    def answer(self, misses: Misses) -> StandinAnswers:
        ids_TK = misses.ids_TK
        return StandinAnswers(
            action_TK=np.full(ids_TK.shape, Action.DROP, np.int8),
            expert_TK=ids_TK,
            weight_TK=np.zeros_like(misses.weight_TK),
            loss_TK=np.square(misses.weight_TK) * self._loss_LE[misses.layer][ids_TK],
            found_TK=np.ones(ids_TK.shape, np.bool_),
        )

    def weights(self, misses: Misses, answers: StandinAnswers, take_TK: Bools) -> Floats:
        kept_TK = np.where(take_TK, np.float32(0), misses.weight_TK)
        return _same_sum(misses, kept_TK, take_TK) if self._renormalise else kept_TK


class Buddy:
    """The best resident expert of a fixed ranking: by co-activation, or by output error with its fitted scale.

    Args:
        rank_LEH: candidates of each expert, best first, -1 beyond the last.
        loss_LEE: expected loss of an access per squared slot weight, when column j answers for row i.
        scale_LEE: what j's output is multiplied with when it answers for i; None is 1 (the paper: original weight).
    """

    def __init__(self, signal: str, *, rank_LEH: Ints, loss_LEE: Floats, scale_LEE: Floats | None = None) -> None:
        self.kind = f"buddy:{signal}"
        self._ranked_LE = [[[j for j in row if j >= 0] for row in rank_EH] for rank_EH in rank_LEH.tolist()]
        self._loss_LEE, self._scale_LEE = loss_LEE, scale_LEE

    def answer(self, misses: Misses) -> StandinAnswers:
        expert_TK, found_TK = first_free(misses, self._ranked_LE[misses.layer])
        weight_TK = misses.weight_TK
        if self._scale_LEE is not None:
            weight_TK = weight_TK * self._scale_LEE[misses.layer][misses.ids_TK, expert_TK]
        loss_TK = np.square(misses.weight_TK) * self._loss_LEE[misses.layer][misses.ids_TK, expert_TK]
        return _buddies(misses, expert_TK, weight_TK, loss_TK, found_TK)

    def weights(self, misses: Misses, answers: StandinAnswers, take_TK: Bools) -> Floats:
        return np.where(take_TK, answers.weight_TK, misses.weight_TK)


class RouterBuddy:
    """The resident expert that the router itself scores highest, with its own score as weight.

    With `renormalise` the row keeps its sum, as the model's `norm_topk_prob` would have it; without, the scores are
    brought to the scale of the router's weights.
    """

    kind = "buddy:router"

    def __init__(self, *, loss_LEE: Floats, renormalise: bool) -> None:
        self._loss_LEE, self._renormalise = loss_LEE, renormalise

    def answer(self, misses: Misses) -> StandinAnswers:
        assert misses.score_TE is not None, (
            "buddy:router needs the router's scores: attach_router_scores was not called"
        )
        ids_TK, score_TE, missing_TK = misses.ids_TK, misses.score_TE, ~misses.resident_E[misses.ids_TK]
        row_T1 = np.arange(len(ids_TK))[:, None]
        offered_TE = np.where(misses.resident_E, score_TE, -np.inf)
        offered_TE[row_T1, ids_TK] = -np.inf
        # all slots of a token have one ranking: its n-th miss gets the n-th of those that are free
        order_TE = (-offered_TE).argsort(axis=1, kind="stable")
        turn_TK = missing_TK.cumsum(axis=1) - 1  # -1 before the first miss, where it is not asked
        expert_TK = order_TE[row_T1, turn_TK]
        found_TK = missing_TK & (offered_TE[row_T1, expert_TK] > -np.inf)
        expert_TK = np.where(found_TK, expert_TK, ids_TK)
        weight_TK = score_TE[row_T1, expert_TK] * _per_score(misses.weight_TK, score_TE[row_T1, ids_TK])
        loss_TK = np.square(misses.weight_TK) * self._loss_LEE[misses.layer][ids_TK, expert_TK]
        return _buddies(misses, expert_TK, weight_TK, loss_TK, found_TK)

    def weights(self, misses: Misses, answers: StandinAnswers, take_TK: Bools) -> Floats:
        weight_TK = np.where(take_TK, answers.weight_TK, misses.weight_TK)
        return _same_sum(misses, weight_TK, take_TK) if self._renormalise else weight_TK


class RandomBuddy:
    """Any resident expert, drawn from a hash of the row's routing: the null that every other buddy must beat."""

    kind = "random"

    def __init__(self, *, loss_LEE: Floats, seed: int = 0) -> None:
        self._loss_LEE, self._seed = loss_LEE, seed

    def answer(self, misses: Misses) -> StandinAnswers:
        T, K = misses.ids_TK.shape
        E = len(misses.resident_E)
        every_E = np.arange(E)
        mixed_TKE = (
            misses.ids_TK[:, :, None] * 7919 + every_E * 104729 + misses.ids_TK.sum(axis=1)[:, None, None] * 31337
        )
        mixed_TKE = (mixed_TKE + self._seed + misses.layer * 65537) * 2654435761 % 4294967291
        score_TKE = (mixed_TKE % 1000003).astype(np.float32)
        expert_TK, found_TK = pick_unique(misses, np.broadcast_to(every_E, (T, K, E)), score_TKE)
        loss_TK = np.square(misses.weight_TK) * self._loss_LEE[misses.layer][misses.ids_TK, expert_TK]
        return _buddies(misses, expert_TK, misses.weight_TK, loss_TK, found_TK)

    def weights(self, misses: Misses, answers: StandinAnswers, take_TK: Bools) -> Floats:
        return np.where(take_TK, answers.weight_TK, misses.weight_TK)


def _buddies(misses: Misses, expert_TK: Ints, weight_TK: Floats, loss_TK: Floats, found_TK: Bools) -> StandinAnswers:
    action_TK = np.full(misses.ids_TK.shape, Action.BUDDY, np.int8)
    return StandinAnswers(
        action_TK=action_TK, expert_TK=expert_TK, weight_TK=weight_TK, loss_TK=loss_TK, found_TK=found_TK
    )


def _same_sum(misses: Misses, weight_TK: Floats, take_TK: Bools) -> Floats:
    """Scale each row that is stood in for to the sum the router gave it; a row without survivors stays zero.

    Other rows keep their bits: two sums of the same weights may differ in the last one where memory order differs.
    """
    wanted_T1, sum_T1 = misses.weight_TK.sum(axis=1, keepdims=True), weight_TK.sum(axis=1, keepdims=True)
    scaled_T1 = take_TK.any(axis=1, keepdims=True) & (sum_T1 > 0)
    return np.where(scaled_T1, weight_TK * (wanted_T1 / np.where(scaled_T1, sum_T1, np.float32(1))), weight_TK)


def _per_score(weight_TK: Floats, score_TK: Floats) -> Floats:
    """The factor between the router's scores and its slot weights, per row `[T, 1]`."""
    score_T1 = np.maximum(score_TK.sum(axis=1, keepdims=True), np.float32(1e-20))
    factor_T1: Floats = weight_TK.sum(axis=1, keepdims=True) / score_T1
    return factor_T1
