"""The best placement there is, by mixed-integer programming (HiGHS): the yardstick of the greedy solver.

For small problems: it has P^2 N variables. Knows no hysteresis. Same objective and rules as `policy.solve`;
affinity is not linear and is refused.

Legend: P pools, N experts of all MoE layers end to end. Variables: x[p, n] pool p holds n; y[p, n, q] share of p's uses
of n answered by pool q, or by the fallback (q = P).
"""

from __future__ import annotations

import highspy
import numpy as np

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
    P, N = now_PN.shape
    cost, fits = _costs(problem, now_PN)
    scale = max(float(cost.max(initial=0.0)), 1e-30)  # HiGHS' tolerances are absolute
    model, kinds = _rules(problem), highspy.HighsVarType
    model.num_col_ = model.a_matrix_.num_col_ = len(cost)
    model.col_cost_, model.col_lower_, model.col_upper_ = cost / scale, np.zeros(len(cost)), fits
    model.integrality_ = [kinds.kInteger] * (P * N) + [kinds.kContinuous] * (len(cost) - P * N)
    search = highspy.Highs()
    for name, value in {"output_flag": False, "time_limit": seconds, "mip_rel_gap": 1e-6}.items():
        search.setOptionValue(name, value)
    search.passModel(model)
    search.run()
    if search.getModelStatus() != highspy.HighsModelStatus.kOptimal:
        how = search.modelStatusToString(search.getModelStatus())
        raise ConfigError(
            f"placement: exact search is unfinished ({how}), must end within {seconds:g} s. hint: use solve"
        )
    held_PN: Bools = np.array(search.getSolution().col_value[: P * N]).reshape(P, N) > 0.5
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


def _rules(problem: PlacementProblem) -> highspy.HighsLp:
    """Rows with their bounds: slots, copies, each access answered once, by those who hold it."""
    P, N = len(problem.pools), problem.experts
    x_PN = np.arange(P * N).reshape(P, N)
    y_PNQ = P * N + np.arange(P * N * (P + 1)).reshape(P, N, P + 1)
    holds = np.stack([y_PNQ[:, :, :P], np.broadcast_to(x_PN.T, (P, N, P))], axis=-1).reshape(-1, 2)  # y <= x
    parts = [x_PN, x_PN.T, y_PNQ.reshape(P * N, P + 1), holds]
    least_N = np.where(problem.required_N, 1.0, 0.0) if problem.covers else np.zeros(N)
    low = [np.zeros(P), least_N, np.ones(P * N), np.full(len(holds), -np.inf)]
    high = [problem.slots_P, np.full(N, float(problem.replicas)), np.ones(P * N), np.zeros(len(holds))]
    model = highspy.HighsLp()
    model.row_lower_, model.row_upper_ = np.concatenate(low), np.concatenate(high)
    widths, matrix = [np.full(len(part), part.shape[1]) for part in parts], model.a_matrix_
    model.num_row_ = matrix.num_row_ = sum(len(part) for part in parts)
    matrix.format_ = highspy.MatrixFormat.kRowwise
    matrix.start_ = np.concatenate([[0], np.cumsum(np.concatenate(widths))])
    matrix.index_ = np.concatenate([part.ravel() for part in parts])
    values = np.ones(len(matrix.index_))
    values[-holds.size + 1 :: 2] = -1.0
    matrix.value_ = values
    return model
