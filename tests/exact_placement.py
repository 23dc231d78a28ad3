"""The best placement there is, by mixed-integer programming (scipy's HiGHS): the yardstick of the greedy solver.

For small problems: it has P^2 N variables. Knows no hysteresis. Same objective and rules as `policy.solve`;
affinity is not linear and is refused.

Legend: P pools, N experts of all MoE layers end to end. Variables: x[p, n] pool p holds n; y[p, n, q] share of p's uses
of n answered by pool q, or by the fallback (q = P).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from buddymoe_ray.errors import ConfigError
from buddymoe_ray.policy import PlacementMap, PlacementProblem, cost_of, previous_held, publish
from buddymoe_ray.policy.placement.problem import Bools, Floats

__all__ = ["solve_exact"]

_MOST_VARIABLES = 200_000


def solve_exact(
    problem: PlacementProblem, previous: PlacementMap | None = None, *, seconds: float = 60.0
) -> PlacementMap:
    """A map of least objective, within `seconds` of search.

    Raises:
        ConfigError: the problem has over 200,000 variables or affinity, or the time did not do.
    """
    P, N = len(problem.pools), problem.experts
    if P * N * (P + 2) > _MOST_VARIABLES or (problem.transition_LEE is not None and problem.affinity_seconds):
        raise ConfigError(
            f"placement: problem is {P} pools and {N} experts, must be small (P^2 N below {_MOST_VARIABLES}) and "
            "without affinity for an exact solution. hint: use solve"
        )
    now_PN = previous_held(problem, previous)
    held_PN = _solved(problem, now_PN, seconds)
    loads = int((held_PN & ~now_PN).sum())
    return publish(
        problem, held_PN, previous, before=cost_of(problem, now_PN), after=cost_of(problem, held_PN, loads=loads)
    )


def _solved(problem: PlacementProblem, now_PN: Bools, seconds: float) -> Bools:
    from scipy.optimize import Bounds, LinearConstraint, milp

    P, N = now_PN.shape
    cost, fits = _costs(problem, now_PN)
    scale = max(float(cost.max(initial=0.0)), 1e-30)  # HiGHS' tolerances are absolute
    matrix, low, high = _rules(problem)
    found = milp(
        cost / scale,
        constraints=LinearConstraint(matrix, low, high),
        integrality=np.arange(len(cost)) < P * N,
        bounds=Bounds(0, fits),
        options={"time_limit": seconds, "mip_rel_gap": 1e-6},
    )
    if found.status != 0:
        raise ConfigError(
            f"placement: exact search is unfinished ({found.message}), must end within {seconds:g} s. hint: use solve"
        )
    held_PN: Bools = found.x[: P * N].reshape(P, N) > 0.5
    return held_PN


def _costs(problem: PlacementProblem, now_PN: Bools) -> tuple[Floats, Floats]:
    """Cost of each variable, and its upper bound (0 where there is no link)."""
    P, N = now_PN.shape
    y_PNQ, fits_PNQ = np.zeros((P, N, P + 1)), np.ones((P, N, P + 1))
    for p in range(P):
        demand_N, link_P = problem.demand_N(p), problem.link_P(p)
        linked_P = np.isfinite(link_P)
        y_PNQ[p, :, :P] = demand_N[:, None] * np.where(linked_P, link_P, 0.0)
        fits_PNQ[p, :, :P] = linked_P
        y_PNQ[p, :, P] = demand_N * np.minimum(problem.standin_N, float(problem.fetch_cost_P[p]))
    x_PN = np.where(now_PN, 0.0, problem.load_cost)
    return np.concatenate([x_PN.ravel(), y_PNQ.ravel()]), np.concatenate([np.ones(P * N), fits_PNQ.ravel()])


def _rules(problem: PlacementProblem) -> tuple[object, npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Sparse rows, their lower and upper bounds: slots, copies, each access answered once, by those who hold it."""
    from scipy.sparse import block_diag, coo_array, eye_array, hstack, kron, vstack

    P, N = len(problem.pools), problem.experts
    ones = np.ones
    slots = kron(eye_array(P), ones((1, N)))
    copies = kron(ones((1, P)), eye_array(N))
    least_N = np.where(problem.required_N, 1.0, 0.0) if problem.covers else np.zeros(N)
    holding = vstack([slots, copies])
    y_count = P * N * (P + 1)
    answered = kron(eye_array(P * N), ones((1, P + 1)))
    p, n, q = (index.ravel() for index in np.indices((P, N, P)))
    row = np.arange(P * N * P)
    accesses = coo_array((ones(len(row)), (row, (p * N + n) * (P + 1) + q)), shape=(len(row), y_count))
    holds = coo_array((-ones(len(row)), (row, q * N + n)), shape=(len(row), P * N))
    matrix = vstack([block_diag([holding, answered]), hstack([holds, accesses])])
    low = np.concatenate([np.zeros(P), least_N, ones(P * N), np.full(len(row), -np.inf)])
    high = np.concatenate([problem.slots_P, np.full(N, float(problem.replicas)), ones(P * N), np.zeros(len(row))])
    return matrix, low, high
