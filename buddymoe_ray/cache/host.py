"""The host tier: whole experts in host memory, between the disk and a device that reads it without help.

Its slots are a store's: this worker's own, of which the one used longest ago is overwritten, or a node's, where an
expert that any worker read is a copy over PCIe for all, and two that miss the same one read it once. Whoever copies
from a slot says when the copy is done. Invariant: a slot is leased from `fetch` to `release`, so nobody overwrites what
is being copied.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np

from buddymoe_ray.cache.disk import DiskReader, ReadTicket, Ticket
from buddymoe_ray.cache.shared.calls import ReadLost
from buddymoe_ray.cache.shared.interface import Store
from buddymoe_ray.cache.shared.tables import READY
from buddymoe_ray.device import Device
from buddymoe_ray.errors import CacheError
from buddymoe_ray.types import ExpertKey

__all__ = ["HostTier"]

_POLL_SECONDS, _SMOOTHING = 200e-6, 0.1


class HostTier:
    """`store` belongs to this object; reads go through `reader`, which is its owner's. `copy_seconds` is what an
    expert's copy to the device takes, lately; 0 before the first."""

    def __init__(self, store: Store, *, reader: DiskReader, device: Device) -> None:
        self.store, self._reader, self._tables = store, reader, store.tables
        self.tensor_C = store.tensor_C
        self._reading, self._lent = list[_Read](), dict[Future[Any], list[int]]()
        self._nothing_kept = np.zeros(store.shape.slots, dtype=bool)
        self.hits = self.misses = 0
        self.copy_seconds = 0.0
        self._device: Device | None = device
        device.pin(self.tensor_C)

    def holds(self, key: ExpertKey) -> bool:
        """Whether a slot has the expert's bytes now. From any thread; takes no lock."""
        return bool(self._tables.entry[key.layer, key.expert])

    def fetch(self, key: ExpertKey) -> tuple[int, Ticket] | None:
        """A slot that holds the expert once the ticket is done, leased until `release`; None when all are in use."""
        tables = self._tables
        tables.reap_now_and_then()
        self.take_back()
        for read in self._reading:
            if read.cancelled:  # some of it may still be on its way, and never will all of it be there
                read.conclude()
        with tables.locked():
            slot = int(tables.look_up(key.layer, [key.expert])[0])
            found = slot >= 0
            if not found:
                claimed = tables.claim([key], protect=False, kept=self._nothing_kept)
                if not claimed:
                    return None
                slot = claimed[0][1]
            ready = bool(tables.state[slot] == READY)
        if found:
            self.hits += 1
            own = (read for read in self._reading if read.slot == slot and not read.concluded)
            return slot, ReadTicket(()) if ready else next(own, _Awaited(self.store, slot, key, self._poll))
        try:
            ticket = self._reader.submit(self.store.layout.pieces[key], self.store.bytes_C[slot])
        except BaseException:
            with tables.locked():
                tables.vacate(slot)
            self.release(slot)
            raise
        self.misses += 1
        self._reading.append(_Read(self.store, slot, ticket))
        return slot, self._reading[-1]

    def copied(self, slot: int, seconds: float) -> None:
        """`release` behind a copy that took so long."""
        share = _SMOOTHING if self.copy_seconds else 1.0
        self.copy_seconds += share * (seconds - self.copy_seconds)
        self.release(slot)

    def lend(self, slots: Sequence[int], reader: Future[Any]) -> None:
        """`release` them once the reader is done: this worker may wait for a slot meanwhile."""
        self._lent[reader] = list(slots)

    def take_back(self) -> None:
        """What was lent and is not read any more."""
        for reader in [reader for reader in self._lent if reader.done()]:
            self._tables.release(self._lent.pop(reader))

    def release(self, slot: int) -> None:
        """The slot is not read any more; a failed read freed it itself."""
        self._poll()
        self._tables.release([slot])

    def check_integrity(self) -> None:
        """Assert the invariants of the tables."""
        self._tables.check_integrity()

    def close(self) -> None:
        """Let go of the store. Safe to call twice."""
        if self._device is not None:
            self._device.unpin(self.tensor_C)
            self._device = None
        self.store.close()

    def _poll(self) -> None:
        """Conclude what this worker has read."""
        for read in self._reading:
            if read.done():
                read.conclude()
        self._reading = [read for read in self._reading if not read.concluded]


@dataclass
class _Read:
    """A read of this worker's own: once concluded the slot is READY, or free again."""

    store: Store
    slot: int
    ticket: ReadTicket
    error: BaseException | None = None
    concluded: bool = False
    cancelled: bool = False

    def done(self) -> bool:
        return self.ticket.done()

    landed = done

    def wait(self) -> None:
        self.conclude()
        if self.error is not None:
            raise self.error

    def settle(self) -> None:
        self.ticket.settle()
        self.conclude()

    def cancel(self) -> bool:
        """Others may wait for it, where there are others."""
        self.cancelled |= self.store.alone and self.ticket.cancel()
        return self.cancelled

    def conclude(self) -> None:
        """Wait for the bytes and tell everybody; once. Raises what interrupts it."""
        if self.concluded:
            return
        tables = self.store.tables
        try:
            self.ticket.wait()
        except BaseException as error:
            self.ticket.settle()
            self.error = error
        with tables.locked():
            if self.error is None:
                tables.commit([self.slot])
            else:
                tables.vacate(self.slot)
        self.concluded = True
        if self.error is not None and not isinstance(self.error, CacheError):
            raise self.error


@dataclass(frozen=True)
class _Awaited:
    """A read of another worker's. While it is waited for, `poll` concludes our own: two workers that wait for each
    other's reads would wait for ever."""

    store: Store
    slot: int
    key: ExpertKey
    poll: Callable[[], None]

    def done(self) -> bool:
        return self._arrived() is not None

    landed = done

    def wait(self) -> None:
        while (arrived := self._arrived()) is None:
            self.settle()
        if not arrived:
            raise ReadLost(f"{self.key} was not read by the worker of this node that had begun to. hint: read it again")

    def settle(self) -> None:
        """Nothing of ours is in flight: some time passes for whoever looks again."""
        self.poll()
        time.sleep(_POLL_SECONDS)
        self.store.tables.reap_now_and_then()

    def cancel(self) -> bool:
        """It is not ours."""
        return False

    def _arrived(self) -> bool | None:
        """Under the lock so that bytes are read after it; `wait` looks again at what `done` found."""
        with self.store.tables.locked():
            return self.store.tables.arrived(self.slot)
