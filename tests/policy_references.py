"""What policies decide, in plain loops: the specs of `Ladder.resolve` and `BuddyMoE.resolve`."""

from __future__ import annotations

import math

from buddymoe_ray.policy import Action, Misses, Reason, Standin, StandinAnswers
from buddymoe_ray.policy.buddymoe import BuddyMoE
from buddymoe_ray.types import EXACT, FAST

__all__ = ["buddymoe_reference", "ladder_reference"]


def ladder_reference(standin: Standin, misses: Misses) -> tuple[list[list[Action]], list[list[Reason]]]:
    """The ladder in plain loops: the spec of `Ladder.resolve`'s actions and reasons."""
    answers: StandinAnswers = standin.answer(misses)
    ids = misses.ids_TK.tolist()
    actions = [[Action.HIT for _ in row] for row in ids]
    reasons = [[Reason.RESIDENT for _ in row] for row in ids]
    fetched: set[int] = set()
    for t, row in enumerate(ids):
        left = float(misses.rows.allowance_T[t])
        order = sorted(range(len(row)), key=lambda k, t=t: (float(answers.loss_TK[t, k]), k))  # type: ignore[misc]
        for k in order:
            if bool(misses.resident_E[row[k]]):
                continue
            loss = float(answers.loss_TK[t, k])
            if int(misses.rows.mode_T[t]) == EXACT:
                reasons[t][k] = Reason.WANTED_EXACT
            elif not bool(answers.found_TK[t, k]):
                reasons[t][k] = Reason.NO_STANDIN
            elif int(misses.rows.mode_T[t]) == FAST:
                reasons[t][k] = Reason.SUBSTITUTED
            elif not loss <= float(misses.rows.price_T[t]):
                reasons[t][k] = Reason.OVER_PRICE
            elif loss > left:
                reasons[t][k], left = Reason.OVER_ALLOWANCE, -math.inf
            else:
                reasons[t][k], left = Reason.SUBSTITUTED, left - loss
            taken = reasons[t][k] is Reason.SUBSTITUTED
            actions[t][k] = Action(int(answers.action_TK[t, k])) if taken else Action.FETCH
            if not taken:
                fetched.add(row[k])
    for t, row in enumerate(ids):
        for k, expert in enumerate(row):
            if actions[t][k] > Action.FETCH and expert in fetched:
                actions[t][k], reasons[t][k] = Action.FETCH, Reason.SHARED_FETCH
    return actions, reasons


def buddymoe_reference(policy: BuddyMoE, misses: Misses) -> list[list[tuple[Action, int, Reason]]]:
    """`BuddyMoE.resolve` in plain loops: `(action, expert, reason)` of each access. Knows no prices: no `bounded`
    rows."""
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
    if int(misses.rows.mode_T[t]) == EXACT:
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
        if psi > best_psi:
            best, best_psi = j, psi
    return best
