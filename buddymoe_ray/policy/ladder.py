"""The miss ladder: per access the cheapest option in time that the row's remaining budget allows.

A resident expert runs; else a stand-in answers where its expected loss is within the row's price and allowance; else
the expert is fetched. Pure; vectorised over all accesses of a layer, its twin in plain loops is a test's. Invariant:
an exact row is never stood in for; a bounded row is never charged beyond its allowance; a fast row never asks for a
fetch where there is a stand-in, even one of unknown expected loss.

Legend: T rows, K slots, E experts.
"""

from __future__ import annotations

import numpy as np

from buddymoe_ray.policy.misses import Bools, Floats, Ints, Misses, Reason, Resolution, RowBudgets
from buddymoe_ray.policy.standins import Own, Standin, StandinAnswers
from buddymoe_ray.types import BOUNDED, EXACT, FAST

__all__ = ["Ladder", "all_resident", "within_budget"]

_ZERO = np.float32(0)
_SUBSTITUTED = np.int8(Reason.SUBSTITUTED)


class Ladder:
    """Answers misses with `standin` within each row's budget (`RowBudgets`).

    Where it finds nobody, `fallback` (if any) answers the rows that must not wait.
    """

    def __init__(self, standin: Standin, *, fallback: Standin | None = None) -> None:
        self.standin, self._fallback = standin, fallback

    @property
    def own(self) -> Own | None:
        """The stand-in, where nobody but an expert's own record answers for it."""
        return self.standin if isinstance(self.standin, Own) and self._fallback is None else None

    def resolve(self, misses: Misses) -> Resolution:
        """Accesses of a row are taken in rising order of expected loss until its allowance is spent. An expert that any
        row of the step fetches answers every row."""
        ids_TK, rows = misses.ids_TK, misses.rows
        missing_TK = ~misses.resident_E[ids_TK]
        if not missing_TK.any():
            return all_resident(misses)
        answers = self._answers(misses, missing_TK)
        if _all_paid(rows, answers, missing_TK):
            return self._all_answered(misses, answers, missing_TK)
        wanted_TK = missing_TK & (rows.mode_T != EXACT)[:, None]
        able_TK = wanted_TK & answers.found_TK
        cheap_TK, take_TK = within_budget(rows, answers.loss_TK, able_TK)
        shared_TK = take_TK & _fetched_anyway(ids_TK, missing_TK & ~take_TK, len(misses.resident_E))
        take_TK = take_TK & ~shared_TK
        reason_TK = np.zeros(ids_TK.shape, np.int8)
        reason_TK[missing_TK] = Reason.WANTED_EXACT
        reason_TK[wanted_TK] = Reason.NO_STANDIN
        reason_TK[able_TK] = Reason.OVER_PRICE
        reason_TK[cheap_TK] = Reason.OVER_ALLOWANCE
        reason_TK[shared_TK] = Reason.SHARED_FETCH
        reason_TK[take_TK] = Reason.SUBSTITUTED
        return Resolution(
            action_TK=np.where(take_TK, answers.action_TK, missing_TK.view(np.int8)),  # 0 a hit, 1 a fetch
            expert_TK=np.where(take_TK, answers.expert_TK, ids_TK),
            weight_TK=self.standin.weights(misses, answers, take_TK),
            loss_TK=np.where(take_TK, answers.loss_TK, _ZERO),
            reason_TK=reason_TK,
        )

    def _all_answered(self, misses: Misses, answers: StandinAnswers, missing_TK: Bools) -> Resolution:
        """Every miss is stood in for."""
        return Resolution(
            action_TK=answers.action_TK * missing_TK,
            expert_TK=answers.expert_TK,
            weight_TK=self.standin.weights(misses, answers, missing_TK),
            loss_TK=np.where(missing_TK, answers.loss_TK, _ZERO),
            reason_TK=missing_TK * _SUBSTITUTED,
        )

    def _answers(self, misses: Misses, missing_TK: Bools) -> StandinAnswers:
        answers = self.standin.answer(misses)
        if self._fallback is None:
            return answers
        fast_T1 = (misses.rows.mode_T == FAST)[:, None]
        if not (fast_T1 & ~answers.found_TK & missing_TK).any():
            return answers
        other = self._fallback.answer(misses)
        access_TK = ~answers.found_TK & other.found_TK & fast_T1
        return StandinAnswers(
            action_TK=np.where(access_TK, other.action_TK, answers.action_TK),
            expert_TK=np.where(access_TK, other.expert_TK, answers.expert_TK),
            weight_TK=np.where(access_TK, other.weight_TK, answers.weight_TK),
            loss_TK=np.where(access_TK, other.loss_TK, answers.loss_TK),
            found_TK=answers.found_TK | access_TK,
        )


def all_resident(misses: Misses) -> Resolution:
    """Every use is a hit."""
    zero_TK = np.zeros(misses.ids_TK.shape, np.int8)
    return Resolution(
        action_TK=zero_TK,
        expert_TK=misses.ids_TK,
        weight_TK=misses.weight_TK,
        loss_TK=np.zeros(misses.ids_TK.shape, np.float32),
        reason_TK=zero_TK,
    )


def _all_paid(rows: RowBudgets, answers: StandinAnswers, missing_TK: Bools) -> bool:
    """Whether every miss has an answer that its row can pay: the usual case, and nothing else need be weighed."""
    if not (answers.found_TK | ~missing_TK).all():
        return False
    fast_T = rows.mode_T == FAST
    if fast_T.all():
        return True
    loss_TK = np.where(missing_TK, answers.loss_TK, _ZERO)
    paid_T = (rows.mode_T == BOUNDED) & (loss_TK.sum(axis=1, dtype=np.float64) <= rows.allowance_T)
    paid_T &= (loss_TK <= rows.price_T[:, None]).all(axis=1)
    return bool((fast_T | paid_T | ~missing_TK.any(axis=1)).all())


def within_budget(rows: RowBudgets, loss_TK: Floats, able_TK: Bools) -> tuple[Bools, Bools]:
    """Which of the accesses that a stand-in could answer are within their row's price, and which of those it can pay.

    A bounded row takes the smallest expected loss first until its allowance is spent; a fast row takes all.
    """
    free_T1 = (rows.mode_T == FAST)[:, None]
    cheap_TK = able_TK & ((loss_TK <= rows.price_T[:, None]) | free_T1)
    if not (rows.mode_T == BOUNDED).any():
        return cheap_TK, cheap_TK
    offered_TK = np.where(cheap_TK, loss_TK, np.inf)
    order_TK = offered_TK.argsort(axis=1, kind="stable")
    # sums in double: the row's own float32 sums may not be told that something fits which does not
    sums_TK = np.take_along_axis(offered_TK, order_TK, axis=1).cumsum(axis=1, dtype=np.float64)
    paid_TK = np.zeros_like(cheap_TK)
    np.put_along_axis(paid_TK, order_TK, sums_TK <= rows.allowance_T[:, None], axis=1)
    return cheap_TK, cheap_TK & (paid_TK | free_T1)


def _fetched_anyway(ids_TK: Ints, fetch_TK: Bools, E: int) -> Bools:
    fetched_E = np.zeros(E, np.bool_)
    fetched_E[ids_TK[fetch_TK]] = True
    return fetched_E[ids_TK]
