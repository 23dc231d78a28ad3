"""What a worker's engine counts, as named metrics, and their text form for Prometheus.

Pure: knows neither HTTP nor ray. Invariant: one table, `METRICS`, is what every exporter exports; labels are `model`,
`replica` and at most one more of a handful of values, so a service has few dozen series per worker, and four per named
API key, however many layers, experts and peers there are. What vLLM counts as well has vLLM's names and labels beside
them (`VLLM_METRICS`; an engine is a replica): its dashboards show it.
Neighbours: `http` serves the text at /metrics, `ray_metrics` feeds `METRICS` to ray's own exporter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise
from statistics import median
from typing import Literal, get_args

import prometheus_client.openmetrics.exposition as openmetrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.core import Metric as Family
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from buddymoe_ray.observe import EngineSnapshot, HistogramSnapshot, RequestsSnapshot
from buddymoe_ray.serve.tenants import TenantCounters
from buddymoe_ray.serve.work import WorkerReport
from buddymoe_ray.types import CalibrationState, FinishReason, GuardState

__all__ = ["METRICS", "VLLM_HISTOGRAMS", "VLLM_METRICS", "Metric", "exposition"]

TENANT_METRICS = {
    "requests": "Requests with a named API key.",
    "refused": "Of these, those beyond its limits.",
    "prompt_tokens": "Prompt tokens of its requests that ended.",
    "generated_tokens": "Tokens generated for them.",
}
PLAIN_TEXT = "text/plain; version=0.0.4; charset=utf-8"
OPEN_METRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"
ALLOWUTF8 = "allow-utf-8"


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


@dataclass(frozen=True, kw_only=True)
class _Histogram:
    """Counts by size, all in seconds or tokens."""

    name: str
    help: str
    read: Callable[[EngineSnapshot], HistogramSnapshot]


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
    _counter("buddymoe_host", "Expert accesses of decode steps that a GPU's host computed.", lambda s: s.access_host),
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
    _counter(
        "buddymoe_peer_slot_reads",
        "Experts copied from the slots of another GPU of the node.",
        lambda s: s.peer_slot_reads,
    ),
    _counter(
        "buddymoe_peer_helped_reads",
        "Experts of prompts that another GPU of the node read over its own link.",
        lambda s: s.peer_helped_reads,
    ),
    _counter(
        "buddymoe_peer_taken_back",
        "Experts of prompts that another GPU was to read and did not in time.",
        lambda s: s.peer_taken_back,
    ),
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
    _counter("buddymoe_link_bytes", "Bytes to and from other nodes' workers that computed.", lambda s: s.link_bytes),
    _gauge("buddymoe_running", "Requests being computed.", lambda s: s.running),
    _gauge("buddymoe_waiting", "Requests admitted and not yet begun.", lambda s: s.waiting),
    _gauge("buddymoe_free_kv_blocks", "KV blocks that no request holds.", lambda s: s.free_kv_blocks),
    _counter("buddymoe_preemptions", "Requests set aside for older ones or other tenants.", lambda s: s.preemptions),
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
        "buddymoe_guard_predicted", "Calibrated cost of the same tokens (nats per token).", lambda s: s.guard.predicted
    ),
    _gauge("buddymoe_guard_factor", "What is charged by what was calibrated, as measured.", lambda s: s.guard.factor),
    _gauge("buddymoe_guard_sampled_tokens", "Tokens these means are over.", lambda s: s.guard.sampled_tokens),
)


def _requests(name: str, help_: str, read: Callable[[RequestsSnapshot], HistogramSnapshot]) -> _Histogram:
    return _Histogram(name=f"vllm:{name}", help=help_, read=lambda snapshot: read(snapshot.requests))


def _kv_usage(snapshot: EngineSnapshot) -> float:
    return 1 - snapshot.free_kv_blocks / snapshot.total_kv_blocks if snapshot.total_kv_blocks else 0.0


_ENDINGS: Mapping[str, FinishReason] = {"stop": "stop", "length": "length", "abort": "cancelled", "error": "error"}
"""vLLM's words for how requests end."""
VLLM_METRICS: tuple[Metric, ...] = (
    _gauge("vllm:num_requests_running", "Requests being computed.", lambda s: s.running),
    _gauge("vllm:num_requests_waiting", "Requests admitted and not yet begun.", lambda s: s.waiting),
    _gauge("vllm:kv_cache_usage_perc", "Share of the KV blocks that requests hold: 1 is all.", _kv_usage),
    _gauge("vllm:gpu_cache_usage_perc", "The same, by an older name.", _kv_usage),
    _counter("vllm:num_preemptions", "Requests set aside for older ones or other tenants.", lambda s: s.preemptions),
    _counter("vllm:prefix_cache_queries", "Prompt tokens that were looked up.", lambda s: s.prompt_tokens),
    _counter("vllm:prefix_cache_hits", "Prompt tokens that were found.", lambda s: s.cached_tokens),
    _counter("vllm:prompt_tokens", "Prompt tokens of requests begun.", lambda s: s.prompt_tokens),
    _counter("vllm:generation_tokens", "Tokens generated.", lambda s: s.requests.generated_tokens),
    Metric(
        name="vllm:request_success",
        kind="counter",
        help="Requests that ended, by how.",
        read=lambda s: {word: s.requests.ended.get(reason, 0) for word, reason in _ENDINGS.items()},
        label="finished_reason",
    ),
)
VLLM_HISTOGRAMS: tuple[_Histogram, ...] = (
    _requests("time_to_first_token_seconds", "From admission to the first token.", lambda r: r.ttft_seconds),
    _requests("inter_token_latency_seconds", "From one token of a request to the next.", lambda r: r.itl_seconds),
    _requests("time_per_output_token_seconds", "The same, by an older name.", lambda r: r.itl_seconds),
    _requests("request_time_per_output_token_seconds", "A request's mean of that.", lambda r: r.per_token_seconds),
    _requests("e2e_request_latency_seconds", "From admission to the end.", lambda r: r.whole_seconds),
    _requests("request_queue_time_seconds", "From admission to the first step.", lambda r: r.queue_seconds),
    _requests("request_prefill_time_seconds", "From there to the first token.", lambda r: r.prefill_seconds),
    _requests("request_decode_time_seconds", "From there to the last token.", lambda r: r.decode_seconds),
    _requests("request_inference_time_seconds", "Both of these.", lambda r: r.computing_seconds),
    _requests("request_prompt_tokens", "Prompt tokens of a request.", lambda r: r.prompt_tokens),
    _requests("request_generation_tokens", "Tokens generated for a request.", lambda r: r.output_tokens),
    _requests("request_params_max_tokens", "Tokens a request allowed.", lambda r: r.most_tokens),
    _requests("request_max_num_generation_tokens", "The same, by another name.", lambda r: r.most_tokens),
)


def exposition(
    model: str,
    reports: Iterable[WorkerReport],
    tenants: Mapping[str, TenantCounters] | None = None,
    *,
    accept: str = "",
) -> tuple[bytes, str]:
    """All workers' metrics, and those of each named API key, and their content type: OpenMetrics 1.0 for who accepts
    it, else Prometheus' 0.0.4."""
    families = _Families(model, sorted(reports, key=lambda report: report.replica), tenants or {})
    # names as they are: by default the library makes underscores of vLLM's colons
    if "application/openmetrics-text" in accept:
        return openmetrics.generate_latest(families, escaping=ALLOWUTF8), OPEN_METRICS
    return generate_latest(families, escaping=ALLOWUTF8), PLAIN_TEXT


@dataclass(frozen=True, kw_only=True)
class _Reported:
    """A gauge of what is not the engine's: a value, or of many the least, the median and the most, or the first few: a
    series for each of these words."""

    name: str
    help: str
    label: str = ""
    read: Callable[[WorkerReport], Mapping[str, float]]


def _ends(values: Iterable[float]) -> Mapping[str, float]:
    found = sorted(values)
    return {"least": found[0], "median": median(found), "most": found[-1]} if found else {}


def _residency_by_layer(report: WorkerReport) -> Mapping[str, float]:
    return _ends(sum(cell & 1 for cell in layer) / len(layer) for layer in _layers(report))


def _hottest(report: WorkerReport) -> Mapping[str, float]:
    cells = sorted((cell >> 3 for layer in _layers(report) for cell in layer), reverse=True)[:HOTTEST]
    return {str(rank): (cell / 31) ** 2 for rank, cell in enumerate(cells, start=1)}


def _layers(report: WorkerReport) -> Iterator[bytes]:
    """Cells of an `ExpertMap`, layer by layer."""
    if report.experts is not None:
        ends = list(accumulate(report.experts.experts_per_layer, initial=0))
        yield from (report.experts.cells[begin:end] for begin, end in pairwise(ends) if begin < end)


HOTTEST = 8
REPORTED = (
    _Reported(
        name="buddymoe_layer_residency",
        help="Share of a layer's experts in slots.",
        label="layers",
        read=_residency_by_layer,
    ),
    _Reported(
        name="buddymoe_expert_use",
        help="Share of steps that ask for the hottest experts, by rank.",
        label="rank",
        read=_hottest,
    ),
    _Reported(
        name="buddymoe_link_seconds",
        help="How long peers take to answer.",
        label="peers",
        read=lambda report: _ends(report.links.values()),
    ),
    _Reported(
        name="buddymoe_placement_epoch",
        help="The placement's map that the worker's node follows.",
        read=lambda report: {} if report.placement is None else {"": report.placement.epoch},
    ),
    _Reported(
        name="buddymoe_placement_age_seconds",
        help="Since the placement last told that node of its map.",
        read=lambda report: {} if report.placement is None else {"": report.placement.age_seconds},
    ),
)


@dataclass(frozen=True)
class _Families(Collector):
    """Every metric with the values of all workers."""

    model: str
    reports: list[WorkerReport]
    tenants: Mapping[str, TenantCounters]

    def collect(self) -> Iterator[Family]:
        workers = GaugeMetricFamily("buddymoe_workers", "Workers that answered.", labels=["model"])
        workers.add_metric([self.model], len(self.reports))
        yield workers
        for metric in METRICS:
            yield self._family(metric, ("model", "replica"))
        for metric in VLLM_METRICS:
            yield self._family(metric, ("model_name", "engine"))
        for histogram in VLLM_HISTOGRAMS:
            found = HistogramMetricFamily(histogram.name, histogram.help, labels=["model_name", "engine"])
            for report in self.reports:
                held = histogram.read(report.snapshot)
                upper = [*map(str, map(float, held.bounds)), "+Inf"]
                buckets = list(zip(upper, map(float, accumulate(held.counts)), strict=True))
                found.add_metric([self.model, report.replica], buckets, sum_value=held.total)
            yield found
        for told in REPORTED:
            gauge = GaugeMetricFamily(told.name, told.help, labels=_labels(told, "model", "replica"))
            for report in self.reports:
                for word, value in told.read(report).items():
                    gauge.add_metric([self.model, report.replica, *([word] if told.label else [])], value)
            yield gauge
        for name, help_ in TENANT_METRICS.items():
            counted = CounterMetricFamily(f"buddymoe_key_{name}", help_, labels=["model", "key"])
            for key, counters in self.tenants.items():
                counted.add_metric([self.model, key], getattr(counters, name))
            yield counted

    def _family(self, metric: Metric, labels: tuple[str, str]) -> Family:
        make = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
        found = make(metric.name, metric.help, labels=_labels(metric, *labels))
        for report in self.reports:
            for of_label, value in metric.read(report.snapshot).items():
                found.add_metric([self.model, report.replica, *([of_label] if metric.label else [])], value)
        return found


def _labels(metric: Metric | _Reported, *labels: str) -> list[str]:
    return [*labels, *([metric.label] if metric.label else [])]
