"""What would live where, before anything loads: from config and headers alone.

Reads no weight and allocates nothing. Predictions are stated with the link speeds they assume; nothing here is
measured. `buddymoe plan` prints it, a deployment checks itself with it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from buddymoe_ray.config import EngineConfig
from buddymoe_ray.errors import BudgetError, ConfigError
from buddymoe_ray.kernels import UpcastScratch
from buddymoe_ray.models.shape import ModelShape, describe
from buddymoe_ray.policy import parse_memory, plan_staging, split_slots
from buddymoe_ray.residency.devices import GpuInfo
from buddymoe_ray.residency.experts import STAGING_SHARE
from buddymoe_ray.residency.machine import available_memory_bytes, cgroup_limit_bytes, torch_dtype
from buddymoe_ray.residency.standin_setup import NodeBudget, StandinSetup, prepare
from buddymoe_ray.types import ExpertLayout, SlotPlan

__all__ = ["ASSUMED", "Plan", "make_plan"]

ASSUMED = {"disk_bytes_s": 1.0e9, "ram_bytes_s": 10.0e9}
"""Link speeds a prediction assumes where nothing better is known; PCIe comes from NVML."""


@dataclass(frozen=True, kw_only=True)
class DevicePlan:
    """One device tier: what it is, what it offers, what would be resident there."""

    device: str
    name: str
    total_bytes: int
    available_bytes: int
    numa_node: int | None
    link: str
    link_bytes_s: float
    dense_bytes: int
    expert_budget_bytes: int
    slots: int
    wave_slots: int
    layer_slots: tuple[int, ...]
    resident_experts: int
    resident_percent: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The whole plan. Bytes are exact from headers; `predicted_*` assume uniform routing and the links named.

    `standins` counts the experts answered by each kind of record, of `standin_bytes` in all (part of `overhead_bytes`);
    `expected_rise_fast` is the calibrated loss (nats per token) if nothing is ever fetched.
    """

    path: str
    model_type: str
    batching: str
    has_weights: bool
    layers: int
    moe_layers: int
    experts_per_layer: int
    experts_per_token: int
    expert_bytes: int
    total_expert_bytes: int
    expert_dtype: str
    compute_dtype: str
    dense_bytes: int
    mode: str
    standins: dict[str, int]
    standin_bytes: int
    expected_rise_fast: float | None
    overhead_bytes: int
    max_model_len: int
    devices: tuple[DevicePlan, ...]
    host_tier_bytes: int
    disk_tier_bytes: int
    memory_limit_bytes: int | None
    predicted_hit_percent: float
    predicted_miss_bytes_per_token: float
    predicted_decode_tok_s: float
    assumed: dict[str, float]

    def as_record(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def make_plan(config: EngineConfig, folder: Path, *, gpus: Sequence[GpuInfo]) -> Plan:
    """Plan one engine per device. Raises BudgetError, with a hint, when dense weights or budget cannot fit."""
    if config.expert_dtype != "native":
        raise ConfigError(
            f"expert_dtype is {config.expert_dtype!r}, must be native for a plan. "
            "hint: int8 takes .52, int4 .27 of bfloat16's bytes"
        )
    shape = describe(folder, dtype=torch_dtype(config.dtype))
    budget = parse_memory(config.memory, total_expert_bytes=shape.total_expert_bytes)
    on_cpu = config.device == "cpu" or not gpus
    largest, share = max(t.nbytes for t in shape.slot_tensors), STAGING_SHARE[config.mode]
    staging = plan_staging(largest_piece=largest, budget_bytes=budget, share=share)
    overhead = _workspace(shape) + (staging.nbytes if on_cpu else 0)
    setup = _standins(config, shape, folder, budget, overhead)
    slots = split_slots(
        budget_bytes=budget,
        slot_bytes=shape.slot_bytes,
        expert_bytes=shape.expert_bytes,
        experts_per_layer=shape.experts_per_layer,
        overhead_bytes=overhead,
    )
    slots = slots if setup is None else setup.plan
    devices = _devices(config, shape, budget, slots, gpus)
    hit = devices[0].resident_experts / sum(shape.experts_per_layer)
    active = shape.experts_per_token * shape.moe_layers * shape.expert_bytes
    missed = (1 - hit) * active
    slow_link = devices[0].link_bytes_s
    host = parse_memory(config.host_memory, total_expert_bytes=shape.total_expert_bytes)
    seconds = missed / slow_link + (active + shape.dense_bytes) / ASSUMED["ram_bytes_s"]
    return Plan(
        path=str(folder.resolve()),
        model_type=shape.model_type,
        batching="packed" if shape.packed and config.batching != "solo" else "solo",
        has_weights=shape.has_weights,
        layers=shape.num_layers,
        moe_layers=shape.moe_layers,
        experts_per_layer=max(shape.experts_per_layer),
        experts_per_token=shape.experts_per_token,
        expert_bytes=shape.expert_bytes,
        total_expert_bytes=shape.total_expert_bytes,
        expert_dtype=shape.expert_dtype,
        compute_dtype=shape.compute_dtype,
        dense_bytes=shape.dense_bytes,
        mode=config.mode,
        standins={} if setup is None else dict(Counter(setup.kind_of.values())),
        standin_bytes=0 if setup is None else sum(setup.layouts[kind].slot_bytes for kind in setup.kind_of.values()),
        expected_rise_fast=None if setup is None or setup.refusal else setup.expected_harm,
        overhead_bytes=slots.overhead_bytes,
        max_model_len=min(config.max_model_len or shape.max_positions, shape.max_positions),
        devices=devices,
        host_tier_bytes=min(host, shape.total_expert_bytes),
        disk_tier_bytes=shape.total_expert_bytes,
        memory_limit_bytes=cgroup_limit_bytes()[0],
        predicted_hit_percent=100 * hit,
        predicted_miss_bytes_per_token=missed,
        predicted_decode_tok_s=1 / seconds,
        assumed=dict(ASSUMED),
    )


def _standins(config: EngineConfig, shape: ModelShape, folder: Path, budget: int, overhead: int) -> StandinSetup | None:
    """What would stand in; None in `exact`, without a profile, or without weights to bind one to."""
    if config.mode == "exact" or not shape.has_weights:
        return None
    layout = ExpertLayout(
        tensors=shape.slot_tensors,
        slot_bytes=shape.slot_bytes,
        expert_bytes=shape.expert_bytes,
        layers=shape.moe_layers,
        experts_per_layer=shape.experts_per_layer,
        pieces={},
    )
    node = NodeBudget(budget_bytes=budget, overhead_bytes=overhead)
    return prepare(config, folder=folder, layout=layout, node=node)


def _workspace(shape: ModelShape) -> int:
    stored, compute = getattr(torch, shape.expert_dtype), getattr(torch, shape.compute_dtype)
    return UpcastScratch.nbytes_for({t.name: t.shape for t in shape.slot_tensors}, stored=stored, compute=compute)


def _devices(
    config: EngineConfig, shape: ModelShape, budget: int, slots: SlotPlan, gpus: Sequence[GpuInfo]
) -> tuple[DevicePlan, ...]:
    if config.device == "cpu" or not gpus:
        free = available_memory_bytes()
        return (
            _device(shape, budget, slots, ("cpu", "host memory", free, free, None, "disk", ASSUMED["disk_bytes_s"])),
        )
    wanted = [gpu for gpu in gpus if config.device in ("auto", "cuda", f"cuda:{gpu.index}")]
    if not wanted:
        raise ConfigError(f"device is {config.device!r}, must be one of {len(gpus)} GPUs. hint: use device auto")
    facts = [
        (
            f"cuda:{g.index}",
            g.name,
            g.total_bytes,
            g.free_bytes,
            g.numa_node,
            "pcie",
            g.pcie_bytes_s or ASSUMED["ram_bytes_s"],
        )
        for g in wanted
    ]
    return tuple(_device(shape, budget, slots, fact) for fact in facts)


def _device(
    shape: ModelShape, budget: int, slots: SlotPlan, facts: tuple[str, str, int, int, int | None, str, float]
) -> DevicePlan:
    device, name, total, free, numa, link, speed = facts
    need = shape.dense_bytes + min(budget, shape.total_expert_bytes)
    if need > free:
        raise BudgetError(
            f"{device} needs {need / 2**30:.2f} GiB (dense {shape.dense_bytes / 2**30:.2f}, experts "
            f"{(need - shape.dense_bytes) / 2**30:.2f}), must be at most the {free / 2**30:.2f} GiB available. "
            f"hint: lower --memory to {max(0, free - shape.dense_bytes) / 2**30:.2f}GiB or less"
        )
    resident = sum(slots.layer_slots)
    return DevicePlan(
        device=device,
        name=name,
        total_bytes=total,
        available_bytes=free,
        numa_node=numa,
        link=link,
        link_bytes_s=speed,
        dense_bytes=shape.dense_bytes,
        expert_budget_bytes=budget,
        slots=slots.slots_total,
        wave_slots=slots.wave_slots,
        layer_slots=slots.layer_slots,
        resident_experts=resident,
        resident_percent=100 * resident / sum(shape.experts_per_layer),
    )
