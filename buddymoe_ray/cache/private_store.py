"""A store with one row: slots and tables in memory of this process, where nobody else ever is.

So no lock is taken, nobody is waited for, and what is computed from slots needs no second look at their words. Where
peers' slots can be read, what they hold is worth as much less as it is nearer there than below: so what all use is in
the slots of all, and of the rest a node holds one of each as far as it can (after SYMI, 2504.19925: replicas by
popularity).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from buddymoe_ray.cache.pool import SlotPool
from buddymoe_ray.cache.shared.locks import FileLocks
from buddymoe_ray.cache.shared.shape import HeaderWord, StoreShape
from buddymoe_ray.cache.shared.tables import SharedTables
from buddymoe_ray.cache.slot_peers import SlotPeers
from buddymoe_ray.device import Device, open_device
from buddymoe_ray.types import ExpertKey, ExpertLayout, SlotPlan

__all__ = ["PrivateStore"]


class _OwnTables(SharedTables):
    """Tables whose one row is this process: it has the lock at all times, and the lock is the tables themselves."""

    def __init__(self, plan: SlotPlan, shape: StoreShape, peers: SlotPeers | None) -> None:
        super().__init__(np.zeros(shape.data_offset, np.uint8), shape, FileLocks(-1))
        self._peers = peers
        self.initialise(plan)
        self.row, self.pid[0] = 0, os.getpid()

    def __enter__(self) -> None:
        self._begin()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.head[HeaderWord.DIRTY] = kind is not None

    def admits(self, key: ExpertKey) -> bool:
        """See SharedTables; one that a peer has, and that is worth less than all that is here, passes through a wave
        slot."""
        if self._peers is None or key.expert not in self._peers.experts(key.layer):
            return True
        here = self.key_expert[self.partition == key.layer]
        mine = self._worth(key.layer, np.array([key.expert]))
        return bool((self._worth(key.layer, here[here >= 0]) < mine).any())

    def first(self, layer: int, slots: int) -> int:
        """See SharedTables; after those of the workers before this one."""
        return 0 if self._peers is None else self._peers.place * slots

    def _worth(self, layer: int, experts: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        usage = super()._worth(layer, experts)
        if self._peers is None:
            return usage
        return usage - self._peers.nearer * np.isin(experts, self._peers.experts(layer))

    def reap(self) -> int:
        """See SharedTables."""
        return 0

    def reap_now_and_then(self) -> None:
        """See SharedTables."""


class PrivateStore:
    """Slots of `plan` on `device` (None is the CPU), in memory of `peers` if given, and who holds what."""

    alone = True

    def __init__(
        self, layout: ExpertLayout, plan: SlotPlan, *, device: Device | None = None, peers: SlotPeers | None = None
    ) -> None:
        assert plan.slot_bytes == layout.slot_bytes, f"plan {plan.slot_bytes}, layout {layout.slot_bytes} bytes a slot"
        self.layout, self.plan, self.peers = layout, plan, peers
        self.shape = StoreShape.of(layout, plan, rows=1)
        where = (device or open_device("cpu")).torch
        memory = None if peers is None else peers.memory
        self._pool = SlotPool(layout, plan.slots_total, where, lent=any(plan.lent_slots), memory=memory)
        self.tensor_C = self._pool.bytes_C
        self.tables: SharedTables = _OwnTables(plan, self.shape, peers)
        self.generation = self.tables.generation

    @classmethod
    def of_waves(cls, layout: ExpertLayout, slots: int) -> PrivateStore:
        """Host slots that are any layer's: what was used longest ago goes first."""
        plan = SlotPlan(
            budget_bytes=slots * layout.slot_bytes,
            slot_bytes=layout.slot_bytes,
            overhead_bytes=0,
            wave_slots=slots,
            layer_slots=(0,) * len(layout.experts_per_layer),
            fully_resident=False,
        )
        return cls(layout, plan)

    @property
    def bytes_C(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """`[C, slot_bytes]` of slots on the CPU."""
        found: np.ndarray[Any, np.dtype[np.uint8]] = self.tensor_C.numpy()
        return found

    def tensors(self, slot: int) -> Mapping[str, Tensor]:
        """The slot's parameters by name, as views in their stored dtype."""
        return self._pool.tensors(slot)

    def address(self, slot: int) -> int:
        """Where the slot's bytes begin."""
        return self._pool.address(slot)

    def give_back(self, first: int) -> None:
        """Give the kernel back the memory of all slots from this one on, which hold nothing."""
        self._pool.release(first, self.shape.slots)

    def take_back(self, slot: int) -> None:
        """It has memory again once it is written."""

    def close(self) -> None:
        """The slots go with the object."""
