"""The service on clusters of its own: several nodes, fake GPUs. Each runs as a program, for it needs its own ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from serving import alone

TESTS = Path(__file__).parents[1]
STREAMS = 16
pytestmark = pytest.mark.timeout(600)  # the first test of a file waits for its program


def run(program: str, *arguments: str, seconds: float = 420) -> list[dict[str, Any]]:
    """What the program prints; its stderr is in the failure."""
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    with alone():
        done = subprocess.run(
            [sys.executable, str(TESTS / program), *arguments],
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
    sys.stderr.write(done.stderr[-4000:])
    records = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0, f"{records}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return records


@pytest.fixture(scope="module")
def phases() -> dict[str, dict[str, Any]]:
    """Three nodes with a worker each, through the death of every kind of process and of a node."""
    records = run("cluster_scenario.py", "--nodes", "3", "--workers", "3", "--kill", "--tokens", "32")
    return {str(record.get("phase") or next(iter(record))): record for record in records} | {
        f"recovered {record['recovered']}": record for record in records if "recovered" in record
    }


def test_exact_tokens_on_three_nodes_while_experts_move(phases: dict[str, dict[str, Any]]) -> None:
    first, migrating = phases["first"], phases["migrating"]
    assert first["same"] == migrating["same"] == STREAMS and not migrating["errors"]
    assert len(migrating["stores"]) == 3 and migrating["epoch"] > first["epoch"] >= 0
    assert sum(store["moves"] for store in migrating["stores"]) > 0, "nothing was moved, so nothing was shown"


@pytest.mark.parametrize("victim", ["worker", "store", "placement", "node"])
def test_streams_outlive(phases: dict[str, dict[str, Any]], victim: str) -> None:
    phase = phases[f"kill {victim}"]
    assert (phase["same"], phase["errors"]) == (STREAMS, []), phase
    assert phases[f"recovered {victim}"]["seconds"] >= 0, "the service was not whole again"


def test_a_killed_store_comes_back_without_refilling(phases: dict[str, dict[str, Any]]) -> None:
    assert any(not store["made"] for store in phases["kill store"]["stores"])


def test_nothing_is_left_behind(phases: dict[str, dict[str, Any]]) -> None:
    assert phases["after"]["same"] == STREAMS
    assert phases["leftovers"]["leftovers"] == []


def test_each_worker_has_its_own_device_and_shard() -> None:
    """`deployments/mixtral.yaml` itself, on two GPUs that are none."""
    [record] = run("fake_gpus.py", "--gpus", "2")
    assert sorted(record["devices"]) == [["0"], ["1"]]
    assert record["covered"] == record["experts"] == 16
    pins = [tuple(pin) for shard in record["shards"] for pin in shard]
    assert len(record["shards"]) == 2 and all(record["shards"])
    assert len(pins) == len(set(pins)) == 16
    assert record["tokens"] == [8] * 4
