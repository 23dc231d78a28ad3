"""`deployments/mixtral.yaml` on a node of two GPUs that are none: a tiny Mixtral, each worker's slots apart.

    FAKE_GPUS=8 pytest -n0 -s tests/ray/test_fake_gpus_service.py

tries as many, says what came of it, and takes minutes: `tests/golden/eight_gpus.log`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from fakes import open_engine_and_note_gpus
from named_actors import placement_maps
from serving import Deploy, eventually
from small_tokenizers import bpe

from buddymoe_ray import LLM
from buddymoe_ray.client import Client
from buddymoe_ray.models.synth import synth_checkpoint

FILE = Path(__file__).parents[2] / "deployments" / "mixtral.yaml"
GPUS, EXPERTS = int(os.environ.get("FAKE_GPUS", "2")), 24


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = synth_checkpoint("mixtral-tiny", tmp_path_factory.mktemp("gpus") / "model")
    bpe().save_pretrained(model)
    return model


def overridden(model: Path) -> dict[str, Any]:
    """What the file serves, of another model and as much smaller."""
    [application] = yaml.safe_load(FILE.read_text())["applications"]
    memory = {"memory": "33%", "host_memory": "100%"}
    smaller = {"model": str(model), **memory, "max_model_len": 64, "max_running": 2}
    fake = {"device": "interpret", "num_cpus": 1, "threads": 1, "drain_seconds": 1, "calibrate": "off"}
    fake |= {"placement_window_seconds": 1.0, "migration_mb_per_second": 1e5}
    return {**application["args"], **smaller, **fake, "dtype": "float32", "default_max_tokens": 2}


def test_each_worker_owns_a_gpu_and_reads_what_the_other_holds(deploy: Deploy, mixtral: Path) -> None:
    prompts = [[5, 6], [60, 61]]
    with LLM(str(mixtral), memory="100%", dtype="float32", device="cpu") as llm:
        expected = [result.token_ids for result in llm.generate(prompts, max_tokens=2, temperature=0.0)]
    args = overridden(mixtral)
    assert (args["num_gpus"], args["workers"]) == (1, "auto"), "the file asks for a worker on every GPU"
    url = deploy("gpus", open_engine=open_engine_and_note_gpus, **args)
    seen = [json.loads(path.read_text()) for path in mixtral.glob("seen-*.json")]
    assert seen == GPUS * [{"visible": None, "device": "interpret"}], "ray hides the other GPU of the node"
    workers = httpx.get(f"{url}/dashboard/data").json()["workers"]
    assert sorted(worker["devices"] for worker in workers) == [[str(gpu)] for gpu in range(GPUS)]
    client = Client("gpus")
    answers = [client.generate(prompt, max_tokens=2, temperature=0.0).token_ids for prompt in prompts]
    assert answers == expected
    asked = 0

    def is_placed() -> bool:
        """All GPUs' slots are pools, and what they keep is not the same."""
        nonlocal asked
        asked += GPUS
        for first in range(asked, asked + GPUS):
            client.generate([first, 2 * first], max_tokens=4, temperature=0.0)
        kept = [found.held_PN for found in placement_maps("gpus") if found.held_PN.shape[1] == EXPERTS]
        return any(len(kept_PN) == GPUS and kept_PN.any(1).all() and (kept_PN.sum(0) == 1).any() for kept_PN in kept)

    eventually(is_placed, seconds=240)
    assert [client.generate(prompt, max_tokens=2, temperature=0.0).token_ids for prompt in prompts] == expected
    snapshots = client.snapshots()
    assert sum(snapshot.peer_slot_reads for snapshot in snapshots) > 0, "nothing was read of a peer"
    shared = sum(snapshot.peer_helped_reads + snapshot.peer_taken_back for snapshot in snapshots)
    assert GPUS > 2 or shared > 0, "no prompt's reads were shared, though two GPUs have no room for all experts"
    told = httpx.get(f"{url}/metrics").text
    assert "buddymoe_peer_slot_reads" in told and "buddymoe_placement_epoch{" in told
    # a service of the same name, but of another model, may have been here before
    [found] = [found for found in placement_maps("gpus") if found.held_PN.shape[1] == EXPERTS]
    print(f"{GPUS} GPUs, holders of each of {EXPERTS} experts: {found.held_PN.sum(0).tolist()}, epoch {found.epoch}")
    print(f"kept by each: {found.held_PN.sum(1).tolist()} of {found.held_PN.shape[1]}")
    for name in (
        "peer_slot_reads",
        "peer_helped_reads",
        "peer_taken_back",
        "bytes_loaded_device",
        "bytes_read_disk",
        "residency",
        "steps",
    ):
        print(f"{name} of each: {[getattr(snapshot, name) for snapshot in snapshots]}")
