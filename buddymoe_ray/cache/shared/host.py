"""The host tier over a shared store: what lies between the disk and a GPU, one copy for all workers of a node.

The twin of `cache.host.HostTier`: an expert that any worker read is a copy over PCIe for all, and two that miss the
same one read it once. The device reads the whole file without help. Invariant: a slot is leased from `fetch` to
`release`, so nobody overwrites what is being copied.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from buddymoe_ray.cache.disk import DiskReader, ReadTicket, Ticket
from buddymoe_ray.cache.host import ReadLost
from buddymoe_ray.cache.shared.store import SharedStore
from buddymoe_ray.cache.shared.tables import READY
from buddymoe_ray.device import Device
from buddymoe_ray.errors import CacheError
from buddymoe_ray.types import ExpertKey

__all__ = ["SharedHostTier"]

_POLL_SECONDS = 200e-6


@dataclass(frozen=True)
class _HostPool:
    bytes_C: Tensor


class SharedHostTier:
    """`store` belongs to this object; reads go through `reader`, which is its owner's."""

    def __init__(self, store: SharedStore, *, reader: DiskReader, device: Device) -> None:
        self._store, self._reader, self._tables = store, reader, store.tables
        self.pool = _HostPool(torch.from_numpy(store.bytes_C))
        self._slots: dict[ExpertKey, list[int]] = {}
        self._reading: list[_Read] = []
        self._nothing_kept = np.zeros(store.shape.slots, dtype=bool)
        self.hits = self.misses = 0
        self._device: Device | None = device
        device.pin(self.pool.bytes_C)

    def holds(self, key: ExpertKey) -> bool:
        """Whether a slot has the expert's bytes now. From any thread; takes no lock."""
        return bool(self._tables.entry[key.layer, key.expert])

    def fetch(self, key: ExpertKey) -> tuple[int, Ticket] | None:
        """A slot that holds the expert once the ticket is done, leased until `release`; None when all are in use."""
        tables = self._tables
        tables.reap_now_and_then()
        with tables.locked():
            slot = int(tables.look_up(key.layer, [key.expert])[0])
            found = slot >= 0
            if not found:
                claimed = tables.claim(key, protect=False, kept=self._nothing_kept)
                if claimed is None:
                    return None
                slot = claimed
            ready = bool(tables.state[slot] == READY)
        self._slots.setdefault(key, []).append(slot)
        if found:
            self.hits += 1
            return slot, ReadTicket(()) if ready else _Awaited(self._store, slot, key, self._poll)
        self.misses += 1
        try:
            ticket = self._reader.submit(self._store.layout.pieces[key], self._store.bytes_C[slot])
        except BaseException:
            with tables.locked():
                tables.vacate(slot)
            self.release(key)
            raise
        self._reading.append(_Read(self._store, slot, ticket))
        return slot, self._reading[-1]

    def release(self, key: ExpertKey, *, failed: bool = False) -> None:
        """The copy out of the expert's slot is done, or was given up; a failed read freed the slot itself."""
        self._poll()
        slots = self._slots[key]
        self._tables.release([slots.pop()])
        if not slots:
            del self._slots[key]

    def check_integrity(self) -> None:
        """Assert the invariants of the tables."""
        self._tables.check_integrity()

    def close(self) -> None:
        """Let go of the store. Safe to call twice."""
        if self._device is not None:
            self._device.unpin(self.pool.bytes_C)
            self._device = None
        self._store.close()

    def _poll(self) -> None:
        """Conclude what this worker has read."""
        for read in self._reading:
            if read.done():
                read.conclude()
        self._reading = [read for read in self._reading if not read.concluded]


@dataclass
class _Read:
    """A read of this worker's own: once concluded the slot is READY, or free again."""

    store: SharedStore
    slot: int
    ticket: ReadTicket
    error: BaseException | None = None
    concluded: bool = False

    def done(self) -> bool:
        return self.ticket.done()

    def wait(self) -> None:
        self.conclude()
        if self.error is not None:
            raise self.error

    def settle(self) -> None:
        self.ticket.settle()
        self.conclude()

    def cancel(self) -> bool:
        """Others may wait for it."""
        return False

    def conclude(self) -> None:
        """Wait for the bytes and tell everybody; once."""
        if self.concluded:
            return
        tables = self.store.tables
        try:
            self.ticket.wait()
        except CacheError as error:
            self.error = error
        with tables.locked():
            if self.error is None:
                tables.commit(self.slot)
            else:
                tables.vacate(self.slot)
        self.concluded = True


@dataclass(frozen=True)
class _Awaited:
    """A read of another worker's. While it is waited for, `poll` concludes our own: two workers that wait for each
    other's reads would wait for ever."""

    store: SharedStore
    slot: int
    key: ExpertKey
    poll: Callable[[], None]

    def done(self) -> bool:
        return self._arrived() is not None

    def wait(self) -> None:
        while (arrived := self._arrived()) is None:
            self.poll()
            time.sleep(_POLL_SECONDS)
            self.store.tables.reap_now_and_then()
        if not arrived:
            raise ReadLost(f"{self.key} was not read by the worker of this node that had begun to. hint: read it again")

    def settle(self) -> None:
        """Nothing of ours is in flight."""

    def cancel(self) -> bool:
        """It is not ours."""
        return False

    def _arrived(self) -> bool | None:
        with self.store.tables.locked():
            return self.store.tables.arrived(self.slot)
