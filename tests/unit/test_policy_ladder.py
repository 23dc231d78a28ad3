"""The ladder: equal to plain loops, exact rows untouched, bounded rows within their means, fast rows never waiting."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from policy_cases import INF, LAYERS, Dice, budgets, floats, miss, only_row, sizes
from policy_references import ladder_reference

from buddymoe_ray.policy import (
    Action,
    Buddy,
    Drop,
    Ladder,
    Misses,
    Own,
    RandomBuddy,
    Reason,
    Resolution,
    RouterBuddy,
    RowBudgets,
    Standin,
)
from buddymoe_ray.policy.misses import Bools

Sizes = tuple[int, int, int, int, float]
KINDS = ("own", "buddy", "router", "random", "drop")
STAND_INS = (Action.OWN, Action.BUDDY, Action.DROP)


def standin(name: str, dice: Dice, E: int) -> Standin:
    loss_LE, loss_LEE = dice.grid(LAYERS, E), dice.grid(LAYERS, E, E)
    if name == "own":
        return Own("lowbit3", loss_LE=loss_LE, has_LE=dice.coin(LAYERS, E, share=0.8))
    if name == "buddy":
        return Buddy("output", rank_LEH=dice.ranks(E, 5), loss_LEE=loss_LEE)
    if name == "router":
        return RouterBuddy(loss_LEE=loss_LEE, renormalise=True)
    return RandomBuddy(loss_LEE=loss_LEE) if name == "random" else Drop(loss_LE=loss_LE, renormalise=False)


def stood_in(resolution: Resolution) -> Bools:
    return resolution.action_TK >= Action.OWN


def own(losses: list[float], has: list[bool] | None = None) -> Own:
    """Records of 8 experts in every layer, with these expected losses."""
    padded = floats(losses + [0.0] * (8 - len(losses)))
    has_E = np.array(has if has is not None else [True] * 8)
    return Own("lowbit3", loss_LE=np.broadcast_to(padded, (LAYERS, 8)), has_LE=np.broadcast_to(has_E, (LAYERS, 8)))


@given(size=sizes(), name=st.sampled_from(KINDS))
def test_it_is_the_slow_twin(size: Sizes, name: str) -> None:
    seed, T, K, E, share = size
    dice = Dice(seed)
    misses, answers_by = dice.misses(T, K, E, resident=share), standin(name, dice, E)
    resolution = Ladder(answers_by).resolve(misses)
    actions, reasons = ladder_reference(answers_by, misses)
    assert resolution.action_TK.tolist() == actions
    assert resolution.reason_TK.tolist() == reasons


@given(size=sizes(), name=st.sampled_from(KINDS))
def test_what_is_promised_to_each_row(size: Sizes, name: str) -> None:
    seed, T, K, E, share = size
    dice = Dice(seed)
    misses, answers_by = dice.misses(T, K, E, resident=share), standin(name, dice, E)
    resolution, answers = Ladder(answers_by).resolve(misses), answers_by.answer(misses)
    resident_TK, stood_TK = misses.resident_E[misses.ids_TK], stood_in(resolution)
    assert np.array_equal(resolution.action_TK == Action.HIT, resident_TK), "a resident expert runs, nobody else does"
    assert not bool(stood_TK[misses.rows.mode_T == 0].any()), "an exact row is never stood in for"
    assert not bool((resolution.loss_TK != 0)[~stood_TK].any()), "hits and fetches are free"
    bounded_T = misses.rows.mode_T == 1
    spent_T = resolution.loss_TK.astype(np.float64).sum(axis=1)
    assert bool((spent_T[bounded_T] <= misses.rows.allowance_T[bounded_T]).all()), "a ledger never goes negative"
    assert bool((resolution.loss_TK <= misses.rows.price_T[:, None])[bounded_T].all()), (
        "no access is dearer than its price"
    )
    fetched = set(misses.ids_TK[resolution.action_TK == Action.FETCH].tolist())
    fast_T1 = (misses.rows.mode_T == 2)[:, None]
    for t, k in np.argwhere(fast_T1 & ~stood_TK & ~resident_TK).tolist():
        shared = resolution.reason_TK[t, k] == Reason.SHARED_FETCH
        assert shared or not answers.found_TK[t, k], "a fast row waits only where nobody can stand in"
    assert not fetched & set(misses.ids_TK[stood_TK].tolist()), "what one row fetches answers every row"
    own_choice_TK = resolution.action_TK < Action.BUDDY
    assert np.array_equal(resolution.expert_TK[own_choice_TK], misses.ids_TK[own_choice_TK])
    for row in resolution.expert_TK.tolist():
        assert len(set(row)) == len(row), "a token never gets one expert twice"


@given(size=sizes(), name=st.sampled_from(KINDS))
def test_a_row_decides_as_if_alone_but_for_fetches_it_shares(size: Sizes, name: str) -> None:
    seed, T, K, E, share = size
    dice = Dice(seed)
    misses, answers_by = dice.misses(T, K, E, resident=share), standin(name, dice, E)
    together = Ladder(answers_by).resolve(misses)
    for t in range(T):
        alone = Ladder(answers_by).resolve(only_row(misses, t))
        shared_K = together.reason_TK[t] == Reason.SHARED_FETCH
        assert np.array_equal(together.action_TK[t][~shared_K], alone.action_TK[0][~shared_K])
        assert bool((alone.action_TK[0][shared_K] >= Action.OWN).all()), "sharing only ever spares a stand-in"


@given(size=sizes(), more=st.sampled_from([0.0, 0.25, 1.0, 8.0]))
def test_more_allowance_never_means_fewer_stand_ins(size: Sizes, more: float) -> None:
    seed, _, K, E, share = size
    dice = Dice(seed)
    poor = dice.misses(1, K, E, modes=(1,), resident=share)
    rich = replace(poor, rows=replace(poor.rows, allowance_T=poor.rows.allowance_T + more))
    ladder = Ladder(standin("own", dice, E))
    few_TK, many_TK = stood_in(ladder.resolve(poor)), stood_in(ladder.resolve(rich))
    assert bool((many_TK | ~few_TK).all())


def test_the_least_harmful_are_taken_first() -> None:
    misses = miss([[0, 1, 2, 3]], [[1.0] * 4], [], budgets([1], allowance=0.875))
    resolution = Ladder(own([0.5, 0.25, 0.125, 0.5])).resolve(misses)
    assert resolution.action_TK.tolist() == [[Action.OWN, Action.OWN, Action.OWN, Action.FETCH]]
    assert resolution.loss_TK.tolist() == [[0.5, 0.25, 0.125, 0.0]]
    assert resolution.reason_TK.tolist()[0][3] == Reason.OVER_ALLOWANCE


def test_a_dear_use_is_fetched_though_there_is_money() -> None:
    misses = miss([[0, 1]], [[1.0, 0.5]], [], budgets([1], allowance=10.0, price=0.25))
    resolution = Ladder(own([0.5, 0.5])).resolve(misses)
    assert resolution.reason_TK.tolist() == [[Reason.OVER_PRICE, Reason.SUBSTITUTED]], (
        "expected loss goes with weight squared"
    )


def test_one_rows_fetch_answers_every_row_and_costs_nothing() -> None:
    misses = miss([[0, 1], [1, 2], [2, 0]], [[0.5, 0.5]] * 3, [], budgets([0, 1, 2], allowance=9.0))
    resolution = Ladder(own([0.5, 0.5, 0.5])).resolve(misses)
    shared, taken, wanted = Reason.SHARED_FETCH, Reason.SUBSTITUTED, Reason.WANTED_EXACT
    assert resolution.reason_TK.tolist() == [[wanted, wanted], [shared, taken], [taken, shared]]
    assert resolution.loss_TK.tolist() == [[0, 0], [0, 0.125], [0.125, 0]]


def test_fast_takes_even_what_nobody_has_measured() -> None:
    """Expected losses that are unknown or endless stop a bounded row, not a fast one, alone or together."""
    for loss in (float("nan"), INF):
        for modes in ([2], [2, 1]):
            rows = budgets(modes, allowance=5.0)
            misses = miss([[0, 1], [2, 3]][: len(modes)], [[0.5, 0.5]] * len(modes), [], rows)
            resolution = Ladder(own([loss, 0.25, loss, 0.25])).resolve(misses)
            expected = [[Action.OWN, Action.OWN], [Action.FETCH, Action.OWN]][: len(modes)]
            assert resolution.action_TK.tolist() == expected, (loss, modes)


def test_fast_goes_on_when_its_allowance_is_no_number() -> None:
    """Endless expected loss taken off an endless allowance in an earlier layer."""
    rows = RowBudgets(
        mode_T=np.array([2, 1], np.int8),
        allowance_T=floats([INF - INF, 1.0]),
        price_T=floats([INF, INF]),
    )
    resolution = Ladder(own([0.5] * 4)).resolve(miss([[0, 1], [2, 3]], [[0.5, 0.5]] * 2, [], rows))
    assert stood_in(resolution).all()


def test_nobody_to_stand_in_is_a_fetch() -> None:
    misses = miss([[0, 1]], [[0.5, 0.5]], [], budgets([2]))
    resolution = Ladder(own([0.0, 0.0], has=[True] + [False] * 7)).resolve(misses)
    assert resolution.reason_TK.tolist() == [[Reason.SUBSTITUTED, Reason.NO_STANDIN]]


def test_a_fallback_serves_only_those_who_must_not_wait() -> None:
    nobody = Buddy("output", rank_LEH=np.full((LAYERS, 8, 2), -1), loss_LEE=np.zeros((LAYERS, 8, 8), np.float32))
    ladder = Ladder(nobody, fallback=Drop(loss_LE=np.ones((LAYERS, 8), np.float32), renormalise=False))
    misses = miss([[0], [1], [2]], [[0.5], [0.5], [0.5]], [3], budgets([0, 1, 2], allowance=9.0))
    resolution = ladder.resolve(misses)
    assert resolution.action_TK.tolist() == [[Action.FETCH], [Action.FETCH], [Action.DROP]]
    assert resolution.weight_TK.tolist() == [[0.5], [0.5], [0.0]] and resolution.loss_TK.tolist() == [[0], [0], [0.25]]


def test_the_stand_in_comes_before_the_fallback() -> None:
    someone = Buddy("output", rank_LEH=np.full((LAYERS, 8, 1), 7), loss_LEE=np.ones((LAYERS, 8, 8), np.float32))
    ladder = Ladder(someone, fallback=Drop(loss_LE=np.zeros((LAYERS, 8), np.float32), renormalise=False))
    resolution = ladder.resolve(miss([[0, 1]], [[0.75, 0.25]], [7], budgets([2])))
    assert resolution.action_TK.tolist() == [[Action.BUDDY, Action.DROP]]
    assert resolution.expert_TK.tolist() == [[7, 1]] and resolution.weight_TK.tolist() == [[0.75, 0.0]]


class Unasked(Own):
    """A stand-in that must not be asked."""

    def answer(self, misses: Misses):  # type: ignore[no-untyped-def]
        raise AssertionError("asked though nothing is missing")


def test_nothing_missing_asks_nobody() -> None:
    loss_LE, has_LE = np.zeros((LAYERS, 8), np.float32), np.ones((LAYERS, 8), np.bool_)
    ladder = Ladder(Unasked("lowbit3", loss_LE=loss_LE, has_LE=has_LE))
    misses = miss([[0, 1]], [[0.5, 0.5]], [0, 1], budgets([1]))
    resolution = ladder.resolve(misses)
    assert resolution.weight_TK is misses.weight_TK and not resolution.action_TK.any()
    none = Dice(0).misses(1, 2, 8, resident=0.0)
    empty = replace(none, ids_TK=none.ids_TK[:0], weight_TK=none.weight_TK[:0])
    assert ladder.resolve(empty).action_TK.shape == (0, 2)


@pytest.mark.parametrize("name", KINDS)
def test_shapes_and_types(name: str) -> None:
    dice = Dice(5)
    misses = dice.misses(6, 4, 12)
    resolution = Ladder(standin(name, dice, 12)).resolve(misses)
    assert resolution.action_TK.dtype == resolution.reason_TK.dtype == np.int8
    assert resolution.expert_TK.dtype == np.int64 and resolution.loss_TK.dtype == np.float32
    assert resolution.weight_TK.dtype == np.float32
    for tensor in vars(resolution).values():
        assert tensor.shape == (6, 4)


def test_layers_share_one_allowance() -> None:
    """What the caller takes off after each layer is gone for the next: no order of layers overdraws."""
    for seed in range(50):
        dice = Dice(seed)
        ladder = Ladder(standin("own", dice, 16))
        first = dice.misses(4, 4, 16, modes=(1,), resident=0.2)
        rows, spent_T = first.rows, np.zeros(4)
        for _ in range(12):
            layer = replace(dice.misses(4, 4, 16, modes=(1,), resident=0.2), rows=rows)
            loss_T = ladder.resolve(layer).loss_TK.sum(axis=1)
            rows = replace(rows, allowance_T=rows.allowance_T - loss_T)
            spent_T += loss_T
        assert bool((spent_T <= first.rows.allowance_T).all()) and bool((rows.allowance_T >= 0).all())
