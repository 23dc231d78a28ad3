"""One turn of the solver: what a pool should hold, given the others; and who takes experts that nobody holds.

Adds to `costs` what the objective alone does not say: loading costs, most replicas, coverage, affinity.
Invariant: no pool above its slots, no expert above its replicas, a required expert never loses its last holder here.

Legend: P pools, N experts of all MoE layers end to end.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from buddymoe_ray.policy.placement.affinity import Affinity
from buddymoe_ray.policy.placement.costs import values_of
from buddymoe_ray.policy.placement.objective import affinity_gain
from buddymoe_ray.policy.placement.problem import Bools, Floats, PlacementProblem

__all__ = ["Search"]

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
