"""Metrics of workers: every count arrives once, under few labels, as text and through ray's counters."""

from __future__ import annotations

import json
import random
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import fields, replace
from pathlib import Path
from typing import cast

import pytest
from asgi import TEXT, serving
from fakes import FakeEngine
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families

from buddymoe_ray.engine.request_times import RequestTimes
from buddymoe_ray.engine.sequence import Sequence
from buddymoe_ray.observe import (
    CalibrationSnapshot,
    EngineSnapshot,
    ExpertMap,
    GuardSnapshot,
    PlacementSnapshot,
    RequestsSnapshot,
)
from buddymoe_ray.serve import ray_metrics
from buddymoe_ray.serve.metrics import METRICS, VLLM_HISTOGRAMS, VLLM_METRICS, exposition
from buddymoe_ray.serve.ray_metrics import RayMetrics
from buddymoe_ray.serve.tenants import TenantCounters
from buddymoe_ray.serve.work import WorkerReport
from buddymoe_ray.types import FinishReason, GenerationRequest, StandinAccesses, TokenEvent


def timed() -> RequestsSnapshot:
    """Two requests by a clock of their own: three tokens after a second, two after three and a cancellation."""
    now = [0.0]
    times = RequestTimes(clock=lambda: now[0])
    first, second = (Sequence(GenerationRequest(request_id=i, prompt_token_ids=(1, 2)), max_model_len=9) for i in "ab")

    def told(seq: Sequence, at: float, reason: FinishReason | None = None, tokens: tuple[int, ...] = (7,)) -> None:
        now[0] = at
        times.told(seq, TokenEvent(request_id=seq.request_id, token_ids=tokens, text="", finish_reason=reason))

    times.arrived(first)
    now[0] = 0.25
    times.begun([first])
    for at, reason in ((1.0, None), (1.5, None), (2.0, "stop")):
        told(first, at, cast("FinishReason | None", reason))
    now[0] = 10.0
    times.arrived(second)
    now[0] = 11.0
    times.begun([second])
    told(second, 13.0)
    told(second, 15.0)
    told(second, 16.0, "cancelled", ())
    return times.snapshot()


SNAPSHOT = EngineSnapshot(
    running=1,
    waiting=2,
    free_kv_blocks=3,
    total_kv_blocks=4,
    steps=5,
    hits=6,
    misses=7,
    bytes_loaded_device=8,
    link_bytes=27,
    bytes_read_disk=9,
    stall_seconds=1.5,
    peer_slot_reads=6,
    peer_helped_reads=25,
    peer_taken_back=26,
    access_hits=10,
    access_peer=18,
    access_host=28,
    access_fetched=11,
    standins=StandinAccesses(lowbit=12, lowrank=13, buddy=14, mean=15, drop=16),
    expected_rise=0.25,
    residency=0.75,
    preemptions=19,
    prompt_tokens=21,
    cached_tokens=20,
    read_ahead_useful_bytes=22,
    read_ahead_wasted_bytes=23,
    calibration=CalibrationSnapshot(state="collecting", tokens=24, percent=25.5, record_bytes=26),
    guard=GuardSnapshot(
        state="tripped", measured_kl=0.5, measured_se=0.125, predicted=0.0625, factor=1.25, sampled_tokens=17
    ),
)
REQUESTS = replace(SNAPSHOT, requests=timed())
FIRST = ("model", "replica", "model_name", "engine")


def parsed(text: bytes) -> dict[tuple[str, str], float]:
    """(name, labels) -> value of every sample; each is there once, after its HELP and TYPE."""
    values: dict[tuple[str, str], float] = {}
    assert text.endswith(b"\n")
    for family in text_string_to_metric_families(text.decode()):
        assert family.documentation.endswith(".") and family.type in ("counter", "gauge", "histogram")
        for sample in family.samples:
            labels = sorted(
                sample.labels, key=lambda name: (name not in FIRST, FIRST.index(name) if name in FIRST else 0)
            )
            key = (sample.name, ",".join(f'{name}="{sample.labels[name]}"' for name in labels))
            assert key not in values
            values[key] = sample.value
    return values


def ours(values: dict[tuple[str, str], float]) -> dict[tuple[str, str], float]:
    return {key: value for key, value in values.items() if key[0].startswith("buddymoe_")}


def written(model: str, reports: Iterable[WorkerReport]) -> bytes:
    return exposition(model, reports)[0]


def test_every_count_of_a_worker_is_written_under_its_name() -> None:
    values = ours(parsed(written("m", [WorkerReport(replica="a", pid=1, snapshot=SNAPSHOT)])))
    who = 'model="m",replica="a"'
    assert values.pop(("buddymoe_workers", 'model="m"')) == 1
    kinds = {"lowbit": 12, "lowrank": 13, "buddy": 14, "mean": 15, "drop": 16}
    assert values == {
        ("buddymoe_hits_total", who): 10,
        ("buddymoe_peer_total", who): 18,
        ("buddymoe_host_total", who): 28,
        ("buddymoe_fetched_total", who): 11,
        **{("buddymoe_standin_uses_total", f'{who},kind="{kind}"'): count for kind, count in kinds.items()},
        ("buddymoe_expected_rise_nats_total", who): 0.25,
        ("buddymoe_residency", who): 0.75,
        ("buddymoe_steps_total", who): 5,
        ("buddymoe_stall_seconds_total", who): 1.5,
        ("buddymoe_peer_slot_reads_total", who): 6,
        ("buddymoe_peer_helped_reads_total", who): 25,
        ("buddymoe_peer_taken_back_total", who): 26,
        ("buddymoe_read_bytes_total", who): 9,
        ("buddymoe_loaded_bytes_total", who): 8,
        ("buddymoe_link_bytes_total", who): 27,
        ("buddymoe_running", who): 1,
        ("buddymoe_waiting", who): 2,
        ("buddymoe_free_kv_blocks", who): 3,
        ("buddymoe_preemptions_total", who): 19,
        ("buddymoe_prompt_tokens_total", who): 21,
        ("buddymoe_cached_tokens_total", who): 20,
        ("buddymoe_read_ahead_useful_bytes_total", who): 22,
        ("buddymoe_read_ahead_wasted_bytes_total", who): 23,
        **{
            ("buddymoe_calibration_state", f'{who},state="{state}"'): state == "collecting"
            for state in ("none", "collecting", "ready", "refused")
        },
        ("buddymoe_calibration_percent", who): 25.5,
        ("buddymoe_calibration_tokens", who): 24,
        ("buddymoe_calibration_record_bytes", who): 26,
        ("buddymoe_guard_state", f'{who},state="off"'): 0,
        ("buddymoe_guard_state", f'{who},state="ok"'): 0,
        ("buddymoe_guard_state", f'{who},state="tripped"'): 1,
        ("buddymoe_guard_measured_kl", who): 0.5,
        ("buddymoe_guard_measured_se", who): 0.125,
        ("buddymoe_guard_predicted", who): 0.0625,
        ("buddymoe_guard_factor", who): 1.25,
        ("buddymoe_guard_sampled_tokens", who): 17,
    }


def test_workers_are_told_apart_and_none_is_told_too() -> None:
    reports = [
        WorkerReport(replica=name, pid=1, snapshot=replace(SNAPSHOT, running=at)) for at, name in enumerate("cab")
    ]
    values = parsed(written("m", reports))
    assert values["buddymoe_workers", 'model="m"'] == 3
    assert [values["buddymoe_running", f'model="m",replica="{name}"'] for name in "abc"] == [1, 2, 0]
    assert written("m", reports) == written("m", reversed(reports))
    assert parsed(written("m", [])) == {("buddymoe_workers", 'model="m"'): 0}


def test_labels_are_escaped() -> None:
    text = written('a"b\\c\nd', [WorkerReport(replica="r", pid=1, snapshot=SNAPSHOT)])
    parsed(text)
    assert rb'model="a\"b\\c\nd"' in text


def test_series_are_few_whatever_is_served() -> None:
    assert sum(len(metric.read(SNAPSHOT)) for metric in METRICS) <= 42
    bounds = [len(histogram.read(REQUESTS).bounds) for histogram in VLLM_HISTOGRAMS]
    assert sum(bounds) + sum(len(metric.read(SNAPSHOT)) for metric in VLLM_METRICS) <= 320
    kinds = next(metric for metric in METRICS if metric.label == "kind")
    assert set(kinds.read(SNAPSHOT)) == {field.name for field in fields(StandinAccesses)}
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    assert all(re.fullmatch(r"buddymoe(_[a-z]+)+", metric.name) and metric.help.endswith(".") for metric in METRICS)


def test_series_are_as_many_for_48_layers_of_128_experts_as_for_one_of_8() -> None:
    rng, texts = random.Random(1), []
    for layers, experts, peers in ((1, 8, 1), (48, 128, 127)):
        cells = bytes(rng.randrange(256) for _ in range(layers * experts))
        spread = ExpertMap(experts_per_layer=(experts,) * layers, cells=cells)
        links = {f"peer {at}": 0.001 * (at + 1) for at in range(peers)}
        report = WorkerReport(replica="a", pid=1, snapshot=REQUESTS, experts=spread, links=links)
        texts.append(parsed(written("m", [report])))
    few, many = texts
    assert set(few) == set(many) and len(ours(many)) < 60 and len(many) < 420
    own = {key: value for key, value in many.items() if "layer_" in key[0] or "use" in key[0] or "link" in key[0]}
    rows = [cells[at : at + 128] for at in range(0, len(cells), 128)]
    shares = sorted(sum(cell & 1 for cell in row) / 128 for row in rows)
    who = 'model="m",replica="a"'
    assert own[("buddymoe_layer_residency", f'{who},layers="least"')] == shares[0]
    assert own[("buddymoe_layer_residency", f'{who},layers="most"')] == shares[-1]
    assert (
        own[("buddymoe_expert_use", f'{who},rank="1"')] == 1 and ("buddymoe_expert_use", f'{who},rank="9"') not in own
    )
    assert own[("buddymoe_link_seconds", f'{who},peers="median"')] == pytest.approx(0.064)


def test_the_map_that_a_node_follows_ages_where_there_is_one() -> None:
    placed = [None, PlacementSnapshot(epoch=7, age_seconds=1.5)]
    reports = [WorkerReport(replica=str(at), pid=1, snapshot=SNAPSHOT, placement=one) for at, one in enumerate(placed)]
    told = {key: value for key, value in parsed(written("m", reports)).items() if "placement" in key[0]}
    who = 'model="m",replica="1"'
    assert told == {("buddymoe_placement_epoch", who): 7, ("buddymoe_placement_age_seconds", who): 1.5}


def test_what_vllm_counts_too_has_its_names_for_its_dashboards() -> None:
    report = WorkerReport(replica="a", pid=1, snapshot=REQUESTS)
    for accept, kind in (
        ("", "text/plain; version=0.0.4"),
        ("application/openmetrics-text;version=1.0.0,*/*", "application/openmetrics-text; version=1.0.0"),
    ):
        text, media_type = exposition("m", [report], accept=accept)
        assert media_type == f"{kind}; charset=utf-8"
        read = openmetrics_families if "openmetrics" in kind else text_string_to_metric_families
        values = {(s.name, *sorted(s.labels.values())): s.value for f in read(text.decode()) for s in f.samples}
        assert (
            values["vllm:num_requests_running", "a", "m"] == 1 and values["vllm:kv_cache_usage_perc", "a", "m"] == 0.25
        )
        assert values["vllm:generation_tokens_total", "a", "m"] == 5
        ends = {
            word: values["vllm:request_success_total", *sorted(("a", "m", word))]
            for word in ("stop", "length", "abort", "error")
        }
        assert ends == {"stop": 1, "length": 0, "abort": 1, "error": 0}
        assert values["vllm:time_to_first_token_seconds_count", "a", "m"] == 2
        assert values["vllm:time_to_first_token_seconds_sum", "a", "m"] == pytest.approx(1.0 + 3.0)
        buckets = [
            values["vllm:time_to_first_token_seconds_bucket", *sorted((at, "a", "m"))]
            for at in ("0.75", "1.0", "2.5", "5.0", "+Inf")
        ]
        assert buckets == [0, 1, 1, 2, 2]
        assert values["vllm:inter_token_latency_seconds_sum", "a", "m"] == pytest.approx(0.5 + 0.5 + 2.0)
        assert values["vllm:request_queue_time_seconds_sum", "a", "m"] == pytest.approx(0.25 + 1.0)
        assert values["vllm:request_decode_time_seconds_count", "a", "m"] == 2


class Recorded:
    """What ray's metrics were told, in their place; refuses what ray refuses."""

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        self.name, self.tag_keys = name, set(tag_keys)
        self.values: dict[tuple[str, ...], float] = defaultdict(float)

    def _key(self, tags: dict[str, str]) -> tuple[str, ...]:
        assert set(tags) == self.tag_keys, f"{self.name} got {tags}"
        return tuple(tags.values())


class RecordedCounter(Recorded):
    def inc(self, value: float, tags: dict[str, str]) -> None:
        assert value > 0, "ray refuses to add nothing"
        self.values[self._key(tags)] += value


class RecordedGauge(Recorded):
    def set(self, value: float, tags: dict[str, str]) -> None:
        self.values[self._key(tags)] = value


def test_rays_counters_hold_what_the_last_snapshot_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_metrics, "Counter", RecordedCounter)
    monkeypatch.setattr(ray_metrics, "Gauge", RecordedGauge)
    exporter = RayMetrics(model="m", replica="r")
    zero = replace(
        SNAPSHOT, access_hits=0, standins=StandinAccesses(), expected_rise=0.0, running=0, guard=GuardSnapshot()
    )
    later = replace(SNAPSHOT, access_hits=25, expected_rise=0.5, running=0)
    for snapshot in (zero, SNAPSHOT, SNAPSHOT, later):
        exporter.publish(snapshot)
        for metric in METRICS:
            sink = exporter._sinks[metric.name]
            assert isinstance(sink, Recorded)
            for label, value in metric.read(snapshot).items():
                key = ("m", "r", label) if metric.label else ("m", "r")
                assert sink.values[key] == value, metric.name


def test_ray_takes_our_names_and_values() -> None:
    """Ray's own classes check names, tags and amounts even where no ray runs."""
    exporter = RayMetrics(model="m", replica="r")
    exporter.publish(SNAPSHOT)
    exporter.publish(replace(SNAPSHOT, steps=99))


async def test_the_endpoint_reports_every_worker() -> None:
    engines = (FakeEngine(), FakeEngine())
    async with serving(*engines, model="org/name") as client:
        for _ in range(4):
            assert (await client.post("/v1/completions", json=TEXT | {"model": "org/name"})).status_code == 200
        engines[1].die()  # a dead engine's last counts are still told
        response = await client.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    values = parsed(response.content)
    steps = [values["buddymoe_steps_total", f'model="org/name",replica="{at}"'] for at in (0, 1)]
    assert steps == [12, 12] and values["buddymoe_workers", 'model="org/name"'] == 2


def test_the_dashboard_asks_for_what_is_written_and_for_labels_that_are_there() -> None:
    board = json.loads((Path(__file__).parents[2] / "cluster" / "grafana.json").read_text())
    labels: dict[str, set[str]] = {}
    spread, tenants = ExpertMap(experts_per_layer=(2,), cells=b"\x01\x02"), {"alice": TenantCounters()}
    placed = PlacementSnapshot(epoch=7, age_seconds=1.5)
    report = WorkerReport(
        replica="a", pid=1, snapshot=REQUESTS, experts=spread, links={"peer": 0.001}, placement=placed
    )
    for family in text_string_to_metric_families(exposition("m", [report], tenants)[0].decode()):
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
    asked = [target for panel in board["panels"] for target in panel["targets"]]
    assert len(asked) > 34 and len({panel["title"] for panel in board["panels"]}) == len(board["panels"])
    for target in asked:
        for name, given in re.findall(r"((?:vllm:|buddymoe_)\w+)\{(\w+)=", target["expr"]):
            assert given in labels[name], target
        for by in [*re.findall(r"by \((\w+)\)", target["expr"]), *re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])]:
            assert any(by in labels[name] for name in re.findall(r"(?:vllm:|buddymoe_)\w+", target["expr"])), target
