"""Replays a workload on a cluster that is only numbers: what each placement would hit, move and stall, by window.

A window is placed with the counts of the windows before it (a moving average), then served with its own. Loads keep to
the movers' bandwidth, so a map may be reached late. Times follow from stated link costs, without overlap or queues:
believe differences between placements more than tokens/s. Neighbours: `workloads`, `baselines`, `policy.placement`.

Legend: W windows, L MoE layers, E experts, P pools (GPUs), N experts of all layers, R options (`OPTIONS`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from buddymoe_ray.calibrate.baselines import eplb, oracle, round_robin, static
from buddymoe_ray.calibrate.charts import Line, bar_chart, embedded, line_chart, rendered, write_page
from buddymoe_ray.calibrate.workloads import Workload
from buddymoe_ray.errors import ConfigError
from buddymoe_ray.policy import (
    OPTIONS,
    ExpectedMisses,
    NodeLinks,
    PlacementMap,
    PlacementProblem,
    Pool,
    expected_misses,
    migration_steps,
    option_accesses,
    publish,
    solve,
)

__all__ = ["PLACEMENTS", "Cluster", "Outcome", "simulate", "write_plot"]

Floats = npt.NDArray[np.float64]
Progress = Callable[..., Iterable[Any]]

PLACEMENTS = ("ours", "static", "round-robin", "eplb", "oracle")
_FRESH = 0.5


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """GPUs and what links cost.

    Args:
        gpus, gpus_per_node, pool_bytes: each GPU has `pool_bytes` for full experts.
        expert_bytes, activation_bytes: one expert; what one access by a peer sends and gets back.
        same_node, other_node, fetch: seconds of one access that a peer of this node or another computes, or whose
            weights are fetched.
        standin: seconds that a stand-in's answer is worth; inf for none.
        host: seconds of one that a GPU's host computes, beside what is fetched; inf for none.
        token_seconds: one token's compute on its GPU when every access is local.
        migrate_bytes_per_second: of each GPU's mover.
        window_seconds, horizon_seconds: see PlacementProblem.
        max_replicas: most holders of an expert; None is no limit.
        affinity_seconds: see PlacementProblem; needs a recorded trace.
    """

    gpus: int
    gpus_per_node: int
    pool_bytes: int
    expert_bytes: int
    activation_bytes: int
    same_node: float
    other_node: float
    fetch: float
    standin: float
    token_seconds: float
    migrate_bytes_per_second: float
    window_seconds: float
    horizon_seconds: float
    max_replicas: int | None = None
    affinity_seconds: float = 0.0
    host: float = math.inf

    def problem(self, workload: Workload, counts_LE: Floats) -> PlacementProblem:
        """The placement problem of one window's counts; requests arrive evenly at all GPUs."""
        per_layer = workload.experts_per_layer
        return PlacementProblem(
            pools=tuple(
                Pool(name=f"gpu{g}", node=f"node{g // self.gpus_per_node}", bytes=self.pool_bytes)
                for g in range(self.gpus)
            ),
            expert_bytes=self.expert_bytes,
            experts_per_layer=per_layer,
            fetch_cost_P=np.full(self.gpus, self.fetch),
            links=NodeLinks(same_node=self.same_node, other_node=self.other_node),
            counts_LE=counts_LE,
            standin_cost_LE=np.full(counts_LE.shape, self.standin) if np.isfinite(self.standin) else None,
            transition_LEE=workload.transition_LEE if self.affinity_seconds else None,
            affinity_seconds=self.affinity_seconds,
            migrate_bytes_per_second=self.migrate_bytes_per_second,
            horizon_seconds=self.horizon_seconds,
            window_seconds=self.window_seconds,
            max_replicas=self.max_replicas,
        )


@dataclass(kw_only=True)
class Outcome:
    """What one placement did over the windows after the first, which only warms up.

    `accesses_WR` are accesses per second by option, `stall_W` seconds per second waited, `loads_W` experts moved,
    `solver_W` seconds of solving, `late` loads that did not fit a window's bandwidth.
    """

    placement: str
    accesses_WR: list[Floats] = field(default_factory=list)
    stall_W: list[float] = field(default_factory=list)
    loads_W: list[int] = field(default_factory=list)
    solver_W: list[float] = field(default_factory=list)
    late: int = 0
    first_solve: float = 0.0

    def as_record(self, cluster: Cluster, workload: Workload) -> dict[str, Any]:
        """Fractions in per cent, bytes and milliseconds; bytes are of all measured windows."""
        accesses_R = np.sum(self.accesses_WR, axis=0)
        share_R = 100 * accesses_R / max(float(accesses_R.sum()), 1e-300)
        hosted = self.hosted(cluster, workload)
        count_R = dict(zip(OPTIONS, accesses_R * cluster.window_seconds, strict=True))
        return {
            "placement": self.placement,
            **{f"{option}_percent": round(float(share), 3) for option, share in zip(OPTIONS, share_R, strict=True)},
            "same_node_bytes": int(count_R["same_node"] * cluster.activation_bytes),
            "other_node_bytes": int(count_R["other_node"] * cluster.activation_bytes),
            "fetch_bytes": int(count_R["fetch"] * cluster.expert_bytes),
            "migration_bytes": sum(self.loads_W) * cluster.expert_bytes,
            "late_loads": self.late,
            "stall_ms_per_token": round(1e3 * self.stall_per_token(cluster, workload), 4),
            "tokens_per_second": round(self.tokens_per_second(cluster, workload), 1),
            "host_percent": round(100 * hosted.by_host / workload.top_k, 3),
            "host_tokens_per_second": round(self.tokens_per_second(cluster, workload, hosted), 1),
            "first_solve_ms": round(1e3 * self.first_solve, 2),
            "solver_ms": round(1e3 * float(np.median(self.solver_W)), 2),
            "solver_ms_max": round(1e3 * max(self.solver_W), 2),
        }

    def stall_per_token(self, cluster: Cluster, workload: Workload) -> float:
        """Mean seconds that a token waits for links."""
        return float(np.mean(self.stall_W)) * cluster.window_seconds / workload.tokens

    def hosted(self, cluster: Cluster, workload: Workload) -> ExpectedMisses:
        """Of a token's accesses to a layer that nothing but a fetch answers, were the host to compute some."""
        accesses_R = np.sum(self.accesses_WR, axis=0)
        missed = float(accesses_R[OPTIONS.index("fetch")]) / max(float(accesses_R.sum()), 1e-300)
        return expected_misses(workload.top_k, missed, cluster.host, cluster.fetch)

    def tokens_per_second(self, cluster: Cluster, workload: Workload, hosted: ExpectedMisses | None = None) -> float:
        """Of all GPUs with one sequence each, accesses one after another, but where some are `hosted`."""
        stall = self.stall_per_token(cluster, workload)
        if hosted is not None:
            stall += len(workload.experts_per_layer) * (hosted.seconds - hosted.missed * cluster.fetch)
        return cluster.gpus / (cluster.token_seconds + stall)


def simulate(
    cluster: Cluster, workload: Workload, placements: Iterable[str], *, progress: Progress = lambda items, **_: items
) -> list[Outcome]:
    """An outcome per placement (names of `PLACEMENTS`). Needs at least 2 windows: the first is only learned from."""
    windows = len(workload.counts_WLE)
    assert windows >= 2, "the first window only warms up"
    outcomes = {name: Outcome(placement=name) for name in placements}
    placed: dict[str, PlacementMap] = {}
    long_run = cluster.problem(workload, workload.counts_WLE.mean(axis=0))
    for name in outcomes:
        begun = time.perf_counter()
        placed[name] = _decide(name, cluster.problem(workload, workload.counts_WLE[0]), long_run, None)
        outcomes[name].first_solve = time.perf_counter() - begun
    average_LE = workload.counts_WLE[0]
    for w in progress(range(1, windows), total=windows - 1, desc="windows"):
        expected, actual = (cluster.problem(workload, c) for c in (average_LE, workload.counts_WLE[w]))
        for name, outcome in outcomes.items():
            told = actual if name == "oracle" else expected
            begun = time.perf_counter()
            wanted = _decide(name, told, long_run, placed[name])
            outcome.solver_W.append(time.perf_counter() - begun)
            placed[name], loads, late = _moved(cluster, told, placed[name], wanted, free=name == "oracle")
            accesses_R, stall = option_accesses(actual, placed[name].held_PN)
            outcome.accesses_WR.append(accesses_R)
            outcome.stall_W.append(stall)
            outcome.loads_W.append(loads)
            outcome.late += late
        average_LE = average_LE * (1 - _FRESH) + workload.counts_WLE[w] * _FRESH
    return list(outcomes.values())


def _decide(
    name: str, told: PlacementProblem, long_run: PlacementProblem, previous: PlacementMap | None
) -> PlacementMap:
    if name in ("static", "round-robin"):
        rule = static if name == "static" else round_robin
        return previous or rule(long_run)
    return {"ours": solve, "eplb": eplb, "oracle": oracle}[name](told, previous)


def _moved(
    cluster: Cluster, problem: PlacementProblem, old: PlacementMap, wanted: PlacementMap, *, free: bool
) -> tuple[PlacementMap, int, int]:
    """What is reached within a window under each mover's bandwidth (`free`: all of it), loads done, loads left."""
    most = int(cluster.migrate_bytes_per_second * cluster.window_seconds // cluster.expert_bytes)
    loads = 0 if wanted.epoch == old.epoch else int(wanted.loads_P.sum())
    if free or not loads or wanted.loads_P.max() <= most:
        return wanted, loads, 0
    held_PN, done_P = old.held_PN.copy(), np.zeros(cluster.gpus, dtype=int)
    copies_N, kept_N = held_PN.sum(axis=0), wanted.held_PN.sum(axis=0) > 0
    for step in migration_steps(old, wanted, problem):
        if step.load is not None and done_P[step.pool] >= most:
            continue
        if step.evict is not None:
            if kept_N[step.evict] and copies_N[step.evict] == 1:
                continue  # its next holder has not loaded it yet
            held_PN[step.pool, step.evict] = False
            copies_N[step.evict] -= 1
        if step.load is not None:
            held_PN[step.pool, step.load] = True
            copies_N[step.load] += 1
            done_P[step.pool] += 1
    done = int(done_P.sum())
    reached = publish(problem, held_PN, old, before=wanted.objective_before, after=wanted.objective_after)
    return reached, done, loads - done


def write_plot(outcomes: Sequence[Outcome], cluster: Cluster, workload: Workload, path: Path, *, title: str) -> None:
    """Write local hits by window and tokens/s as one HTML file. Raises ConfigError when it cannot be written."""
    windows = range(1, len(workload.counts_WLE))
    lines = []
    for outcome in outcomes:
        accesses_WR = np.array(outcome.accesses_WR)
        local_W = 100 * accesses_WR[:, 0] / np.maximum(accesses_WR.sum(axis=1), 1e-300)
        lines.append(Line(name=outcome.placement, x=windows, y=local_W))
    speeds = [outcome.tokens_per_second(cluster, workload) for outcome in outcomes]
    values = {
        "title": title,
        "embedded": embedded,
        "hits": line_chart(lines, x="window", y="accesses answered locally, %"),
        "speeds": bar_chart(speeds, [o.placement for o in outcomes], x="placement", y="tokens/s"),
    }
    try:
        write_page(rendered("simulation.html", values), path)
    except OSError as error:
        raise ConfigError(
            f"--plot {path} cannot be written ({error.strerror}), must be. hint: choose another file"
        ) from error
