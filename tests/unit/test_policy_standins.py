"""Stand-ins: each against plain loops, no expert twice in a token, weights as the model's own rule would have them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from policy_cases import LAYERS, Dice, budgets, floats, miss, sizes

from buddymoe_ray.policy import (
    Action,
    Buddy,
    Drop,
    Misses,
    Own,
    RandomBuddy,
    RouterBuddy,
    Standin,
    StandinAnswers,
    pick,
)
from buddymoe_ray.policy.misses import Floats
from buddymoe_ray.policy.pick import pick_unique

Sizes = tuple[int, int, int, int, float]


def first_free(misses: Misses, ranked: Callable[[int, int], list[int]]) -> list[list[int | None]]:
    """Buddies in plain loops: `ranked(t, expert)` names candidates, best first."""
    picked: list[list[int | None]] = []
    for t, row in enumerate(misses.ids_TK.tolist()):
        used = set(row)
        answers: list[int | None] = []
        for expert in row:
            best = None
            if not misses.resident_E[expert]:
                open_ones = [j for j in ranked(t, expert) if j >= 0 and misses.resident_E[j] and j not in used]
                best = open_ones[0] if open_ones else None
            if best is not None:
                used.add(best)
            answers.append(best)
        picked.append(answers)
    return picked


def found(misses: Misses, answers: StandinAnswers) -> list[list[int | None]]:
    """What a stand-in found, where the expert is missing."""
    return [
        [
            int(answers.expert_TK[t, k]) if answers.found_TK[t, k] and not misses.resident_E[expert] else None
            for k, expert in enumerate(row)
        ]
        for t, row in enumerate(misses.ids_TK.tolist())
    ]


def loss_of_pairs(misses: Misses, answers: StandinAnswers, loss_LEE: Floats) -> None:
    for t, k in np.argwhere(answers.found_TK).tolist():
        i, j = int(misses.ids_TK[t, k]), int(answers.expert_TK[t, k])
        expected = float(misses.weight_TK[t, k]) ** 2 * float(loss_LEE[misses.layer, i, j])
        assert float(answers.loss_TK[t, k]) == expected


@given(size=sizes())
def test_own_is_whoever_has_a_record(size: Sizes) -> None:
    seed, T, K, E, share = size
    dice = Dice(seed)
    misses, loss_LE, has_LE = dice.misses(T, K, E, resident=share), dice.grid(LAYERS, E), dice.coin(LAYERS, E)
    own = Own("lowbit3", loss_LE=loss_LE, has_LE=has_LE)
    answers = own.answer(misses)
    for t in range(T):
        for k in range(K):
            expert = int(misses.ids_TK[t, k])
            assert bool(answers.found_TK[t, k]) == bool(has_LE[misses.layer, expert])
            expected = float(misses.weight_TK[t, k]) ** 2 * float(loss_LE[misses.layer, expert])
            assert float(answers.loss_TK[t, k]) == expected
    assert own.kind == "lowbit3" and set(answers.action_TK.ravel().tolist()) == {Action.OWN}
    assert np.array_equal(answers.expert_TK, misses.ids_TK)
    assert own.weights(misses, answers, answers.found_TK) is misses.weight_TK


@given(size=sizes())
def test_buddies_of_a_table_are_the_first_that_are_free(size: Sizes) -> None:
    seed, T, K, E, share = size
    dice = Dice(seed)
    misses = dice.misses(T, K, E, resident=share)
    rank_LEH, loss_LEE, scale_LEE = dice.ranks(E, 6), dice.grid(LAYERS, E, E), dice.grid(LAYERS, E, E)
    buddy = Buddy("output", rank_LEH=rank_LEH, loss_LEE=loss_LEE, scale_LEE=scale_LEE)
    answers = buddy.answer(misses)
    assert found(misses, answers) == first_free(misses, lambda _, e: rank_LEH[misses.layer, e].tolist())
    loss_of_pairs(misses, answers, loss_LEE)
    for t, k in np.argwhere(answers.found_TK).tolist():
        i, j = int(misses.ids_TK[t, k]), int(answers.expert_TK[t, k])
        scale = float(scale_LEE[misses.layer, i, j])
        assert float(answers.weight_TK[t, k]) == float(misses.weight_TK[t, k]) * scale
    assert buddy.kind == "buddy:output"


@given(size=sizes())
def test_the_first_that_is_free_has_the_best_of_falling_scores(size: Sizes) -> None:
    """The loops along a ranking against the array operations over all candidates."""
    seed, T, K, E, share = size
    dice = Dice(seed)
    misses, rank_EH = dice.misses(T, K, E, resident=share), dice.ranks(E, 6)[0]
    candidates_TKH = rank_EH[misses.ids_TK]
    falling_TKH = np.broadcast_to(-np.arange(rank_EH.shape[1], dtype=np.float32), candidates_TKH.shape)
    expected = pick_unique(misses, candidates_TKH, falling_TKH)
    answers = pick.first_free(misses, [[j for j in row if j >= 0] for row in rank_EH.tolist()])
    assert np.array_equal(answers[0], expected[0]) and np.array_equal(answers[1], expected[1])


@given(size=sizes())
def test_router_buddies_are_the_best_resident_by_live_score(size: Sizes) -> None:
    seed, T, K, E, share = size
    dice = Dice(seed)
    misses, loss_LEE = dice.misses(T, K, E, resident=share), dice.grid(LAYERS, E, E)
    answers = RouterBuddy(loss_LEE=loss_LEE, renormalise=False).answer(misses)
    assert misses.score_TE is not None
    score_TE = misses.score_TE
    assert found(misses, answers) == first_free(
        misses, lambda t, _: sorted(range(E), key=lambda j: (-float(score_TE[t, j]), j))
    )
    loss_of_pairs(misses, answers, loss_LEE)


@given(size=sizes())
def test_no_stand_in_gives_a_token_one_expert_twice(size: Sizes) -> None:
    seed, T, K, E, share = size
    dice = Dice(seed)
    misses, loss_LEE = dice.misses(T, K, E, resident=share), dice.grid(LAYERS, E, E)
    for standin in (
        Buddy("coactivation", rank_LEH=dice.ranks(E, 6), loss_LEE=loss_LEE),
        RouterBuddy(loss_LEE=loss_LEE, renormalise=True),
        RandomBuddy(loss_LEE=loss_LEE, seed=seed % 1000),
    ):
        answers = standin.answer(misses)
        for row in answers.expert_TK.tolist():
            assert len(set(row)) == len(row), f"{standin.kind}: {row}"
        assert bool(misses.resident_E[answers.expert_TK[answers.found_TK]].all()), "a buddy is resident"
        assert not bool((answers.found_TK & misses.resident_E[misses.ids_TK]).any()), "a hit needs no buddy"


@given(size=sizes())
def test_every_buddy_that_could_be_found_is(size: Sizes) -> None:
    """With all experts as candidates a slot stays empty only when the token uses every resident one."""
    seed, T, K, E, share = size
    dice = Dice(seed)
    misses = dice.misses(T, K, E, resident=share)
    answers = RandomBuddy(loss_LEE=dice.grid(LAYERS, E, E)).answer(misses)
    resident = int(misses.resident_E.sum())
    for t in range(T):
        hits = int(misses.resident_E[misses.ids_TK[t]].sum())
        assert int(answers.found_TK[t].sum()) == min(K - hits, resident - hits)


def test_ties_go_to_the_earlier_candidate() -> None:
    misses = miss([[0]], [[1.0]], [3, 5, 6], budgets([2]))
    candidates_TKH = np.array([[[6, 3, 5]]])
    expert_TK, found_TK = pick_unique(misses, candidates_TKH, np.ones((1, 1, 3), np.float32))
    assert expert_TK.tolist() == [[6]] and found_TK.tolist() == [[True]]


def test_slots_choose_in_order() -> None:
    """The heavier slot comes first and takes the buddy that both want."""
    misses = miss([[0, 1]], [[0.75, 0.25]], [2, 3], budgets([2]))
    both = np.broadcast_to([2, 3], (LAYERS, 8, 2))
    answers = Buddy("coactivation", rank_LEH=both, loss_LEE=np.zeros((LAYERS, 8, 8), np.float32)).answer(misses)
    assert answers.expert_TK.tolist() == [[2, 3]]
    assert answers.weight_TK.tolist() == [[0.75, 0.25]], "without scales the slot keeps its weight"


def test_a_tables_end_is_an_end() -> None:
    """-1 is no expert, not the last one and not expert 0."""
    misses = miss([[1]], [[1.0]], [0, 7], budgets([2]))
    none_left = np.full((LAYERS, 8, 3), -1)
    answers = Buddy("coactivation", rank_LEH=none_left, loss_LEE=np.zeros((LAYERS, 8, 8), np.float32)).answer(misses)
    assert answers.found_TK.tolist() == [[False]] and answers.expert_TK.tolist() == [[1]]


def test_a_missing_score_is_said() -> None:
    misses = miss([[1]], [[1.0]], [0], budgets([2]))
    with pytest.raises(AssertionError, match="needs the router's scores"):
        RouterBuddy(loss_LEE=np.zeros((LAYERS, 8, 8), np.float32), renormalise=True).answer(misses)


def every(dice: Dice, E: int, *, renormalise: bool) -> list[Standin]:
    loss_LEE = dice.grid(LAYERS, E, E)
    return [
        Own("lowbit4", loss_LE=dice.grid(LAYERS, E), has_LE=dice.coin(LAYERS, E)),
        Drop(loss_LE=dice.grid(LAYERS, E), renormalise=renormalise),
        Buddy("output", rank_LEH=dice.ranks(E, 5), loss_LEE=loss_LEE, scale_LEE=dice.grid(LAYERS, E, E)),
        RouterBuddy(loss_LEE=loss_LEE, renormalise=renormalise),
        RandomBuddy(loss_LEE=loss_LEE),
    ]


@pytest.mark.parametrize("renormalise", [False, True])
def test_rows_without_stand_ins_keep_their_bits(renormalise: bool) -> None:
    """Weights of any size, in any memory order: other tenants must not feel who is stood in for."""
    for seed in range(20):
        dice = Dice(seed)
        misses = dice.misses(7, 6, 16)
        weight_TK = dice.rng.random((6, 7), np.float32).T
        misses = replace(misses, weight_TK=weight_TK)
        for standin in every(dice, 16, renormalise=renormalise):
            answers = standin.answer(misses)
            take_TK = answers.found_TK & (np.arange(7) % 2 == 0)[:, None]
            weights_TK = standin.weights(misses, answers, take_TK)
            untouched_T = ~take_TK.any(axis=1)
            assert np.array_equal(weights_TK[untouched_T], weight_TK[untouched_T]), standin.kind
            assert weights_TK.dtype == np.float32, standin.kind


def test_drop_follows_the_models_own_rule() -> None:
    misses = miss([[0, 1, 2], [0, 1, 2]], [[0.5, 0.25, 0.25], [0.5, 0.25, 0.125]], [0], budgets([2, 2]))
    take_TK = np.array([[False, True, True], [False, False, True]])
    for renormalise, expected in (
        (False, [[0.5, 0.0, 0.0], [0.5, 0.25, 0.0]]),
        (True, [[1.0, 0.0, 0.0], [0.5 * 0.875 / 0.75, 0.25 * 0.875 / 0.75, 0.0]]),
    ):
        drop = Drop(loss_LE=np.ones((LAYERS, 8), np.float32), renormalise=renormalise)
        answers = drop.answer(misses)
        np.testing.assert_allclose(drop.weights(misses, answers, take_TK), floats(expected))
        assert answers.loss_TK.tolist() == np.square(misses.weight_TK).tolist() and bool(answers.found_TK.all())
        assert not answers.weight_TK.any()


def test_a_token_without_survivors_is_zero() -> None:
    misses = miss([[0, 1]], [[0.5, 0.5]], [], budgets([2]))
    drop = Drop(loss_LE=np.ones((LAYERS, 8), np.float32), renormalise=True)
    assert drop.weights(misses, drop.answer(misses), np.ones((1, 2), np.bool_)).tolist() == [[0.0, 0.0]]


def test_router_buddies_bring_their_own_score() -> None:
    """Renormalised the row keeps its sum; else scores are brought to the scale of the router's weights."""
    misses = miss([[0, 1]], [[1.0, 0.5]], [0, 4], budgets([2]))
    score_TE = floats([[0.5, 0.25, 0.0, 0.0, 0.125, 0.0, 0.0, 0.125]])
    misses = replace(misses, score_TE=score_TE)
    take_TK = np.array([[False, True]])
    plain = RouterBuddy(loss_LEE=np.zeros((LAYERS, 8, 8), np.float32), renormalise=False)
    answers = plain.answer(misses)
    assert answers.expert_TK.tolist() == [[0, 4]]
    assert plain.weights(misses, answers, take_TK).tolist() == [[1.0, 0.25]], "weights are twice the scores"
    same_sum = RouterBuddy(loss_LEE=np.zeros((LAYERS, 8, 8), np.float32), renormalise=True)
    np.testing.assert_allclose(same_sum.weights(misses, answers, take_TK), floats([[1.2, 0.3]]))


def test_random_is_the_same_again_and_spreads() -> None:
    """A replay must draw the same; over many tokens nobody is preferred."""
    dice = Dice(3)
    E = 16
    misses = replace(dice.misses(4000, 2, E), resident_E=np.arange(E) % 2 == 0, layer=0)
    null = RandomBuddy(loss_LEE=np.zeros((LAYERS, E, E), np.float32), seed=1)
    answers = null.answer(misses)
    assert np.array_equal(answers.expert_TK, null.answer(misses).expert_TK)
    drawn = np.bincount(answers.expert_TK[answers.found_TK], minlength=E)[::2]
    assert int(drawn.min()) > 0.6 * float(drawn.mean()), drawn.tolist()
    other = RandomBuddy(loss_LEE=np.zeros((LAYERS, E, E), np.float32), seed=2).answer(misses)
    assert not np.array_equal(answers.expert_TK, other.expert_TK)
    elsewhere = null.answer(replace(misses, layer=2))
    assert not np.array_equal(answers.expert_TK, elsewhere.expert_TK)


def test_random_does_not_depend_on_the_batch() -> None:
    dice = Dice(4)
    misses = dice.misses(6, 4, 12)
    null = RandomBuddy(loss_LEE=np.zeros((LAYERS, 12, 12), np.float32))
    whole = null.answer(misses).expert_TK
    alone = null.answer(replace(misses, ids_TK=misses.ids_TK[2:3], weight_TK=misses.weight_TK[2:3])).expert_TK
    assert np.array_equal(whole[2:3], alone)
