"""Which experts to cut into segments over several pools (MoEShard, 2503.08467): only where that wins.

A replica serves as much for one round trip instead of several, so a cut wins in two cases alone: nobody holds the
expert and it fits in no single pool's free bytes but in several; or its holders, as many as may be, cannot keep up.
Only bytes that no full expert takes are used. Pure: proposes, places nothing.

Legend: P pools, N experts of all MoE layers end to end, S segments.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from buddymoe_ray.errors import ConfigError
from buddymoe_ray.policy.placement.map import PlacementMap
from buddymoe_ray.policy.placement.problem import Bools, Floats, PlacementProblem, answers

__all__ = ["SegmentSplit", "shard_segments"]

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class SegmentSplit:
    """Expert `expert` of MoE layer `layer`, its neurons cut into `len(pools)` equal parts, one at each of `pools`;
    `gain` in seconds per second."""

    layer: int
    expert: int
    pools: tuple[int, ...]
    gain: float


def shard_segments(
    problem: PlacementProblem,
    placed: PlacementMap,
    *,
    access_seconds: float,
    gather_seconds: float,
    most_segments: int = 8,
    most_experts: int = 256,
) -> tuple[SegmentSplit, ...]:
    """Splits worth making beside `placed`, hottest expert first, each predicted with those before it made.

    An access of S segments costs the slowest of S links and `gather_seconds` for each part after the first, and saves
    the share (S - 1) / S of `access_seconds`, the time that one pool takes to compute an access of the whole expert. A
    holder whose accesses take over a second per second is behind; what it is behind is what a split can take over.

    Raises:
        ConfigError: a time is below 0, or fewer than 2 segments are allowed.
    """
    if min(access_seconds, gather_seconds) < 0 or most_segments < 2:
        raise ConfigError(
            f"placement: access_seconds {access_seconds}, gather_seconds {gather_seconds}, most_segments "
            f"{most_segments} must be at least 0, 0 and 2. hint: leave most_segments out"
        )
    free_P = np.array([pool.bytes for pool in problem.pools]) - placed.held_PN.sum(axis=1) * problem.expert_bytes
    cost_PN = np.stack([cost_N for cost_N, _ in answers(problem, placed.held_PN)])
    behind_N = _behind(problem, placed, access_seconds)
    waste_N = np.zeros(problem.experts)
    for p in range(len(problem.pools)):
        waste_N += problem.demand_N(p) * cost_PN[p]
    copies_N = placed.held_PN.sum(axis=0)
    absent_N: Bools = copies_N == 0
    worth_N = behind_N + np.where(absent_N, waste_N, 0.0)
    order = [int(n) for n in np.argsort(-worth_N, kind="stable")[:most_experts] if worth_N[n] > 0]
    found = []
    for n in order:
        now_P = cost_PN[:, n] if absent_N[n] else None
        expert = _Expert(n=n, now_P=now_P, behind=float(behind_N[n]), copies=int(copies_N[n]))
        best = _best_split(problem, expert, free_P, access_seconds, gather_seconds, most_segments)
        if best is not None:
            found.append(best)
            free_P[list(best.pools)] -= -(-problem.expert_bytes // len(best.pools))
    return tuple(found)


def _behind(problem: PlacementProblem, placed: PlacementMap, access_seconds: float) -> Floats:
    """Seconds of work per second that each expert's holders together cannot do: accesses of peers spread evenly."""
    copies_N = placed.held_PN.sum(axis=0)
    local_N = sum(problem.demand_N(p) * held_N for p, held_N in enumerate(placed.held_PN))
    away_N = (problem.total_N - local_N) / np.maximum(copies_N, 1)
    behind_N = np.zeros(problem.experts)
    for p, held_N in enumerate(placed.held_PN):
        behind_N += np.maximum((problem.demand_N(p) + away_N) * access_seconds - 1.0, 0.0) * held_N
    return behind_N


@dataclass(frozen=True, kw_only=True)
class _Expert:
    """`now_P`: seconds of an access now, where nobody holds it; `behind`: see `_behind`; `copies`: its holders."""

    n: int
    now_P: Floats | None
    behind: float
    copies: int


def _best_split(
    problem: PlacementProblem, asked: _Expert, free_P: Ints, access_seconds: float, gather_seconds: float, most: int
) -> SegmentSplit | None:
    """The split of most gain within a node, if any gains."""
    demand_P, now_P = problem.demand_P(asked.n), asked.now_P
    best: SegmentSplit | None = None
    layer = int(np.searchsorted(problem.offset_L, asked.n, side="right")) - 1
    expert = asked.n - int(problem.offset_L[layer])
    for S in range(1 if asked.copies < problem.replicas else 2, most + 1):
        segment = -(-problem.expert_bytes // S)
        for node in range(int(problem.node_P.max()) + 1):
            fits = np.flatnonzero((problem.node_P == node) & (free_P >= segment))
            if len(fits) < S:
                continue
            chosen = fits[np.argsort(-free_P[fits], kind="stable")[:S]]
            link_P = np.array([problem.link_P(p)[chosen].max() for p in range(len(problem.pools))])
            extra_P = link_P + gather_seconds * (S - 1) - access_seconds * (S - 1) / S
            if now_P is not None:
                gain = float(demand_P @ np.maximum(now_P - extra_P, 0.0))
            else:
                spilt = min(asked.behind, float(S))  # S pools have S seconds per second to give
                extra = float(demand_P @ extra_P) / max(float(demand_P.sum()), 1e-300)
                gain = spilt - spilt / access_seconds * max(extra, 0.0) if spilt else 0.0
            gain -= problem.load_cost
            if gain > (best.gain if best else 0.0):
                pools = tuple(int(p) for p in chosen)
                best = SegmentSplit(layer=layer, expert=expert, pools=pools, gain=gain)
    # one part is a plain replica: where that is best the placement should hold one, and nothing is to be cut
    return best if best is not None and len(best.pools) > 1 else None
