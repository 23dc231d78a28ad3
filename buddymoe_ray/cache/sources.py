"""Where a cache's experts come from: straight from disk, or by way of a host tier to a device apart.

A copy out of a host slot is begun early and admitted when it is asked for; nobody waits for it but who needs its host
slot. Used from one thread. Invariant: a host slot is given back once its copy is done, and not before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from buddymoe_ray.cache.disk import DiskReader, Ticket
from buddymoe_ray.cache.host import HostTier
from buddymoe_ray.cache.sharded_reads import ShardedReads
from buddymoe_ray.cache.shared.calls import Stalled
from buddymoe_ray.cache.shared.interface import Store
from buddymoe_ray.cache.slot_peers import PeerRead, SlotPeers
from buddymoe_ray.device import Copy, Device
from buddymoe_ray.types import ExpertKey

__all__ = ["DiskSource", "HostSource", "Source"]


class Source(Protocol):
    """What fills slots."""

    @property
    def host(self) -> HostTier | None: ...
    @property
    def shards(self) -> ShardedReads | None: ...
    def due(self, missing: Sequence[ExpertKey], *, reading: bool) -> Sequence[ExpertKey]:
        """Those of a layer's experts that are to be begun now, without what peers read; `reading`: something is."""

    def wanted(self) -> Sequence[ExpertKey]:
        """What peers ask this worker to read for them; what has been copied meanwhile they see from now on."""

    def begin(self, key: ExpertKey, slot: int) -> Ticket | None:
        """Begin to fill a slot with an expert; None while every host slot is in use. Raises CacheError."""

    def make_room(self) -> bool:
        """Give back a host slot, waiting for the copy out of it; whether there was any."""

    def settle(self) -> None:
        """Give back all of them."""

    def close(self) -> None:
        """The same, and let go of host tier and peers. Safe to call twice."""


class DiskSource:
    """Reads into the slots of `store`."""

    host = shards = None

    def __init__(self, store: Store, reader: DiskReader) -> None:
        self._pieces, self._bytes_C, self._reader = store.layout.pieces, store.bytes_C, reader

    def due(self, missing: Sequence[ExpertKey], *, reading: bool) -> Sequence[ExpertKey]:
        """See Source."""
        return missing

    def wanted(self) -> Sequence[ExpertKey]:
        """See Source."""
        return ()

    def begin(self, key: ExpertKey, slot: int) -> Ticket:
        """See Source."""
        return self._reader.submit(self._pieces[key], self._bytes_C[slot])

    def make_room(self) -> bool:
        """See Source."""
        return False

    def settle(self) -> None:
        """See Source."""

    def close(self) -> None:
        """See Source."""


class HostSource:
    """By way of the slots of `host`, or from a peer's, to those of `store`, which is on `device`. Closes both."""

    def __init__(self, store: Store, host: HostTier, device: Device, peers: SlotPeers | None = None) -> None:
        self.host, self._store, self._device = host, store, device
        self._admitted = deque[_Passage]()
        self.shards = None if peers is None else ShardedReads(peers, store.layout.expert_bytes)

    def due(self, missing: Sequence[ExpertKey], *, reading: bool) -> Sequence[ExpertKey]:
        """See Source; what is being copied is being read."""
        if self.shards is None:
            return missing
        self._release()
        return self.shards.due(missing, reading=reading or bool(self._admitted))

    def wanted(self) -> Sequence[ExpertKey]:
        """See Source."""
        if self.shards is None:
            return ()
        self._release()
        return [key for key in self.shards.peers.wanted() if key in self._store.layout.pieces]

    def begin(self, key: ExpertKey, slot: int) -> Ticket | None:
        """See Source."""
        self._release()
        if self.shards is not None:
            self.shards.peers.withdraw(slot)
            if (read := self.shards.peers.read(key, self._store.tensor_C[slot])) is not None:
                self.shards.took(key)
                return _FromPeer(self.shards.peers, key, slot, read)
        tier = self.host
        try:
            fetched = tier.fetch(key)
        except Stalled:
            tier = tier.own_slots
            fetched = tier.fetch(key)
        if fetched is None:
            return None
        passage = _Passage(self, key, slot, tier, *fetched)
        if passage.done():
            passage.copy = self.copy(passage)  # beside what is computed meanwhile
        return passage

    def copy(self, passage: _Passage) -> Copy:
        """Copy a host slot that has its bytes, once what was computed so far has read the device slot."""
        return self._device.copy(self._store.tensor_C[passage.slot], passage.tier.tensor_C[passage.host_slot])

    def admit(self, passage: _Passage, copy: Copy) -> None:
        """What is computed from now on may read the expert in its slot."""
        self._device.admit(copy)
        passage.copy, passage.generation = copy, int(self._store.generation[passage.slot])
        self._admitted.append(passage)
        self._release()

    def make_room(self) -> bool:
        """See Source."""
        return self._release(wait=True)

    def settle(self) -> None:
        """See Source."""
        while self._release(wait=True):
            pass

    def close(self) -> None:
        """See Source."""
        self.settle()
        self.host.close()
        if self.shards is not None:
            self.shards.peers.close()

    def _release(self, *, wait: bool = False) -> bool:
        """Give back the host slots whose copies are done, with `wait` of the oldest at least; whether one was."""
        released = False
        while self._admitted and ((wait and not released) or self._admitted[0].copied):
            passage = self._admitted.popleft()
            assert passage.copy is not None, f"{passage.key} was admitted without a copy"
            passage.copy.wait()
            if self.shards is not None and int(self._store.generation[passage.slot]) == passage.generation:
                self.shards.peers.publish(passage.slot, passage.key)
            passage.tier.copied(passage.host_slot, passage.copy.seconds())
            released = True
        return released


@dataclass(eq=False, slots=True)
class _Passage:
    """An expert on its way through a host slot of `tier`, as a Ticket: `copy` is what has begun behind it, into the
    slot's `generation` once that is admitted."""

    source: HostSource
    key: ExpertKey
    slot: int
    tier: HostTier
    host_slot: int
    read: Ticket
    copy: Copy | None = None
    generation: int = -1

    @property
    def copied(self) -> bool:
        """Whether the device slot has the bytes."""
        return self.copy is not None and self.copy.done()

    def done(self) -> bool:
        """See Ticket."""
        return self.read.done()

    def landed(self) -> bool:
        """See Ticket; begins the copy once it can."""
        if self.copy is None and self.read.done():
            self.copy = self.source.copy(self)
        return self.copied

    def wait(self) -> None:
        """See Ticket; once."""
        try:
            self.read.wait()
        except BaseException:
            self.read.settle()  # an interrupt leaves reads in flight
            if self.copy is not None:
                self.copy.wait()
            self.tier.release(self.host_slot)
            raise
        self.source.admit(self, self.copy or self.source.copy(self))

    def settle(self) -> None:
        """See Ticket."""
        self.read.settle()

    def cancel(self) -> bool:
        """See Ticket."""
        return self.read.cancel()


@dataclass(frozen=True, slots=True)
class _FromPeer:
    """A copy out of a peer's slot, which others may read from this one's then."""

    peers: SlotPeers
    key: ExpertKey
    slot: int
    read: PeerRead

    def done(self) -> bool:
        """See Ticket."""
        return self.read.done()

    landed = done

    def wait(self) -> None:
        """See Ticket."""
        self.read.wait()
        self.peers.publish(self.slot, self.key)

    def settle(self) -> None:
        """See Ticket."""
        self.read.settle()

    def cancel(self) -> bool:
        """See Ticket."""
        return self.read.cancel()
