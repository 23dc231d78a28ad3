"""The service on several nodes, through the death of everything, and on GPUs that are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cluster_scenario
import httpx
import pytest
import yaml
from named_actors import placement_maps, store_statuses
from ray import serve
from ray.cluster_utils import Cluster
from ray.serve.schema import ServeDeploySchema
from serving import Deploy, eventually

from buddymoe_ray.models.synth import synth_checkpoint
from buddymoe_ray.serve.handles import WORKER_NAME

ROOT = Path(__file__).parents[2]
STREAMS = 16
pytestmark = pytest.mark.timeout(600)  # the first test waits for the whole scenario


@pytest.fixture(autouse=True, scope="module")
def no_other_stores(cluster: Cluster) -> None:
    """A store outlives its service for a minute."""
    cluster_scenario.end_stores()
    eventually(lambda: not store_statuses())


@pytest.fixture(scope="module")
def phases(cluster: Cluster, http_port: int) -> dict[str, dict[str, Any]]:
    """Three nodes with a worker each, through the death of every kind of process and of a node."""
    shape = cluster_scenario.options(["--nodes", "3", "--workers", "3", "--kill", "--tokens", "32"])
    scenario = cluster_scenario.Scenario(shape, cluster)
    scenario.run()
    return {str(record.get("phase") or next(iter(record))): record for record in scenario.records} | {
        f"recovered {record['recovered']}": record for record in scenario.records if "recovered" in record
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


def test_each_worker_has_its_own_device_and_shard(deploy: Deploy, http_port: int, tmp_path: Path) -> None:
    """`deployments/mixtral.yaml` itself, but for a random Mixtral of two layers, on two GPUs that are none."""
    [service] = ServeDeploySchema(**yaml.safe_load((ROOT / "deployments/mixtral.yaml").read_text())).applications
    model = synth_checkpoint("mixtral-tiny", tmp_path / "mixtral", layers=2)
    config = json.loads((model / "config.json").read_text())  # with the real one's context, which the file expects
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 32768}))
    url = deploy("gpus", **(service.args | {"model": str(model)}))
    assert [streamed(url, service.args["model_name"]) for _ in range(4)] == [8] * 4
    handle: Any = serve.get_deployment_handle(WORKER_NAME, "gpus")
    devices = [report.devices for report in handle.broadcast("report").results(timeout_s=60)]
    assert sorted(devices) == [("0",), ("1",)]

    def follow_the_map() -> bool:
        """The first map may be older than both workers: it places nothing."""
        maps, stores = placement_maps("gpus"), store_statuses()
        placing = [found for found in maps if found.held_PN.any()]
        return any(len(store.workers) == 2 and store.epoch >= found.epoch for found in placing for store in stores)

    eventually(follow_the_map, seconds=90)
    [found], [store] = placement_maps("gpus"), store_statuses()
    assert found.held_PN.shape[1] == found.held_PN.any(axis=0).sum() == 16
    pins = [pin for shard in store.shards for pin in shard]
    assert len(store.shards) == 2 and all(store.shards)
    assert len(pins) == len(set(pins)) == 16


def streamed(url: str, model: str) -> int:
    """Tokens of a streamed reply; fails when it does not end as it should."""
    body = {"model": model, "prompt": [5, 6, 7, 8], "max_tokens": 8, "temperature": 0, "stream": True}
    body["stream_options"] = {"include_usage": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=120) as reply:
        lines = [line for line in reply.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]", lines
    tokens: int = json.loads(lines[-2][6:])["usage"]["completion_tokens"]
    return tokens
