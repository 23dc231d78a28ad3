"""What a placement costs: every use by its cheapest rung, less affinity, plus migration. The spec of the solvers.

Plain and not incremental: solvers keep running sums of their own and are tested against this. Knows no solver.
Invariant: every use is answered exactly once. Neighbours: `placement` has the words, `costs` the fast twin.

Legend: P pools, N experts of all MoE layers end to end, L MoE layers, M nodes, R rungs.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from buddymoe_ray.policy.placement.map import PlacementMap
from buddymoe_ray.policy.placement.problem import Bools, Floats, NodeLinks, PlacementProblem

__all__ = ["RUNGS", "affinity_gain", "answers", "cost_of", "objective", "rung_uses"]

RUNGS = ("local", "same_node", "other_node", "standin", "fetch")
"""How a use is answered: here, by a peer of this node, by one of another, by a stand-in, by weights that come."""

_LOCAL, _SAME, _OTHER, _STANDIN, _FETCH = range(len(RUNGS))


def answers(problem: PlacementProblem, held_PN: Bools) -> Iterator[tuple[Floats, npt.NDArray[np.int8]]]:
    """For each pool, seconds of one use of every expert and the rung (index into `RUNGS`) that answers it."""
    same_node = _nearest_of_nodes if isinstance(problem.links, NodeLinks) else _nearest_of_matrix
    for pool, (peer_N, rung_N) in enumerate(same_node(problem, held_PN)):
        fetch = float(problem.fetch_cost_P[pool])
        cost_N = np.full(problem.experts, fetch)
        kind_N = np.full(problem.experts, _FETCH, dtype=np.int8)
        for offer_N, offered in ((problem.standin_N, np.int8(_STANDIN)), (peer_N, rung_N)):
            better_N = offer_N <= cost_N  # at equal price a real expert answers rather than a stand-in
            np.copyto(cost_N, offer_N, where=better_N)
            np.copyto(kind_N, offered, where=better_N)
        cost_N[held_PN[pool]] = 0.0
        kind_N[held_PN[pool]] = _LOCAL
        yield cost_N, kind_N


def _nearest_of_nodes(problem: PlacementProblem, held_PN: Bools) -> Iterator[tuple[Floats, npt.NDArray[np.int8]]]:
    assert isinstance(problem.links, NodeLinks), "the matrix form has its own way"
    node_MN = np.stack([held_PN[problem.node_P == m].any(axis=0) for m in range(problem.node_P.max() + 1)])
    any_N = node_MN.any(axis=0)
    far_N = np.where(any_N, problem.links.other_node, np.inf)
    for node in problem.node_P:
        yield (
            np.where(node_MN[node], problem.links.same_node, far_N),
            np.where(node_MN[node], _SAME, _OTHER).astype(np.int8),
        )


def _nearest_of_matrix(problem: PlacementProblem, held_PN: Bools) -> Iterator[tuple[Floats, npt.NDArray[np.int8]]]:
    for pool in range(len(problem.pools)):
        cost_PN = np.where(held_PN, problem.link_P(pool)[:, None], np.inf)
        cost_PN[pool] = np.inf
        best_N = cost_PN.argmin(axis=0)
        near_N = problem.node_P[best_N] == problem.node_P[pool]
        yield cost_PN.min(axis=0), np.where(near_N, _SAME, _OTHER).astype(np.int8)


def rung_uses(problem: PlacementProblem, held_PN: Bools) -> tuple[Floats, float]:
    """Uses per second answered by each rung `[R]`, and the seconds per second that they cost together."""
    uses_R, seconds = np.zeros(len(RUNGS)), 0.0
    for pool, (cost_N, rung_N) in enumerate(answers(problem, held_PN)):
        demand_N = problem.demand_N(pool)
        uses_R += np.bincount(rung_N, weights=demand_N, minlength=len(RUNGS))
        seconds += float(demand_N @ cost_N)
    return uses_R, seconds


def affinity_gain(problem: PlacementProblem, held_PN: Bools) -> float:
    """Seconds per second saved where one pool answers a use and the next layer's use after it (ExFlow, 2401.08383).

    Sum over transitions of (uses that peers answer) x P(successor) x (some pool holds both) x `affinity_seconds`.
    """
    if problem.transition_LEE is None or not problem.affinity_seconds:
        return 0.0
    peer_N, gain, at = peer_uses(problem, held_PN), 0.0, problem.offset_L
    for layer in range(len(problem.experts_per_layer) - 1):
        here, then = slice(at[layer], at[layer + 1]), slice(at[layer + 1], at[layer + 2])
        together_EE = held_PN[:, here].T.astype(np.float32) @ held_PN[:, then].astype(np.float32) > 0
        chance_EE = problem.transition_LEE[layer][: together_EE.shape[0], : together_EE.shape[1]]
        gain += float(peer_N[here] @ (chance_EE * together_EE).sum(axis=1))
    return gain * problem.affinity_seconds


def peer_uses(problem: PlacementProblem, held_PN: Bools) -> Floats:
    """Uses per second of each expert that peers answer `[N]`."""
    uses_N = np.zeros(problem.experts)
    for pool, (_, rung_N) in enumerate(answers(problem, held_PN)):
        uses_N += problem.demand_N(pool) * ((rung_N == _SAME) | (rung_N == _OTHER))
    return uses_N


def cost_of(problem: PlacementProblem, held_PN: Bools, *, loads: int = 0) -> float:
    """Seconds per second that the holders `[P, N]` cost, with `loads` experts to bring first."""
    _, seconds = rung_uses(problem, held_PN)
    return seconds - affinity_gain(problem, held_PN) + loads * problem.load_cost


def objective(problem: PlacementProblem, placed: PlacementMap) -> float:
    """Seconds lost per second of serving: sum of uses x cheapest rung, less affinity, plus migration / horizon."""
    return cost_of(problem, placed.held_PN, loads=len(placed.migration.load_pool))
