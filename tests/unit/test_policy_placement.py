"""Placement: the price of a map, and what the solver may never do, whatever the problem."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from placement_cases import breaches, brute_cost, noisy, objective, random_problem, simple

from buddymoe_ray.errors import ConfigError
from buddymoe_ray.policy import OPTIONS, Effort, NodeLinks, Pool, cost_of, option_accesses, solve
from buddymoe_ray.policy.placement.problem import affinity_gain
from buddymoe_ray.policy.placement.values import values_of

seeds = st.integers(0, 10_000)
LARGE = Effort(fill_rounds=2, exchange_cells=0)
"""Makes a small problem go the way of a large one."""


@given(seeds)
@settings(max_examples=60)
def test_the_objective_is_the_cheapest_way_of_every_use(seed: int) -> None:
    problem = random_problem(seed)
    held_PN = np.random.default_rng(seed).random((len(problem.pools), problem.experts)) < 0.4
    accesses_R, seconds = option_accesses(problem, held_PN)
    assert seconds == pytest.approx(brute_cost(problem, held_PN), rel=1e-9, abs=1e-15)
    assert accesses_R.sum() == pytest.approx(problem.total_N.sum(), rel=1e-6)


@given(seeds)
@settings(max_examples=40)
def test_values_are_differences_of_the_objective(seed: int) -> None:
    problem = random_problem(seed)
    rng = np.random.default_rng(seed)
    held_PN = rng.random((len(problem.pools), problem.experts)) < 0.4
    values = values_of(problem, np.zeros_like(held_PN))
    for p, row_N in enumerate(held_PN):
        values.put(p, row_N)
    assert values.cost() == pytest.approx(brute_cost(problem, held_PN), rel=1e-9, abs=1e-12)
    for p in range(len(held_PN)):
        n = int(rng.integers(problem.experts))
        without, with_it = held_PN.copy(), held_PN.copy()
        without[p, n], with_it[p, n] = False, True
        saved = brute_cost(problem, without) - brute_cost(problem, with_it)
        assert values.value_N(p)[n] == pytest.approx(saved, rel=1e-6, abs=1e-12)


@given(seeds, st.booleans())
@settings(max_examples=60)
def test_a_map_keeps_every_rule(seed: int, large: bool) -> None:
    problem = random_problem(seed)
    effort = LARGE if large else None
    first = solve(problem, effort=effort)
    assert breaches(problem, first) == [] and first.epoch == 1
    assert objective(problem, first) == pytest.approx(first.objective_after)
    moved = solve(noisy(problem, seed + 1, 1.0), first, effort=effort)
    assert breaches(problem, moved) == [] and moved.epoch == 1 + bool((moved.held_PN != first.held_PN).any())
    assert moved.objective_after <= moved.objective_before
    assert moved.load_bytes == 100 * int((moved.held_PN & ~first.held_PN).sum())


@given(seeds)
@settings(max_examples=40)
def test_equal_problems_get_equal_maps_and_nothing_moves_without_a_reason(seed: int) -> None:
    problem = random_problem(seed)
    first = solve(problem)
    assert (solve(random_problem(seed)).held_PN == first.held_PN).all()
    for window in (problem, noisy(problem, seed, 0.01)):
        again = solve(window, first)
        assert again.epoch == 1 and (again.held_PN == first.held_PN).all()
        assert not again.loads_P.any()


def test_small_noise_moves_nothing_in_a_large_problem_either() -> None:
    rng = np.random.default_rng(0)
    counts_LE = rng.poisson(np.stack([rng.permutation(2000.0 / (1 + np.arange(64))) for _ in range(6)]))
    problem = simple((48,) * 24, counts_LE)
    first = solve(problem, effort=LARGE)
    again = solve(noisy(problem, 1, 0.02), first, effort=LARGE)
    assert again.epoch == 1
    shifted = replace(problem, counts_LE=np.roll(counts_LE, 1, axis=1))
    assert solve(shifted, first, effort=LARGE).epoch == 2, "a real shift does move"


def test_a_change_must_pay_for_its_migration_with_a_margin() -> None:
    """Loading saves .1 s a second; at 60 % of that in migration a margin of .5 says yes, of .8 no."""
    before, after = [[1.0, 0.9]], [[0.9, 1.0]]
    problem = simple((1,), before, max_replicas=1, fetch_cost_P=np.array([1.0]))
    first = solve(problem)
    assert first.holders(0, 0) == (0,)
    costs = {"migrate_bytes_per_second": 100 / 0.06, "horizon_seconds": 1.0}
    shifted = replace(problem, counts_LE=np.array(after), **costs)
    assert solve(shifted, first, margin=0.8, least_gain=0).epoch == 1
    moved = solve(shifted, first, margin=0.5, least_gain=0)
    assert moved.holders(0, 1) == (0,) and moved.epoch == 2
    assert solve(shifted, first, margin=0.5, least_gain=0.5).epoch == 1, "the whole map must be worth it too"


def test_hot_experts_get_replicas_and_cold_ones_a_holder() -> None:
    problem = simple((3, 3, 3, 3), [[100, 80, 1, 1, 1, 1]])
    placed = solve(problem)
    assert len(placed.holders(0, 0)) == len(placed.holders(0, 1)) == 4
    assert all(placed.holders(0, e) for e in range(6))
    capped = solve(replace(problem, max_replicas=2))
    assert len(capped.holders(0, 0)) == 2


def test_an_expert_with_a_good_standin_stays_out() -> None:
    standin = np.array([[0.01, np.inf, np.inf]])
    placed = solve(simple((2,), [[100, 5, 5]], standin_cost_LE=standin))
    assert placed.holders(0, 0) == ()
    assert placed.holders(0, 1) == placed.holders(0, 2) == (0,)
    assert solve(simple((2,), [[100, 5, 5]])).holders(0, 0) == (0,), "without it the hottest is held"


def test_all_uses_are_local_when_every_pool_holds_everything() -> None:
    problem = simple((9, 9), [[5, 3, 1, 2]])
    placed = solve(problem)
    assert placed.held_PN.all() and option_accesses(problem, placed.held_PN)[0][0] == pytest.approx(11)
    assert placed.objective_after == pytest.approx(8 * problem.load_cost)


@pytest.mark.parametrize(
    ("slots", "counts", "held"),
    [
        ((0, 0), [[1, 2]], 0),
        ((2,), [[3, 1, 2]], 2),
        ((4, 0), [[0, 0, 0, 0]], 4),
        ((2, 1), [[0, 0], [0, 0]], 0),
        ((50,), [[1, 1]], 2),
    ],
    ids=["no bytes", "one pool", "no counts, still covered", "no counts, not all fit", "more bytes than experts"],
)
def test_edges(slots: tuple[int, ...], counts: Any, held: int) -> None:
    problem = simple(slots, counts)
    placed = solve(problem)
    assert placed.held_PN.sum() == held and breaches(problem, placed) == []


def test_pools_come_go_and_shrink() -> None:
    problem = simple((3, 3, 2), [[9, 8, 7, 1, 1, 1]])
    first = solve(problem)
    without = replace(problem, pools=problem.pools[1:], fetch_cost_P=np.full(2, 10.0))
    fewer = solve(without, first)
    assert breaches(without, fewer) == [] and fewer.pools == ("p1", "p2") and fewer.epoch == 2
    small = replace(problem, pools=(replace(problem.pools[0], bytes=100), *problem.pools[1:]))
    assert breaches(small, solve(small, first)) == []
    assert breaches(problem, solve(problem, fewer)) == []
    with pytest.raises(ConfigError, match="start without it"):
        solve(simple((3,), [[1, 2]]), first)


def test_affinity_brings_experts_that_follow_one_another_together() -> None:
    """Layer 1 follows layer 0 in another order and all are as popular: only affinity can tell where they go."""
    counts, follows = np.full((2, 4), 10.0), np.stack([np.eye(4)[[1, 0, 3, 2]], np.zeros((4, 4))])
    problem = simple((4, 4), counts, transition_LEE=follows, affinity_seconds=0.3)
    placed = solve(problem)
    plain = solve(replace(problem, affinity_seconds=0.0))
    assert affinity_gain(problem, placed.held_PN) == pytest.approx(0.3 * 20)
    assert cost_of(problem, placed.held_PN) < cost_of(problem, plain.held_PN)
    assert objective(problem, placed) == pytest.approx(placed.objective_after)


def test_a_map_names_experts_by_layer() -> None:
    placed = solve(simple((12, 12), np.ones((2, 6))))
    assert placed.keys(np.array([0, 5, 6, 11])) == [(0, 0), (0, 5), (1, 0), (1, 5)]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"expert_bytes": 0}, "expert_bytes"),
        ({"counts_LE": None}, "counts"),
        ({"counts_LE": np.ones((2, 2))}, "counts_LE"),
        ({"counts_LE": np.array([[np.nan, 1.0]])}, "counts_LE"),
        ({"fetch_cost_P": np.array([-1.0, 1.0])}, "fetch_cost_P"),
        ({"links": np.ones((2, 2))}, "links"),
        ({"horizon_seconds": 0.0}, "horizon_seconds"),
        ({"max_replicas": 0}, "max_replicas"),
        ({"pools": (Pool(name="a", node="n", bytes=1),) * 2}, "pools"),
    ],
)
def test_a_problem_that_does_not_fit_together_is_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=f"placement: {named} .*must be"):
        simple((1, 1), [[1, 2]], **changes)


def test_links_and_margins_are_checked() -> None:
    with pytest.raises(ConfigError, match="must be rising"):
        NodeLinks(same_node=2.0, other_node=1.0)
    with pytest.raises(ConfigError, match="margin"):
        solve(simple((1,), [[1, 2]]), margin=-1.0)
    assert len(OPTIONS) == 5
