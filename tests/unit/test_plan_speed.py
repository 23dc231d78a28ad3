"""What `plan` says of speed: the arithmetic, and the measurement it starts from."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from families import build_checkpoint

from buddymoe_ray.cli import main
from buddymoe_ray.config import EngineConfig
from buddymoe_ray.engine import measure_machine as module
from buddymoe_ray.engine import measured_file
from buddymoe_ray.engine.measure_machine import measure_machine
from buddymoe_ray.models.fingerprint import model_hash
from buddymoe_ray.models.profile import default_profile_path, load_profile
from buddymoe_ray.models.resolve import resolve_model
from buddymoe_ray.residency.plan import make_plan
from buddymoe_ray.residency.routes import served_hits
from buddymoe_ray.residency.speed import ROWS, MachineSpeed, TokenWork, answered_misses, decode_seconds, prefill_seconds

SPEED = MachineSpeed(
    weights_bytes_s={"int8": {1: 1e9, 8: 0.5e9, 64: 0.1e9}, "int4": {1: 2e9, 8: 1e9, 64: 0.1e9}},
    disk_bytes_s=1e8,
    step_seconds=0.001,
    layer_seconds=0.0001,
)
WORK = TokenWork(
    layers=10,
    dense_dtype="int8",
    dense_bytes=10_000_000,
    head_bytes=0,
    kv_bytes=0,
    expert_dtype="int4",
    expert_bytes=1_000_000,
    active=40,
    per_layer=4,
    experts=160,
    missed=0.0,
)


def test_rates_between_measured_rows_are_interpolated_and_beyond_them_proportional() -> None:
    assert SPEED.weights_seconds("int8", 1e9) == 1.0
    assert SPEED.weights_seconds("int8", 1e9, 8) == 2.0
    assert SPEED.weights_seconds("int8", 1e9, 4.5) == pytest.approx(1.5)
    assert SPEED.weights_seconds("int8", 1e9, 128) == pytest.approx(20.0)


@pytest.mark.parametrize(
    ("memory", "budget", "found"), [("25%", 0.0003, 0.363), ("25%", 0.003, 0.957), ("37.5%", 0.001, 0.921)]
)
def test_a_budget_pays_for_most_misses_as_most_are_cheap(memory: str, budget: float, found: float) -> None:
    """What stand-ins answered of the misses of `builtin:tiny` on held-out code."""
    plan = make_plan(EngineConfig(memory=memory, mode="bounded", budget=budget), resolve_model("builtin:tiny"), gpus=())
    missed = 100 - plan.predicted_hit_percent
    assert plan.predicted_standin_percent / missed == pytest.approx(found, abs=0.06)
    none = make_plan(EngineConfig(memory=memory, mode="bounded", budget=0.0), resolve_model("builtin:tiny"), gpus=())
    assert none.predicted_standin_percent == 0


def test_a_step_is_its_weights_its_overhead_and_what_it_waits_for() -> None:
    resident = 0.001 + 10 * 0.0001 + 0.01 + 40 * 0.0005
    assert decode_seconds(WORK, SPEED, 512) == pytest.approx(resident)
    assert decode_seconds(replace(WORK, kv_bytes=2000), SPEED, 512) == pytest.approx(resident + 2000 * 512 / 1e9)
    half = replace(WORK, missed=0.5)  # .2 s of reads
    assert decode_seconds(half, SPEED, 512) == pytest.approx(0.2 + 0.7 * resident)
    assert decode_seconds(replace(half, reads_ahead=True), SPEED, 512) == pytest.approx(0.2 + 0.2 * resident)
    stood_in = replace(WORK, stood_in=0.5, standin_bytes=500_000.0)
    assert decode_seconds(stood_in, SPEED, 512) == pytest.approx(resident - 20 * 0.0005 + 20 * 0.00025)


def test_of_misses_the_host_computes_what_it_answers_sooner() -> None:
    """Two misses of 10 ms each in every layer, 8 ms where the host computes them: one each way."""
    half, hosts = replace(WORK, per_layer=2, active=20, missed=1.0, dense_bytes=0), replace(SPEED, host_bytes_s=1.25e8)
    arithmetic = 0.001 + 10 * 0.0001 + 20 * 0.0005
    assert decode_seconds(half, hosts, 1) == pytest.approx(0.2 + 0.7 * arithmetic)
    shared = replace(half, host_compute="auto")
    assert decode_seconds(shared, hosts, 1) == pytest.approx(0.1 + 0.7 * arithmetic)
    assert answered_misses(shared, hosts).by_host == pytest.approx(10)
    assert decode_seconds(replace(half, host_compute="on"), hosts, 1) == pytest.approx(0.16 + 0.7 * arithmetic)
    some = answered_misses(replace(shared, missed=0.5), hosts)  # none, one or both, at 1, 2 and 1 in 4
    assert some.seconds == pytest.approx(10 * (0.5 * 0.008 + 0.25 * 0.01)) and some.by_host == pytest.approx(7.5)


def test_a_prompt_reads_each_absent_expert_once_and_the_last_layer_only_the_last_token_s() -> None:
    """16 experts a layer, 4 a token: 100 tokens use all of them, one uses 3.64 of 16."""
    slow, one = replace(SPEED, disk_bytes_s=1e5), 16 * (1 - (15 / 16) ** 4)
    long = replace(WORK, absent=0.75)
    assert prefill_seconds(long, slow, 100) == pytest.approx(0.75 * (144 + one) * 1e6 / 1e5, rel=0.01)
    assert prefill_seconds(replace(long, dense_bytes=0), slow, 1) == pytest.approx(
        0.75 * 10 * one * 1e6 / 1e5, rel=0.01
    )
    assert prefill_seconds(long, SPEED, 100) < prefill_seconds(long, SPEED, 200)
    head = replace(WORK, head_bytes=5_000_000)  # of one row instead of 100
    saved = prefill_seconds(WORK, SPEED, 100) - prefill_seconds(head, SPEED, 100)
    assert saved == pytest.approx(0.005 * (10 * 100 / 64 - 1))
    rows = replace(SPEED, token_seconds=1e-5)
    assert prefill_seconds(WORK, rows, 100) == pytest.approx(prefill_seconds(WORK, SPEED, 100) + 10 * 100 * 1e-5)
    pairs = prefill_seconds(replace(WORK, query_width=2000), replace(SPEED, pair_seconds=1e-9), 100)
    assert pairs == pytest.approx(prefill_seconds(WORK, SPEED, 100) + 2000 * 100 * 50 * 1e-9)


def test_what_comes_before_a_layer_s_experts_hides_no_more_reads_than_wave_slots_hold() -> None:
    """In each of 10 layers 1 s of attention, then 12 absent experts of .01 s each and more arithmetic than that; in the
    last layer 2.7, and less."""
    work, attends = replace(WORK, dense_bytes=0, absent=0.75, reads_ahead=True), replace(SPEED, layer_seconds=1.0)

    def seconds(waves: int, *, ahead: bool = True) -> float:
        return prefill_seconds(replace(work, wave_slots=waves, reads_ahead=ahead), attends, 1000)

    assert seconds(0) - seconds(2) == pytest.approx(0.2 * 9 * 2 * 0.01 + 2 * 0.01)
    assert seconds(2) > seconds(12) == seconds(1000), "there is no more to read"
    assert seconds(0) < seconds(0, ahead=False) == seconds(12, ahead=False)


def test_a_machine_is_measured_once_and_what_is_damaged_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured_file, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(module, "_BYTES", 16 << 20)
    monkeypatch.setattr(module, "_STEPS", 4)
    shard = tmp_path / "shard"
    shard.write_bytes(bytes(1 << 20))

    def measured(*dtypes: str) -> MachineSpeed:
        return measure_machine(dtypes, [shard], expert_bytes=1 << 16, threads=1)

    first = measured("int4")
    [kept] = tmp_path.glob("speed-*.json")
    rates = first.weights_bytes_s["int4"]
    assert set(rates) == set(ROWS) and min(rates.values()) > 0 and first.disk_bytes_s > 0
    assert (
        first.token_seconds > 0
        and first.step_seconds >= 0
        and first.layer_seconds >= 0
        and first.step_seconds + first.layer_seconds > 0
    )
    assert measured("int4", "float32").weights_bytes_s["int4"] == rates, "only what is new is measured"
    monkeypatch.setattr(module, "_weights_bytes_s", lambda *_: pytest.fail("measured again"))
    again = measured("int4", "float32")
    assert again.weights_bytes_s["int4"] == rates and set(again.weights_bytes_s) == {"int4", "float32"}
    for damaged in ("", "[]", '{"weights": 5}', kept.read_text().replace(":", ": -", 99)):
        kept.write_text(damaged)
        with pytest.raises(pytest.fail.Exception, match="measured again"):
            measured("int4")


def test_the_command_measures(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", "builtin:tiny", "--memory", "50%", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["speed"]["measured"] and plan["predicted_ttft_seconds"] > 0
    assert plan["predicted_decode_tok_s"] * plan["speed"]["step_seconds"] < 1
    assert main(["plan", "--model", "builtin:tiny", "--memory", "50%"]) == 0
    told = capsys.readouterr().out
    assert all(mode in told for mode in ("exact", "bounded", "fast")) and "measured here" in told


def test_a_plan_says_what_the_host_s_cores_are_good_for(capsys: pytest.CaptureFixture[str]) -> None:
    """In every mode, with what has no effect in `exact` as well."""
    few = ["--mode", "bounded", "--budget", "0.0001", "--gpus", "1GiB", "--memory", "50%", "--host-memory", "100%"]
    alone = planned(capsys, *few, "--host-compute", "off")
    assert alone["predicted_host_percent"] == 0
    assert alone["predicted_decode_tok_s"] == alone["predicted_fetching_tok_s"] > 0
    one, four = (planned(capsys, *few, "--threads", threads) for threads in ("1", "4"))
    assert 0 < one["predicted_host_percent"] < four["predicted_host_percent"]
    speeds = [plan["predicted_decode_tok_s"] for plan in (alone, one, four)]
    assert speeds == sorted(speeds) and len({*speeds}) == 3
    assert main(["plan", *few]) == 0
    told = capsys.readouterr().out
    assert "by host" in told and "weights on the host  10.0 GB/s, a guess" in told


def test_what_cannot_be_is_told_before_anything_is_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "measure_machine", lambda *_, **__: pytest.fail("it was measured"))
    assert main(["plan", "--model", "builtin:tiny", "--max-running", "100000", "--max-model-len", "1024"]) != 0
    assert "hint:" in capsys.readouterr().err


def planned(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    assert main(["plan", "--json", *options]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_hits_are_those_of_the_profile_s_routes(capsys: pytest.CaptureFixture[str]) -> None:
    """Of the experts that stay where stand-ins answer, else of what the cache keeps; all where all fits."""
    folder = resolve_model("builtin:tiny")
    profile = load_profile(default_profile_path(folder) or Path(), model_hash=model_hash(folder))
    exact = planned(capsys, "--memory", "50%")
    sizes = exact["devices"][0]["layer_slots"]
    routes, counts = profile.routes_TLK[:4096].astype(int), profile.counts_LE.astype(int)
    served = [served_hits(routes[:, [la]], counts[[la]], (size,)).item() for la, size in enumerate(sizes)]
    assert exact["predicted_routing"] == "profile"
    assert exact["predicted_hit_percent"] == pytest.approx(100 * sum(served) / len(served))
    resident = exact["devices"][0]["resident_percent"]
    assert resident + 5 < exact["predicted_hit_percent"] < 100
    assert planned(capsys, "--memory", "100%")["predicted_hit_percent"] == 100
    fast = planned(capsys, "--memory", "50%", "--mode", "fast")
    assert fast["devices"][0]["resident_percent"] < fast["predicted_hit_percent"] < exact["predicted_hit_percent"]


def test_without_a_profile_routing_is_taken_to_be_uniform(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build_checkpoint("olmoe", tmp_path)
    found = planned(capsys, "--model", str(tmp_path), "--memory", "60%")
    assert found["predicted_routing"] == "uniform"
    assert found["predicted_hit_percent"] == pytest.approx(found["devices"][0]["resident_percent"])
