"""What one call of a shared cache is waiting for, and where it reads what it will not wait for any longer.

A neighbour that was stopped (SIGSTOP, a frozen container) lives: what it leases, loads or locks is still its own, and
nobody may take that over. So every worker has a slot of its own, in no table, and when others have stood still for too
long it reads there what it needs, one expert at a time. Knows neither locks nor tables.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import torch

from buddymoe_ray.cache.disk import DiskReader, Ticket
from buddymoe_ray.cache.pool import Lease, SlotPool
from buddymoe_ray.errors import CacheError
from buddymoe_ray.types import ExpertKey, ExpertLayout

__all__ = ["Counts", "FIRST_PAUSE_SECONDS", "NotBegun", "OwnLoad", "OwnSlot", "ReadLost", "Stalled", "StreamState"]

FIRST_PAUSE_SECONDS = 50e-6


@dataclass(slots=True)
class Counts:
    """Lookups of one user of a store, bytes that it read, and what `shared` of its misses others were reading."""

    hits: int = 0
    misses: int = 0
    shared: int = 0
    nbytes: int = 0


class Stalled(CacheError):
    """Somebody who stands still has what is needed."""


class ReadLost(CacheError):
    """Whoever was reading the expert failed or was killed: it is to be fetched again."""


@dataclass(frozen=True, slots=True)
class NotBegun:
    """The ticket of a read that never began, into a slot that could not be freed at once: over, and failed."""

    def done(self) -> bool:
        """See Ticket."""
        return True

    landed = done

    def wait(self) -> None:
        """See Ticket."""
        raise ReadLost("a read was not begun, must be for its expert to be there. hint: read it again")

    def settle(self) -> None:
        """See Ticket."""

    def cancel(self) -> bool:
        """See Ticket."""
        return False


@dataclass(frozen=True, slots=True)
class OwnLoad:
    """An expert that this worker reads; it `began` to wait for it then, if it did."""

    key: ExpertKey
    slot: int
    ticket: Ticket
    began: float | None

    def untimed(self) -> OwnLoad:
        """The same, of which nobody wants to know how long it takes."""
        return OwnLoad(self.key, self.slot, self.ticket, None)


@dataclass(slots=True)
class StreamState:
    """One `stream` in progress: what is still to come, and from where; `since` then nothing has come. What it `awaits`
    is all that a peer reads into slots of its own."""

    since: float
    missing: deque[ExpertKey] = field(default_factory=deque)
    claimed: deque[tuple[ExpertKey, int]] = field(default_factory=deque)  # slots that nothing is read into yet
    loads: deque[OwnLoad] = field(default_factory=deque)
    waits: list[tuple[ExpertKey, int]] = field(default_factory=list)  # read by another worker, and leased
    ready: list[tuple[ExpertKey, int]] = field(default_factory=list)  # leased and not lent yet
    pause: float = FIRST_PAUSE_SECONDS
    awaits: bool = False


class OwnSlot:
    """A slot outside of the store, whose bytes count in the budget."""

    def __init__(self, layout: ExpertLayout, reader: DiskReader) -> None:
        self._layout, self._reader = layout, reader
        self._pool = SlotPool(layout, 1, torch.device("cpu"))
        self._bytes = self._pool.bytes_C[0].numpy()

    def read(self, key: ExpertKey) -> Lease:
        """The expert, until the next one is read. Raises CacheError."""
        generation = self._pool.renew(0)
        ticket = self._reader.submit(self._layout.pieces[key], self._bytes)
        try:
            ticket.wait()
        finally:
            ticket.settle()  # an interrupt leaves reads in flight
        return Lease(key, 0, generation, self._pool)
