"""The table of GPUs in deployments/README.md: what `plan` says of `gpu-*.yaml` on such cards, from configs alone."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import yaml

from buddymoe_ray.models.synth_shapes import SHAPES
from buddymoe_ray.residency.devices import supposed_gpus
from buddymoe_ray.residency.plan import Plan, make_plan
from buddymoe_ray.serve.args import ServeArgs

__all__ = ["DEPLOYMENTS", "cards_table"]

DEPLOYMENTS = sorted((Path(__file__).parents[1] / "deployments").glob("gpu-*.yaml"))
SEVERAL = 4
_WIDER = {"hidden_size": 6144, "intermediate_size": 16384, "num_hidden_layers": 56, "num_attention_heads": 48}
MODELS = {
    "Qwen/Qwen3-30B-A3B": SHAPES["qwen3-30b-a3b"],
    "mistralai/Mixtral-8x7B-Instruct-v0.1": SHAPES["mixtral-8x7b"],
    "mistralai/Mixtral-8x22B-Instruct-v0.1": {**SHAPES["mixtral-8x7b"], **_WIDER, "max_position_embeddings": 65536},
}


def planned(path: Path) -> tuple[dict[str, Any], Plan]:
    """A deployment's arguments, and the plan that its header asks for on several of its cards."""
    text = path.read_text()
    [application] = yaml.safe_load(text)["applications"]
    args = application["args"]
    asked = re.search(r"buddymoe plan (.*) --gpus (\S+)$", text, re.M)
    assert asked is not None, f"{path.name} does not say how it is planned"
    flags = (f"--{name.replace('_', '-')} {args[name]}" for name in ("model", "memory", "max_running", "max_model_len"))
    assert asked[1] == " ".join(flags), f"{path.name} plans {asked[1]!r} and serves something else"
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps({**MODELS[args["model"]], "dtype": "bfloat16"}))
        config = ServeArgs(**args, device="cuda").engine_config()
        return args, make_plan(config, Path(folder), gpus=supposed_gpus(f"{SEVERAL}x{asked[2]}"))


def cards_table() -> str:
    """A row for each deployment by card."""
    lines = [
        "| deployment | model | experts | on a GPU | dense | KV cache | "
        f"host tier | in the slots of 1, of {SEVERAL} GPUs | read a token |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for path in DEPLOYMENTS:
        args, plan = planned(path)
        device, experts = plan.devices[0], plan.moe_layers * plan.experts_per_layer
        held = [min(100, round(100 * count * device.slots / experts)) for count in (1, SEVERAL)]
        kv = f"{_gib(device.kv_cache_bytes)}, {device.kv_tokens:,} tokens"
        cells = (
            f"[{path.name}]({path.name})",
            args["model"].split("/")[1],
            _gib(plan.total_expert_bytes),
            args["memory"].replace("GiB", " GiB"),
            _gib(plan.dense_bytes),
            kv,
            f"{100 * plan.host_tier_bytes / plan.total_expert_bytes:.0f} %",
            f"{held[0]} %, {held[1]} %",
            _gib(plan.predicted_miss_bytes_per_token),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _gib(nbytes: float) -> str:
    return f"{nbytes / 2**30:.1f} GiB"
