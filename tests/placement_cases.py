"""Random small placement problems of every sort, and their cost in plain loops."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from buddymoe_ray.policy import NodeLinks, PlacementMap, PlacementProblem, Pool, cost_of

__all__ = ["breaches", "brute_cost", "noisy", "objective", "random_problem", "simple"]


def random_problem(seed: int, **changes: Any) -> PlacementProblem:
    """2 to 4 unequal pools on one or two nodes; skewed or uniform, shared or own counts; links by node or a matrix;
    with and without stand-ins and most replicas; layers of unequal size."""
    rng = np.random.default_rng(seed)
    P, L, E = int(rng.integers(2, 5)), int(rng.integers(1, 4)), int(rng.integers(4, 9))
    per_layer = tuple(int(n) for n in rng.integers(max(1, E - 2), E + 1, L))
    E, N, nodes = max(per_layer), sum(per_layer), int(rng.integers(1, 3))
    slots = rng.integers(0, max(2, int(N * rng.choice([0.3, 0.6, 1.0]))), P)
    pools = tuple(
        Pool(name=f"p{i}", node=f"n{i % nodes}", bytes=int(s) * 100 + int(rng.integers(0, 100)))
        for i, s in enumerate(slots)
    )
    popular_LE = np.stack([rng.permutation((1.0 + np.arange(E)) ** -rng.choice([0, 1.0, 2.0])) for _ in range(L)])
    fields: dict[str, Any] = {}
    if rng.random() < 0.5:
        fields["counts_LE"] = rng.poisson(popular_LE * 200).astype(float)
    else:
        fields["counts_PLE"] = rng.poisson(popular_LE * rng.gamma(1, 60, (P, L, E))).astype(np.float32)
    if rng.random() < 0.5:
        fields["standin_cost_LE"] = np.where(rng.random((L, E)) < 0.6, rng.gamma(2, 2e-4, (L, E)), np.inf)
    if rng.random() < 0.3:
        fields["max_replicas"] = int(rng.integers(1, P + 1))
    links: Any = NodeLinks(same_node=1e-4, other_node=float(rng.choice([3e-4, np.inf])))
    if rng.random() < 0.3:
        links = np.where(rng.random((P, P)) < 0.1, np.inf, rng.gamma(2, 1e-4, (P, P)))
        np.fill_diagonal(links, 0.0)
    whole = {
        "pools": pools,
        "expert_bytes": 100,
        "experts_per_layer": per_layer,
        "fetch_cost_P": rng.uniform(5e-4, 2e-3, P),
        "links": links,
        "migrate_bytes_per_second": 1e5,
        "horizon_seconds": float(rng.choice([1.0, 600.0])),
        **fields,
    }
    return PlacementProblem(**(whole | changes))


def simple(slots: tuple[int, ...], counts: Any, **changes: Any) -> PlacementProblem:
    """Pools of so many slots, two to a node, links 1 and 3, fetches 10 (seconds), free migration."""
    counts_LE = np.asarray(counts, dtype=float)
    whole: dict[str, Any] = {
        "pools": tuple(Pool(name=f"p{i}", node=f"n{i // 2}", bytes=100 * s) for i, s in enumerate(slots)),
        "expert_bytes": 100,
        "experts_per_layer": (counts_LE.shape[1],) * len(counts_LE),
        "fetch_cost_P": np.full(len(slots), 10.0),
        "links": NodeLinks(same_node=1.0, other_node=3.0),
        "counts_LE": counts_LE,
        "migrate_bytes_per_second": 1e12,
    }
    return PlacementProblem(**(whole | changes))


def brute_cost(problem: PlacementProblem, held_PN: Any) -> float:
    """Seconds per second of all accesses, one access's cheapest way at a time."""
    seconds, P = 0.0, len(problem.pools)
    for p in range(P):
        n = -1
        for layer, count in enumerate(problem.experts_per_layer):
            for expert in range(count):
                n += 1
                ways = [float(problem.fetch_cost_P[p])]
                if problem.standin_cost_LE is not None:
                    ways.append(float(problem.standin_cost_LE[layer, expert]))
                ways += [_link(problem, p, q) for q in range(P) if held_PN[q, n]]
                if problem.counts_PLE is not None:
                    accesses = float(problem.counts_PLE[p, layer, expert])
                else:
                    assert problem.counts_LE is not None
                    accesses = float(problem.counts_LE[layer, expert]) / P
                seconds += accesses / problem.window_seconds * min(ways)
    return seconds


def _link(problem: PlacementProblem, p: int, q: int) -> float:
    if p == q:
        return 0.0
    if not isinstance(problem.links, NodeLinks):
        return float(problem.links[p, q])
    same = problem.pools[p].node == problem.pools[q].node
    return problem.links.same_node if same else problem.links.other_node


def breaches(problem: PlacementProblem, placed: PlacementMap) -> list[str]:
    """Rules that a map breaks; empty for a sound one."""
    held_PN, found = placed.held_PN, []
    if any(held_PN[p].sum() * problem.expert_bytes > pool.bytes for p, pool in enumerate(problem.pools)):
        found.append("bytes")
    if held_PN.sum(axis=0).max(initial=0) > (problem.max_replicas or len(problem.pools)):
        found.append("replicas")
    needed = [
        problem.standin_cost_LE is None or not np.isfinite(problem.standin_cost_LE[layer, expert])
        for layer, count in enumerate(problem.experts_per_layer)
        for expert in range(count)
    ]
    fits = sum(needed) <= sum(min(p.bytes // problem.expert_bytes, len(needed)) for p in problem.pools)
    if fits and not held_PN.any(axis=0)[np.array(needed)].all():
        found.append("coverage")
    return found


def objective(problem: PlacementProblem, placed: PlacementMap) -> float:
    """Seconds lost per second of serving under a map, its loads counted."""
    return cost_of(problem, placed.held_PN, loads=int(placed.loads_P.sum()))


def noisy(problem: PlacementProblem, seed: int, amount: float) -> PlacementProblem:
    """The same with every count off by up to `amount` (a share)."""
    rng = np.random.default_rng(seed)
    name = "counts_PLE" if problem.counts_PLE is not None else "counts_LE"
    counts = getattr(problem, name)
    return replace(problem, **{name: counts * rng.uniform(1 - amount, 1 + amount, counts.shape)})
