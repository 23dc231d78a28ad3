"""What one more copy of an expert in one pool saves, kept up to date while a solver changes holders.

The fast twin of `problem.cost_of`. For links by node a row of values is a few sums over N, however many pools there
are; for a matrix of links it is P x N. Knows no migration and no rule about who must be held.
Invariant: `held_PN` and the running counts agree.

Legend: P pools, N experts of all MoE layers end to end, M nodes, Q pools that ask.
"""

from __future__ import annotations

from collections import Counter
from typing import Protocol

import numpy as np
import numpy.typing as npt

from buddymoe_ray.policy.placement.problem import Bools, Floats, NodeLinks, PlacementProblem

__all__ = ["Values", "values_of"]


class Values(Protocol):
    """Running state of a solver: who holds what, and what a copy is worth."""

    held_PN: Bools
    copies_N: npt.NDArray[np.int32]

    def value_N(self, pool: int) -> Floats:
        """Seconds per second saved by each expert in this pool, given who else holds it (the pool's own copy apart)."""
        ...

    def put(self, pool: int, row_N: Bools) -> None:
        """Let the pool hold exactly this."""
        ...

    def cost(self) -> float:
        """Seconds per second of all accesses: `problem.option_accesses` says the same, more slowly."""
        ...


def values_of(problem: PlacementProblem, held_PN: Bools) -> Values:
    """The state that starts from these holders (copied)."""
    if isinstance(problem.links, NodeLinks):
        return _NodeValues(problem, problem.links, held_PN)
    return _MatrixValues(problem, held_PN)


class _NodeValues:
    """Links by node. With S, O, F the cost of an access when its node, another node, nobody holds the expert (each at
    most the fallback F), a copy at p saves demand(p) S at p itself, `node_MN` = sum over the node of demand (O - S)
    when it is the node's first, and `first_N` = sum over all of demand (F - O) when it is the very first."""

    def __init__(self, problem: PlacementProblem, links: NodeLinks, held_PN: Bools) -> None:
        self._problem, self._links, self._node_P = problem, links, problem.node_P
        self._near: dict[float, Floats] = {}  # by fetch cost: S, times the shared rate where there is one
        M, N = int(self._node_P.max()) + 1, problem.experts
        self._node_MN, self._first_N, self._fall = np.zeros((M, N)), np.zeros(N), 0.0
        self._sum_demands()
        self.held_PN = held_PN.copy()
        self._copies_MN = np.zeros((M, N), dtype=np.int32)
        for node, row_N in zip(self._node_P.tolist(), held_PN, strict=True):
            self._copies_MN[node] += row_N
        self.copies_N = self._copies_MN.sum(axis=0, dtype=np.int32)

    def _sum_demands(self) -> None:
        fetch_P = self._problem.fetch_cost_P.astype(np.float64)
        if self._problem.counts_PLE is not None:
            for p, fetch in enumerate(fetch_P):
                self._add(int(self._node_P[p]), self._problem.demand_N(p), float(fetch))
            return
        rate_N = self._problem.rate_N
        # pools of a node that fetch at one cost count as one
        alike = Counter(zip(self._node_P.tolist(), fetch_P.tolist(), strict=True))
        for (node, fetch), pools in alike.items():
            self._add(node, rate_N * (pools / len(fetch_P)), fetch)

    def _add(self, node: int, demand_N: Floats, fetch: float) -> None:
        same_N, other_N, fall_N = self._option_costs(fetch)
        self._node_MN[node] += demand_N * (other_N - same_N)
        self._first_N += demand_N * (fall_N - other_N)
        self._fall += float(demand_N @ fall_N)

    def _option_costs(self, fetch: float) -> tuple[Floats, Floats, Floats]:
        fall_N = np.minimum(self._problem.standin_N, fetch)
        other_N = np.minimum(fall_N, self._links.other_node)
        return np.minimum(other_N, self._links.same_node), other_N, fall_N

    def _local_N(self, pool: int) -> Floats:
        """demand S: what a copy saves at its own pool."""
        fetch = float(self._problem.fetch_cost_P[pool])
        shared = self._problem.counts_PLE is None
        if fetch not in self._near:
            self._near[fetch] = self._option_costs(fetch)[0] * (self._problem.rate_N if shared else 1.0)
        at_pool = 1 / len(self._node_P) if shared else self._problem.demand_N(pool)
        local_N: Floats = self._near[fetch] * at_pool
        return local_N

    def value_N(self, pool: int) -> Floats:
        node = self._node_P[pool]
        value_N = self._local_N(pool)
        value_N += self._node_MN[node] * (self._copies_MN[node] == 0)
        nowhere = np.flatnonzero(self.copies_N == 0)
        value_N[nowhere] += self._first_N[nowhere]
        own = np.flatnonzero(self.held_PN[pool])  # its own copies do not count against it
        value_N[own] += self._node_MN[node, own] * (self._copies_MN[node, own] == 1)
        value_N[own] += self._first_N[own] * (self.copies_N[own] == 1)
        return value_N

    def put(self, pool: int, row_N: Bools) -> None:
        changed = np.flatnonzero(row_N != self.held_PN[pool])
        change = np.where(row_N[changed], 1, -1)
        self.copies_N[changed] += change
        self._copies_MN[self._node_P[pool], changed] += change
        self.held_PN[pool] = row_N

    def cost(self) -> float:
        saved = float(self._first_N[self.copies_N > 0].sum() + np.sum(self._node_MN * (self._copies_MN > 0)))
        for pool, held_N in enumerate(self.held_PN):
            saved += float(self._local_N(pool)[np.flatnonzero(held_N)].sum())
        return self._fall - saved


class _MatrixValues:
    """Any links. Keeps the two cheapest ways of every asker to every expert, so that a pool can be left out."""

    def __init__(self, problem: PlacementProblem, held_PN: Bools) -> None:
        P = len(problem.pools)
        self._link_QP = np.stack([problem.link_P(p) for p in range(P)])
        self._demand_QN = np.stack([problem.demand_N(p) for p in range(P)])
        self._fall_QN = np.minimum(problem.standin_N[None, :], problem.fetch_cost_P.astype(np.float64)[:, None])
        self.held_PN = held_PN.copy()
        self.copies_N = held_PN.sum(axis=0, dtype=np.int32)
        self._best_QN, self._next_QN = self._fall_QN.copy(), self._fall_QN.copy()
        self._who_QN = np.full(self._fall_QN.shape, -1, dtype=np.int32)
        self._refresh(np.arange(problem.experts))

    def _refresh(self, columns: npt.NDArray[np.int64]) -> None:
        """Find the two cheapest ways anew for these experts."""
        fall_QC = self._fall_QN[:, columns]
        best_QC, next_QC, who_QC = fall_QC.copy(), fall_QC.copy(), np.full(fall_QC.shape, -1, dtype=np.int32)
        for p, held_N in enumerate(self.held_PN):
            offer_QC = np.where(held_N[columns], self._link_QP[:, p : p + 1], np.inf)
            beats_QC = offer_QC < best_QC
            next_QC = np.where(beats_QC, best_QC, np.minimum(next_QC, offer_QC))
            best_QC, who_QC = np.where(beats_QC, offer_QC, best_QC), np.where(beats_QC, p, who_QC)
        self._best_QN[:, columns], self._next_QN[:, columns], self._who_QN[:, columns] = best_QC, next_QC, who_QC

    def value_N(self, pool: int) -> Floats:
        without_QN = np.where(self._who_QN == pool, self._next_QN, self._best_QN)
        saved_QN = np.maximum(without_QN - self._link_QP[:, pool : pool + 1], 0.0)
        value_N: Floats = (self._demand_QN * saved_QN).sum(axis=0)
        return value_N

    def put(self, pool: int, row_N: Bools) -> None:
        changed = np.flatnonzero(row_N != self.held_PN[pool])
        self.copies_N += row_N.astype(np.int32) - self.held_PN[pool]
        self.held_PN[pool] = row_N
        if len(changed):
            self._refresh(changed)

    def cost(self) -> float:
        return float((self._demand_QN * self._best_QN).sum())
