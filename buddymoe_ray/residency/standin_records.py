"""Stand-ins from a setup to what answers: records read into memory, their arithmetic; at start, or later.

Records live in memory of the engine's own or in the node's one copy. Decides nothing. Invariant: what is brought later
takes no more than the plan in force reserves for it, readers' buffers included. Neighbour: `tier` opens all the rest.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from buddymoe_ray.cache import DiskReader, ExpertCache, StandinPool, largest_read
from buddymoe_ray.cache.shared import Room
from buddymoe_ray.config import EngineConfig
from buddymoe_ray.device import Device, open_device
from buddymoe_ray.kernels import ExpertMath
from buddymoe_ray.models.expert_math import expert_math
from buddymoe_ray.models.load import LoadedModel
from buddymoe_ray.moe import Standins, record_computes
from buddymoe_ray.observe import progress
from buddymoe_ray.policy import Staging, plan_staging
from buddymoe_ray.residency.sharing import Sharing, open_records
from buddymoe_ray.residency.standin_setup import StandinSetup, prepare_within

__all__ = ["LateStandins", "bring_standins", "load_records", "open_standins"]

_STAGING_SHARE = 0.03


@dataclass(frozen=True, kw_only=True)
class LateStandins:
    """What came while an engine served without; `room` is the node's copy of the records."""

    setup: StandinSetup
    standins: Standins
    room: Room | None

    def settle(self, cache: ExpertCache) -> None:
        """Make those experts resident that are to be, for good. Raises CacheError; the plan is in force even so."""
        cache.settle_ahead()
        try:
            for layer, named in enumerate(self.setup.plan.pinned):
                for _ in cache.stream(layer, named, protect_residency=False):
                    pass
        finally:
            cache.plan = self.setup.plan


def bring_standins(
    config: EngineConfig, loaded: LoadedModel, cache: ExpertCache, path: Path, sharing: Sharing | None
) -> LateStandins:
    """Those of a profile that was made meanwhile, in the memory that the cache's plan reserves, of which it lends none
    by now. From any thread; the cache is not touched. Raises ProfileError, BudgetError, CacheError."""
    assert not any(cache.plan.lent_slots), f"lent slots are {cache.plan.lent_slots}, must be none"
    reserved, device = cache.plan.reserved_bytes, open_device(config.device)
    staging = plan_staging(
        largest_read=largest_read(cache.layout), budget_bytes=reserved, depth=1, share=_STAGING_SHARE
    )
    plan = replace(cache.plan, reserved_bytes=reserved - staging.nbytes)
    setup = prepare_within(config, folder=loaded.folder, path=path, layout=cache.layout, plan=plan)
    maths = [expert_math(module, loaded.layout) for module in loaded.experts]
    room, pool = load_records(setup, loaded, staging, None if device.apart else sharing)
    return LateStandins(
        setup=setup, standins=open_standins(setup, loaded, maths, pool, device, config.threads), room=room
    )


def load_records(
    setup: StandinSetup, loaded: LoadedModel, staging: Staging, sharing: Sharing | None
) -> tuple[Room | None, StandinPool]:
    """The records of the stand-ins, in memory of this engine's own or in the node's."""

    def filled(pool: StandinPool) -> StandinPool:
        reader = DiskReader(depth=staging.depth, buffer_bytes=staging.buffer_bytes)
        try:
            pool.load(reader, progress=progress)
        finally:
            reader.close()
        return pool

    def fill(memory: Tensor) -> None:
        filled(StandinPool(setup.layouts, setup.kind_of, loaded.device, memory[:nbytes]))

    nbytes = StandinPool.nbytes_for(setup.layouts, setup.kind_of)
    if sharing is None:
        return None, filled(StandinPool(setup.layouts, setup.kind_of, loaded.device))
    room, memory = open_records(sharing, setup, fill)
    return room, StandinPool(setup.layouts, setup.kind_of, loaded.device, memory)


def open_standins(
    setup: StandinSetup, loaded: LoadedModel, maths: list[ExpertMath], pool: StandinPool, device: Device, threads: int
) -> Standins:
    """What answers with the records of the pool."""
    return Standins(
        policy=setup.policy,
        pool=pool,
        compute={
            kind: record_computes(
                kind, setup.layouts[kind], maths, threads=threads, device=device, dtype=loaded.compute_dtype
            )
            for kind in sorted(set(setup.kind_of.values()))
        },
        experts_per_layer=loaded.layout.experts_per_layer,
        layers=setup.layers,
    )
