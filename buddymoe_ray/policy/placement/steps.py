"""The order in which a mover goes from one map to the next: hottest gain first, and it may stop anywhere.

Pure: says what to do, moves nothing. Invariants: no pool above its slots after any step; the last copy of an expert
that the new map covers is evicted only after it was loaded elsewhere, unless full pools exchange last copies in a ring
and something has to go first (the host's master copy answers meanwhile).

Legend: P pools, N experts of all MoE layers end to end.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from buddymoe_ray.policy.placement.costs import values_of
from buddymoe_ray.policy.placement.map import PlacementMap, previous_held
from buddymoe_ray.policy.placement.problem import Bools, Floats, PlacementProblem

__all__ = ["Step", "migration_steps"]


@dataclass(frozen=True, kw_only=True)
class Step:
    """In `pool`, first drop `evict`, then bring `load` (experts in N; either may be None). `gain` in seconds per second
    as seen from the old map."""

    pool: int
    evict: int | None
    load: int | None
    gain: float


def migration_steps(old: PlacementMap | None, new: PlacementMap, problem: PlacementProblem) -> list[Step]:
    """Steps from `old` (None: empty pools) to `new`, whose pools are the problem's. Loads by falling gain; evictions
    that make room for nothing come last."""
    assert new.held_PN.shape == (len(problem.pools), problem.experts), "the new map is of this problem"
    now_PN = previous_held(problem, old)
    values = values_of(problem, now_PN)
    steps: list[Step] = []
    copies_N, free_P = now_PN.sum(axis=0), problem.slots_P - now_PN.sum(axis=1)
    differs_PN: Bools = now_PN != new.held_PN
    for pool in np.flatnonzero(differs_PN.any(axis=1)).tolist():
        value_N = values.value_N(pool)
        steps += _of_pool(pool, now_PN[pool], new.held_PN[pool], value_N, copies_N == 1, int(free_P[pool]))
    steps.sort(key=lambda step: (step.load is None, -step.gain, step.pool))
    return _guarded(steps, now_PN, new.held_PN)


def _of_pool(pool: int, now_N: Bools, new_N: Bools, value_N: Floats, last_N: Bools, free: int) -> list[Step]:
    """Loads by value, each with the eviction that makes its room: copies that are missed least first."""
    loads, evicts = np.flatnonzero(new_N & ~now_N), np.flatnonzero(now_N & ~new_N)
    loads = loads[np.argsort(-value_N[loads], kind="stable")].tolist()
    evicts = evicts[np.lexsort((value_N[evicts], last_N[evicts]))].tolist()
    first = min(max(0, free), len(loads))
    over = max(0, -free)  # a pool that shrank makes room first
    steps = [Step(pool=pool, evict=n, load=None, gain=np.inf) for n in evicts[:over]]
    evicts = evicts[over:]
    pairs = [(None, n) for n in loads[:first]] + list(zip(evicts, loads[first:], strict=False))
    steps += [Step(pool=pool, evict=out, load=n, gain=float(value_N[n])) for out, n in pairs]
    left = evicts[len(loads) - first :]
    return steps + [Step(pool=pool, evict=n, load=None, gain=-float(value_N[n])) for n in left]


def _guarded(steps: list[Step], now_PN: Bools, new_PN: Bools) -> list[Step]:
    """Put off evictions of last copies until another copy is there."""
    copies_N = now_PN.sum(axis=0).tolist()
    wanted_N: list[bool] = (new_PN.sum(axis=0) > 0).tolist()
    waiting: dict[int, deque[Step]] = {}  # by the expert whose last copy they would drop
    order: list[Step] = []

    def do(first: Step) -> None:
        ready = deque([first])
        while ready:
            step = ready.popleft()
            order.append(step)
            if step.evict is not None:
                copies_N[step.evict] -= 1
            if step.load is None:
                continue
            copies_N[step.load] += 1
            if step.load in waiting and copies_N[step.load] > 1:
                queue = waiting[step.load]
                ready.append(queue.popleft())
                if not queue:
                    del waiting[step.load]

    for step in steps:
        if step.evict is not None and wanted_N[step.evict] and copies_N[step.evict] <= 1:
            waiting.setdefault(step.evict, deque()).append(step)
        else:
            do(step)
    while waiting:  # only rings are left: break the one of most gain
        expert = max(waiting, key=lambda n: (waiting[n][0].gain, -n))
        queue = waiting[expert]
        broken = queue.popleft()
        if not queue:
            del waiting[expert]
        do(broken)
    return order
