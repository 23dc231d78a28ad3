"""The experts of one node in one shared-memory file: opens the store and the records that its workers use together.

Every worker of the node comes here with the same model, budget and number of workers, so all find the same files; the
first one makes them. Does not know who else is there, nor Ray: a `Sharing` says it all.
Invariant: slots and records of the node stay within `workers` times the budget of one worker.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from buddymoe_ray.cache import NVLINK_NEARER, DiskReader, ExpertCache, HostTier, SlotPeers, StandinPool
from buddymoe_ray.cache.shared import (
    FOLDER,
    Room,
    SharedStore,
    open_room,
    store_digest,
    store_path,
    sweep,
)
from buddymoe_ray.cache.shared.locks import ROW_BYTE, ROWS, FileLocks
from buddymoe_ray.device import Device
from buddymoe_ray.errors import BudgetError, CacheError, ConfigError
from buddymoe_ray.policy import split_slots
from buddymoe_ray.residency.device_pool import DevicePool
from buddymoe_ray.residency.devices import list_gpus, peers_nearer
from buddymoe_ray.residency.machine import available_memory_bytes
from buddymoe_ray.residency.standin_setup import StandinSetup
from buddymoe_ray.types import ExpertLayout, SlotPlan

__all__ = ["Sharing", "StoreSpec", "in_use", "open_host", "open_peers", "open_records", "open_store"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class StoreSpec:
    """All that another process needs to attach to a store and to keep it.

    `standin_LE`, where every expert has a stand-in, is what one access of it costs, as a share of the costliest.
    `below` says that GPUs' slots are above it: what it is asked for says little of what is used.
    """

    path: Path
    layout: ExpertLayout
    plan: SlotPlan
    digest: bytes
    tag: str
    standin_LE: npt.NDArray[np.float32] | None = None
    below: bool = False

    def open(self, progress: Callable[..., Iterable[Any]] = lambda items, **_: items) -> SharedStore:
        """An attachment of the caller's own. Raises BudgetError, CacheError."""
        return SharedStore(
            self.path,
            self.layout,
            self.plan,
            self.digest,
            progress=progress,
            before_making=lambda: _check_room(self.plan),
        )


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """With whom an engine shares its experts.

    Args:
        workers: engines of this node; the store has the budget of all of them.
        tag: tells nodes apart that share a machine; part of the file's name.
        folder: where the files are, a memory file system.
        movable: residents may be exchanged while the engines run, so stand-in records are kept for all experts.
        linked: experts may also be computed for other nodes' workers, beside this engine's own steps, once the engine's
            `link` was called; memory is set aside for it.
        secret: what linked workers prove to each other.
        host: the address on which other nodes reach this one.
        keeper: told about the store before this engine attaches; it may make and fill it, and keeps it from then on.
        placer: told about the slots of a device apart that others read, so that it says what is to stay in them.
    """

    workers: int
    tag: str = ""
    folder: Path = FOLDER
    movable: bool = False
    linked: bool = False
    secret: str = field(default="", repr=False)
    host: str = "127.0.0.1"
    keeper: Callable[[StoreSpec], None] | None = None
    placer: Callable[[DevicePool], None] | None = None

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ConfigError(f"workers is {self.workers}, must be at least 1. hint: count the engines of this node")


def spec_of(
    sharing: Sharing, layout: ExpertLayout, plan: SlotPlan, standin_LE: npt.NDArray[np.float32] | None = None
) -> StoreSpec:
    """Where the store of a node is."""
    digest = store_digest(layout, plan)
    path = store_path(digest, tag=sharing.tag, folder=sharing.folder)
    return StoreSpec(path=path, layout=layout, plan=plan, digest=digest, tag=sharing.tag, standin_LE=standin_LE)


def in_use(sharing: Sharing, layout: ExpertLayout, plan: SlotPlan) -> bool:
    """Whether anybody is attached to the store that a node has under this plan."""
    try:
        fd = os.open(spec_of(sharing, layout, plan).path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    locks = FileLocks(fd)
    try:
        return locks.held_elsewhere(ROW_BYTE, ROWS)
    finally:
        locks.close()


def open_store(
    sharing: Sharing,
    layout: ExpertLayout,
    setup: StandinSetup | None,
    plan: SlotPlan,
    reader: DiskReader,
    progress: Callable[..., Iterable[Any]],
) -> ExpertCache:
    """Attach to the node's store, made now if it is not there. Raises BudgetError, CacheError."""
    spec = spec_of(sharing, layout, plan, None if setup is None or not sharing.movable else setup.access_loss_LE)
    return ExpertCache(_attach(sharing, spec, progress), reader=reader)


def open_host(
    sharing: Sharing,
    layout: ExpertLayout,
    host_bytes: int,
    reader: DiskReader,
    device: Device,
    progress: Callable[..., Iterable[Any]],
) -> HostTier:
    """The node's one host tier below its GPUs, of every worker's `host_bytes` together. Raises as `open_store`."""
    plan = split_slots(
        budget_bytes=sharing.workers * host_bytes,
        slot_bytes=layout.slot_bytes,
        expert_bytes=layout.expert_bytes,
        experts_per_layer=layout.experts_per_layer,
        overhead_bytes=0,
        workers=sharing.workers,
    )
    spec = replace(spec_of(sharing, layout, plan), below=True)
    return HostTier(_attach(sharing, spec, progress), reader=reader, device=device)


def open_peers(sharing: Sharing, layout: ExpertLayout, plan: SlotPlan, device: Device) -> SlotPeers | None:
    """Slots on a device apart that the node's workers read from each other, whatever the budget of each; None where it
    is alone, or the device shares no memory."""
    if sharing.workers < 2:
        return None
    gpus = list_gpus() if device.torch.type == "cuda" else ()
    digest, nearer = store_digest(layout, None), peers_nearer(gpus, NVLINK_NEARER)
    slots, nbytes = plan.slots_total, layout.slot_bytes
    try:
        return SlotPeers(device, slots=slots, slot_bytes=nbytes, digest=digest, tag=sharing.tag, nearer=nearer)
    except CacheError as error:
        log.warning("device slots are not shared with this node's other workers: %s", error)
        return None


def _attach(sharing: Sharing, spec: StoreSpec, progress: Callable[..., Iterable[Any]]) -> SharedStore:
    sweep(sharing.folder)
    if sharing.keeper is not None:
        sharing.keeper(spec)
    return spec.open(progress)


def open_records(
    sharing: Sharing, setup: StandinSetup, fill: Callable[[Tensor], None]
) -> tuple[Room | None, Tensor | None]:
    """The node's one copy of the stand-in records, read by `fill` if nobody has yet; nothing where there are none."""
    nbytes = StandinPool.nbytes_for(setup.layouts, setup.kind_of)
    if not nbytes:
        return None, None
    files = [layout.pieces for layout in setup.layouts.values()]
    digest = hashlib.blake2b(f"{setup.binding}|{nbytes}|{_stamps(files)}".encode(), digest_size=32).digest()
    path = store_path(digest, tag=sharing.tag, folder=sharing.folder).with_suffix(".records")
    room = open_room(path, nbytes, digest, fill)
    return room, room.bytes[:nbytes]


def _stamps(pieces: list[Any]) -> list[tuple[str, int, int]]:
    paths = sorted({piece.path for by_key in pieces for runs in by_key.values() for piece in runs})
    return [(path, Path(path).stat().st_size, Path(path).stat().st_mtime_ns) for path in paths]


def _check_room(plan: SlotPlan) -> None:
    """Shared memory is charged to the cgroup of whoever touches it first and is not reclaimable."""
    need, free = plan.slots_total * plan.slot_bytes, available_memory_bytes()
    if need > free:
        raise BudgetError(
            f"memory available is {free} bytes, must be at least {need} for the node's shared experts. "
            "hint: lower --memory or the workers per node"
        )
