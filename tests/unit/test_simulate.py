"""`buddymoe simulate`: workloads are what they say, every access is counted once, rows and refusals as scripts meet."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest

from buddymoe_ray.calibrate.simulate import PLACEMENTS, Cluster, simulate
from buddymoe_ray.calibrate.workloads import KINDS, Routes, load_routes, replayed, save_routes, synthetic
from buddymoe_ray.cli import main
from buddymoe_ray.errors import ConfigError
from buddymoe_ray.models.resolve import resolve_model

SMALL = ["simulate", "--gpus", "8", "--gpus-per-node", "4", "--layers", "3", "--experts", "32", "--top-k", "4"]


def made_up(kind: str, *, seed: int = 0, windows: int = 12, tokens: int = 4000) -> Any:
    return synthetic(kind, experts_per_layer=(32, 32, 32), top_k=4, windows=windows, tokens=tokens, skew=1.0, seed=seed)


def cluster(**changes: Any) -> Cluster:
    whole: dict[str, Any] = {
        "gpus": 8,
        "gpus_per_node": 4,
        "pool_bytes": 2000,
        "expert_bytes": 100,
        "activation_bytes": 8,
        "same_node": 25e-6,
        "other_node": 80e-6,
        "fetch": 2e-3,
        "standin": float("inf"),
        "token_seconds": 1e-3,
        "migrate_bytes_per_second": 1e5,
        "window_seconds": 1.0,
        "horizon_seconds": 600.0,
    }
    return Cluster(**(whole | changes))


@pytest.mark.parametrize("kind", KINDS)
def test_a_workload_uses_top_k_experts_per_token(kind: str) -> None:
    work = made_up(kind)
    per_layer_WL = work.counts_WLE.sum(axis=2)
    assert np.allclose(per_layer_WL, 4 * 4000, rtol=0.03) and work.counts_WLE.max() <= 4000
    assert (made_up(kind).counts_WLE == work.counts_WLE).all() and (made_up(kind, seed=1).counts_WLE != 0).any()
    assert (made_up(kind, seed=1).counts_WLE != work.counts_WLE).any()


def likeness(work: Any, a: int, b: int) -> float:
    return float(np.corrcoef(work.counts_WLE[a].ravel(), work.counts_WLE[b].ravel())[0, 1])


def test_zipf_stays_drifting_moves_and_bursty_bursts() -> None:
    assert likeness(made_up("zipf"), 0, 11) > 0.99
    drifting = made_up("drifting")
    assert likeness(drifting, 0, 3) > 0.99 and likeness(drifting, 8, 11) > 0.99 and likeness(drifting, 0, 11) < 0.6
    jumps = [likeness(made_up("bursty", windows=30), w, w + 1) for w in range(29)]
    assert max(jumps) > 0.99 and min(jumps) < 0.97


def test_every_use_is_answered_and_speed_follows_from_the_stall() -> None:
    work, small = made_up("zipf", windows=5), cluster()
    for outcome in simulate(small, work, PLACEMENTS):
        row = outcome.as_record(small, work)
        shares = [row[f"{option}_percent"] for option in ("local", "same_node", "other_node", "standin", "fetch")]
        assert sum(shares) == pytest.approx(100, abs=0.01) and len(outcome.accesses_WR) == 4
        accesses = work.counts_WLE[1:].sum()
        assert np.sum(outcome.accesses_WR) == pytest.approx(accesses)
        stall = accesses * (row["same_node_percent"] * 25e-8 + row["other_node_percent"] * 80e-8) / 4 / 4000
        assert row["stall_ms_per_token"] == pytest.approx(1e3 * stall, rel=1e-3)
        assert row["tokens_per_second"] == pytest.approx(8 / (1e-3 + stall), rel=1e-3)
        assert row["same_node_bytes"] == pytest.approx(8 * accesses * row["same_node_percent"] / 100, rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_ours_waits_less_than_the_baselines_and_no_less_than_the_oracle(kind: str) -> None:
    work, small = made_up(kind, windows=6), cluster()
    stall = {o.placement: o.stall_per_token(small, work) for o in simulate(small, work, PLACEMENTS)}
    assert stall["oracle"] <= stall["ours"] * 1.01
    assert stall["ours"] < min(stall["static"], stall["round-robin"], stall["eplb"])


def test_a_drift_moves_experts_within_the_bandwidth_and_a_still_one_none() -> None:
    still, moving = made_up("zipf", tokens=400_000), made_up("drifting", tokens=400_000)
    (quiet,) = simulate(cluster(), still, ["ours"])
    assert sum(quiet.loads_W) == 0
    (fast,) = simulate(cluster(), moving, ["ours"])
    assert sum(fast.loads_W) > 20 and fast.late == 0
    (slow,) = simulate(cluster(migrate_bytes_per_second=100.0), moving, ["ours"])
    assert max(slow.loads_W) <= 8 and slow.late > 0, "one expert per GPU and window"
    assert slow.stall_per_token(cluster(), moving) > fast.stall_per_token(cluster(), moving)


def test_standins_answer_what_fits_nowhere() -> None:
    work = made_up("zipf")
    small = cluster(pool_bytes=300, standin=2e-4)
    (outcome,) = simulate(small, work, ["ours"])
    row = outcome.as_record(small, work)
    assert row["standin_percent"] > 1 and row["fetch_percent"] == 0 and row["fetch_bytes"] == 0


def test_misses_that_the_host_computes_are_answered_beside_those_that_are_fetched() -> None:
    work, small = made_up("zipf", windows=4), cluster(pool_bytes=300, other_node=9.0, same_node=9.0, host=2e-3)
    (outcome,) = simulate(small, work, ["static"])
    row, hosted = outcome.as_record(small, work), outcome.hosted(small, work)
    missed = row["fetch_percent"] / 100
    assert hosted.missed == pytest.approx(4 * missed, rel=1e-3) and 0.5 < missed < 1
    assert row["host_percent"] == pytest.approx(25 * hosted.by_host, abs=1e-3)
    assert row["host_percent"] < row["fetch_percent"]
    assert row["stall_ms_per_token"] == pytest.approx(3 * 4 * missed * 2, rel=5e-3)
    assert row["host_tokens_per_second"] == pytest.approx(8 / (1e-3 + 3 * hosted.seconds), rel=5e-3)
    assert row["host_tokens_per_second"] > 1.3 * row["tokens_per_second"]
    alone = cluster(pool_bytes=300, other_node=9.0, same_node=9.0)
    record = outcome.as_record(alone, work)
    assert record["host_percent"] == 0 and record["host_tokens_per_second"] == record["tokens_per_second"]


def routes() -> Routes:
    rng = np.random.default_rng(0)
    ids = np.stack([[rng.permutation(6)[:2], rng.permutation(4)[:2]] for _ in range(50)]).astype(np.int16)
    return Routes(routes_TLK=ids, experts_per_layer=(6, 4))


def test_a_trace_replays_its_own_counts_and_transitions(tmp_path: Path) -> None:
    save_routes(routes(), tmp_path / "t")
    back = load_routes(tmp_path / "t")
    assert (back.routes_TLK == routes().routes_TLK).all() and back.experts_per_layer == (6, 4)
    work = replayed(back, windows=5, tokens=100)
    assert work.counts_WLE.shape == (5, 2, 6) and np.allclose(work.counts_WLE.sum(axis=2), 200)
    third = sum((back.routes_TLK[:10, 0] == e).sum() == work.counts_WLE[0, 0, e] / 10 for e in range(6))
    assert third == 6 and work.transition_LEE is not None
    used = np.unique(back.routes_TLK[:, 0])
    assert np.allclose(work.transition_LEE[0][used].sum(axis=1), 2)
    both = sum(1 in t[0] and 3 in t[1] for t in back.routes_TLK) / sum(1 in t[0] for t in back.routes_TLK)
    assert work.transition_LEE[0][1, 3] == pytest.approx(both)
    with pytest.raises(ConfigError, match="--windows is 51"):
        replayed(back, windows=51, tokens=100)


def test_a_damaged_trace_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t"
    save_routes(routes(), path)
    whole = msgpack.unpackb(path.read_bytes())
    damages = [{"version": 2}, {"magic": "x"}, {"shape": [1, 2]}, {"shape": [50, 2, 3]}, {"routes": b"zz"}]
    damages += [{"experts_per_layer": [3, 3]}, {"shape": [1 << 40, 2, 2]}]
    for raw in (b"", b"no", path.read_bytes()[:-7], *(msgpack.packb(whole | d) for d in damages)):
        path.write_bytes(raw)
        with pytest.raises(ConfigError, match="is no routes file"):
            load_routes(path)


def rows(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    out = capsys.readouterr().out
    assert ": " not in out.split('"', 1)[0]
    return [json.loads(line) for line in out.splitlines()]


def test_a_row_per_placement_and_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "o.html"
    assert (
        main([*SMALL, "--memory", "20%", "--workload", "drifting", "--windows", "5", "--plot", str(page), "--json"])
        == 0
    )
    got = rows(capsys)
    assert [row["placement"] for row in got] == list(PLACEMENTS)
    assert all(row["slots_per_gpu"] == 19 and row["gpus"] == 8 and row["solver_ms"] >= 0 for row in got)
    text = page.read_text()
    assert text.count("data:image/svg+xml;base64,") == 2 and "http" not in text.replace("http-equiv", "")
    assert main([*SMALL, "--memory", "20%", "--windows", "3", "--placements", "ours,static"]) == 0
    shown = capsys.readouterr().out
    assert "ours" in shown and "static" in shown and "eplb" not in shown


def test_a_models_routes_are_recorded_and_replayed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = resolve_model("builtin:tiny") / "heldout" / "python.txt"
    corpus, trace = tmp_path / "c.txt", tmp_path / "t.routes"
    corpus.write_text(text.read_text()[:6000])
    record = ["simulate", "--record", "builtin:tiny", "--corpus", str(corpus), "--out", str(trace), "--json"]
    assert main([*record, "--tokens", "800"]) == 0
    (said,) = rows(capsys)
    assert (said["tokens"], said["layers"], said["top_k"]) == (768, 4, 4)
    replay = ["simulate", "--trace", str(trace), "--gpus", "4", "--windows", "4", "--placements", "ours", "--json"]
    assert main([*replay, "--memory", "30%", "--affinity-us", "5"]) == 0
    (row,) = rows(capsys)
    assert row["experts"] == 32 and row["fetch_percent"] == 0 and 0 < row["local_percent"] < 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "0"], "--gpus is 0"),
        (["--gpus", "4097"], "must be at most 4096. hint: simulate a part"),
        (["--host-gbps", "0"], "--host-gbps is 0.0, must be above 0"),
        (["--windows", "1"], "must be at least 2"),
        (["--top-k", "999"], "at most --experts"),
        (["--memory", "x"], "must be like 25%"),
        (["--expert-bytes", "5%"], "must be bytes"),
        (["--placements", "best"], "must be of ours"),
        (["--fetch-gbps", "nan"], "must be above 0"),
        (["--skew", "-1"], "must be at least 0"),
        (["--same-node-us", "99"], "at most --other-node-us"),
        (["--trace", "/nowhere"], "cannot be read"),
        (["--trace", "/nowhere", "--workload", "zipf"], "given with --trace"),
        (["--affinity-us", "1"], "given without --trace"),
        (["--out", "x"], "without --record"),
        (["--record", "builtin:tiny"], "must go with --corpus"),
        (["--plot", "/nowhere/o.html"], "must be in a folder that can be written"),
    ],
)
def test_bad_usage_is_one_line_and_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.startswith("buddymoe simulate: ") and not captured.out


@pytest.mark.parametrize(
    "arguments",
    [
        "simulate --plot",
        "simulate --record builtin:tiny --corpus {text} --out",
        "profile --model builtin:tiny --corpus {text} --out",
    ],
)
def test_a_pipe_or_device_is_never_replaced_by_a_file(arguments: str, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("def add(a, b): return a + b\n" * 99)
    os.mkfifo(pipe := tmp_path / "pipe")
    assert main([*arguments.format(text=tmp_path / "text").split(), str(pipe)]) in (1, 2)
    assert pipe.is_fifo()
