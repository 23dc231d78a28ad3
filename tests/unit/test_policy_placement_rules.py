"""Baselines, and the order of moves."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from placement_cases import breaches, noisy, objective, random_problem, simple

from buddymoe_ray.calibrate.baselines import eplb, oracle, replicas_by_load, round_robin, static
from buddymoe_ray.policy import migration_steps, solve

seeds = st.integers(0, 10_000)


@given(seeds)
@settings(max_examples=40)
def test_every_baseline_keeps_to_bytes_and_replicas(seed: int) -> None:
    problem = random_problem(seed)
    for rule in (round_robin, static, eplb, oracle):
        assert not {"bytes", "replicas"} & set(breaches(problem, rule(problem))), rule.__name__


def test_no_baseline_beats_the_solver_by_much() -> None:
    for seed in range(30):
        problem = replace(random_problem(seed), migrate_bytes_per_second=1e15)
        ours = objective(problem, solve(problem))
        for rule in (round_robin, static, eplb):
            placed = rule(problem)
            if breaches(problem, placed) == []:
                assert ours <= 1.03 * objective(problem, placed) + 1e-12, (seed, rule.__name__)


def test_round_robin_and_static_place_as_they_say() -> None:
    problem = simple((2, 3), [[1, 9, 5, 3]])
    assert round_robin(problem).held_PN.astype(int).tolist() == [[1, 1, 0, 0], [1, 0, 1, 1]]
    held_PN = static(problem).held_PN
    assert held_PN.any(axis=0).all() and held_PN[:, 1].all(), "one of each, then the most frequent"
    assert static(simple((1, 1), [[1, 9, 5, 3]])).held_PN.sum(axis=0).tolist() == [0, 1, 1, 0]


@given(st.lists(st.integers(0, 50), min_size=1, max_size=9), st.integers(0, 30), st.integers(1, 6))
@settings(max_examples=150)
def test_replicas_go_to_the_highest_load_per_replica(load: list[int], slots: int, most: int) -> None:
    load_E = np.array(load, dtype=float)
    copies_E = replicas_by_load(load_E, slots, most)
    assert copies_E.max(initial=0) <= most and copies_E.sum() <= max(slots, 0)
    if slots < len(load):
        return
    want_E = np.ones(len(load), dtype=int)  # one slot at a time, as described
    for _ in range(slots - len(load)):
        per_E = np.where(want_E < most, load_E / want_E, -1)
        if per_E.max() < 0:
            break
        want_E[per_E.argmax()] += 1
    heaviest = (load_E / want_E).max()
    assert (load_E / copies_E).max() == pytest.approx(heaviest), "the heaviest replica is as light"


def test_eplb_spreads_load_evenly() -> None:
    problem = simple((8,) * 4, [[64, 16, 8, 4, 2, 1, 1, 1], [1, 1, 1, 1, 8, 8, 8, 8]])
    placed = eplb(problem)
    assert placed.held_PN.any(axis=0).all() and placed.held_PN[:, 0].all()
    per_N = problem.total_N / placed.held_PN.sum(axis=0)
    load_P = (placed.held_PN * per_N).sum(axis=1)
    assert load_P.max() < 1.25 * load_P.min()


@given(seeds, st.booleans())
@settings(max_examples=80)
def test_a_mover_may_stop_anywhere(seed: int, from_nothing: bool) -> None:
    problem = random_problem(seed)
    old = None if from_nothing else solve(problem)
    later = noisy(problem, seed + 1, 1.0)
    new = oracle(later) if seed % 2 else solve(later, old, margin=0, least_gain=0)
    held_PN = np.zeros_like(new.held_PN) if old is None else old.held_PN.copy()
    wanted_N = new.held_PN.any(axis=0)
    steps = migration_steps(old, new, later)
    for at, step in enumerate(steps):
        if step.evict is not None:
            assert held_PN[step.pool, step.evict] and not new.held_PN[step.pool, step.evict]
            if wanted_N[step.evict] and held_PN[:, step.evict].sum() == 1:
                for other in steps[at:]:  # a ring of full pools: nothing else could go first
                    alone = other.evict is not None and held_PN[:, other.evict].sum() == 1 and wanted_N[other.evict]
                    full = held_PN[other.pool].sum() >= problem.slots_P[other.pool]
                    assert alone or full or other.load is None
            held_PN[step.pool, step.evict] = False
        if step.load is not None:
            assert new.held_PN[step.pool, step.load] and not held_PN[step.pool, step.load]
            held_PN[step.pool, step.load] = True
        assert (held_PN.sum(axis=1) <= problem.slots_P).all()
    assert (held_PN == new.held_PN).all()


def test_the_hottest_gain_moves_first_and_a_last_copy_waits() -> None:
    old = static(simple((2, 2), [[4, 3, 2, 1]], max_replicas=1))
    problem = simple((3, 3), [[4, 3, 2, 1]])
    gains = [step.gain for step in migration_steps(old, solve(problem), problem)]
    assert gains == sorted(gains, reverse=True) and len(gains) == 2
    held_PN = np.array([[1, 0], [0, 1], [0, 0]], dtype=bool)
    three = simple((1, 1, 1), [[5, 4]])
    first = replace(solve(three), held_PN=held_PN)
    turned = replace(first, held_PN=held_PN[[2, 0, 1]])
    order = [(step.pool, step.evict, step.load) for step in migration_steps(first, turned, three)]
    assert order == [(2, None, 1), (1, 1, 0), (0, 0, None)]
