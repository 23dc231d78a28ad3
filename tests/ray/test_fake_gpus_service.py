"""`deployments/mixtral.yaml` on a node of two GPUs that are none: a tiny Mixtral, each worker's slots apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from fakes import open_engine_and_note_gpus
from serving import Deploy
from small_tokenizers import bpe

from buddymoe_ray import LLM
from buddymoe_ray.client import Client
from buddymoe_ray.models.synth import synth_checkpoint

FILE = Path(__file__).parents[2] / "deployments" / "mixtral.yaml"
GPUS = 2


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = synth_checkpoint("mixtral-tiny", tmp_path_factory.mktemp("gpus") / "model")
    bpe().save_pretrained(model)
    return model


def overridden(model: Path) -> dict[str, Any]:
    """What the file serves, of another model and as much smaller."""
    [application] = yaml.safe_load(FILE.read_text())["applications"]
    smaller = {"model": str(model), "memory": "75%", "host_memory": "100%", "max_model_len": 64, "max_running": 2}
    fake = {"device": "interpret", "num_cpus": 1, "threads": 1, "drain_seconds": 1, "calibrate": "off"}
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
    assert sorted(worker["devices"] for worker in workers) == [["0"], ["1"]]
    client = Client("gpus")
    answers = [client.generate(prompt, max_tokens=2, temperature=0.0).token_ids for prompt in prompts]
    assert answers == expected
    assert sum(snapshot.peer_slot_reads for snapshot in client.snapshots()) > 0, "nothing was read of a peer"
    assert "buddymoe_peer_slot_reads" in httpx.get(f"{url}/metrics").text
