"""Wires an engine: resolve, load, size, attach. The only place where all layers below meet.

Order matters for memory: dense weights first, then the expert budget is a hard limit, then what is left bounds the KV
cache. Decides sizes, runs nothing.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from buddymoe_ray.config import EngineConfig, parse_memory
from buddymoe_ray.device import Device, open_device
from buddymoe_ray.engine import attention, one_call
from buddymoe_ray.engine.calibration import Calibration, Checks
from buddymoe_ray.engine.kv import KVPool
from buddymoe_ray.engine.parts import EngineLimits, EngineParts
from buddymoe_ray.engine.plain_forward import choose_forward
from buddymoe_ray.engine.recorded import RecordedDecode, StepSizes
from buddymoe_ray.engine.runner import PackedRunner, Runner, SoloRunner, probe
from buddymoe_ray.engine.scheduler import Scheduler
from buddymoe_ray.engine.states import StatePool
from buddymoe_ray.engine.suspended import PassParts
from buddymoe_ray.engine.validate import checked_sampling
from buddymoe_ray.errors import BudgetError, CheckpointError, ConfigError, RequestError
from buddymoe_ray.models.load import LoadedModel, load_model, on_kernels
from buddymoe_ray.models.recurrent import StateShapes, attach_states
from buddymoe_ray.models.resolve import resolve_model
from buddymoe_ray.models.shape import generation_defaults, narrowed_family
from buddymoe_ray.models.tokenizer import load_tokenizer
from buddymoe_ray.moe import MoEBlock, StepState
from buddymoe_ray.observe import progress
from buddymoe_ray.policy import Prefill, kv_cache_bytes, plan_prefill, recording_bytes, split_kv, state_slots
from buddymoe_ray.residency.machine import available_memory_bytes, refuse_dense_dtype, torch_dtype
from buddymoe_ray.residency.sharing import Sharing
from buddymoe_ray.residency.tier import ExpertTier, open_experts
from buddymoe_ray.types import SamplingParams

__all__ = ["BLOCK_SIZE", "build_parts"]

log = logging.getLogger(__name__)

BLOCK_SIZE = 16


def build_parts(config: EngineConfig, *, text: bool = True, sharing: Sharing | None = None) -> EngineParts:
    """Everything an Engine needs; `sharing` says with whom it shares its experts. Raises ConfigError, CheckpointError,
    BudgetError."""
    torch.set_num_threads(config.threads)
    device = open_device(config.device)
    folder = resolve_model(config.model)
    packed = _packed(config, folder)
    attention.register()
    name = attention.NAME if packed else None
    refuse_dense_dtype(config, apart=device.apart)
    loaded = load_model(folder, dtype=torch_dtype(config.dtype), device=device.torch, attn=name)
    if not device.apart:
        loaded = on_kernels(loaded, config.dense_dtype, threads=config.threads, progress=progress)
    step = StepState()
    experts = open_experts(config, loaded, step, device, sharing)
    try:
        kv = _KVSize.choose(config, loaded, experts, step, 1 if sharing is None else sharing.workers, packed=packed)
        scheduler = Scheduler(
            num_blocks=kv.blocks,
            block_size=BLOCK_SIZE,
            max_running=kv.max_running,
            prefill=_prefill(config, loaded, experts, fixed=not kv.runner.shares)
            if packed
            else Prefill(beside=kv.max_model_len, alone=kv.max_model_len),
            grows=kv.runner.repeatable,
            suspends=kv.runner.parts is not None and config.prefill_chunk is None,
            reuses=_reuses(config, kv.runner),
        )
        tokenizer = load_tokenizer(folder) if text else None
        return EngineParts(
            config=config,
            experts=experts,
            runner=kv.runner,
            scheduler=scheduler,
            calibration=Calibration(config, loaded, experts, Checks(config, kv.runner, scheduler, step), sharing),
            sharing=sharing,
            step=step,
            limits=EngineLimits(
                max_model_len=kv.max_model_len, max_running=kv.max_running, kv_tokens=kv.blocks * BLOCK_SIZE
            ),
            vocab_size=loaded.vocab_size,
            loaded=loaded,
            eos_token_ids=loaded.eos_token_ids or _own_end(tokenizer),
            sampling_defaults=_sampling_defaults(config, folder),
            tokenizer=tokenizer,
        )
    except BaseException:
        experts.close()
        raise


def _own_end(tokenizer: Any) -> frozenset[int]:
    """The tokenizer's end token, where a checkpoint names none: as in vLLM, not in transformers' `generate`."""
    end = getattr(tokenizer, "eos_token_id", None)
    return frozenset() if end is None else frozenset({end})


def _sampling_defaults(config: EngineConfig, folder: Path) -> dict[str, Any]:
    """Sampling parameters of the checkpoint, for requests that leave them open. Raises CheckpointError."""
    if config.generation_config == "none":
        return {}
    found = generation_defaults(folder)
    try:
        plain = vars(checked_sampling(SamplingParams(**found)))
    except RequestError as error:
        raise CheckpointError(
            f"{folder / 'generation_config.json'} cannot be used: {error}; or set generation_config to none"
        ) from error
    return {name: plain[name] for name in found}


def _prefill(config: EngineConfig, loaded: LoadedModel, experts: ExpertTier, *, fixed: bool) -> Prefill:
    return plan_prefill(
        config.prefill_chunk,
        hidden=loaded.hidden_size,
        experts_per_token=loaded.experts_per_token,
        item_bytes=loaded.compute_dtype.itemsize,
        fully_resident=experts.cache.plan.fully_resident,
        fixed=fixed,
    )


def _reuses(config: EngineConfig, runner: Runner) -> bool:
    """Whether texts share KV blocks. Raises ConfigError where they cannot."""
    if config.prefix_cache == "on" and not runner.shares:
        raise ConfigError(
            "prefix_cache is 'on', must be auto or off where batching is solo or layers carry a state from token to "
            "token. hint: leave it at auto"
        )
    return config.prefix_cache == "on" or (config.prefix_cache == "auto" and runner.repeatable and runner.shares)


def _packed(config: EngineConfig, folder: Path) -> bool:
    family = narrowed_family(folder)
    if config.batching == "packed" and not family.packed:
        raise ConfigError(f"batching is 'packed', must be 'solo' for {family.model_type}. hint: leave it at auto")
    return family.packed and config.batching != "solo"


@dataclass(frozen=True, kw_only=True)
class _KVSize:
    """The KV cache that fits and the runner that uses it."""

    blocks: int
    max_running: int
    max_model_len: int
    runner: Runner

    @classmethod
    def choose(
        cls,
        config: EngineConfig,
        loaded: LoadedModel,
        experts: ExpertTier,
        step: StepState,
        workers: int,
        *,
        packed: bool,
    ) -> _KVSize:
        wanted = min(config.max_model_len or loaded.max_positions, loaded.max_positions)
        if config.max_model_len is not None and config.max_model_len > loaded.max_positions:
            raise ConfigError(
                f"max_model_len is {config.max_model_len}, must be at most {loaded.max_positions} for this model. "
                "hint: drop it"
            )
        if not packed:
            probe(loaded, step, use_cache=True)
            running, solo = config.max_running, SoloRunner(loaded, step)
            return cls(blocks=running * _blocks(wanted), max_running=running, max_model_len=wanted, runner=solo)
        paged, carried = attention.PagedAttention(), StateShapes()
        attention.attach(loaded.model, paged)
        attach_states(loaded.model, carried)
        probe(loaded, step, use_cache=False)
        shapes = dict(sorted(paged.shapes.items()))
        per_block = KVPool.bytes_per_token(shapes, loaded.compute_dtype) * BLOCK_SIZE
        state, sequence = carried.nbytes, _blocks(wanted) * per_block
        most = config.max_running * sequence + state_slots(config.max_running) * state
        recording = _recording_bytes(loaded, experts, config.max_running, wanted)
        budget = _kv_budget(config, most, experts.device, workers, beside=recording or 0)
        split = split_kv(budget, max_running=config.max_running, sequence=sequence, state=state)
        fitting, promised = split.tokens // per_block, split.running * _blocks(wanted)
        if not split.running or fitting < min(2, promised):
            raise BudgetError(
                f"KV cache is {fitting} blocks of {per_block} bytes and states of {split.running} sequences, {state} "
                f"bytes each, must be at least {min(2, promised)} and of 1. hint: raise kv_memory"
            )
        blocks = min(fitting, promised)
        if split.running < config.max_running:
            log.warning(
                "max_running is lowered from %d to %d: there is no room for states of more, of %d bytes each",
                *(config.max_running, split.running, state),
            )
        max_model_len = min(wanted, blocks * BLOCK_SIZE)
        if config.max_model_len is not None and blocks < promised:
            log.warning(
                "the KV cache holds %d tokens, max_running %d of max_model_len %d are %d: some will wait",
                *(blocks * BLOCK_SIZE, split.running, wanted, promised * BLOCK_SIZE),
            )
        if max_model_len < wanted:
            log.warning("max_model_len is lowered from %d to %d: the KV cache holds no more", wanted, max_model_len)
        pool = KVPool(  # with one block more, for a token of the engine's own
            shapes, blocks=blocks + 1, block_size=BLOCK_SIZE, dtype=loaded.compute_dtype, device=loaded.device
        )
        paged.open(pool, threads=config.threads, apart=experts.device.apart)
        states = StatePool(carried, paged, running=split.running, device=loaded.device) if carried.of else None
        room = (_blocks(max_model_len), blocks)
        runner = _packed_runner(loaded, experts, paged, step, states, room, recording)
        return cls(blocks=blocks, max_running=split.running, max_model_len=max_model_len, runner=runner)


def _packed_runner(
    loaded: LoadedModel,
    experts: ExpertTier,
    paged: attention.PagedAttention,
    step: StepState,
    states: StatePool | None,
    room: tuple[int, int],
    recording: int | None,
) -> PackedRunner:
    """Over an open `paged`; `room` is the most blocks of a text, and the block that is nobody's, `recording` how many
    bytes recorded steps may take."""
    if states is not None:
        attach_states(loaded.model, states)
    one_call.attach(loaded, experts.blocks, paged, step)
    compute, parts = choose_forward(loaded, paged, step), None
    by_rows = paged.by_kernel and all(block.kernel is not None for block in experts.blocks)  # rows do not see others
    if by_rows and states is None:  # nor how their text was cut into passes
        parts = PassParts(
            compute=compute,
            paged=paged,
            step=step,
            block_size=BLOCK_SIZE,
            device=loaded.device,
            last=_last_block(loaded, experts),
            ahead=experts.ahead,
        )
    runner = PackedRunner(compute, paged, step, device=loaded.device, repeatable=by_rows, parts=parts, states=states)
    if experts.device.apart:
        K, (columns, nobody) = loaded.experts_per_token, room
        sizes = StepSizes(experts_per_token=K, columns=columns, nobody=nobody, most_bytes=recording)
        runner.recorded = RecordedDecode(
            compute, paged, step, experts.blocks, device=experts.device, sizes=sizes, states=states
        )
    return runner


def _last_block(loaded: LoadedModel, experts: ExpertTier) -> MoEBlock | None:
    """The block of the model's last layer, where that has one."""
    layers = [module for name, module in loaded.model.named_modules() if re.search(r"\.layers\.\d+$", name)]
    return experts.blocks[-1] if layers and loaded.experts[-1] in {*layers[-1].modules()} else None


def _blocks(tokens: int) -> int:
    return -(-tokens // BLOCK_SIZE)


def _recording_bytes(loaded: LoadedModel, experts: ExpertTier, running: int, tokens: int) -> int | None:
    """What recordings of decode steps may take; None where the device has no memory of its own."""
    if experts.device.free_bytes() is None:
        return None
    return recording_bytes(
        running=running,
        layers=len(experts.blocks),
        experts_per_token=loaded.experts_per_token,
        hidden=loaded.hidden_size,
        vocab=loaded.vocab_size,
        item_bytes=loaded.compute_dtype.itemsize,
        length=tokens,
    )


def _kv_budget(config: EngineConfig, promised: int, device: Device, workers: int, *, beside: int) -> int:
    """Bytes; workers of a node share its memory, on a GPU each has its own, `beside` of which others take."""
    if config.kv_memory != "auto":
        return parse_memory(config.kv_memory, total_expert_bytes=0)
    own = device.free_bytes()
    free = available_memory_bytes() // workers if own is None else max(0, own - beside)
    return kv_cache_bytes(promised=promised, explicit=config.max_model_len is not None, free=free)
