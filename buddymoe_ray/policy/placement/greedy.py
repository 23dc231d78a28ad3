"""Finds a placement: pools fill up side by side by gain per byte, then each in turn takes its best content.

Given what the others hold, the gains of a pool's experts add up and all take the same bytes, so its best content is its
most valuable experts: every turn is exact and the objective only falls. A hot expert gets replicas (SYMI, 2504.19925)
because a second copy still saves the link. Small problems get exchanges between pairs of pools on top
(`swaps`). Pure: equal input gives an equal map. Knows no clock; `Effort` bounds the work.

Legend: P pools, N experts of all MoE layers end to end.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from buddymoe_ray.errors import ConfigError
from buddymoe_ray.policy.placement.map import PlacementMap, previous_held
from buddymoe_ray.policy.placement.problem import Bools, PlacementProblem
from buddymoe_ray.policy.placement.publish import publish
from buddymoe_ray.policy.placement.search import Search
from buddymoe_ray.policy.placement.swaps import exchange

__all__ = ["Effort", "solve"]


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How hard to look.

    Args:
        fill_rounds: turns in which empty pools fill up; more is nearer to one expert at a time.
        first_sweeps: most turns of each pool for a first map, and for any map of a small problem.
        update_sweeps: the same for a window's update of a large one.
        exchange_cells: a problem is small with at most so many pairs of pools times experts: exchanges between pairs
            of pools are tried.
    """

    fill_rounds: int = 8
    first_sweeps: int = 12
    update_sweeps: int = 1
    exchange_cells: int = 150_000


def solve(
    problem: PlacementProblem,
    previous: PlacementMap | None = None,
    *,
    margin: float = 0.5,
    least_gain: float = 0.01,
    effort: Effort | None = None,
) -> PlacementMap:
    """A map for this window's counts.

    Every required expert gets a holder where all of them fit (`PlacementProblem.covers`); where they do not fit, or
    where a stand-in answers, the objective says who stays out. With `previous`, hysteresis twice: an expert is loaded
    only if that gains `1 + margin` times its migration cost over the horizon, and a new map is made only if it lowers
    the objective by the share `least_gain`, or if the last one breaks a rule (a pool shrank or went, an expert lost its
    last holder). Otherwise holders and epoch stay.

    Raises:
        ConfigError: `previous` is of a model with other experts, or margin or least_gain is below 0.
    """
    if not (margin >= 0 and 0 <= least_gain < 1):
        raise ConfigError(
            f"placement: margin is {margin} and least_gain {least_gain}, must be at least 0 (and least_gain below 1). "
            "hint: leave them out"
        )
    effort = effort or Effort()
    now_PN = previous_held(problem, previous)
    first = previous is None
    load_cost = problem.load_cost * (1.0 if first else 1.0 + margin)
    affine = problem.transition_LEE is not None and problem.affinity_seconds > 0
    tries = [
        (Search(problem, now_PN, load_cost=load_cost, affine=bias), rounds)
        for rounds in (_fill_rounds(problem, effort) if first else (0,))
        for bias in ((True, False) if affine else (False,))
    ]
    before = tries[0][0].cost()
    for search, rounds in tries:
        _improve(search, rounds, effort)
    costs = [search.cost() for search, _ in tries]
    at = int(np.argmin(costs))
    held_PN, after = tries[at][0].values.held_PN, costs[at]
    worth = before - after > least_gain * abs(before)
    if previous is not None and not worth and _sound(problem, now_PN):
        held_PN, after = now_PN, before
    return publish(problem, held_PN, previous, before=before, after=after)


def _fill_rounds(problem: PlacementProblem, effort: Effort) -> tuple[int, ...]:
    """In how many turns empty pools fill up; a small problem is tried from two sides."""
    slots = max(1, int(problem.slots_P.max()))
    if _cells(problem) * slots <= effort.exchange_cells:
        return (slots, 1)
    return (effort.fill_rounds,)


def _cells(problem: PlacementProblem) -> int:
    return len(problem.pools) ** 2 * problem.experts


def _improve(search: Search, rounds: int, effort: Effort) -> None:
    """Filling in `rounds` (0: what is held is the start), turns and exchanges."""
    problem = search.problem
    small = _cells(problem) <= effort.exchange_cells
    for turn in range(1, rounds + 1):
        search.sweep(-(-problem.slots_P * turn // rounds))
    search.cover()
    _settle(search, effort.first_sweeps if rounds or small else effort.update_sweeps)
    if small and len(problem.pools) > 1:
        for _ in range(effort.first_sweeps):
            if not exchange(search):
                break
            _settle(search, effort.first_sweeps)


def _settle(search: Search, sweeps: int) -> None:
    for _ in range(sweeps):
        if not search.sweep(search.problem.slots_P):
            break


def _sound(problem: PlacementProblem, held_PN: Bools) -> bool:
    """Whether the holders keep the rules: bytes, replicas, coverage."""
    fits = bool((held_PN.sum(axis=1) <= problem.slots_P).all())
    copies_N = held_PN.sum(axis=0)
    covered = not problem.covers or bool((copies_N[problem.required_N] > 0).all())
    return fits and covered and bool((copies_N <= problem.replicas).all())
