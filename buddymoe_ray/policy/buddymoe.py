"""BuddyMoE whole (arXiv 2511.10054): substitute a resident buddy when the router is undecided, else fetch.

Offline: buddy lists from co-activation, q(j|i) = M(i,j) / sum_j' M(i,j'), the shortest prefix of peers by falling q
whose sum reaches alpha (CFT), at most k_max. Online, in this order: TAE (the entropy of the renormalised top-k over
ln k) must be above tau, the margin p1 - p2 below gamma, the share of missing experts of the step and layer below
beta; then at most rho slots per token take the unused resident candidate of largest
    psi = q(j|i) (1 + eta z_j(x))
among the first H, with z the router's score of j for this token as a share of its largest; the paper's factor for hops
to other devices is 1: candidates are on this one. The substitute keeps the slot's weight; a slot that is forbidden or
finds no buddy is fetched. The same in plain loops is beside its tests.

Pure; knows no bytes. Legend: T rows, K slots, E experts, H candidates, L layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from buddymoe_ray.policy.ladder import all_resident, within_budget
from buddymoe_ray.policy.misses import Action, Floats, Ints, Misses, Reason, Resolution, Tiny
from buddymoe_ray.policy.pick import pick_unique
from buddymoe_ray.types import EXACT

__all__ = ["BuddyMoE", "BuddyParams", "buddy_lists", "normalised_entropy"]


_LEAST = np.float32(1e-20)


@dataclass(frozen=True, kw_only=True)
class BuddyParams:
    """The paper's knobs. `gamma`: margins at or above it forbid (2 is never); `beta`: shares of missing experts at or
    above it forbid (over 1 is never); `rho`: substitutes per token and layer; `search`: candidates looked at (H)."""

    alpha: float = 0.9
    k_max: int = 16
    epsilon: float = 0.0
    gamma: float = 2.0
    beta: float = 1.1
    eta: float = 0.5
    rho: int = 3
    search: int = 16


def buddy_lists(coactivation_EE: npt.NDArray[np.floating], params: BuddyParams) -> tuple[Ints, Floats, float]:
    """Candidates `[E, k_max]` by falling q (-1 beyond a list's end), their q `[E, k_max]`, and the share of lists that
    `k_max` cut short. `coactivation_EE[i, j]` counts tokens whose top-k holds both (the diagonal is ignored)."""
    E = len(coactivation_EE)
    counts_EE = coactivation_EE.astype(np.float64) + params.epsilon
    np.fill_diagonal(counts_EE, 0)
    q_EE = counts_EE / np.maximum(counts_EE.sum(axis=1, keepdims=True), 1e-30)
    order_EE = (-q_EE).argsort(axis=1, kind="stable")
    sorted_EE = np.take_along_axis(q_EE, order_EE, axis=1)
    before_EE = sorted_EE.cumsum(axis=1) - sorted_EE
    # 6 and 3 of 10 are .9, whatever their floats sum to
    wanted_EE = (before_EE < params.alpha - 1e-9) & (sorted_EE > 0)
    width = min(params.k_max, E)
    cut = float((wanted_EE.sum(axis=1) > width).mean())
    kept_EH = wanted_EE[:, :width]
    q_EH = np.where(kept_EH, sorted_EE[:, :width], 0.0).astype(np.float32)
    return np.where(kept_EH, order_EE[:, :width], -1), q_EH, cut


def normalised_entropy(weight_TK: Floats) -> Floats:
    """Token activating entropy `[T]`: of the renormalised slot weights, over ln K; 0 is peaked, 1 is even."""
    p_TK = _shares(weight_TK)
    entropy_T: Floats = -(p_TK * np.log(np.maximum(p_TK, _LEAST))).sum(axis=1)
    return entropy_T / np.float32(math.log(max(2, weight_TK.shape[1])))


def _shares(weight_TK: Floats) -> Floats:
    share_TK: Floats = weight_TK / np.maximum(weight_TK.sum(axis=1, keepdims=True), _LEAST)
    return share_TK


class BuddyMoE:
    """The paper's decision for each miss.

    Args:
        candidates_LEH, q_LEH: buddy lists and their q.
        tau_L: TAE at or below which a token of the layer is not touched.
        params: the other knobs.
        loss_LEE: expected loss of an access per squared slot weight, when column j answers for row i. The paper knows
        none: without
            it nothing is charged, and `bounded` rows, which pay for what they take, are not touched.
    """

    def __init__(
        self,
        *,
        candidates_LEH: Ints,
        q_LEH: Floats,
        tau_L: Floats,
        params: BuddyParams,
        loss_LEE: Floats | None = None,
    ) -> None:
        self.params, self._loss_LEE = params, loss_LEE
        self._candidates_LEH, self._q_LEH = candidates_LEH[..., : params.search], q_LEH[..., : params.search]
        self._tau_L = tau_L

    def resolve(self, misses: Misses) -> Resolution:
        """The paper's gates, then its buddies; a `bounded` row also keeps to its price and allowance."""
        ids_TK, params = misses.ids_TK, self.params
        resident_TK = misses.resident_E[ids_TK]
        if resident_TK.all():
            return all_resident(misses)
        gate_T = self._gate(misses)
        candidates_TKH = self._candidates_LEH[misses.layer][ids_TK]
        expert_TK, found_TK = pick_unique(misses, candidates_TKH, self._psi(misses, candidates_TKH))
        allowed_TK = ~resident_TK & (gate_T == Reason.SUBSTITUTED)[:, None]
        take_TK = allowed_TK & found_TK
        over_TK = take_TK & (take_TK.cumsum(axis=1) > params.rho)
        within_TK = take_TK & ~over_TK
        loss_TK = self._loss(misses, expert_TK)
        cheap_TK, take_TK = within_budget(misses.rows, loss_TK, within_TK)
        reason_TK = np.broadcast_to(gate_T[:, None], ids_TK.shape).copy()
        reason_TK[within_TK & ~take_TK] = Reason.OVER_PRICE
        reason_TK[cheap_TK & ~take_TK] = Reason.OVER_ALLOWANCE
        reason_TK[allowed_TK & ~found_TK] = Reason.NO_BUDDY
        reason_TK[over_TK] = Reason.OVER_RHO
        reason_TK[resident_TK] = Reason.RESIDENT
        return Resolution(
            action_TK=np.where(take_TK, np.int8(Action.BUDDY), (~resident_TK).view(np.int8)),  # 0 a hit, 1 a fetch
            expert_TK=np.where(take_TK, expert_TK, ids_TK),
            weight_TK=misses.weight_TK,
            loss_TK=np.where(take_TK & ~np.isnan(loss_TK), loss_TK, np.float32(0)),
            reason_TK=reason_TK,
        )

    def _loss(self, misses: Misses, expert_TK: Ints) -> Floats:
        """Nats of each access; where no expected losses are known no number, which is within no price."""
        if self._loss_LEE is None:
            return np.full(misses.weight_TK.shape, math.nan, np.float32)
        loss_TK: Floats = np.square(misses.weight_TK) * self._loss_LEE[misses.layer][misses.ids_TK, expert_TK]
        return loss_TK

    def _gate(self, misses: Misses) -> Tiny:
        """Per row why it may not be touched, or SUBSTITUTED when it may."""
        params, T = self.params, len(misses.ids_TK)
        top_TK = np.sort(_shares(misses.weight_TK), axis=1)[:, ::-1]
        margin_T = top_TK[:, 0] - top_TK[:, min(1, top_TK.shape[1] - 1)]
        wanted = np.unique(misses.ids_TK)
        missing_share = float((~misses.resident_E[wanted]).sum()) / max(1, len(wanted))
        untouched = missing_share >= params.beta
        gate_T = np.full(T, Reason.GATED_DELTA if untouched else Reason.SUBSTITUTED, np.int8)
        gate_T[margin_T >= params.gamma] = Reason.GATED_MARGIN
        gate_T[normalised_entropy(misses.weight_TK) <= self._tau_L[misses.layer]] = Reason.GATED_TAE
        gate_T[misses.rows.mode_T == EXACT] = Reason.WANTED_EXACT
        return gate_T

    def _psi(self, misses: Misses, candidates_TKH: Ints) -> Floats:
        psi_TKH: Floats = self._q_LEH[misses.layer][misses.ids_TK]
        if misses.score_TE is not None and self.params.eta:
            share_TE = misses.score_TE / np.maximum(misses.score_TE.max(axis=1, keepdims=True), _LEAST)
            z_TKH = share_TE[np.arange(len(share_TE))[:, None, None], candidates_TKH]  # where there is none, any
            psi_TKH = psi_TKH * (1 + self.params.eta * z_TKH)
        return psi_TKH
