"""BuddyMoE: lists by cumulative frequency, every gate by hand and in order, and the whole against plain loops."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from policy_cases import INF, LAYERS, Dice, budgets, floats, miss, sizes
from policy_references import buddymoe_reference

from buddymoe_ray.policy import Action, BuddyMoE, BuddyParams, Reason, buddy_lists, normalised_entropy
from buddymoe_ray.policy.misses import Ints

Sizes = tuple[int, int, int, int, float]
E = 8


def lists_by_hand(counts: list[list[float]], params: BuddyParams) -> tuple[list[list[int]], int]:
    """The shortest prefix of peers by falling q that sums to alpha, and how many lists k_max cut."""
    lists, cut = [], 0
    for i, row in enumerate(counts):
        peers = [(c + params.epsilon, j) for j, c in enumerate(row) if j != i and c + params.epsilon > 0]
        total = math.fsum(c for c, _ in peers)
        chosen: list[int] = []
        for _, j in sorted(peers, key=lambda peer: (-peer[0], peer[1])):
            if math.fsum(row[c] + params.epsilon for c in chosen) / total >= params.alpha - 1e-9:
                break
            chosen.append(j)
        cut += len(chosen) > params.k_max
        lists.append(chosen[: params.k_max])
    return lists, cut


@given(
    seed=st.integers(0, 2**31),
    alpha=st.sampled_from([0.3, 0.62, 0.9, 1.1]),
    k_max=st.sampled_from([1, 3, 16]),
    epsilon=st.sampled_from([0.0, 0.5]),
)
def test_lists_are_the_shortest_prefix_that_covers_alpha(seed: int, alpha: float, k_max: int, epsilon: float) -> None:
    params = BuddyParams(alpha=alpha, k_max=k_max, epsilon=epsilon)
    counts_EE = Dice(seed).rng.integers(0, 50, (7, 7)).astype(np.float32)
    candidates_EH, q_EH, cut = buddy_lists(counts_EE, params)
    expected, cut_by_hand = lists_by_hand(counts_EE.tolist(), params)
    assert [[j for j in row if j >= 0] for row in candidates_EH.tolist()] == expected
    assert cut == pytest.approx(cut_by_hand / 7)
    assert candidates_EH.shape == q_EH.shape == (7, min(k_max, 7)) and q_EH.dtype == np.float32
    assert bool((np.diff(q_EH, axis=1) <= 0).all()) and not bool(q_EH[candidates_EH < 0].any())


def test_q_is_the_share_of_all_co_activations() -> None:
    counts_EE = floats([[9.0, 6.0, 3.0, 1.0], [6.0, 9.0, 0.0, 0.0], [3.0, 0.0, 9.0, 0.0], [1.0, 0.0, 0.0, 9.0]])
    candidates_EH, q_EH, cut = buddy_lists(counts_EE, BuddyParams(alpha=0.9, k_max=4))
    assert candidates_EH.tolist() == [[1, 2, -1, -1], [0, -1, -1, -1], [0, -1, -1, -1], [0, -1, -1, -1]]
    np.testing.assert_allclose(q_EH[0], floats([0.6, 0.3, 0.0, 0.0]))
    assert cut == 0.0 and counts_EE[0, 0] == 9.0, "the counts are left as they were"


def test_an_expert_that_nobody_joins_has_no_buddies_but_by_epsilon() -> None:
    counts_EE = np.zeros((4, 4))
    assert bool((buddy_lists(counts_EE, BuddyParams())[0] == -1).all())
    smoothed_EH = buddy_lists(counts_EE, BuddyParams(epsilon=1.0, alpha=1.1))[0]
    assert [sorted(row) for row in smoothed_EH.tolist()] == [
        sorted([*(j for j in range(4) if j != i), -1]) for i in range(4)
    ]


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([0.25] * 4, 1.0),
        ([3.0] * 4, 1.0),
        ([1.0, 0.0, 0.0, 0.0], 0.0),
        ([0.5, 0.5, 0.0, 0.0], 0.5),
        ([1.0], 0.0),
    ],
)
def test_token_activating_entropy(weights: list[float], expected: float) -> None:
    assert normalised_entropy(floats([weights])).tolist() == pytest.approx([expected], abs=1e-6)


@given(seed=st.integers(0, 2**31), K=st.integers(1, 8))
def test_entropy_is_between_peaked_and_even(seed: int, K: int) -> None:
    entropy_T = normalised_entropy(Dice(seed).grid(20, K, low=1))
    assert bool((entropy_T >= -1e-6).all() and (entropy_T <= 1 + 1e-6).all())


def policy(params: BuddyParams | None = None, *, tau: float = -1.0, **changes: Any) -> BuddyMoE:
    """8 experts in every layer; the buddies of each are 4, 5, 6, 7 with q of 1/2, 1/4, 1/8, 1/16."""
    tables: dict[str, Any] = {
        "candidates_LEH": np.broadcast_to([4, 5, 6, 7], (LAYERS, E, 4)),
        "q_LEH": np.broadcast_to(floats([0.5, 0.25, 0.125, 0.0625]), (LAYERS, E, 4)),
        "tau_L": np.full(LAYERS, tau, np.float32),
    }
    return BuddyMoE(params=params or BuddyParams(), **(tables | changes))


EVEN = [[0.25, 0.25, 0.25, 0.25]]
PEAKED = [[0.75, 0.125, 0.0625, 0.0625]]


def reasons(of: BuddyMoE, weights: list[list[float]], resident: list[int], mode: int = 2) -> list[int]:
    resolution = of.resolve(miss([[0, 1, 2, 3]], weights, resident, budgets([mode], allowance=9.0)))
    return resolution.reason_TK[0].tolist()


def test_a_buddy_answers_with_the_slots_own_weight_and_is_used_once() -> None:
    misses = miss([[0, 1, 2, 3]], PEAKED, [1, 4, 6], budgets([2]))
    resolution = policy().resolve(misses)
    assert resolution.expert_TK.tolist() == [[4, 1, 6, 3]]
    assert resolution.action_TK.tolist() == [[Action.BUDDY, Action.HIT, Action.BUDDY, Action.FETCH]]
    assert resolution.reason_TK.tolist()[0][3] == Reason.NO_BUDDY
    assert resolution.weight_TK is misses.weight_TK and not resolution.loss_TK.any()


def test_a_peaked_token_is_not_touched() -> None:
    """TAE at tau or below forbids; one hair above does not."""
    tae = float(normalised_entropy(floats(PEAKED))[0])
    forbidden, allowed = [Reason.GATED_TAE] * 4, [Reason.SUBSTITUTED] * 3 + [Reason.OVER_RHO]
    assert reasons(policy(tau=tae), PEAKED, [4, 5, 6, 7]) == forbidden
    assert reasons(policy(tau=tae - 1e-6), PEAKED, [4, 5, 6, 7]) == allowed
    assert reasons(policy(tau=tae), EVEN, [4, 5, 6, 7]) == allowed


def test_tau_is_per_layer() -> None:
    by_layer = policy(tau_L=floats([2.0, -1.0, 2.0]))
    assert reasons(by_layer, EVEN, [4, 5, 6, 7])[0] == Reason.SUBSTITUTED
    elsewhere = replace(miss([[0, 1, 2, 3]], EVEN, [4], budgets([2])), layer=0)
    assert by_layer.resolve(elsewhere).reason_TK.tolist() == [[Reason.GATED_TAE] * 4]


def test_a_wide_margin_forbids() -> None:
    assert reasons(policy(BuddyParams(gamma=0.625)), PEAKED, [4, 5, 6, 7]) == [Reason.GATED_MARGIN] * 4
    assert reasons(policy(BuddyParams(gamma=0.626)), PEAKED, [4, 5, 6, 7])[0] == Reason.SUBSTITUTED
    assert reasons(policy(BuddyParams(gamma=0.01)), EVEN, [4, 5, 6, 7])[0] == Reason.SUBSTITUTED


def test_too_many_missing_experts_forbid() -> None:
    """Counted once each over the whole step, whoever wants them."""
    resident = [0, 4]
    assert reasons(policy(BuddyParams(beta=0.75)), EVEN, resident) == [Reason.RESIDENT] + [Reason.GATED_DELTA] * 3
    assert reasons(policy(BuddyParams(beta=0.76)), EVEN, resident)[1] == Reason.SUBSTITUTED
    twice = miss([[0, 1], [0, 2]], [[0.5, 0.5]] * 2, [0, 4], budgets([2, 2]))
    assert policy(BuddyParams(beta=0.7)).resolve(twice).reason_TK[0, 1] == Reason.SUBSTITUTED, "two of three missing"
    assert policy(BuddyParams(beta=0.66)).resolve(twice).reason_TK[0, 1] == Reason.GATED_DELTA


def test_gates_are_asked_in_the_papers_order() -> None:
    strict = BuddyParams(gamma=0.0, beta=0.0)
    assert reasons(policy(strict, tau=1.0), EVEN, [4]) == [Reason.GATED_TAE] * 4
    assert reasons(policy(strict), EVEN, [4]) == [Reason.GATED_MARGIN] * 4
    assert reasons(policy(replace(strict, gamma=2.0)), EVEN, [4]) == [Reason.GATED_DELTA] * 4
    assert reasons(policy(strict, tau=1.0), EVEN, [4], mode=0) == [Reason.WANTED_EXACT] * 4


@pytest.mark.parametrize("rho", [0, 1, 2, 3, 9])
def test_at_most_rho_substitutes_per_token(rho: int) -> None:
    found = reasons(policy(BuddyParams(rho=rho)), EVEN, [4, 5, 6, 7])
    most = min(rho, 4)
    assert found == [Reason.SUBSTITUTED] * most + [Reason.OVER_RHO] * (4 - most)


def test_only_the_first_candidates_are_searched() -> None:
    assert reasons(policy(BuddyParams(search=2)), EVEN, [6, 7]) == [Reason.NO_BUDDY] * 4
    assert reasons(policy(BuddyParams(search=3)), EVEN, [6, 7]) == [Reason.SUBSTITUTED] + [Reason.NO_BUDDY] * 3


def first_buddy(of: BuddyMoE, score: list[float] | None = None) -> int:
    misses = miss([[0]], [[1.0]], [4, 5, 6, 7], budgets([2]))
    if score is not None:
        misses = replace(misses, score_TE=floats([[0.5, 0, 0, 0, *score]]))
    return int(policy_answer(of, misses)[0, 0])


def policy_answer(of: BuddyMoE, misses: Any) -> Ints:
    return of.resolve(misses).expert_TK


def test_eta_lets_the_routers_score_decide() -> None:
    """psi = q (1 + eta z), z as a share of the token's largest score: 1/2 of expert 4 against 1/4 (1 + eta) of 5."""
    score = [0.0, 0.5, 0.0, 0.0]
    assert first_buddy(policy(BuddyParams(eta=0.0)), score) == 4
    assert first_buddy(policy(BuddyParams(eta=0.9)), score) == 4
    assert first_buddy(policy(BuddyParams(eta=1.1)), score) == 5
    assert first_buddy(policy(BuddyParams(eta=1.1))) == 4, "without scores q alone"


def test_bounded_rows_are_not_touched_where_no_harm_is_known() -> None:
    """The paper charges nothing; a row that pays for what it takes would get it for nothing."""
    assert reasons(policy(), EVEN, [4, 5, 6, 7], mode=1) == [Reason.OVER_PRICE] * 3 + [Reason.OVER_RHO]
    free = budgets([1], allowance=INF, price=INF)
    resolution = policy().resolve(miss([[0, 1, 2, 3]], EVEN, [], replace(free, allowance_T=floats([9.0]))))
    assert resolution.action_TK.tolist() == [[Action.FETCH] * 4]


def test_bounded_rows_pay_where_harms_are_known() -> None:
    loss_LEE = np.ones((LAYERS, E, E), np.float32)
    loss_LEE[:, 1] = 8.0
    known = policy(loss_LEE=loss_LEE)
    rows = budgets([1, 2], allowance=0.0625, price=0.25)
    resolution = known.resolve(miss([[0, 1, 2, 3]] * 2, EVEN * 2, [4, 5, 6, 7], rows))
    paid, over, dear = Reason.SUBSTITUTED, Reason.OVER_ALLOWANCE, Reason.OVER_PRICE
    assert resolution.reason_TK.tolist() == [[paid, dear, over, Reason.OVER_RHO], [paid, paid, paid, Reason.OVER_RHO]]
    assert resolution.loss_TK.tolist() == [[0.0625, 0, 0, 0], [0.0625, 0.5, 0.0625, 0]], "fast rows are told the cost"


def drawn(dice: Dice, most: int, params: BuddyParams, tau: float) -> BuddyMoE:
    rank_LEH = dice.ranks(most, 7)
    q_LEH = -np.sort(-dice.grid(*rank_LEH.shape), axis=2)
    return BuddyMoE(candidates_LEH=rank_LEH, q_LEH=q_LEH, tau_L=np.full(LAYERS, tau, np.float32), params=params)


@given(
    size=sizes(),
    tau=st.sampled_from([-1.0, 0.803, 0.941, 0.987]),
    gamma=st.sampled_from([0.0617, 0.203, 2.0]),
    beta=st.sampled_from([0.3, 0.77, 1.1]),
    eta=st.sampled_from([0.0, 0.5, 2.0]),
    rho=st.sampled_from([0, 1, 3, 8]),
    search=st.sampled_from([1, 4, 16]),
)
def test_it_is_the_slow_twin(
    size: Sizes, tau: float, gamma: float, beta: float, eta: float, rho: int, search: int
) -> None:
    seed, T, K, most, share = size
    dice = Dice(seed)
    misses = dice.misses(T, K, most, modes=(0, 2), resident=share)
    params = BuddyParams(gamma=gamma, beta=beta, eta=eta, rho=rho, search=search)
    paper = drawn(dice, most, params, tau)
    resolution = paper.resolve(misses)
    expected = buddymoe_reference(paper, misses)
    assert resolution.action_TK.tolist() == [[action for action, _, _ in row] for row in expected]
    assert resolution.expert_TK.tolist() == [[expert for _, expert, _ in row] for row in expected]
    assert resolution.reason_TK.tolist() == [[reason for _, _, reason in row] for row in expected]
    for row in resolution.expert_TK.tolist():
        assert len(set(row)) == len(row), "a token never gets one expert twice"
    assert int((resolution.action_TK == Action.BUDDY).sum(axis=1).max()) <= rho
    assert not bool((resolution.action_TK == Action.DROP).any()), "nothing is dropped"


@given(size=sizes(), lists=st.sampled_from([0.5, 0.9, 1.1]))
def test_nothing_missing_changes_nothing(size: Sizes, lists: float) -> None:
    seed, T, K, most, _ = size
    dice = Dice(seed)
    misses = dice.misses(T, K, most, resident=1.0)
    resolution = drawn(dice, most, BuddyParams(alpha=lists), 2.0).resolve(misses)
    assert resolution.expert_TK is misses.ids_TK and not resolution.action_TK.any()


def test_all_reasons_of_the_paper_are_reached() -> None:
    """The random cases above are worth something only if every gate decides some of them."""
    seen: set[int] = set()
    for seed in range(60):
        dice = Dice(seed)
        misses = dice.misses(6, 4, 12, modes=(0, 2))
        params = BuddyParams(gamma=0.203, beta=0.77, rho=1)
        seen |= set(drawn(dice, 12, params, 0.803).resolve(misses).reason_TK.ravel().tolist())
    gates = {Reason.GATED_TAE, Reason.GATED_MARGIN, Reason.GATED_DELTA, Reason.OVER_RHO, Reason.NO_BUDDY}
    assert seen == gates | {Reason.RESIDENT, Reason.WANTED_EXACT, Reason.SUBSTITUTED}
