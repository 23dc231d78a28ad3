"""The map that is published: who holds which expert, and how a mover gets there from the map before.

Knows no costs and no solver. Invariants: holders that did not change keep their epoch; no pool is above its slots after
any step; the last copy of an expert that the new map covers is evicted only after it was loaded elsewhere, unless full
pools exchange last copies in a ring and something has to go first (the host's master copy answers meanwhile).

Legend: P pools, N experts of all MoE layers end to end, L MoE layers.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from buddymoe_ray.errors import ConfigError
from buddymoe_ray.policy.placement.problem import Bools, Floats, PlacementProblem
from buddymoe_ray.policy.placement.values import values_of

__all__ = ["PlacementMap", "Step", "migration_steps", "previous_held", "publish"]

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class PlacementMap:
    """Where experts are.

    Args:
        epoch: rises by one with every change of holders.
        pools: names of the pools, in the order of P.
        experts_per_layer: E of every layer.
        held_PN: whether pool p holds expert n.
        loads_P: experts that each pool has to bring, coming from the map before; together they are `load_bytes`.
        objective_before, objective_after: seconds lost per second under the counts of this window, with the old map and
            with this one (its migration counted).
    """

    epoch: int
    pools: tuple[str, ...]
    experts_per_layer: tuple[int, ...]
    held_PN: Bools
    loads_P: Ints
    load_bytes: int
    objective_before: float
    objective_after: float

    @cached_property
    def _offset_L(self) -> npt.NDArray[np.int64]:
        return np.concatenate([[0], np.cumsum(self.experts_per_layer, dtype=np.int64)])

    def holders(self, layer: int, expert: int) -> tuple[int, ...]:
        """Indices of the pools that hold it, rising; none where it stays out."""
        return tuple(int(p) for p in np.flatnonzero(self.held_PN[:, self._offset_L[layer] + expert]))

    def keys(self, experts_N: npt.NDArray[Any]) -> list[tuple[int, int]]:
        """Indices in N as (layer, expert)."""
        layers = np.searchsorted(self._offset_L, experts_N, side="right") - 1
        return list(zip(layers.tolist(), (experts_N - self._offset_L[layers]).tolist(), strict=True))


def previous_held(problem: PlacementProblem, previous: PlacementMap | None) -> Bools:
    """What the problem's pools hold now `[P, N]`: rows of the last map by name, a new pool is empty.

    Raises ConfigError when the last map is of a model with other experts.
    """
    held_PN = np.zeros((len(problem.pools), problem.experts), dtype=bool)
    if previous is None:
        return held_PN
    if previous.experts_per_layer != problem.experts_per_layer:
        raise ConfigError(
            f"the last map has {sum(previous.experts_per_layer)} experts in {len(previous.experts_per_layer)} layers, "
            f"must have {problem.experts} in {len(problem.experts_per_layer)}. hint: start without it"
        )
    row_of = {name: at for at, name in enumerate(previous.pools)}
    for at, pool in enumerate(problem.pools):
        if pool.name in row_of:
            held_PN[at] = previous.held_PN[row_of[pool.name]]
    return held_PN


def publish(
    problem: PlacementProblem, held_PN: Bools, previous: PlacementMap | None, *, before: float, after: float
) -> PlacementMap:
    """The map of these holders, next after `previous`; `before` and `after` are its objectives (seconds per second)."""
    names = tuple(pool.name for pool in problem.pools)
    now_PN = previous_held(problem, previous)
    loads_P = (held_PN & ~now_PN).sum(axis=1)
    same = previous is not None and previous.pools == names and bool((held_PN == now_PN).all())
    epoch = 1 if previous is None else previous.epoch + (not same)
    held_PN = held_PN.copy()
    held_PN.setflags(write=False)
    return PlacementMap(
        epoch=epoch,
        pools=names,
        experts_per_layer=problem.experts_per_layer,
        held_PN=held_PN,
        loads_P=loads_P,
        load_bytes=int(loads_P.sum()) * problem.expert_bytes,
        objective_before=before,
        objective_after=after,
    )


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
