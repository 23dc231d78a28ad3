"""What a worker's engine counts, as named metrics, and their text form for Prometheus.

Pure: knows neither HTTP nor ray. Invariant: one table, `METRICS`, is what every exporter exports; labels are `model`,
`replica` and at most one more of a handful of values, so a service has few dozen series per worker.
Neighbours: `http` serves the text at /metrics, `ray_metrics` feeds the same table to ray's own exporter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Literal, get_args

from buddymoe_ray.observe import EngineSnapshot
from buddymoe_ray.serve.work import WorkerReport
from buddymoe_ray.types import CalibrationState, GuardState

__all__ = ["METRICS", "Metric", "exposition"]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One metric. Counters only grow while a worker lives.

    `read` gives its values by the value of `label`; a metric without `label` has one value, under "".
    """

    name: str
    kind: Literal["counter", "gauge"]
    help: str
    read: Callable[[EngineSnapshot], Mapping[str, float]]
    label: str = ""


def _counter(name: str, help_: str, read: Callable[[EngineSnapshot], float]) -> Metric:
    return Metric(name=name, kind="counter", help=help_, read=lambda snapshot: {"": read(snapshot)})


def _gauge(name: str, help_: str, read: Callable[[EngineSnapshot], float]) -> Metric:
    return Metric(name=name, kind="gauge", help=help_, read=lambda snapshot: {"": read(snapshot)})


METRICS: tuple[Metric, ...] = (
    _counter("buddymoe_hits", "Expert accesses of decode steps whose expert was resident.", lambda s: s.access_hits),
    _counter(
        "buddymoe_peer",
        "Expert accesses of decode steps that another worker answered exactly.",
        lambda s: s.access_peer,
    ),
    _counter(
        "buddymoe_fetched", "Expert accesses of decode steps that waited for their expert.", lambda s: s.access_fetched
    ),
    Metric(
        name="buddymoe_standin_uses",
        kind="counter",
        help="Expert accesses of decode steps that a stand-in answered, by its kind.",
        read=lambda s: asdict(s.standins),
        label="kind",
    ),
    _counter(
        "buddymoe_expected_rise_nats", "Expected extra loss charged for stand-ins (nats).", lambda s: s.expected_rise
    ),
    _gauge("buddymoe_residency", "Share of the routed experts in device slots.", lambda s: s.residency),
    _counter("buddymoe_steps", "Engine steps.", lambda s: s.steps),
    _counter("buddymoe_stall_seconds", "Time the model waited for experts.", lambda s: s.stall_seconds),
    _counter("buddymoe_read_bytes", "Bytes of experts asked of the disk.", lambda s: s.bytes_read_disk),
    _counter(
        "buddymoe_read_ahead_useful_bytes",
        "Bytes of experts read on a guess that they would be asked for, and were.",
        lambda s: s.read_ahead_useful_bytes,
    ),
    _counter(
        "buddymoe_read_ahead_wasted_bytes",
        "Bytes of experts read on a guess that they would be asked for, and were not.",
        lambda s: s.read_ahead_wasted_bytes,
    ),
    _counter("buddymoe_loaded_bytes", "Bytes of experts put into device slots.", lambda s: s.bytes_loaded_device),
    _gauge("buddymoe_running", "Requests being computed.", lambda s: s.running),
    _gauge("buddymoe_waiting", "Requests admitted and not yet begun.", lambda s: s.waiting),
    _gauge("buddymoe_free_kv_blocks", "KV blocks that no request holds.", lambda s: s.free_kv_blocks),
    _counter("buddymoe_preemptions", "Requests whose KV blocks went to an older one.", lambda s: s.preemptions),
    _counter("buddymoe_prompt_tokens", "Prompt tokens of requests begun.", lambda s: s.prompt_tokens),
    _counter("buddymoe_cached_tokens", "Of these, those that were not computed again.", lambda s: s.cached_tokens),
    Metric(
        name="buddymoe_guard_state",
        kind="gauge",
        help="1 at the guard's state: off, ok, or tripped (the model serves exact).",
        read=lambda s: {state: float(state == s.guard.state) for state in get_args(GuardState)},
        label="state",
    ),
    Metric(
        name="buddymoe_calibration_state",
        kind="gauge",
        help="1 at the state of the model's own calibration: none, collecting, ready or refused.",
        read=lambda s: {state: float(state == s.calibration.state) for state in get_args(CalibrationState)},
        label="state",
    ),
    _gauge("buddymoe_calibration_percent", "How much of it is done.", lambda s: s.calibration.percent),
    _gauge("buddymoe_calibration_tokens", "Tokens that it measured stand-ins on.", lambda s: s.calibration.tokens),
    _gauge(
        "buddymoe_calibration_record_bytes", "Bytes of its stand-ins on disk.", lambda s: s.calibration.record_bytes
    ),
    _gauge("buddymoe_guard_measured_kl", "Measured cost of stand-ins (nats per token).", lambda s: s.guard.measured_kl),
    _gauge("buddymoe_guard_measured_se", "Standard error of the measured cost.", lambda s: s.guard.measured_se),
    _gauge(
        "buddymoe_guard_predicted", "Charged cost of the same tokens (nats per token).", lambda s: s.guard.predicted
    ),
    _gauge("buddymoe_guard_sampled_tokens", "Tokens these means are over.", lambda s: s.guard.sampled_tokens),
)


def exposition(model: str, reports: Iterable[WorkerReport]) -> bytes:
    """All workers' metrics in Prometheus' text format, version 0.0.4."""
    ordered = sorted(reports, key=lambda report: report.replica)
    lines = [
        "# HELP buddymoe_workers Workers that answered.",
        "# TYPE buddymoe_workers gauge",
        f"buddymoe_workers{_labels({'model': model})} {len(ordered)}",
    ]
    for metric in METRICS:
        name = metric.name + ("_total" if metric.kind == "counter" else "")
        lines += [f"# HELP {name} {metric.help}", f"# TYPE {name} {metric.kind}"]
        for report in ordered:
            for value_of_label, value in metric.read(report.snapshot).items():
                labels = {"model": model, "replica": report.replica}
                if metric.label:
                    labels[metric.label] = value_of_label
                lines.append(f"{name}{_labels(labels)} {value}")
    return ("\n".join(lines) + "\n").encode()


def _labels(labels: Mapping[str, str]) -> str:
    return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items()) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
