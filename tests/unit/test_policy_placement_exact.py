"""The greedy solver against the best there is, on small problems of every sort."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from exact_placement import solve_exact
from placement_cases import breaches, objective, random_problem, simple

from buddymoe_ray.errors import ConfigError
from buddymoe_ray.policy import solve


def test_greedy_is_within_three_percent_of_the_best(record_property: pytest.RecordProperty) -> None:
    gaps = []
    for seed in range(60):
        problem = random_problem(seed)
        greedy, best = solve(problem), solve_exact(problem)
        assert breaches(problem, best) == [], f"problem {seed}"
        found, least = objective(problem, greedy), objective(problem, best)
        assert found >= least * (1 - 1e-5) - 1e-12, f"problem {seed}: greedy {found} below the exact {least}"
        gaps.append((found - least) / least if least > 1e-12 else found - least)
    record_property("worst_gap", max(gaps))
    record_property("median_gap", float(np.median(gaps)))
    assert max(gaps) <= 0.03, f"worst gap {max(gaps):.4f}, of problem {int(np.argmax(gaps))}"
    assert np.median(gaps) <= 1e-6


def test_an_update_without_margin_is_near_the_best_too() -> None:
    for seed in range(12):
        first = solve(random_problem(seed))
        problem = random_problem(seed)
        name = "counts_PLE" if problem.counts_PLE is not None else "counts_LE"
        problem = replace(problem, **{name: np.flip(getattr(problem, name), axis=-1).copy()})
        moved, best = solve(problem, first, margin=0, least_gain=0), solve_exact(problem, first)
        assert objective(problem, moved) <= 1.05 * objective(problem, best) + 1e-12, f"problem {seed}"


def test_exact_refuses_what_it_cannot_do() -> None:
    follows = np.zeros((2, 4, 4))
    with pytest.raises(ConfigError, match="without affinity"):
        solve_exact(simple((4, 4), np.ones((2, 4)), transition_LEE=follows, affinity_seconds=1.0))
    with pytest.raises(ConfigError, match="must be small"):
        solve_exact(simple((4,) * 64, np.ones((2, 64))))
