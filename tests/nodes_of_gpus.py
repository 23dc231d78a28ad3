"""What `residency.speed` foretells of nodes of GPUs that nobody has run this on: rates are stated, not measured.

    python tests/nodes_of_gpus.py > tests/golden/measured/nodes.jsonl

Shapes are read from configurations. Every GPU decodes one sequence with its own copy of the dense weights; of the
experts its slots hold the share `memory`. Two conventions beside the rates: a share s of the experts, the most used
first, gets s^.7 of the accesses (what the cache of `builtin:tiny` has: 38 % of them at a quarter, 65 % at half); with
NVLink the slots of a node hold different experts, without it, where a peer is no nearer than the host, each holds the
most used. `static` is an offload that keeps a fixed share of the experts, of any, and waits for each of the others.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from buddymoe_ray.config import EngineConfig
from buddymoe_ray.models.shape import ModelShape
from buddymoe_ray.models.synth_shapes import SHAPES
from buddymoe_ray.residency.plan import planned_shape
from buddymoe_ray.residency.speed import ROWS, MachineSpeed, TokenWork, decode_seconds, prefill_seconds, token_work

MODELS: dict[str, tuple[dict[str, Any], float]] = {  # with the bytes of a stored weight in those of bfloat16
    "Mixtral 8x7B": (dict(SHAPES["mixtral-8x7b"]), 1.0),
    "Qwen3 30B-A3B": (dict(SHAPES["qwen3-30b-a3b"]), 1.0),
    "DeepSeek V3, fp8": ({"model_type": "deepseek_v3"}, 0.5),
}
MEMORIES, MODES, GPUS, PROMPT = (0.5, 0.25), ("static", "exact", "bounded", "fast"), (1, 2, 4, 8), 2048
SKEW_POWER = 0.7
STANDIN, FETCHED_BOUNDED = 3.25 / 16, 0.08
"""A 3-bit copy's bytes in those of bfloat16; the share of misses that `bounded` fetched of `builtin:tiny` at 25 %."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """Rates, bytes a second: of HBM, of its link to the host, and of reads from another GPU."""

    name: str
    hbm: float
    host: float
    peer: float

    def speed(self) -> MachineSpeed:
        """Weights at 60 % of HBM up to 64 rows; a graph's launch and a layer's kernels cost as much as named."""
        rates = {"bfloat16": dict.fromkeys(ROWS, 0.6 * self.hbm)}
        return MachineSpeed(
            weights_bytes_s=rates | {"int4": rates["bfloat16"]},
            disk_bytes_s=self.host,
            peer_bytes_s=self.peer,
            step_seconds=200e-6,
            layer_seconds=20e-6,
        )


PCIE_4, PCIE_5, NVLINK = 26e9, 52e9, 200e9  # what copies get of 31.5, 63 and, one way, 300 or 450 GB/s
CARDS = (
    Card(name="PCIe 4", hbm=2.0e12, host=PCIE_4, peer=PCIE_4),
    Card(name="PCIe 5", hbm=3.35e12, host=PCIE_5, peer=PCIE_5),
    Card(name="PCIe 5, NVLink", hbm=3.35e12, host=PCIE_5, peer=NVLINK),
)


def shape_of(config: dict[str, Any], folder: Path) -> ModelShape:
    """From a configuration alone, in bfloat16."""
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    return planned_shape(EngineConfig(model=str(folder), device="cpu"), folder)


@dataclass(frozen=True, kw_only=True)
class Holding:
    """The share of all experts that a GPU's slots hold; `sharing` GPUs hold different ones and read each other's."""

    own: float
    sharing: int

    @classmethod
    def of(cls, memory: float, mode: str, card: Card, gpus: int, *, scale: float) -> Holding | None:
        """None where copies of all experts leave no slots."""
        own = memory - STANDIN / scale if mode in ("bounded", "fast") else memory
        shared = card.peer > card.host and mode != "static"
        return cls(own=own, sharing=gpus if shared else 1) if own > 0 else None


def work_of(shape: ModelShape, scale: float, mode: str, holding: Holding) -> tuple[TokenWork, TokenWork]:
    """What a token asks for, and what a prompt does, which uses all experts alike; of those that no GPU holds each
    that shares brings as many."""
    own, together = holding.own, min(1.0, holding.own * holding.sharing)
    node = together if mode == "static" else together**SKEW_POWER
    hit = node * own / together
    fetched = {"bounded": FETCHED_BOUNDED, "fast": 0.0}.get(mode, 1.0) * (1 - hit)
    config, stood_in = EngineConfig(read_ahead="off"), 1 - hit - fetched
    work = token_work(config, shape, None, resident=own, hit=hit, stood_in=stood_in, workers=holding.sharing)
    work = replace(
        work,
        dense_dtype="bfloat16",
        expert_dtype="bfloat16",
        dense_bytes=int(scale * work.dense_bytes),
        head_bytes=int(scale * work.head_bytes),
        expert_bytes=int(scale * work.expert_bytes),
        standin_bytes=STANDIN * work.expert_bytes,
    )
    return replace(work, at_peers=(node - hit) / (1 - hit) if hit < 1 else 0.0), work


def rows(name: str, folder: Path) -> Iterator[dict[str, Any]]:
    """Of one model: a line for each card, number of GPUs, memory and mode."""
    config, scale = MODELS[name]
    shape = shape_of(config, folder)
    for card, gpus, memory, mode in product(CARDS, GPUS, MEMORIES, MODES):
        holding = Holding.of(memory, mode, card, gpus, scale=scale)
        if holding is None:
            continue
        token, prompt = work_of(shape, scale, mode, holding)
        yield {
            "model": name,
            "card": card.name,
            "gpus": gpus,
            "memory": memory,
            "mode": mode,
            "gib": round(memory * scale * shape.total_expert_bytes / 2**30, 1),
            "tok_s": float(f"{gpus / seconds(token, card.speed(), mode):.4g}"),
            "ttft_s": float(f"{prefill_seconds(prompt, card.speed(), PROMPT):.4g}"),
        }


def seconds(work: TokenWork, speed: MachineSpeed, mode: str) -> float:
    """Of a token; who waits for each read hides nothing of it."""
    if mode != "static":
        return decode_seconds(work, speed, PROMPT)
    free = replace(speed, disk_bytes_s=float("inf"))
    return decode_seconds(work, free, PROMPT) + work.missed * work.active * work.expert_bytes / speed.disk_bytes_s


if __name__ == "__main__":
    for model in MODELS:
        with tempfile.TemporaryDirectory() as made:
            for row in rows(model, Path(made)):
                sys.stdout.write(json.dumps(row) + "\n")
