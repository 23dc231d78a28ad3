"""BuddyMoE whole (arXiv 2511.10054): substitute a resident buddy when the router is undecided, else fetch.

Offline: buddy lists from co-activation, q(j|i) = M(i,j) / sum_j' M(i,j'), the shortest prefix of peers by falling q
whose sum reaches alpha (CFT), at most k_max. Online, in this order: TAE (the entropy of the renormalised top-k over
ln k) must be above tau, the margin p1 - p2 below gamma, the share of missing experts of the step and layer below
beta; then at most rho slots per token take the unused resident candidate of largest
    psi = q(j|i) (1 + eta z_j(x)) (1 - kappa hop(j))
among the first H, with z the router's score of j for this token as a share of its largest. The substitute keeps the
slot's weight; a slot that is forbidden or finds no buddy is fetched. `resolve_reference` is the same in plain loops.

Pure; knows no bytes. Legend: T rows, K slots, E experts, H candidates, L layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from buddymoe_ray.policy.ladder import all_resident, within_budget
from buddymoe_ray.policy.misses import Action, Misses, Reason, Resolution
from buddymoe_ray.policy.standins import pick_unique

__all__ = ["BuddyMoE", "BuddyParams", "buddy_lists", "normalised_entropy"]


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
    kappa: float = 0.0
    rho: int = 3
    search: int = 16


def buddy_lists(coactivation_EE: Tensor, params: BuddyParams) -> tuple[Tensor, Tensor, float]:
    """Candidates `[E, k_max]` by falling q (-1 beyond a list's end), their q `[E, k_max]`, and the share of lists that
    `k_max` cut short. `coactivation_EE[i, j]` counts tokens whose top-k holds both (the diagonal is ignored)."""
    E = len(coactivation_EE)
    counts_EE = coactivation_EE.double() + params.epsilon
    counts_EE.fill_diagonal_(0)
    q_EE = counts_EE / counts_EE.sum(dim=1, keepdim=True).clamp_min(1e-30)
    sorted_EE, order_EE = q_EE.sort(dim=1, descending=True, stable=True)
    before_EE = sorted_EE.cumsum(dim=1) - sorted_EE
    # 6 and 3 of 10 are .9, whatever their floats sum to
    wanted_EE = (before_EE < params.alpha - 1e-9) & (sorted_EE > 0)
    width = min(params.k_max, E)
    cut = float((wanted_EE.sum(dim=1) > width).double().mean())
    kept_EH = wanted_EE[:, :width]
    return order_EE[:, :width].where(kept_EH, -1), sorted_EE[:, :width].where(kept_EH, 0.0).float(), cut


def normalised_entropy(weight_TK: Tensor) -> Tensor:
    """Token activating entropy `[T]`: of the renormalised slot weights, over ln K; 0 is peaked, 1 is even."""
    p_TK = weight_TK.float() / weight_TK.float().sum(dim=1, keepdim=True).clamp_min(1e-20)
    return -(p_TK * p_TK.clamp_min(1e-20).log()).sum(dim=1) / math.log(max(2, weight_TK.shape[1]))


class BuddyMoE:
    """The paper's decision for each miss.

    Args:
        candidates_LEH, q_LEH: buddy lists and their q.
        tau_L: TAE at or below which a token of the layer is not touched.
        params: the other knobs.
        hop_E: 0 where an expert is on this device, else the hops to it; None is all 0.
        harm_LEE: harm of a use per squared slot weight, when column j answers for row i. The paper knows none: without
            it nothing is charged, and `bounded` rows, which pay for what they take, are not touched.
    """

    def __init__(
        self,
        *,
        candidates_LEH: Tensor,
        q_LEH: Tensor,
        tau_L: Tensor,
        params: BuddyParams,
        hop_E: Tensor | None = None,
        harm_LEE: Tensor | None = None,
    ) -> None:
        self.params, self._harm_LEE = params, harm_LEE
        self._candidates_LEH, self._q_LEH = candidates_LEH[..., : params.search], q_LEH[..., : params.search]
        self._tau_L, self._hop_E = tau_L, hop_E

    def resolve(self, misses: Misses) -> Resolution:
        """The paper's gates, then its buddies; a `bounded` row also keeps to its price and allowance."""
        ids_TK, params = misses.ids_TK, self.params
        resident_TK = misses.resident_E[ids_TK]
        if bool(resident_TK.all()):
            return all_resident(misses)
        gate_T = self._gate(misses, resident_TK)
        candidates_TKH = self._candidates_LEH[misses.layer][ids_TK]
        expert_TK, found_TK = pick_unique(misses, candidates_TKH, self._psi(misses, candidates_TKH))
        allowed_TK = ~resident_TK & (gate_T == Reason.SUBSTITUTED)[:, None]
        take_TK = allowed_TK & found_TK
        over_TK = take_TK & (take_TK.cumsum(dim=1) > params.rho)
        within_TK = take_TK & ~over_TK
        harm_TK = self._harm(misses, expert_TK)
        cheap_TK, take_TK = within_budget(misses.rows, harm_TK, within_TK)
        reason_TK = gate_T[:, None].expand(ids_TK.shape)
        reason_TK = torch.where(within_TK & ~take_TK, Reason.OVER_PRICE, reason_TK)
        reason_TK = torch.where(cheap_TK & ~take_TK, Reason.OVER_ALLOWANCE, reason_TK)
        reason_TK = torch.where(allowed_TK & ~found_TK, Reason.NO_BUDDY, reason_TK)
        reason_TK = torch.where(over_TK, Reason.OVER_RHO, reason_TK)
        reason_TK = torch.where(resident_TK, Reason.RESIDENT, reason_TK)
        action_TK = torch.where(take_TK, Action.BUDDY, torch.where(resident_TK, Action.HIT, Action.FETCH))
        return Resolution(
            action_TK=action_TK.to(torch.int8),
            expert_TK=torch.where(take_TK, expert_TK, ids_TK),
            weight_TK=misses.weight_TK,
            harm_TK=torch.where(take_TK & ~harm_TK.isnan(), harm_TK, 0.0),
            reason_TK=reason_TK.to(torch.int8),
        )

    def _harm(self, misses: Misses, expert_TK: Tensor) -> Tensor:
        """Nats of each use; where no harms are known no number, which is within no price."""
        if self._harm_LEE is None:
            return torch.full_like(misses.weight_TK, math.nan, dtype=torch.float32)
        return misses.weight_TK.float().square() * self._harm_LEE[misses.layer][misses.ids_TK, expert_TK]

    def _gate(self, misses: Misses, resident_TK: Tensor) -> Tensor:
        """Per row why it may not be touched, or SUBSTITUTED when it may."""
        params, weight_TK = self.params, misses.weight_TK.float()
        p_TK = weight_TK / weight_TK.sum(dim=1, keepdim=True).clamp_min(1e-20)
        top_T2 = p_TK.topk(min(2, p_TK.shape[1]), dim=1).values
        margin_T = top_T2[:, 0] - top_T2[:, -1]
        wanted_E = torch.zeros_like(misses.resident_E)
        wanted_E[misses.ids_TK.reshape(-1)] = True
        missing_share = float((wanted_E & ~misses.resident_E).sum()) / max(1, int(wanted_E.sum()))
        exact_T = misses.rows.mode_T == 0
        gate_T = torch.full_like(margin_T, Reason.SUBSTITUTED, dtype=torch.int64)
        if missing_share >= params.beta:
            gate_T = torch.full_like(gate_T, Reason.GATED_DELTA)
        gate_T = torch.where(margin_T >= params.gamma, Reason.GATED_MARGIN, gate_T)
        gate_T = torch.where(normalised_entropy(weight_TK) <= self._tau_L[misses.layer], Reason.GATED_TAE, gate_T)
        return torch.where(exact_T, Reason.WANTED_EXACT, gate_T)

    def _psi(self, misses: Misses, candidates_TKH: Tensor) -> Tensor:
        q_TKH = self._q_LEH[misses.layer][misses.ids_TK]
        psi_TKH = q_TKH
        named_TKH = candidates_TKH.clamp_min(0)
        if misses.score_TE is not None and self.params.eta:
            share_TE = misses.score_TE / misses.score_TE.amax(dim=1, keepdim=True).clamp_min(1e-20)
            z_TKH = share_TE[:, None, :].expand(-1, named_TKH.shape[1], -1).gather(2, named_TKH)
            psi_TKH = psi_TKH * (1 + self.params.eta * z_TKH)
        if self._hop_E is not None:
            psi_TKH = psi_TKH * (1 - self.params.kappa * self._hop_E[named_TKH])
        return psi_TKH


def resolve_reference(policy: BuddyMoE, misses: Misses) -> list[list[tuple[Action, int, Reason]]]:
    """`BuddyMoE.resolve` in plain loops: `(action, expert, reason)` of each use. Knows no prices: no `bounded` rows."""
    ids, resident = misses.ids_TK.tolist(), misses.resident_E.tolist()
    wanted = {e for row in ids for e in row}
    delta = sum(not resident[e] for e in wanted) / len(wanted)
    decided = []
    for t, row in enumerate(ids):
        gate = _gate_reference(policy, misses, t, delta)
        used, taken, decision = set(row), 0, []
        for expert in row:
            if resident[expert]:
                decision.append((Action.HIT, expert, Reason.RESIDENT))
                continue
            best = _best_reference(policy, misses, t, expert, used)
            if best is not None:
                used.add(best)
            if gate is not Reason.SUBSTITUTED:
                decision.append((Action.FETCH, expert, gate))
            elif best is None:
                decision.append((Action.FETCH, expert, Reason.NO_BUDDY))
            elif taken >= policy.params.rho:
                decision.append((Action.FETCH, expert, Reason.OVER_RHO))
            else:
                taken += 1
                decision.append((Action.BUDDY, best, Reason.SUBSTITUTED))
        decided.append(decision)
    return decided


def _gate_reference(policy: BuddyMoE, misses: Misses, t: int, delta: float) -> Reason:
    weights = misses.weight_TK[t].tolist()
    p = sorted((w / sum(weights) for w in weights), reverse=True)
    entropy = -sum(v * math.log(max(v, 1e-20)) for v in p) / math.log(max(2, len(p)))
    if int(misses.rows.mode_T[t]) == 0:
        return Reason.WANTED_EXACT
    if entropy <= float(policy._tau_L[misses.layer]):
        return Reason.GATED_TAE
    if p[0] - p[min(1, len(p) - 1)] >= policy.params.gamma:
        return Reason.GATED_MARGIN
    return Reason.GATED_DELTA if delta >= policy.params.beta else Reason.SUBSTITUTED


def _best_reference(policy: BuddyMoE, misses: Misses, t: int, expert: int, used: set[int]) -> int | None:
    best, best_psi = None, -math.inf
    for j, q in zip(
        policy._candidates_LEH[misses.layer, expert].tolist(), policy._q_LEH[misses.layer, expert].tolist(), strict=True
    ):
        if j < 0 or not bool(misses.resident_E[j]) or j in used:
            continue
        psi = q
        if misses.score_TE is not None:
            psi *= 1 + policy.params.eta * float(misses.score_TE[t, j]) / float(misses.score_TE[t].max())
        if policy._hop_E is not None:
            psi *= 1 - policy.params.kappa * float(policy._hop_E[j])
        if psi > best_psi:
            best, best_psi = j, psi
    return best
