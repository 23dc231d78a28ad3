"""From holders to a published map: primaries, epoch, migration.

Invariants: holders that did not change keep their epoch and their primaries; a primary is kept while it still holds.
Knows no costs. Neighbours: `greedy`, `exact` and `rules` find holders.

Legend: P pools, N experts of all MoE layers end to end.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from buddymoe_ray.policy.placement.map import Migration, PlacementMap, previous_held
from buddymoe_ray.policy.placement.problem import Bools, PlacementProblem

__all__ = ["publish"]


def publish(
    problem: PlacementProblem, held_PN: Bools, previous: PlacementMap | None, *, before: float, after: float
) -> PlacementMap:
    """The map of these holders, next after `previous`; `before` and `after` are its objectives (seconds per second)."""
    names = tuple(pool.name for pool in problem.pools)
    now_PN = previous_held(problem, previous)
    changed = np.flatnonzero(held_PN != now_PN)
    joins = held_PN.reshape(-1)[changed]
    load_pool, load_expert = np.divmod(changed[joins], problem.experts)
    evict_pool, evict_expert = np.divmod(changed[~joins], problem.experts)
    same = previous is not None and previous.pools == names and not len(changed)
    epoch = 1 if previous is None else previous.epoch + (not same)
    held_PN = held_PN.copy()
    held_PN.setflags(write=False)
    return PlacementMap(
        epoch=epoch,
        pools=names,
        workers=tuple(pool.workers for pool in problem.pools),
        experts_per_layer=problem.experts_per_layer,
        held_PN=held_PN,
        primary_N=_primaries(held_PN, _kept(names, previous)),
        migration=Migration(
            load_pool=load_pool.astype(np.int32),
            load_expert=load_expert.astype(np.int32),
            evict_pool=evict_pool.astype(np.int32),
            evict_expert=evict_expert.astype(np.int32),
            nbytes=len(load_pool) * problem.expert_bytes,
        ),
        objective_before=before,
        objective_after=after,
    )


def _kept(names: tuple[str, ...], previous: PlacementMap | None) -> npt.NDArray[np.int64] | None:
    """The last map's primaries as indices of today's pools, -1 where the pool is gone."""
    if previous is None:
        return None
    now_of = {name: at for at, name in enumerate(names)}
    moved_P = np.array([*(now_of.get(name, -1) for name in previous.pools), -1])
    kept_N: npt.NDArray[np.int64] = moved_P[previous.primary_N]
    return kept_N


def _primaries(held_PN: Bools, kept_N: npt.NDArray[np.int64] | None) -> npt.NDArray[np.int32]:
    """A holder for each expert: the last one where it still holds, else turn about, so that primaries spread evenly."""
    N = held_PN.shape[1]
    chosen_N = np.full(N, -1, dtype=np.int32)
    if kept_N is not None:
        still_N = (kept_N >= 0) & held_PN[kept_N, np.arange(N)]
        chosen_N[still_N] = kept_N[still_N]
    open_N = np.flatnonzero((chosen_N < 0) & held_PN.any(axis=0))
    open_held = held_PN[:, open_N].T
    copies = open_held.sum(axis=1, dtype=np.int64)
    _, pool = np.nonzero(open_held)  # holders of each open expert, rising
    chosen_N[open_N] = pool[np.cumsum(copies) - copies + open_N % np.maximum(copies, 1)]
    return chosen_N
