"""Placements by simple rules, for `simulate` to compare the solver with: static, round robin, EPLB-like, and an oracle.

Each is a pure function of a problem that returns a map, like `solve`. None weighs links, stand-ins or migration.

Legend: P pools, N experts of all MoE layers end to end, L MoE layers, C places (pool slots) in dealing order.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from buddymoe_ray.policy import PlacementMap, PlacementProblem, cost_of, previous_held, publish, solve

__all__ = ["eplb", "oracle", "round_robin", "static"]

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


def round_robin(problem: PlacementProblem, previous: PlacementMap | None = None) -> PlacementMap:
    """Experts dealt in order over the pools, again and again until all are full; counts are not looked at."""
    held_PN = np.zeros((len(problem.pools), problem.experts), dtype=bool)
    begin = 0
    for row_N, slots in zip(held_PN, problem.slots_P.tolist(), strict=True):
        row_N[(begin + np.arange(slots)) % problem.experts] = True
        begin += slots
    return _published(problem, _capped(problem, held_PN), previous)


def static(problem: PlacementProblem, previous: PlacementMap | None = None) -> PlacementMap:
    """By frequency, once: with long-run counts, what a placement that never changes would do.

    One copy of everything, or of the most frequent as far as they fit, is dealt over the pools; then each pool adds the
    most frequent experts that it lacks.
    """
    order_N = np.argsort(-problem.total_N, kind="stable")
    held_PN = np.zeros((len(problem.pools), problem.experts), dtype=bool)
    dealt_C = _places(problem.slots_P)[: problem.experts]
    held_PN[dealt_C, order_N[: len(dealt_C)]] = True
    for row_N, slots in zip(held_PN, problem.slots_P.tolist(), strict=True):
        others = order_N[~row_N[order_N]]
        row_N[others[: slots - int(row_N.sum())]] = True
    return _published(problem, _capped(problem, held_PN), previous)


def eplb(problem: PlacementProblem, previous: PlacementMap | None = None) -> PlacementMap:
    """Balance load by replicas, after the idea of DeepSeek's expert-parallel load balancer.

    Layers share the slots equally. Within a layer each further slot goes to the expert of most load per replica; then
    replicas are dealt, heaviest first, over the pools in turn, so that pools bear alike loads. Recomputed from the
    window's counts each time, without a look at what moves. Where a layer gets fewer slots than experts, the least
    loaded stay out.
    """
    P, at = len(problem.pools), problem.offset_L
    layers = len(problem.experts_per_layer)
    bounds_LP = np.stack([problem.slots_P * layer // layers for layer in range(layers + 1)])
    held_PN = np.zeros((P, problem.experts), dtype=bool)
    for layer in range(layers):
        slots_P = bounds_LP[layer + 1] - bounds_LP[layer]
        load_E = problem.total_N[at[layer] : at[layer + 1]]
        most = min(problem.replicas, int((slots_P > 0).sum()))
        copies_E = replicas_by_load(load_E, int(slots_P.sum()), most)
        order_E = np.argsort(-load_E / np.maximum(copies_E, 1), kind="stable")
        dealt_C = np.repeat(order_E, copies_E[order_E])
        held_PN[np.roll(_places(slots_P), -layer)[: len(dealt_C)], at[layer] + dealt_C] = True
    return _published(problem, held_PN, previous)


def oracle(problem: PlacementProblem, previous: PlacementMap | None = None) -> PlacementMap:
    """The solver told this very window's counts, free to move anything for nothing: no real policy can do better."""
    found = solve(problem, None)
    return _published(problem, found.held_PN, previous)


def replicas_by_load(load_E: Floats, slots: int, most: int) -> Ints:
    """How many replicas each expert of a layer gets: one each, then always one to the highest load per replica.

    That is apportionment by highest quotients, found by bisection over the quotient instead of one slot at a time.
    """
    E = len(load_E)
    if slots <= E:
        copies_E = np.zeros(E, dtype=np.int64)
        copies_E[np.argsort(-load_E, kind="stable")[:slots]] = 1
        return np.minimum(copies_E, most)
    low, high = 0.0, float(load_E.max(initial=0.0))
    for _ in range(60):
        middle = (low + high) / 2
        if _by_quotient(load_E, middle, most).sum() > slots:
            low = middle
        else:
            high = middle
    copies_E = _by_quotient(load_E, high, most) if high > 0 else np.ones(E, dtype=np.int64)
    quotient_E = np.where(copies_E < most, load_E / copies_E, -1.0)
    for expert in np.argsort(-quotient_E, kind="stable")[: slots - int(copies_E.sum())]:
        copies_E[expert] += quotient_E[expert] >= 0  # ties that the bisection cannot part
    return copies_E


def _by_quotient(load_E: Floats, quotient: float, most: int) -> Ints:
    return np.clip(np.ceil(load_E / max(quotient, 1e-300)), 1, most).astype(np.int64)


def _places(slots_P: Ints) -> Ints:
    """Pools in dealing order: all in turn, then those with another slot, and so on `[C]`."""
    if not slots_P.sum():
        return np.zeros(0, dtype=np.int64)
    turn_C = np.concatenate([np.arange(slots) for slots in slots_P])
    pool_C = np.repeat(np.arange(len(slots_P)), slots_P)
    return pool_C[np.lexsort((pool_C, turn_C))]


def _capped(problem: PlacementProblem, held_PN: Bools) -> Bools:
    """Drop copies above the most replicas, last pools first."""
    return held_PN & (np.cumsum(held_PN, axis=0, dtype=np.int32) <= problem.replicas)


def _published(problem: PlacementProblem, held_PN: Bools, previous: PlacementMap | None) -> PlacementMap:
    now_PN = previous_held(problem, previous)
    loads = int((held_PN & ~now_PN).sum())
    after = cost_of(problem, held_PN, loads=loads)
    return publish(problem, held_PN, previous, before=cost_of(problem, now_PN), after=after)
