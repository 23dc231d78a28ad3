"""Metrics of workers: every count arrives once, under few labels, as text and through ray's counters."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import fields, replace

import pytest
from asgi import TEXT, serving
from fakes import FakeEngine

from buddymoe_ray.observe import CalibrationSnapshot, EngineSnapshot, GuardSnapshot
from buddymoe_ray.serve import ray_metrics
from buddymoe_ray.serve.metrics import METRICS, exposition
from buddymoe_ray.serve.ray_metrics import RayMetrics
from buddymoe_ray.serve.work import WorkerReport
from buddymoe_ray.types import StandinAccesses

SNAPSHOT = EngineSnapshot(
    running=1,
    waiting=2,
    free_kv_blocks=3,
    total_kv_blocks=4,
    steps=5,
    hits=6,
    misses=7,
    bytes_loaded_device=8,
    bytes_read_disk=9,
    stall_seconds=1.5,
    access_hits=10,
    access_peer=18,
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
    guard=GuardSnapshot(state="tripped", measured_kl=0.5, measured_se=0.125, predicted=0.0625, sampled_tokens=17),
)
LINE = re.compile(r'^(\w+)\{((?:\w+="(?:[^"\\]|\\.)*",?)*)\} (\S+)$')


def parsed(text: bytes) -> dict[tuple[str, str], float]:
    """(name, labels) -> value of every sample; each is there once, after its HELP and TYPE."""
    values: dict[tuple[str, str], float] = {}
    described: set[str] = set()
    assert text.endswith(b"\n")
    for line in text.decode().splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split()
            assert name not in described and kind == ("counter" if name.endswith("_total") else "gauge")
            described.add(name)
        elif not line.startswith("# HELP "):
            match = LINE.match(line)
            assert match is not None, line
            name, labels, value = match.groups()
            assert name in described and (name, labels) not in values
            values[name, labels] = float(value)
    return values


def test_every_count_of_a_worker_is_written_under_its_name() -> None:
    values = parsed(exposition("m", [WorkerReport(replica="a", pid=1, snapshot=SNAPSHOT)]))
    who = 'model="m",replica="a"'
    assert values.pop(("buddymoe_workers", 'model="m"')) == 1
    kinds = {"lowbit": 12, "lowrank": 13, "buddy": 14, "mean": 15, "drop": 16}
    assert values == {
        ("buddymoe_hits_total", who): 10,
        ("buddymoe_peer_total", who): 18,
        ("buddymoe_fetched_total", who): 11,
        **{("buddymoe_standin_uses_total", f'{who},kind="{kind}"'): count for kind, count in kinds.items()},
        ("buddymoe_expected_rise_nats_total", who): 0.25,
        ("buddymoe_residency", who): 0.75,
        ("buddymoe_steps_total", who): 5,
        ("buddymoe_stall_seconds_total", who): 1.5,
        ("buddymoe_read_bytes_total", who): 9,
        ("buddymoe_loaded_bytes_total", who): 8,
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
        ("buddymoe_guard_sampled_tokens", who): 17,
    }


def test_workers_are_told_apart_and_none_is_told_too() -> None:
    reports = [
        WorkerReport(replica=name, pid=1, snapshot=replace(SNAPSHOT, running=at)) for at, name in enumerate("cab")
    ]
    values = parsed(exposition("m", reports))
    assert values["buddymoe_workers", 'model="m"'] == 3
    assert [values["buddymoe_running", f'model="m",replica="{name}"'] for name in "abc"] == [1, 2, 0]
    assert exposition("m", reports) == exposition("m", reversed(reports))
    assert parsed(exposition("m", [])) == {("buddymoe_workers", 'model="m"'): 0}


def test_labels_are_escaped() -> None:
    text = exposition('a"b\\c\nd', [WorkerReport(replica="r", pid=1, snapshot=SNAPSHOT)])
    parsed(text)
    assert rb'model="a\"b\\c\nd"' in text


def test_series_are_few_whatever_is_served() -> None:
    assert sum(len(metric.read(SNAPSHOT)) for metric in METRICS) <= 36
    kinds = next(metric for metric in METRICS if metric.label == "kind")
    assert set(kinds.read(SNAPSHOT)) == {field.name for field in fields(StandinAccesses)}
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    assert all(re.fullmatch(r"buddymoe(_[a-z]+)+", metric.name) and metric.help.endswith(".") for metric in METRICS)


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
