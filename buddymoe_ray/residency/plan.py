"""What would live where, before anything loads: from config and headers alone.

Reads no weight and allocates nothing. Predictions come from what the machine was measured to do, or from speeds that
are guessed and named. `buddymoe plan` prints it, a deployment checks itself with it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from buddymoe_ray.config import EngineConfig, parse_memory
from buddymoe_ray.device import open_device
from buddymoe_ray.errors import BudgetError, ConfigError
from buddymoe_ray.models.expert_dtype import recoded_tensors
from buddymoe_ray.models.shape import ModelShape, describe
from buddymoe_ray.policy import Prefill, kv_cache_bytes, plan_prefill, recording_bytes, split_kv, state_slots
from buddymoe_ray.residency.devices import GpuInfo
from buddymoe_ray.residency.machine import (
    available_memory_bytes,
    cgroup_limit_bytes,
    refuse_dense_dtype,
    torch_dtype,
)
from buddymoe_ray.residency.routes import expected_hits
from buddymoe_ray.residency.speed import (
    GUESSED_DISK,
    GUESSED_RAM,
    MachineSpeed,
    answered_misses,
    decode_seconds,
    guessed_speed,
    prefill_seconds,
    stood_in_share,
    token_work,
)
from buddymoe_ray.residency.standin_setup import StandinSetup
from buddymoe_ray.residency.tier import plan_memory, scratch_bytes
from buddymoe_ray.types import ExpertLayout, SlotPlan, plain_shapes

__all__ = ["PROMPT", "Plan", "make_plan", "planned_shape"]

_ON_CPU = ("cpu", "interpret")

PROMPT = 512
"""Tokens of the prompt whose first token is predicted."""


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where an engine would run."""

    device: str
    name: str
    total_bytes: int
    available_bytes: int
    numa_node: int | None
    link: str
    link_bytes_s: float
    peer_bytes_s: float


@dataclass(frozen=True, kw_only=True)
class DevicePlan(_Place):
    """One device tier: what it is, what it offers, what would be resident there. `recording_bytes` are a GPU's, for
    decode steps that it replays."""

    dense_bytes: int
    recording_bytes: int
    expert_budget_bytes: int
    max_running: int
    kv_cache_bytes: int
    kv_tokens: int
    slots: int
    wave_slots: int
    layer_slots: tuple[int, ...]
    resident_experts: int
    resident_percent: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The whole plan. Bytes are exact from headers; `predicted_*` assume uniform routing, one sequence, a prompt of
    `PROMPT` tokens, and `speed`, which says whether it was measured; of `predicted_fetching_tok_s` the host computes no
    miss.

    `standins` counts the experts answered by each kind of record, of `standin_bytes` in all (part of `overhead_bytes`);
    `expected_rise_fast` is the calibrated loss (nats per token) if nothing is ever fetched. `kv_tokens` of a device are
    those of all sequences together; `max_running` of `max_model_len` each are what the config promises, or fewer, where
    there is no room for their states: `state_bytes` is what layers carry of one from token to token, in two slots.
    `activation_bytes` are what prompts take while they are computed, `prefill_tokens` of them at once.
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
    dense_dtype: str
    dense_format: str
    dense_bytes: int
    mode: str
    budget: float
    standins: dict[str, int]
    standin_bytes: int
    expected_rise_fast: float | None
    overhead_bytes: int
    max_model_len: int
    max_running: int
    kv_bytes_per_token: int
    state_bytes: int
    prefill_tokens: int
    activation_bytes: int
    devices: tuple[DevicePlan, ...]
    host_tier_bytes: int
    disk_tier_bytes: int
    memory_limit_bytes: int | None
    predicted_routing: str
    predicted_hit_percent: float
    predicted_standin_percent: float
    predicted_miss_bytes_per_token: float
    predicted_host_percent: float
    predicted_decode_tok_s: float
    predicted_fetching_tok_s: float
    predicted_ttft_seconds: float
    speed: MachineSpeed

    def as_record(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def planned_shape(config: EngineConfig, folder: Path) -> ModelShape:
    """The checkpoint's, with its experts in the precision that they are served in."""
    on_cpu = config.device in _ON_CPU or (config.device == "auto" and open_device("auto").torch.type == "cpu")
    found = describe(folder, dtype=torch_dtype(config.dtype), dense_dtype=config.dense_dtype, on_cpu=on_cpu)
    return _served(found, config.expert_dtype)


def make_plan(
    config: EngineConfig,
    folder: Path,
    *,
    gpus: Sequence[GpuInfo],
    speed: MachineSpeed | None = None,
    shape: ModelShape | None = None,
) -> Plan:
    """Plan one engine per device, for a machine of such `speed` (None: guessed). `shape` is `planned_shape`'s, or None.
    Raises BudgetError, with numbers and a hint, when dense weights, experts or the promised KV cache cannot fit."""
    shape = shape or planned_shape(config, folder)
    if config.max_model_len is not None and config.max_model_len > shape.max_positions:
        raise ConfigError(
            f"max_model_len is {config.max_model_len}, must be at most {shape.max_positions} for this model. "
            "hint: leave it out"
        )
    first, *_ = places = _places(config, gpus)
    layout, apart = _layout(shape), config.device == "interpret" or first.device != "cpu"
    scratch = scratch_bytes(layout, getattr(torch, shape.compute_dtype), as_stored=not apart and shape.as_stored)
    planned = config if shape.has_weights else config.exactly()  # no weights, nothing to bind a profile to
    slots, setup, _ = plan_memory(planned, layout, folder=folder, apart=apart, scratch=scratch)
    length = min(config.max_model_len or shape.max_positions, shape.max_positions)
    devices, prefill = tuple(_device(config, shape, length, slots, p) for p in places), _prefill(config, shape, slots)
    host = parse_memory(config.host_memory, total_expert_bytes=shape.total_expert_bytes)
    speed = speed or guessed_speed(config, shape, first.link_bytes_s, first.peer_bytes_s, apart=first.device != "cpu")
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
        dense_dtype=config.dense_dtype,
        dense_format=shape.dense_format,
        dense_bytes=shape.dense_bytes,
        mode=config.mode,
        budget=config.budget,
        standins={} if setup is None else dict(Counter(setup.kind_of.values())),
        standin_bytes=0 if setup is None else sum(setup.layouts[kind].slot_bytes for kind in setup.kind_of.values()),
        expected_rise_fast=None if setup is None or setup.refusal else setup.expected_loss,
        overhead_bytes=slots.overhead_bytes,
        max_model_len=length,
        max_running=min(device.max_running for device in devices),
        kv_bytes_per_token=shape.kv_bytes_per_token,
        state_bytes=shape.state_bytes,
        prefill_tokens=prefill.alone,
        activation_bytes=prefill.nbytes,
        devices=devices,
        host_tier_bytes=min(host, shape.total_expert_bytes),
        disk_tier_bytes=shape.total_expert_bytes,
        memory_limit_bytes=cgroup_limit_bytes()[0],
        **_predicted(config, shape, setup, slots, expected_hits(config, folder, slots), devices, speed),
        speed=speed,
    )


def _predicted(
    config: EngineConfig,
    shape: ModelShape,
    setup: StandinSetup | None,
    slots: SlotPlan,
    hit: float | None,
    devices: Sequence[DevicePlan],
    speed: MachineSpeed,
) -> dict[str, Any]:
    routing = "uniform" if hit is None else "profile"
    resident = sum(slots.layer_slots) / sum(shape.experts_per_layer)
    hit = resident if hit is None else hit
    stood_in = (1 - hit) * stood_in_share(config, setup)
    work = token_work(config, shape, setup, resident=resident, hit=hit, stood_in=stood_in, workers=len(devices))
    work = replace(work, wave_slots=slots.wave_slots)
    prompt = min(PROMPT, config.max_model_len or PROMPT, shape.max_positions)
    return {
        "predicted_routing": routing,
        "predicted_hit_percent": 100 * hit,
        "predicted_standin_percent": 100 * stood_in,
        "predicted_miss_bytes_per_token": work.missed * work.active * work.expert_bytes,
        "predicted_host_percent": 100 * answered_misses(work, speed).by_host / work.active,
        "predicted_decode_tok_s": 1 / decode_seconds(work, speed, prompt),
        "predicted_fetching_tok_s": 1 / decode_seconds(replace(work, host_compute="off"), speed, prompt),
        "predicted_ttft_seconds": prefill_seconds(work, speed, prompt),
    }


def _layout(shape: ModelShape) -> ExpertLayout:
    return ExpertLayout(
        tensors=shape.slot_tensors,
        slot_bytes=shape.slot_bytes,
        expert_bytes=shape.expert_bytes,
        layers=shape.moe_layers,
        experts_per_layer=shape.experts_per_layer,
        coded=shape.coded,
        pieces={},  # where they are on disk does not matter here
    )


def _prefill(config: EngineConfig, shape: ModelShape, slots: SlotPlan) -> Prefill:
    return plan_prefill(
        config.prefill_chunk,
        hidden=shape.hidden_size,
        experts_per_token=shape.experts_per_token,
        item_bytes=getattr(torch, shape.compute_dtype).itemsize,
        fully_resident=slots.fully_resident,
        fixed=shape.state_bytes > 0,
    )


def _served(shape: ModelShape, expert_dtype: str) -> ModelShape:
    if expert_dtype == "native":
        return shape
    tensors, nbytes = recoded_tensors(
        plain_shapes(shape.slot_tensors, shape.coded), expert_dtype, transposed=shape.transposed
    )
    return replace(
        shape,
        slot_tensors=tensors,
        coded=(),
        slot_bytes=nbytes,
        expert_bytes=nbytes,
        total_expert_bytes=nbytes * sum(shape.experts_per_layer),
        expert_dtype=expert_dtype,
    )


def _places(config: EngineConfig, gpus: Sequence[GpuInfo]) -> list[_Place]:
    if config.device in _ON_CPU or (config.device == "auto" and not gpus):
        refuse_dense_dtype(config, apart=config.device == "interpret")
        free = available_memory_bytes()
        speed = GUESSED_DISK
        cpu = _Place(
            device="cpu",
            name="host memory",
            total_bytes=free,
            available_bytes=free,
            numa_node=None,
            link="disk",
            link_bytes_s=speed,
            peer_bytes_s=speed,
        )
        return [cpu]
    wanted = [gpu for gpu in gpus if config.device in ("auto", "cuda", f"cuda:{gpu.index}")]
    if not wanted:
        raise ConfigError(f"device is {config.device!r}, must be one of {len(gpus)} GPUs. hint: use device auto")
    refuse_dense_dtype(config, apart=True)
    return [
        _Place(
            device=f"cuda:{gpu.index}",
            name=gpu.name,
            total_bytes=gpu.total_bytes,
            available_bytes=gpu.free_bytes,
            numa_node=gpu.numa_node,
            link="pcie",
            link_bytes_s=gpu.pcie_bytes_s or GUESSED_RAM,
            peer_bytes_s=gpu.peer_bytes_s or GUESSED_RAM,
        )
        for gpu in wanted
    ]


_LEAST_TOKENS = 32
"""Of a KV cache: two blocks."""


def _device(config: EngineConfig, shape: ModelShape, length: int, slots: SlotPlan, place: _Place) -> DevicePlan:
    experts = min(slots.budget_bytes, shape.total_expert_bytes)
    recording = _recording(config, shape, length) if place.device != "cpu" else 0
    free = place.available_bytes - shape.dense_bytes - recording
    if experts > free:
        fitting = max(0, free - 4 * _LEAST_TOKENS * shape.kv_bytes_per_token)  # of what is left a quarter is for KV
        raise BudgetError(
            f"{place.device} needs {_gib(shape.dense_bytes + experts + recording)} (dense {_gib(shape.dense_bytes)}, "
            f"experts {_gib(experts)}, recorded steps {_gib(recording)}), must be at most the "
            f"{_gib(place.available_bytes)} available. "
            f"hint: lower --memory to {fitting / 2**30:.2f}GiB or less"
        )
    free -= experts
    sequence = length * shape.kv_bytes_per_token
    promised = config.max_running * sequence + state_slots(config.max_running) * shape.state_bytes
    explicit = config.max_model_len is not None
    if config.kv_memory != "auto":
        kv, wanted = parse_memory(config.kv_memory, total_expert_bytes=0), "kv_memory"
    elif explicit:
        kv, wanted = promised, f"max_running {config.max_running} × max_model_len {length}"
    else:
        kv, wanted = kv_cache_bytes(promised=promised, explicit=False, free=free), "the KV cache"
    room = kv_cache_bytes(promised=kv, explicit=True, free=free)
    if kv > room:
        raise BudgetError(
            f"{wanted} is {_gib(kv)} of KV cache at {shape.kv_bytes_per_token:,} bytes a token and "
            f"{shape.state_bytes:,} a sequence's states, must be at most the {_gib(room)} that {place.device} leaves "
            f"beside dense weights ({_gib(shape.dense_bytes)}), experts ({_gib(experts)}) and recorded steps "
            f"({_gib(recording)}). "
            "hint: lower --max-running, --max-model-len or --memory"
        )
    split = split_kv(kv, max_running=config.max_running, sequence=sequence, state=shape.state_bytes)
    if not split.running:
        raise BudgetError(
            f"{wanted} is {kv} bytes, must have room in half of it for states of a sequence and of a text beside it, "
            f"twice {shape.state_bytes} bytes each. hint: lower --memory"
        )
    resident, tokens = sum(slots.layer_slots), min(split.tokens, split.running * sequence) // shape.kv_bytes_per_token
    least = min(_LEAST_TOKENS, split.running * length) if shape.packed and config.batching != "solo" else 0
    if tokens < least:
        raise BudgetError(
            f"{wanted} is {kv} bytes, must be at least {least * shape.kv_bytes_per_token}, {least} tokens. "
            "hint: raise --kv-memory, or lower --memory"
        )
    return DevicePlan(
        **asdict(place),
        dense_bytes=shape.dense_bytes,
        recording_bytes=recording,
        expert_budget_bytes=slots.budget_bytes,
        max_running=split.running,
        kv_cache_bytes=split.states + tokens * shape.kv_bytes_per_token,
        kv_tokens=tokens,
        slots=slots.slots_total,
        wave_slots=slots.wave_slots,
        layer_slots=slots.layer_slots,
        resident_experts=resident,
        resident_percent=100 * resident / sum(shape.experts_per_layer),
    )


def _recording(config: EngineConfig, shape: ModelShape, length: int) -> int:
    """Of decode steps, where several sequences share one."""
    if config.batching == "solo" or not shape.packed:
        return 0
    return recording_bytes(
        running=config.max_running,
        layers=shape.moe_layers,
        experts_per_token=shape.experts_per_token,
        hidden=shape.hidden_size,
        vocab=shape.vocab_size,
        item_bytes=getattr(torch, shape.compute_dtype).itemsize,
        length=length,
    )


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB"
