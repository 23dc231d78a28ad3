"""The experts of one node in one shared-memory file: opens the store and the records that its workers use together.

Every worker of the node comes here with the same model, budget and number of workers, so all find the same files; the
first one makes them. Does not know who else is there, nor Ray: a `Sharing` says it all.
Invariant: slots and records of the node stay within `workers` times the budget of one worker.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from buddymoe_ray.cache import DiskReader, StandinPool
from buddymoe_ray.cache.shared import (
    FOLDER,
    Room,
    SharedExpertCache,
    SharedStore,
    open_room,
    store_digest,
    store_path,
    sweep,
)
from buddymoe_ray.engine.machine import available_memory_bytes
from buddymoe_ray.engine.standin_setup import StandinSetup
from buddymoe_ray.errors import BudgetError, ConfigError
from buddymoe_ray.types import ExpertLayout, SlotPlan

__all__ = ["Sharing", "StoreSpec", "open_records", "open_store"]


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """With whom an engine shares its experts.

    Args:
        workers: engines of this node; the store has the budget of all of them.
        tag: tells nodes apart that share a machine; part of the file's name.
        folder: where the files are, a memory file system.
    """

    workers: int
    tag: str = ""
    folder: Path = FOLDER

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ConfigError(f"workers is {self.workers}, must be at least 1. hint: count the engines of this node")


@dataclass(frozen=True, kw_only=True)
class StoreSpec:
    """All that another process needs to attach to a store."""

    path: Path
    layout: ExpertLayout
    plan: SlotPlan
    digest: bytes

    def open(self, progress: Callable[..., Iterable[Any]] = lambda items, **_: items) -> SharedStore:
        """An attachment of the caller's own. Raises BudgetError, CacheError."""
        return SharedStore(self.path, self.layout, self.plan, self.digest, progress=progress)


def spec_of(sharing: Sharing, layout: ExpertLayout, plan: SlotPlan) -> StoreSpec:
    """Where the store of a node is."""
    digest = store_digest(layout, plan)
    path = store_path(digest, tag=sharing.tag, folder=sharing.folder)
    return StoreSpec(path=path, layout=layout, plan=plan, digest=digest)


def open_store(
    sharing: Sharing,
    layout: ExpertLayout,
    plan: SlotPlan,
    reader: DiskReader,
    progress: Callable[..., Iterable[Any]],
) -> SharedExpertCache:
    """Attach to the node's store, made now if it is not there. Raises BudgetError, CacheError."""
    sweep(sharing.folder)
    spec = spec_of(sharing, layout, plan)
    if not spec.path.exists():
        _check_room(plan)
    return SharedExpertCache(spec.open(progress), reader=reader)


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
