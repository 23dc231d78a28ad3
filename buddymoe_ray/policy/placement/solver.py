"""Finds a placement: pools fill up side by side by gain per byte, then each in turn takes its best content.

Given what the others hold, the gains of a pool's experts add up and all take the same bytes, so its best content is its
most valuable experts: every turn is exact and the objective only falls. A hot expert gets replicas (SYMI, 2504.19925)
because a second copy still saves the link. Small problems get exchanges between pairs of pools on top, for what no pool
can do alone. Pure: equal input gives an equal map. Knows no clock; `Effort` bounds the work.
Invariant: no pool above its slots, no expert above its replicas, a required expert never loses its last holder here.

Legend: P pools (a, b two of them), N experts of all MoE layers end to end.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations

import numpy as np
import numpy.typing as npt

from buddymoe_ray.errors import ConfigError
from buddymoe_ray.policy.placement.affinity import Affinity
from buddymoe_ray.policy.placement.map import PlacementMap, previous_held, publish
from buddymoe_ray.policy.placement.problem import Bools, Floats, PlacementProblem, affinity_gain
from buddymoe_ray.policy.placement.values import values_of

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


_NOISE = 1e-9
"""Gains below this share of what joins a pool are rounding, not reasons."""


class Search:
    """Holders under change, starting from `now_PN`; what is held there costs nothing to keep, the rest `load_cost`."""

    def __init__(self, problem: PlacementProblem, now_PN: Bools, *, load_cost: float, affine: bool) -> None:
        self.problem, self.load_cost = problem, load_cost
        self.now_PN = now_PN
        self.values = values_of(problem, now_PN)
        self._limited = problem.replicas < len(problem.pools)
        self.affine = affine
        self._affinity = Affinity(problem) if affine else None
        self._must_N = problem.required_N if problem.covers else np.zeros(problem.experts, dtype=bool)
        self._must_any = bool(self._must_N.any())

    def score_N(self, pool: int) -> Floats:
        """Worth of each expert in this pool given the others: -inf may not, +inf must be there."""
        own, copies_N = np.flatnonzero(self.values.held_PN[pool]), self.values.copies_N
        score_N = self.values.value_N(pool)
        if self._affinity is not None:
            score_N += self._affinity.bonus_N(self.values.held_PN[pool])
        if self.load_cost:
            score_N -= self.load_cost
            score_N[np.flatnonzero(self.now_PN[pool])] += self.load_cost
        if self._limited:
            score_N[copies_N - self.values.held_PN[pool] >= self.problem.replicas] = -np.inf
        if self._must_any:
            score_N[own[self._must_N[own] & (copies_N[own] == 1)]] = np.inf
        return score_N

    def cost(self) -> float:
        """The objective of the holders now, by `objective.cost_of`'s definition."""
        held_PN = self.values.held_PN
        loads = int((held_PN & ~self.now_PN).sum())
        return self.values.cost() - affinity_gain(self.problem, held_PN) + loads * self.problem.load_cost

    def sweep(self, slots_P: npt.NDArray[np.int64]) -> bool:
        """Let each pool in turn take its best content; whether anything changed."""
        if self._affinity is not None:
            self._affinity.refresh(self.values.held_PN)
        changed = False
        for pool, slots in enumerate(slots_P.tolist()):
            changed |= self._turn(pool, slots)
        return changed

    def _turn(self, pool: int, slots: int) -> bool:
        own_N, score_N = self.values.held_PN[pool], self.score_N(pool)
        best_N = best_of(score_N, own_N, slots)
        changed = np.flatnonzero(best_N != own_N)
        if not len(changed):
            return False
        joins, leaves = changed[best_N[changed]], changed[own_N[changed]]
        new, old = float(score_N[joins].sum()), float(score_N[leaves].sum())
        if own_N.sum() <= slots and new - old <= _NOISE * abs(new):
            return False
        self.values.put(pool, best_N)
        return True

    def cover(self) -> None:
        """Find a holder for each required expert that has none, in place of the copies that are missed least."""
        for pool in np.flatnonzero(self.values.held_PN.sum(axis=1) > self.problem.slots_P).tolist():
            self._turn(pool, int(self.problem.slots_P[pool]))  # a pool that shrank
        while (open_N := np.flatnonzero(self._must_N & (self.values.copies_N == 0))).size:
            share = -(-len(open_N) // len(self.problem.pools))
            for pool, slots in enumerate(self.problem.slots_P.tolist()):
                self._take(pool, slots, open_N[self.values.copies_N[open_N] == 0], share)

    def _take(self, pool: int, slots: int, open_N: npt.NDArray[np.int64], most: int) -> None:
        """Give a pool up to `most` of the open experts, those it values most."""
        score_N, own_N = self.score_N(pool), self.values.held_PN[pool]
        held = np.flatnonzero(own_N)
        leaving = held[np.argsort(score_N[held], kind="stable")]
        leaving = leaving[score_N[leaving] < np.inf]
        room = slots - len(held)
        count = min(most, len(open_N), room + len(leaving))
        if count <= 0:
            return
        row_N = own_N.copy()
        row_N[leaving[: max(0, count - room)]] = False
        row_N[open_N[np.argsort(-score_N[open_N], kind="stable")[:count]]] = True
        self.values.put(pool, row_N)


def best_of(score_N: Floats, own_N: Bools, slots: int) -> Bools:
    """The `slots` experts of highest score, no new one without worth; ties go to those held, then to the first."""
    own = np.flatnonzero(own_N)
    scores = score_N[own]
    least = float(scores.min()) if len(own) == slots and slots else 0.0
    # a full pool looks only at what is worth as much as the least of what it has
    found = np.flatnonzero((score_N >= least) & (score_N > 0)) if least > 0 else np.flatnonzero(score_N > 0)
    zeros = own[scores == 0.0]
    found = np.concatenate([found, zeros])
    best_N = np.zeros_like(own_N)
    extra = len(found) - slots
    if extra <= 0:
        best_N[found] = True
        return best_N
    if slots <= 0:
        return best_N
    scores = score_N[found]
    edge = np.partition(scores, extra)[extra]  # the lowest score that still gets in
    best_N[found[scores > edge]] = True
    ties = found[scores == edge]
    ties = ties[np.argsort(~own_N[ties], kind="stable")]
    best_N[ties[: slots - int(best_N.sum())]] = True
    return best_N


_NEVER = -1e300
"""Stands for -inf in differences."""


def exchange(search: Search) -> bool:
    """Try all ordered pairs of pools once; whether anything changed."""
    changed = False
    values = search.values
    for a, b in permutations(range(len(search.problem.pools)), 2):
        cost = search.cost() if search.affine else 0.0
        while True:
            row_a, row_b = values.held_PN[a].copy(), values.held_PN[b].copy()
            if not _best_exchange(search, a, b):
                break
            if search.affine:  # its bonuses are hints that do not add up: ask the objective
                now = search.cost()
                if cost - now <= 1e-9 * abs(cost):
                    values.put(a, row_a)
                    values.put(b, row_b)
                    break
                cost = now
            changed = True
    return changed


def _best_exchange(search: Search, a: int, b: int) -> bool:
    """Hand one expert of a on to b: b gives another in return, or drops one (or has room) and a takes a new one in.

    Whether an exchange gained and was made.
    """
    values = search.values
    row_a, row_b = values.held_PN[a].copy(), values.held_PN[b].copy()
    leave_b_N = search.score_N(b)  # what b loses by dropping its own; inf for a last copy that must stay
    enter_a_N = search.score_N(a)
    only_a, only_b = row_a & ~row_b, row_b & ~row_a
    values.put(a, row_a & ~only_a)
    values.put(b, row_b & ~only_b)
    alone_a_N, alone_b_N = (np.maximum(search.score_N(pool), _NEVER) for pool in (a, b))
    values.put(a, row_a)
    values.put(b, row_b)
    move_N, back_N = np.full(len(row_a), -np.inf), np.full(len(row_a), -np.inf)
    move_N[only_a] = (alone_b_N - alone_a_N)[only_a]  # from a to b
    back_N[only_b] = (alone_a_N - alone_b_N)[only_b]
    drop_N = np.where(row_b, -leave_b_N, -np.inf)
    take_N = np.where(~row_a, enter_a_N, -np.inf)
    n = int(move_N.argmax())
    if not np.isfinite(move_N[n]):
        return False
    least = 1e-9 * float(alone_a_N.max(initial=0.0))
    m = int(back_N.argmax())
    swap = float(move_N[n] + back_N[m])
    room = search.problem.slots_P[b] > row_b.sum()
    d = int(drop_N.argmax())
    if not room:
        take_N[d] = -np.inf  # what b drops and a takes is the swap
    c = int(take_N.argmax())
    lost, taken = (0.0 if room else float(drop_N[d])), max(0.0, float(take_N[c]))
    chain = float(move_N[n]) + lost + taken
    if max(swap, chain) <= least:
        return False
    row_a[n], row_b[n] = False, True
    if swap >= chain:
        row_a[m], row_b[m] = True, False
    else:
        row_b[d] &= room
        row_a[c] |= taken > 0
    values.put(a, row_a)
    values.put(b, row_b)
    return True
