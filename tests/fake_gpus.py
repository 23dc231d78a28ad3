"""`deployments/mixtral.yaml` on a machine that says it has GPUs: who gets which, who pins what, and does it answer?

A program of its own, for a process has one ray instance: `python fake_gpus.py --gpus 8`. Only the model's path is
overridden, by a random Mixtral of two layers. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import ray
import yaml
from ray import serve
from ray.serve.schema import ServeDeploySchema

from buddymoe_ray.actors import placement_map, store_statuses
from buddymoe_ray.models.synth import synth_checkpoint
from buddymoe_ray.serve.app import build_app
from buddymoe_ray.serve.args import ServeArgs
from buddymoe_ray.serve.handles import WORKER_NAME
from buddymoe_ray.serve.records import WorkerReport

DEPLOYMENT = Path(__file__).parents[1] / "deployments/mixtral.yaml"
PROMPT = [5, 6, 7, 8]


def random_mixtral(folder: Path) -> Path:
    """Two layers, with the context of the real one, which the file's limits expect."""
    model = synth_checkpoint("mixtral-tiny", folder, layers=2)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 32768}))
    return model


def deployed(model: Path, port: int) -> tuple[str, ServeArgs]:
    """Run the file's application; everything but the model's path is the file's own."""
    schema = ServeDeploySchema(**yaml.safe_load(DEPLOYMENT.read_text()))
    application = schema.applications[0]
    args = ServeArgs(**(application.args | {"model": str(model)}))
    serve.start(http_options={"host": schema.http_options.host, "port": port})
    serve.run(build_app(args), name=application.name, route_prefix=application.route_prefix)
    return application.name, args


def streamed(port: int, model: str) -> int:
    """Tokens of a streamed reply; raises when it does not end as it should."""
    body = {"model": model, "prompt": PROMPT, "max_tokens": 8, "temperature": 0, "stream": True}
    body["stream_options"] = {"include_usage": True}
    with httpx.stream("POST", f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=120) as reply:
        lines = [line for line in reply.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]", lines
    tokens: int = json.loads(lines[-2][6:])["usage"]["completion_tokens"]
    return tokens


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gpus", type=int, default=2)
    gpus = parser.parse_args().gpus
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        model = random_mixtral(Path(folder) / "mixtral")
        ray.init(
            address="local",
            num_cpus=8 * gpus,
            num_gpus=gpus,
            include_dashboard=False,
            object_store_memory=200 << 20,
            log_to_driver=False,
        )
        try:
            name, args = deployed(model, port)
            tokens = [streamed(port, args.served_name) for _ in range(2 * gpus)]
            handle: Any = serve.get_deployment_handle(WORKER_NAME, name)
            reports = [r for r in handle.broadcast("report").results(timeout_s=60) if isinstance(r, WorkerReport)]
            record = placed(name, gpus)
            print(json.dumps(record | {"devices": [r.devices for r in reports], "tokens": tokens}), flush=True)
        finally:
            serve.shutdown()
            ray.shutdown()


def placed(name: str, workers: int, seconds: float = 90) -> dict[str, Any]:
    """What the map says once there is one that every worker's shard follows."""
    end = time.monotonic() + seconds
    while True:
        found, stores = placement_map(name), store_statuses()
        ready = found is not None and stores and len(stores[0].workers) == workers and stores[0].epoch >= found.epoch
        if ready or time.monotonic() > end:
            break
        time.sleep(0.5)
    experts = 0 if found is None else found.held_PN.shape[1]
    return {
        "experts": experts,
        "covered": 0 if found is None else int(found.held_PN.any(axis=0).sum()),
        "shards": [list(shard) for store in stores for shard in store.shards],
        "stores": len(stores),
    }


if __name__ == "__main__":
    main()
