"""What is asked of a placement and what an answer costs: memories, demand, links, and the objective.

Plain and not incremental: the solver keeps running sums of its own (`values`) and is tested against this. Knows no
solver, no clock and no network. Invariants: a problem that was made has shapes and numbers that fit together; every
access is answered exactly once.

Legend: P pools, N experts of all MoE layers end to end, L MoE layers, E experts of the widest layer, M nodes, R
options.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from buddymoe_ray.errors import ConfigError

__all__ = ["OPTIONS", "NodeLinks", "PlacementProblem", "Pool", "affinity_gain", "answers", "cost_of", "option_accesses"]

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Pool:
    """One memory that holds full experts: a GPU of one worker, or a CPU node's store that several workers share.

    `bytes` is what full experts may take there.
    """

    name: str
    node: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class NodeLinks:
    """Seconds of one access that a peer computes, by where the peer is; infinite where there is no link.

    Raises ConfigError when the way to another node is cheaper than the way within one.
    """

    same_node: float
    other_node: float

    def __post_init__(self) -> None:
        if not 0 <= self.same_node <= self.other_node:
            raise ConfigError(
                f"links are {self.same_node} (same node) and {self.other_node} (other node) seconds, must be rising "
                "and at least 0. hint: give link costs as a matrix if another node is nearer"
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class PlacementProblem:
    """What the solver is asked.

    Args:
        pools: memories, with names of their own.
        expert_bytes: one expert, as it lies in a pool.
        experts_per_layer: E of every MoE layer; tables over [L, E] are read up to it.
        fetch_cost_P: seconds of one access whose weights come from host memory or disk.
        links: `NodeLinks`, or `[P, P]` seconds of one access of row p computed at column q: 0 on the diagonal, inf is
        no
            link. The matrix form takes P^2 N time and memory: meant for up to some hundred pools.
        counts_PLE: accesses per window that arise at each pool; or
        counts_LE: accesses per window in all, of which an equal share arises at each pool.
        standin_cost_LE: seconds that one access answered by a resident stand-in is worth; inf where there is none.
        transition_LEE: P(expert j of layer l + 1 | expert i of layer l); the last layer's table is not read.
        affinity_seconds: saved per access whose expert and its successor are both answered by one peer (ExFlow).
        migrate_bytes_per_second: bandwidth that loading experts is given.
        horizon_seconds: for how long a placement is expected to stand.
        window_seconds: the time that counts were taken over.
        max_replicas: most pools that hold the same expert; None is no limit.

    Raises:
        ConfigError: a field does not fit the others.
    """

    pools: tuple[Pool, ...]
    expert_bytes: int
    experts_per_layer: tuple[int, ...]
    fetch_cost_P: Array
    links: NodeLinks | Array
    counts_PLE: Array | None = None
    counts_LE: Array | None = None
    standin_cost_LE: Array | None = None
    transition_LEE: Array | None = None
    affinity_seconds: float = 0.0
    migrate_bytes_per_second: float = 10e9
    horizon_seconds: float = 600.0
    window_seconds: float = 1.0
    max_replicas: int | None = None

    def __post_init__(self) -> None:
        P, L, E = len(self.pools), len(self.experts_per_layer), max(self.experts_per_layer, default=0)
        names = {pool.name for pool in self.pools}
        _need(
            len(names) == P >= 1, "pools", f"{len(names)} names for {P} pools", "at least one, each with its own name"
        )
        _need(min((p.bytes for p in self.pools), default=0) >= 0, "pools", "of negative bytes", "of at least 0 bytes")
        _need(
            min(self.experts_per_layer, default=0) >= 1, "experts_per_layer", self.experts_per_layer, "at least 1 each"
        )
        _need(self.expert_bytes >= 1, "expert_bytes", self.expert_bytes, "at least 1")
        _need(
            (self.counts_PLE is None) != (self.counts_LE is None),
            "counts",
            "both or neither",
            "counts_PLE or counts_LE",
        )
        _table("counts_PLE", self.counts_PLE, (P, L, E), finite=True)
        _table("counts_LE", self.counts_LE, (L, E), finite=True)
        _table("fetch_cost_P", self.fetch_cost_P, (P,), finite=True)
        _table("standin_cost_LE", self.standin_cost_LE, (L, E), finite=False)
        _table("transition_LEE", self.transition_LEE, (L, E, E), finite=True)
        if not isinstance(self.links, NodeLinks):
            _table("links", self.links, (P, P), finite=False)
            _need(not np.diagonal(self.links).any(), "links", "not 0 on the diagonal", "0 there")
        for name in ("migrate_bytes_per_second", "horizon_seconds", "window_seconds"):
            _need(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        _need(0 <= self.affinity_seconds < np.inf, "affinity_seconds", self.affinity_seconds, "at least 0")
        _need(self.max_replicas is None or self.max_replicas >= 1, "max_replicas", self.max_replicas, "at least 1")

    @cached_property
    def offset_L(self) -> npt.NDArray[np.int64]:
        """Index in N of every layer's first expert, and N itself: `[L + 1]`."""
        return np.concatenate([[0], np.cumsum(self.experts_per_layer, dtype=np.int64)])

    @property
    def experts(self) -> int:
        """N."""
        return int(self.offset_L[-1])

    @cached_property
    def slots_P(self) -> npt.NDArray[np.int64]:
        """Full experts that fit in each pool, at most all of them."""
        return np.array([min(pool.bytes // self.expert_bytes, self.experts) for pool in self.pools], dtype=np.int64)

    @property
    def replicas(self) -> int:
        """Most holders of one expert."""
        return min(self.max_replicas or len(self.pools), len(self.pools))

    @cached_property
    def node_P(self) -> npt.NDArray[np.int64]:
        """Number of each pool's node."""
        order = {node: at for at, node in enumerate(dict.fromkeys(pool.node for pool in self.pools))}
        return np.array([order[pool.node] for pool in self.pools], dtype=np.int64)

    @cached_property
    def standin_N(self) -> Floats:
        """Seconds of a stand-in's answer; inf where there is none."""
        if self.standin_cost_LE is None:
            return np.full(self.experts, np.inf)
        return self.flat(self.standin_cost_LE)

    @cached_property
    def required_N(self) -> Bools:
        """Experts that some pool must hold, where all of them fit: those that no stand-in answers for."""
        return ~np.isfinite(self.standin_N)

    @property
    def covers(self) -> bool:
        """Whether the pools can hold every required expert. If not, the objective alone says which stay out."""
        return bool(self.required_N.sum() <= self.slots_P.sum())

    @cached_property
    def total_N(self) -> Floats:
        """Accesses per second in all."""
        if self.counts_LE is not None:
            return self.rate_N
        assert self.counts_PLE is not None, "counts were checked"
        return self.flat(self.counts_PLE.sum(axis=0, dtype=np.float64)) / self.window_seconds

    @cached_property
    def rate_N(self) -> Floats:
        """Accesses per second of the shared counts, before they are shared out."""
        assert self.counts_LE is not None, "asked for shared counts only"
        return self.flat(self.counts_LE) / self.window_seconds

    def demand_N(self, pool: int) -> Floats:
        """Accesses per second that arise at one pool."""
        if self.counts_PLE is not None:
            return self.flat(self.counts_PLE[pool]) / self.window_seconds
        rate_N: Floats = self.rate_N / len(self.pools)
        return rate_N

    def link_P(self, pool: int) -> Floats:
        """Seconds of one access of this pool that each pool computes; 0 for itself."""
        if not isinstance(self.links, NodeLinks):
            row_P: Floats = self.links[pool].astype(np.float64)
            return row_P
        near = self.node_P == self.node_P[pool]
        cost_P = np.where(near, self.links.same_node, self.links.other_node)
        cost_P[pool] = 0.0
        return cost_P

    @property
    def load_cost(self) -> float:
        """Seconds per second that loading one expert costs over the horizon."""
        return self.expert_bytes / self.migrate_bytes_per_second / self.horizon_seconds

    def flat(self, table_LE: Array) -> Floats:
        """A table over [L, E] as [N]."""
        if len(set(self.experts_per_layer)) == 1:
            whole_N: Floats = table_LE.reshape(-1).astype(np.float64)
            return whole_N
        inside_N: Floats = table_LE[self._inside_LE].astype(np.float64)
        return inside_N

    @cached_property
    def _inside_LE(self) -> Bools:
        width = max(self.experts_per_layer)
        return np.arange(width) < np.array(self.experts_per_layer)[:, None]


def _need(sound: bool, name: str, found: object, wanted: str) -> None:
    if not sound:
        raise ConfigError(f"placement: {name} is {found}, must be {wanted}. hint: check what builds the problem")


def _table(name: str, table: Array | None, shape: tuple[int, ...], *, finite: bool) -> None:
    if table is None:
        return
    _need(table.shape == shape, name, f"of shape {table.shape}", f"of shape {shape}")
    low, high = (table.min(), table.max()) if table.size else (0.0, 0.0)
    _need(bool(low >= 0 and (high < np.inf or not finite)), name, f"from {low} to {high}", "numbers of at least 0")


OPTIONS = ("local", "same_node", "other_node", "standin", "fetch")
"""How an access is answered: here, by a peer of this node, by one of another, by a stand-in, by weights that come."""

_LOCAL, _SAME, _OTHER, _STANDIN, _FETCH = range(len(OPTIONS))


def answers(problem: PlacementProblem, held_PN: Bools) -> Iterator[tuple[Floats, npt.NDArray[np.int8]]]:
    """For each pool, seconds of one access of every expert and the option (index into `OPTIONS`) that answers it."""
    same_node = _nearest_of_nodes if isinstance(problem.links, NodeLinks) else _nearest_of_matrix
    for pool, (peer_N, option_N) in enumerate(same_node(problem, held_PN)):
        fetch = float(problem.fetch_cost_P[pool])
        cost_N = np.full(problem.experts, fetch)
        kind_N = np.full(problem.experts, _FETCH, dtype=np.int8)
        for offer_N, offered in ((problem.standin_N, np.int8(_STANDIN)), (peer_N, option_N)):
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


def option_accesses(problem: PlacementProblem, held_PN: Bools) -> tuple[Floats, float]:
    """Accesses per second answered by each option `[R]`, and the seconds per second that they cost together."""
    accesses_R, seconds = np.zeros(len(OPTIONS)), 0.0
    for pool, (cost_N, option_N) in enumerate(answers(problem, held_PN)):
        demand_N = problem.demand_N(pool)
        accesses_R += np.bincount(option_N, weights=demand_N, minlength=len(OPTIONS))
        seconds += float(demand_N @ cost_N)
    return accesses_R, seconds


def affinity_gain(problem: PlacementProblem, held_PN: Bools) -> float:
    """Seconds per second saved where one pool answers accesses of two layers in a row (ExFlow, 2401.08383).

    Sum over transitions of (accesses that peers answer) x P(successor) x (some pool holds both) x `affinity_seconds`.
    """
    if problem.transition_LEE is None or not problem.affinity_seconds:
        return 0.0
    peer_N, gain, at = peer_accesses(problem, held_PN), 0.0, problem.offset_L
    for layer in range(len(problem.experts_per_layer) - 1):
        here, then = slice(at[layer], at[layer + 1]), slice(at[layer + 1], at[layer + 2])
        together_EE = held_PN[:, here].T.astype(np.float32) @ held_PN[:, then].astype(np.float32) > 0
        chance_EE = problem.transition_LEE[layer][: together_EE.shape[0], : together_EE.shape[1]]
        gain += float(peer_N[here] @ (chance_EE * together_EE).sum(axis=1))
    return gain * problem.affinity_seconds


def peer_accesses(problem: PlacementProblem, held_PN: Bools) -> Floats:
    """Accesses per second of each expert that peers answer `[N]`."""
    accesses_N = np.zeros(problem.experts)
    for pool, (_, option_N) in enumerate(answers(problem, held_PN)):
        accesses_N += problem.demand_N(pool) * ((option_N == _SAME) | (option_N == _OTHER))
    return accesses_N


def cost_of(problem: PlacementProblem, held_PN: Bools, *, loads: int = 0) -> float:
    """Seconds per second that the holders `[P, N]` cost, with `loads` experts to bring first."""
    _, seconds = option_accesses(problem, held_PN)
    return seconds - affinity_gain(problem, held_PN) + loads * problem.load_cost
