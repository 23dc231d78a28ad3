"""Opens the experts of an engine: cuts the budget, fills the slots, loads stand-ins, gives every layer its block.

The only place where the memory plan, the caches and the kernels meet. Decides nothing itself: `policy` splits,
`standin_setup` reads the calibration. Invariant: slots, records, staging and scratch together stay within the budget.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from buddymoe_ray.cache import READ_ON_THE_SPOT, DiskReader, ExpertCache, StandinPool, largest_read, open_private
from buddymoe_ray.cache.shared import Room
from buddymoe_ray.config import EngineConfig, parse_memory
from buddymoe_ray.device import Device, open_device
from buddymoe_ray.errors import ProfileError
from buddymoe_ray.kernels import (
    ExpertMath,
    UpcastScratch,
)
from buddymoe_ray.models.expert_dtype import format_of, recoded_layout
from buddymoe_ray.models.expert_math import expert_math, read_as_stored
from buddymoe_ray.models.experts_hook import attach
from buddymoe_ray.models.load import LoadedModel
from buddymoe_ray.models.router_hook import attach_router_scores, embedded, router_choices
from buddymoe_ray.moe import (
    ExpertCompute,
    FirstLayer,
    MoEBlock,
    ReadAhead,
    Standins,
    StepState,
)
from buddymoe_ray.observe import progress
from buddymoe_ray.policy import MIN_SLOTS, Staging, lend_reserved, plan_staging, split_slots
from buddymoe_ray.residency.arithmetic import expert_computes, layer_waves, stored_dtype, stored_shapes
from buddymoe_ray.residency.calibrations import CalibrationFolder, calibrates, reserved_bytes
from buddymoe_ray.residency.device_pool import DevicePool
from buddymoe_ray.residency.host_compute import open_host_experts
from buddymoe_ray.residency.sharing import Sharing, in_use, open_host, open_peers, open_store
from buddymoe_ray.residency.standin_records import load_records, open_standins
from buddymoe_ray.residency.standin_setup import (
    NodeBudget,
    StandinSetup,
    find_profile,
    prepare,
    self_made,
    serve_without,
)
from buddymoe_ray.types import ExpertLayout, SlotPlan

__all__ = [
    "STAGING_SHARE",
    "ExpertTier",
    "PlannedStandins",
    "open_experts",
    "plan_memory",
    "plan_standins",
    "scratch_bytes",
]

log = logging.getLogger(__name__)

STAGING_SHARE: Mapping[str, float] = {"exact": 0.06, "bounded": 0.03, "fast": 0.03}
"""Share of the budget for disk staging: with stand-ins hardly anything is read in decode, and every byte counts."""
_ON_THE_SPOT_SHARE = 0.01
"""The same with stand-ins where experts are read on the spot, one at a time."""
_MANY_ROWS, _WAVES_OF_MANY = 64, 6
"""Steps of so many rows use nearly every expert. Small ones take less to compute than a call: each is for six of them
then. 128 prompts of 16 tokens through `builtin:tiny` at 25 %: 16 steps take .37 s of a core, in waves of two .41."""


@dataclass(frozen=True, kw_only=True)
class ExpertTier:
    """The experts of one engine. `setup` is None where every miss is fetched; `room` is the node's copy of records;
    `ahead` is None where nothing is read ahead.

    `new_compute` makes the experts' arithmetic once more, for another thread.
    """

    device: Device
    cache: ExpertCache
    setup: StandinSetup | None
    standin_bytes: int
    room: Room | None
    blocks: tuple[MoEBlock, ...]
    ahead: ReadAhead | None
    new_compute: Callable[[], list[ExpertCompute]]

    def close(self) -> None:
        """Close files and give shared memory back. Safe to call twice."""
        self.cache.close()
        if self.room is not None:
            self.room.close()


def open_experts(
    config: EngineConfig, loaded: LoadedModel, step: StepState, device: Device, sharing: Sharing | None = None
) -> ExpertTier:
    """Open the cache, load stand-ins and attach a block to every MoE layer.

    With `sharing`, slots and records are the node's: its workers' budgets together, one copy of everything. On a device
    apart that is the host tier.
    Raises BudgetError, ProfileError, ConfigError, CacheError; nothing stays open then.
    """
    maths = [expert_math(module, loaded.layout) for module in loaded.experts]
    loaded = _recoded(config, loaded, maths)
    packed = format_of(config.expert_dtype)
    node = None if device.apart else sharing  # slots apart are an engine's own; it shares the tier below
    plan, setup, staging = _planned(config, loaded, maths, node, apart=device.apart)
    cache = _open_cache(config, loaded.layout, plan, staging, device, sharing, setup)
    room = None
    try:
        cache.warm(progress=progress)
        pool = None
        if setup is not None:
            room, pool = load_records(setup, loaded, staging, node)
        standins = (
            None if setup is None or pool is None else open_standins(setup, loaded, maths, pool, device, config.threads)
        )
        ahead = _read_ahead(config, loaded, cache, apart=device.apart, stands_in=standins is not None)
        waves = layer_waves(loaded, maths, packed, config.threads, device, complete=plan.fully_resident)
        block = partial(MoEBlock, cache=cache, step=step, standins=standins, ahead=ahead)
        blocks = tuple(block(layer=layer, compute=compute, prompts=p) for layer, (compute, p) in enumerate(waves))
        host = open_host_experts(config, loaded, maths, packed, cache, device)
        for each in blocks:
            each.peers = host
        attach(loaded.experts, lambda layer, _module: blocks[layer])
    except BaseException:
        cache.close()
        if room is not None:
            room.close()
        raise
    if setup is not None and setup.wants_scores:
        attach_router_scores(
            loaded.model,
            loaded.experts,
            loaded.layout.experts_per_layer,
            model_type=loaded.family.model_type,
            into=step.scores,
        )
    return ExpertTier(
        device=device,
        cache=cache,
        setup=setup,
        standin_bytes=0 if standins is None else standins.pool.nbytes,
        room=room,
        blocks=blocks,
        ahead=ahead,
        new_compute=lambda: expert_computes(loaded, maths, packed),
    )


@dataclass(frozen=True, kw_only=True)
class PlannedStandins:
    """What would stand in on an engine, before any of it is loaded."""

    setup: StandinSetup
    staging: Staging
    maths: list[ExpertMath]
    device: Device
    threads: int

    @property
    def nbytes(self) -> int:
        """Of the records."""
        return StandinPool.nbytes_for(self.setup.layouts, self.setup.kind_of)

    def load(self, loaded: LoadedModel) -> StandinPool:
        """The records, in memory."""
        return load_records(self.setup, loaded, self.staging, None)[1]

    def open(self, loaded: LoadedModel, pool: StandinPool) -> Standins:
        """What answers with them."""
        return open_standins(self.setup, loaded, self.maths, pool, self.device, self.threads)


def plan_standins(config: EngineConfig, loaded: LoadedModel, maths: list[ExpertMath]) -> PlannedStandins:
    """Of an engine of `config`, which is not exact, beside a model of its dtypes that is open already. Raises
    BudgetError, ProfileError."""
    device = open_device(config.device)
    _, setup, staging = _planned(config, loaded, maths, None, apart=device.apart)
    assert setup is not None, f"mode is {config.mode}, must be one with stand-ins and a profile"
    return PlannedStandins(setup=setup, staging=staging, maths=maths, device=device, threads=config.threads)


def _planned(
    config: EngineConfig, loaded: LoadedModel, maths: list[ExpertMath], node: Sharing | None, *, apart: bool
) -> tuple[SlotPlan, StandinSetup | None, Staging]:
    """The memory plan of an engine over this model."""
    as_stored = not apart and format_of(config.expert_dtype) is None and read_as_stored(maths, loaded.layout)
    return plan_memory(
        config,
        loaded.layout,
        folder=loaded.folder,
        apart=apart,
        scratch=scratch_bytes(loaded.layout, loaded.compute_dtype, as_stored=as_stored),
        node=node,
    )


def plan_memory(
    config: EngineConfig,
    layout: ExpertLayout,
    *,
    folder: Path,
    apart: bool,
    scratch: int,
    node: Sharing | None = None,
) -> tuple[SlotPlan, StandinSetup | None, Staging]:
    """Cut the budget, the node's where it is shared: staging and `scratch` bytes first, then records and slots.

    Reads headers only. Raises BudgetError, ProfileError.
    """
    workers = 1 if node is None else node.workers
    budget = parse_memory(config.memory, total_expert_bytes=layout.total_bytes)
    spot = config.mode != "exact" and layout.expert_bytes <= READ_ON_THE_SPOT
    share = _ON_THE_SPOT_SHARE if spot else STAGING_SHARE[config.mode]
    staging = plan_staging(largest_read=largest_read(layout), budget_bytes=budget, share=share)
    if node is not None:
        scratch += layout.slot_bytes  # where a worker reads what it won't wait for
    if node is not None and node.linked:
        scratch *= 2  # peers are answered beside the engine's own steps
    overhead = workers * (scratch + (0 if apart else staging.nbytes))
    budgets = NodeBudget(
        budget_bytes=workers * budget,
        overhead_bytes=overhead,
        workers=workers,
        movable=node is not None and node.movable,
    )
    path = None if config.mode == "exact" else find_profile(config, folder)
    try:
        setup = None if path is None else prepare(config, folder=folder, path=path, layout=layout, node=budgets)
    except ProfileError as error:
        if path is None or not self_made(config, folder, path):
            raise
        log.warning("what was calibrated before is made again: %s", error)
        CalibrationFolder(path.parent).discard()
        setup = None
    if setup is None or (node is not None and path is not None and self_made(config, folder, path)):
        many = layout.expert_bytes <= READ_ON_THE_SPOT and config.max_running >= _MANY_ROWS
        reserved = _reserved(config, layout, budgets, apart=apart)
        plan = _exact_plan(layout, budgets, reserved, waves=_WAVES_OF_MANY if many else 0)
        if not apart:  # there the memory of slots cannot be given back
            plan = lend_reserved(plan, plan.reserved_bytes, layout.experts_per_layer)
        # who was there before stand-ins were goes on under this plan, and with a node's memory there is one
        if setup is None or (node is not None and in_use(node, layout, plan)):
            return plan, None, staging
    return setup.plan, setup, staging


def scratch_bytes(layout: ExpertLayout, compute: torch.dtype, *, as_stored: bool) -> int:
    """Bytes of the upcast scratch, which count against the expert budget; packed experts need none, nor do those that
    kernels read `as_stored`."""
    if as_stored or (stored_dtype(layout) == torch.uint8 and not layout.coded):
        return 0
    if layout.coded:  # decoded to float32 one matrix at a time, by way of others as large
        return max(12 * matrix.N * matrix.K for matrix in layout.coded)
    return UpcastScratch.nbytes_for(stored_shapes(layout), stored=stored_dtype(layout), compute=compute)


def _exact_plan(layout: ExpertLayout, node: NodeBudget, reserved: int = 0, *, waves: int = 0) -> SlotPlan:
    plan = split_slots(
        budget_bytes=node.budget_bytes,
        slot_bytes=layout.slot_bytes,
        expert_bytes=layout.expert_bytes,
        experts_per_layer=layout.experts_per_layer,
        overhead_bytes=node.overhead_bytes + reserved,
        workers=node.workers,
        waves=waves,
    )
    return plan if plan.fully_resident else replace(plan, reserved_bytes=reserved)


def _reserved(config: EngineConfig, layout: ExpertLayout, node: NodeBudget, *, apart: bool) -> int:
    """What is set aside for stand-ins that are still to be made; 0 where none will be."""
    if not calibrates(config):
        return 0
    room = node.budget_bytes - node.overhead_bytes - MIN_SLOTS * node.workers * layout.slot_bytes
    reserved = reserved_bytes(config, layout, room=room, on_cpu=not apart)
    if not reserved:
        log.warning("memory is too little for stand-ins of all experts: none are made. hint: raise --memory")
        serve_without(config)
    return reserved


def _open_cache(
    config: EngineConfig,
    layout: ExpertLayout,
    plan: SlotPlan,
    staging: Staging,
    device: Device,
    sharing: Sharing | None,
    setup: StandinSetup | None,
) -> ExpertCache:
    reader = DiskReader(depth=staging.depth, buffer_bytes=staging.buffer_bytes, files=layout.files)
    if sharing is not None and not device.apart:
        return open_store(sharing, layout, setup, plan, reader, progress)
    host_bytes = parse_memory(config.host_memory, total_expert_bytes=layout.total_bytes)
    host = None
    if sharing is not None and host_bytes:
        host = open_host(sharing, layout, host_bytes, reader, device, progress)
    slots, peers = (
        host_bytes // layout.slot_bytes,
        None if sharing is None else open_peers(sharing, layout, plan, device),
    )
    try:
        cache = open_private(layout, plan, reader=reader, device=device, host_slots=slots, host=host, peers=peers)
    except BaseException:
        if peers is not None:
            peers.close()
        raise
    movable = not (plan.pinned or plan.fully_resident)
    if movable and peers is not None and sharing is not None and sharing.placer is not None:
        sharing.placer(DevicePool(cache, peers))
    return cache


def _recoded(config: EngineConfig, loaded: LoadedModel, maths: list[ExpertMath]) -> LoadedModel:
    """The model with its experts in `config.expert_dtype`."""
    layout = recoded_layout(
        loaded.layout,
        loaded.folder,
        config.expert_dtype,
        transposed=maths[0].transposed,
        progress=progress,
    )
    return replace(loaded, layout=layout)


def _read_ahead(
    config: EngineConfig, loaded: LoadedModel, cache: ExpertCache, *, apart: bool, stands_in: bool
) -> ReadAhead | None:
    """What reads the next layer's experts ahead; None where that cannot be, or nothing is to be hidden."""
    plan, layout = cache.plan, loaded.layout
    if config.read_ahead == "off" or apart or plan.fully_resident or plan.pinned:
        return None
    if layout.expert_bytes <= READ_ON_THE_SPOT:
        return None
    choices = router_choices(
        loaded.model, loaded.experts, layout.experts_per_layer, experts_per_token=loaded.experts_per_token
    )
    if len(choices) < 2:
        return None
    first = None
    if not stands_in:  # else nobody knows before a step whether it waits for what is missing
        embeds = embedded(loaded.model, loaded.experts[0])
        first = FirstLayer(loaded.vocab_size, loaded.experts_per_token, choices[0], embeds)
    return ReadAhead(cache, choices, experts_per_token=loaded.experts_per_token, first=first)
