"""A solver's hint for inter-layer affinity (ExFlow, 2401.08383): a pool likes the successors of what it holds.

Looks at the likeliest few neighbours of each expert and not at who else holds both, so it guides a search and prices
nothing: `problem.affinity_gain` does, and the solver keeps what that says is better.

Legend: P pools, N experts of all MoE layers end to end, E experts of a layer, J likeliest neighbours of an expert.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from buddymoe_ray.policy.placement.problem import Bools, Floats, PlacementProblem, peer_accesses

__all__ = ["Affinity"]

_NEIGHBOURS = 4


class Affinity:
    """Bonuses by pool content. `refresh` first: accesses that peers answer change with the holders."""

    def __init__(self, problem: PlacementProblem) -> None:
        assert problem.transition_LEE is not None, "asked for with transitions only"
        self._problem = problem
        self._after_NJ, self._after_chance_NJ = _likeliest(problem, forward=True)
        self._before_NJ, self._before_chance_NJ = _likeliest(problem, forward=False)
        self._saved_N = np.zeros(problem.experts)

    def refresh(self, held_PN: Bools) -> None:
        """Take the accesses that peers answer now; while nobody holds anything, all accesses."""
        accesses_N = peer_accesses(self._problem, held_PN) if held_PN.any() else self._problem.total_N
        self._saved_N = accesses_N * self._problem.affinity_seconds

    def bonus_N(self, own_N: Bools) -> Floats:
        """Seconds per second saved beside what the pool holds already, by expert."""
        after_N = (self._after_chance_NJ * own_N[self._after_NJ]).sum(axis=1) * self._saved_N
        flow_NJ = self._before_chance_NJ * (self._saved_N * own_N)[self._before_NJ]
        bonus_N: Floats = after_N + flow_NJ.sum(axis=1)
        return bonus_N


def _likeliest(problem: PlacementProblem, *, forward: bool) -> tuple[npt.NDArray[np.int64], Floats]:
    """Indices in N and P(transition) of each expert's likeliest successors, or of those it most likely follows."""
    assert problem.transition_LEE is not None, "asked for with transitions only"
    at, N = problem.offset_L, problem.experts
    index_NJ, chance_NJ = np.zeros((N, _NEIGHBOURS), dtype=np.int64), np.zeros((N, _NEIGHBOURS))
    for layer in range(len(problem.experts_per_layer) - 1):
        here, then = slice(at[layer], at[layer + 1]), slice(at[layer + 1], at[layer + 2])
        chance_EE = problem.transition_LEE[layer][: here.stop - here.start, : then.stop - then.start]
        rows, other, table_EE = (here, then, chance_EE) if forward else (then, here, chance_EE.T)
        top_EJ = np.argsort(-table_EE, axis=1, kind="stable")[:, :_NEIGHBOURS]
        index_NJ[rows, : top_EJ.shape[1]] = top_EJ + other.start
        chance_NJ[rows, : top_EJ.shape[1]] = np.take_along_axis(table_EE, top_EJ, axis=1)
    return index_NJ, chance_NJ
