"""The host tier: whole experts in host memory, between the disk and a device that reads it without help.

Its slots are a store's: this worker's own, of which the one used longest ago is overwritten, or a node's, where an
expert that any worker read is a copy over PCIe for all, and two that miss the same one read it once. Whoever copies
from a slot says when the copy is done. Waits are bounded: `fetch` raises Stalled for what others stand still with, and
whoever asked goes on with `own_slots`. Invariant: a slot is leased from `fetch` to `release`, so nobody overwrites what
is being copied.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from buddymoe_ray.cache.disk import DiskReader, ReadTicket, Ticket
from buddymoe_ray.cache.private_store import PrivateStore
from buddymoe_ray.cache.shared.calls import ReadLost, Stalled
from buddymoe_ray.cache.shared.interface import Store
from buddymoe_ray.cache.shared.tables import PATIENCE_SECONDS, READY
from buddymoe_ray.device import Device
from buddymoe_ray.errors import CacheError
from buddymoe_ray.types import ExpertKey

__all__ = ["HostTier"]

_POLL_SECONDS, _SMOOTHING = 200e-6, 0.1
_READS_BEFORE = 16
"""So many reads may come before one that is waited for."""


class HostTier:
    """`store` belongs to this object; reads go through `reader`, which is its owner's. `copy_seconds` is what an
    expert's copy to the device takes, lately; 0 before the first."""

    def __init__(self, store: Store, *, reader: DiskReader, device: Device) -> None:
        self.store, self._reader, self._tables = store, reader, store.tables
        self.tensor_C = store.tensor_C
        self._reading, self._lent = list[_Read](), dict[Future[Any], list[int]]()
        self._nothing_kept = np.zeros(store.shape.slots, dtype=bool)
        self._stalled: dict[int, int] = {}  # slots that somebody did not fill in time, by their generation
        self._full_since: float | None = None
        self._own_slots: HostTier | None = None
        self.hits = self.misses = 0
        self.copy_seconds = 0.0
        self._device: Device | None = device
        device.pin(self.tensor_C)

    def holds(self, key: ExpertKey) -> bool:
        """Whether a slot has the expert's bytes now. From any thread; takes no lock."""
        return bool(self._tables.entry[key.layer, key.expert])

    def fetch(self, key: ExpertKey) -> tuple[int, Ticket] | None:
        """A slot that holds the expert once the ticket is done, leased until `release`; None when all are in use.
        Raises Stalled where others stand still with the tables, the expert or all slots, and what a read does."""
        tables = self._tables
        tables.reap_now_and_then()
        self.take_back()
        for read in self._reading:
            # some of one that was cancelled may still be on its way, and never will all of it be there
            if read.cancelled or read.error is not None:
                read.conclude()
        with tables.locked_soon():
            slot = int(tables.look_up(key.layer, [key.expert])[0])
            found = slot >= 0
            if not found:
                claimed = tables.claim([key], protect=False, kept=self._nothing_kept)
                if not claimed:
                    self._check_patience()
                    return None
                slot = claimed[0][1]
            ready = bool(tables.state[slot] == READY)
        self._full_since = None
        if found:
            found_at = slot, ReadTicket(()) if ready else self._under_way(key, slot)
            self.hits += 1
            return found_at
        try:
            ticket = self._reader.submit(self.store.layout.pieces[key], self.store.bytes_C[slot])
        except BaseException as error:
            self._reading.append(_Read(self.store, slot, ReadTicket(()), error))
            self.release(slot)
            raise
        self.misses += 1
        self._reading.append(_Read(self.store, slot, ticket))
        return slot, self._reading[-1]

    @property
    def own_slots(self) -> HostTier:
        """A slot outside of the store, for what this worker will not wait for any longer: one expert's memory more,
        from when it is first asked for."""
        if self._own_slots is None:
            assert self._device is not None, "the tier is closed, must be open"
            store = PrivateStore.of_waves(self.store.layout, 1)
            self._own_slots = HostTier(store, reader=self._reader, device=self._device)
        return self._own_slots

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
        if self._own_slots is not None:
            self._own_slots.close()
        if self._device is not None:
            self._device.unpin(self.tensor_C)
            self._device = None
        self.store.close()

    def _under_way(self, key: ExpertKey, slot: int) -> Ticket:
        """The read, ours or another worker's, that fills a slot which is leased. Raises Stalled, and it is not then."""
        for read in self._reading:
            if read.slot == slot and not read.concluded:
                return read
        if self._stalled.get(slot) == int(self._tables.generation[slot]):
            self._tables.release([slot])
            raise Stalled(f"{key} is read by a process that stands still. hint: continue it, or end it")
        return _Awaited(self, slot, key, time.monotonic() + self._patience)

    def _check_patience(self) -> None:
        """Raises Stalled where no slot could be had for long, of a node's; one's own are given back by oneself."""
        now = time.monotonic()
        self._full_since = now if self._full_since is None else self._full_since
        if not self.store.alone and now - self._full_since > self._patience:
            raise Stalled("all host slots are held by processes that stand still. hint: continue them, or end them")

    @property
    def _patience(self) -> float:
        return PATIENCE_SECONDS + _READS_BEFORE * self._reader.seconds(self.store.layout.expert_bytes)

    def _arrived(self, slot: int, end: float) -> bool | None:
        """Whether what another worker reads is there, None: not yet; one that is not in time is not waited for again.
        Under the lock so that bytes are read after it."""
        there = None
        with suppress(Stalled), self._tables.locked_soon():
            there = self._tables.arrived(slot)
        if there is None and time.monotonic() > end:
            self._stalled[slot] = int(self._tables.generation[slot])
            return False
        return there

    def _poll(self) -> None:
        """Conclude what this worker has read."""
        for read in self._reading:
            if read.done():
                read.conclude()
        self._reading = [read for read in self._reading if not read.concluded]


@dataclass
class _Read:
    """A read of this worker's own: once concluded the slot is READY, or free again. Its bytes may be used before, where
    somebody stands still with the tables."""

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
        """Wait for the bytes and tell everybody, as soon as the tables may be had; once. Raises what interrupts it."""
        if self.concluded:
            return
        tables = self.store.tables
        try:
            self.ticket.wait()
        except BaseException as error:
            self.ticket.settle()
            self.error = error
        with suppress(Stalled):  # it is tried again
            with tables.locked_soon():
                if self.error is None:
                    tables.commit([self.slot])
                else:
                    tables.vacate(self.slot)
            self.concluded = True
        if self.error is not None and not isinstance(self.error, CacheError):
            raise self.error


@dataclass(frozen=True)
class _Awaited:
    """A read of another worker's, until `end`. While it is waited for our own are concluded: two workers that wait for
    each other's reads would wait for ever."""

    host: HostTier
    slot: int
    key: ExpertKey
    end: float

    def done(self) -> bool:
        return self.host._arrived(self.slot, self.end) is not None

    landed = done

    def wait(self) -> None:
        while (arrived := self.host._arrived(self.slot, self.end)) is None:  # `done` may have been long ago
            self.settle()
        if not arrived:
            raise ReadLost(f"{self.key} was not read by the worker of this node that had begun to. hint: read it again")

    def settle(self) -> None:
        """Nothing of ours is in flight: some time passes for whoever looks again."""
        self.host._poll()
        time.sleep(_POLL_SECONDS)
        self.host.store.tables.reap_now_and_then()

    def cancel(self) -> bool:
        """It is not ours."""
        return False
