"""The host tier: whole experts in host memory, between the disk and a device that reads it without help.

Fixed slots, least recently used is evicted. The expert cache copies from its slots and says when a copy is done.
Invariant: a slot in use (being filled or copied from) is never given to another expert.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Protocol

import torch
from torch import Tensor

from buddymoe_ray.cache.disk import Bytes, DiskReader, ReadTicket, Ticket
from buddymoe_ray.cache.pool import SlotPool
from buddymoe_ray.device import Device
from buddymoe_ray.errors import CacheError
from buddymoe_ray.types import ExpertKey, ExpertLayout

__all__ = ["Host", "HostPool", "HostTier", "ReadLost"]


class ReadLost(CacheError):
    """Whoever was reading the expert failed or was killed: it is to be fetched again."""


class HostPool(Protocol):
    """A host tier's slots."""

    @property
    def bytes_C(self) -> Tensor:
        """`[C, slot_bytes]` uint8."""


class Host(Protocol):
    """A host tier, as the expert cache uses it: `HostTier`, or `shared.SharedHostTier`."""

    @property
    def pool(self) -> HostPool: ...
    @property
    def hits(self) -> int: ...
    def holds(self, key: ExpertKey) -> bool: ...
    def fetch(self, key: ExpertKey) -> tuple[int, Ticket] | None: ...
    def release(self, key: ExpertKey, *, failed: bool = False) -> None: ...
    def check_integrity(self) -> None: ...
    def close(self) -> None: ...


class HostTier:
    """`slots` experts in host memory over `reader`, for `device`."""

    def __init__(self, layout: ExpertLayout, *, slots: int, reader: DiskReader, device: Device) -> None:
        assert slots > 0, f"slots is {slots}, must be positive"
        # pages of its own: what shares one with other memory that is pinned cannot be pinned
        self.pool = SlotPool(layout, slots, torch.device("cpu"))
        self._layout, self._reader = layout, reader
        self._bytes: Bytes = self.pool.bytes_C.numpy()
        self._free = list(range(slots))
        self._slot_of: OrderedDict[ExpertKey, int] = OrderedDict()  # least recently used first
        self._busy: dict[ExpertKey, int] = {}
        self._tickets = dict[int, ReadTicket]()  # of each slot's latest read
        self.hits = self.misses = 0
        self._device: Device | None = device
        device.pin(self.pool.bytes_C)

    def holds(self, key: ExpertKey) -> bool:
        """Whether a slot is the expert's, filled or being filled. From any thread."""
        return key in self._slot_of

    def fetch(self, key: ExpertKey) -> tuple[int, Ticket] | None:
        """A slot that holds the expert once the ticket is done, busy until `release`; None when all slots are busy."""
        slot = self._slot_of.get(key)
        if slot is not None:
            ticket = self._tickets[slot]
            if ticket.lost:  # whoever began to read it gave up, or could not: some of it may still be on its way
                ticket.settle()
                self._tickets[slot] = ticket = self._reader.submit(self._layout.pieces[key], self._bytes[slot])
                self.misses += 1
            else:
                self.hits += 1
            self._slot_of.move_to_end(key)
            self._busy[key] = self._busy.get(key, 0) + 1
            return slot, ticket
        slot = self._claim()
        if slot is None:
            return None
        self.pool.renew(slot)
        try:
            ticket = self._reader.submit(self._layout.pieces[key], self._bytes[slot])
        except BaseException:
            self._free.append(slot)  # never filled, so it must not be found
            raise
        self.misses += 1
        self._slot_of[key], self._tickets[slot] = slot, ticket
        self._busy[key] = 1
        return slot, ticket

    def release(self, key: ExpertKey, *, failed: bool = False) -> None:
        """The copy out of the expert's slot is done; after a failed read the slot is free again."""
        self._busy[key] -= 1
        if not self._busy[key]:
            del self._busy[key]
            if failed:
                self._free.append(self._slot_of.pop(key))

    def close(self) -> None:
        """The slots go with the object. Safe to call twice."""
        if self._device is not None:
            self._device.unpin(self.pool.bytes_C)
            self._device = None

    def check_integrity(self) -> None:
        """Slots are free or hold one expert each."""
        used = list(self._slot_of.values())
        assert sorted([*used, *self._free]) == list(range(self.pool.count)), f"held {used}, free {self._free}"
        assert set(self._busy) <= set(self._slot_of), f"busy {self._busy} of {list(self._slot_of)}"

    def _claim(self) -> int | None:
        if self._free:
            return self._free.pop()
        victim = next((key for key in self._slot_of if key not in self._busy), None)
        return None if victim is None else self._slot_of.pop(victim)
