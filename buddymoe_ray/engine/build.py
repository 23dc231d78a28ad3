"""Wires an engine: resolve, load, size, attach. The only place where all layers below meet.

Order matters for memory: dense weights first, then the expert budget is a hard limit, then what is left bounds the KV
cache. Decides sizes, runs nothing.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from buddymoe_ray.cache import DiskReader, ExpertCache
from buddymoe_ray.config import EngineConfig
from buddymoe_ray.engine import attention
from buddymoe_ray.engine.engine import EngineLimits, EngineParts
from buddymoe_ray.engine.kv import KVPool
from buddymoe_ray.engine.machine import available_memory_bytes, pick_device
from buddymoe_ray.engine.runner import PackedRunner, Runner, SoloRunner, probe_kv_shapes
from buddymoe_ray.engine.scheduler import Scheduler
from buddymoe_ray.errors import BudgetError, ConfigError
from buddymoe_ray.kernels import ExpertMath, UpcastScratch
from buddymoe_ray.models.experts_hook import attach
from buddymoe_ray.models.load import LoadedModel, load_model
from buddymoe_ray.models.resolve import resolve_model
from buddymoe_ray.models.shape import describe
from buddymoe_ray.models.tokenizer import load_tokenizer
from buddymoe_ray.moe import MoEBlock, StepState
from buddymoe_ray.policy import LRU, parse_memory, plan_staging, split_slots
from buddymoe_ray.types import ExpertLayout

__all__ = ["BLOCK_SIZE", "build_parts", "scratch_bytes", "torch_dtype"]

log = logging.getLogger(__name__)

BLOCK_SIZE = 16
_KV_AUTO_CAP = 1 << 30
_KV_AUTO_SHARE = 0.25


def build_parts(config: EngineConfig, *, text: bool = True) -> EngineParts:
    """Everything an Engine needs. Raises ConfigError, CheckpointError, BudgetError."""
    torch.set_num_threads(config.threads)
    device = pick_device(config.device)
    folder = resolve_model(config.model)
    packed = _packed(config, folder)
    attention.register()
    name = attention.NAME if packed else None
    loaded = load_model(folder, dtype=torch_dtype(config.dtype), device=device, attn=name)
    step = StepState()
    cache = _attach_experts(config, loaded, step)
    try:
        kv = _KVSize.choose(config, loaded, packed, step)
        scheduler = Scheduler(
            num_blocks=kv.blocks,
            block_size=BLOCK_SIZE,
            max_running=config.max_running,
            prefill_chunk=config.prefill_chunk if packed else kv.max_model_len,
        )
        return EngineParts(
            config=config,
            cache=cache,
            runner=kv.runner,
            scheduler=scheduler,
            step=step,
            limits=EngineLimits(
                max_model_len=kv.max_model_len, max_running=config.max_running, kv_tokens=kv.blocks * BLOCK_SIZE
            ),
            vocab_size=loaded.vocab_size,
            eos_token_ids=loaded.eos_token_ids,
            tokenizer=load_tokenizer(folder) if text else None,
        )
    except BaseException:
        cache.close()
        raise


def torch_dtype(name: str) -> torch.dtype | None:
    """The compute dtype by its name; None for `auto`."""
    return None if name == "auto" else getattr(torch, name)


def scratch_bytes(layout: ExpertLayout, compute: torch.dtype) -> int:
    """Bytes of the upcast scratch, which count against the expert budget."""
    return UpcastScratch.nbytes_for(_shapes(layout), stored=_stored(layout), compute=compute)


def _packed(config: EngineConfig, folder: Path) -> bool:
    family = describe(folder)
    if config.batching == "packed" and not family.packed:
        raise ConfigError(f"batching is 'packed', must be 'solo' for {family.model_type}. hint: leave it at auto")
    return family.packed and config.batching != "solo"


def _shapes(layout: ExpertLayout) -> dict[str, tuple[int, ...]]:
    return {tensor.name: tensor.shape for tensor in layout.tensors}


def _stored(layout: ExpertLayout) -> torch.dtype:
    return getattr(torch, layout.tensors[0].dtype)


def _open_cache(config: EngineConfig, loaded: LoadedModel) -> ExpertCache:
    layout, on_gpu = loaded.layout, loaded.device.type != "cpu"
    budget = parse_memory(config.memory, total_expert_bytes=layout.total_bytes)
    largest = max(piece.nbytes for pieces in layout.pieces.values() for piece in pieces)
    staging = plan_staging(largest_piece=largest, budget_bytes=budget)
    plan = split_slots(
        budget_bytes=budget,
        slot_bytes=layout.slot_bytes,
        expert_bytes=layout.expert_bytes,
        experts_per_layer=layout.experts_per_layer,
        overhead_bytes=scratch_bytes(layout, loaded.compute_dtype) + (0 if on_gpu else staging.nbytes),
    )
    cache = ExpertCache(
        layout,
        plan,
        eviction=LRU,
        reader=DiskReader(depth=staging.depth, buffer_bytes=staging.buffer_bytes),
        device=loaded.device,
        host_slots=parse_memory(config.host_memory, total_expert_bytes=layout.total_bytes) // layout.slot_bytes,
    )
    try:
        cache.warm(progress=_progress)
    except BaseException:
        cache.close()
        raise
    return cache


def _progress(items: Iterable[int], **options: Any) -> Iterable[int]:
    return tqdm(items, disable=not sys.stderr.isatty(), file=sys.stderr, **options)


def _attach_experts(config: EngineConfig, loaded: LoadedModel, step: StepState) -> ExpertCache:
    layout = loaded.layout
    cache = _open_cache(config, loaded)
    scratch = UpcastScratch(_shapes(layout), stored=_stored(layout), compute=loaded.compute_dtype, device=loaded.device)

    def block(layer: int, module: nn.Module) -> MoEBlock:
        return MoEBlock(
            layer=layer,
            cache=cache,
            math=_expert_math(module),
            scratch=scratch,
            step=step,
        )

    attach(loaded.experts, block)
    return cache


def _expert_math(module: nn.Module) -> ExpertMath:
    gated = bool(module.has_gate)
    post_norm = bool(getattr(module, "has_post_expert_norm", False))
    return ExpertMath(
        activate=module._apply_gate if gated else module.act_fn,  # type: ignore[arg-type]
        gated=gated,
        bias=bool(module.has_bias),
        transposed=bool(module.is_transposed),
        post_norm=module.post_expert_norm if post_norm else None,  # type: ignore[arg-type]
    )


@dataclass(frozen=True, kw_only=True)
class _KVSize:
    """The KV cache that fits and the runner that uses it."""

    blocks: int
    max_model_len: int
    runner: Runner

    @classmethod
    def choose(cls, config: EngineConfig, loaded: LoadedModel, packed: bool, step: StepState) -> _KVSize:
        wanted = min(config.max_model_len or loaded.max_positions, loaded.max_positions)
        if config.max_model_len is not None and config.max_model_len > loaded.max_positions:
            raise ConfigError(
                f"max_model_len is {config.max_model_len}, must be at most {loaded.max_positions} for this model. "
                "hint: drop it"
            )
        if not packed:
            blocks = config.max_running * _blocks(wanted)
            return cls(blocks=blocks, max_model_len=wanted, runner=SoloRunner(loaded, step))
        paged = attention.PagedAttention()
        attention.attach(loaded.model, paged)
        shapes = probe_kv_shapes(loaded, paged, step)
        per_block = KVPool.bytes_per_token(shapes, loaded.compute_dtype) * BLOCK_SIZE
        fitting = _kv_budget(config, loaded.device) // per_block
        if fitting < 2:
            raise BudgetError(
                f"KV cache is {fitting} blocks of {per_block} bytes, must be at least 2. hint: raise kv_memory"
            )
        blocks = min(fitting, config.max_running * _blocks(wanted))
        max_model_len = min(wanted, blocks * BLOCK_SIZE)
        if max_model_len < wanted:
            log.warning("max_model_len is lowered from %d to %d: the KV cache holds no more", wanted, max_model_len)
        pool = KVPool(shapes, blocks=blocks, block_size=BLOCK_SIZE, dtype=loaded.compute_dtype, device=loaded.device)
        return cls(blocks=blocks, max_model_len=max_model_len, runner=PackedRunner(loaded, paged, pool, step))


def _blocks(tokens: int) -> int:
    return -(-tokens // BLOCK_SIZE)


def _kv_budget(config: EngineConfig, device: torch.device) -> int:
    if config.kv_memory != "auto":
        return parse_memory(config.kv_memory, total_expert_bytes=0)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory_bytes()
    return min(_KV_AUTO_CAP, int(free * _KV_AUTO_SHARE))
