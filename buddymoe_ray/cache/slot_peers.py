"""A node's workers read each other's device slots: a missing expert that a peer has is copied from there.

Every worker shares the memory of its slots and a `SlotTable` of what they hold, gives both to whoever connects to its
socket, by file descriptor, and looks for other sockets of the same name. A connection that ends is a peer that closed
its slots or died, even by kill -9: its memory is unmapped once nothing copies from it. Over the same connection a
worker says which experts it would have a peer read into its slots (`sharded_reads`): each message replaces the one
before, and with the connection they are gone. One thread does all that; who misses an expert waits for none of it. Only
this user's processes are answered or asked.
"""

from __future__ import annotations

import logging
import os
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from buddymoe_ray.cache.shared.calls import ReadLost
from buddymoe_ray.cache.slot_table import SlotTable, pack_key, unpack_key
from buddymoe_ray.device import Copy, Device, open_device
from buddymoe_ray.errors import BuddyMoEError, CacheError
from buddymoe_ray.types import ExpertKey

__all__ = ["NVLINK_NEARER", "PeerRead", "SlotPeers"]

log = logging.getLogger(__name__)

NVLINK_NEARER = 2.0
"""log2 of how much nearer a peer's slots are than what is below: NVLink carries four times what PCIe 5 does."""

_MOST = 16
"""Workers of a node that find each other."""
_SECONDS = 1.0
_HELLO, _MAGIC = struct.Struct("8s32sqq"), b"BuddySl1"
_CREDENTIALS = struct.Struct("3i")
_WANTED, _LONGEST, _WANTED_SECONDS = b"BuddyWt1", 1 << 16, 5.0
"""How a message begins that says what is wanted, its most bytes, and for how long it counts."""


@dataclass(frozen=True)
class _Peer:
    table: SlotTable
    memory_C: Tensor


@dataclass(frozen=True)
class _Wants:
    """What an asker said last, and when."""

    keys: tuple[ExpertKey, ...]
    since: float


@dataclass(frozen=True)
class PeerRead:
    """A copy out of a peer's slot; a `Ticket`."""

    copy: Copy
    source: Tensor  # mapped for as long as it is copied from
    unchanged: Callable[[], bool]

    def done(self) -> bool:
        """See Ticket."""
        return self.copy.done()

    landed = done

    def wait(self) -> None:
        """See Ticket. Raises ReadLost where the peer used its slot for something else meanwhile."""
        self.copy.wait()
        if not self.unchanged():
            raise ReadLost("a peer's slot was used anew, must be read again. hint: whoever waits for it does")

    def settle(self) -> None:
        """See Ticket."""
        self.copy.wait()

    def cancel(self) -> bool:
        """It has begun."""
        return False


class SlotPeers:
    """Memory for `slots` on `device`, shared with workers of the same `digest` and `tag`, whose slots are so much
    `nearer` than the host, in powers of two.

    Raises BudgetError, or CacheError where the device cannot share memory or too many workers do.
    """

    def __init__(
        self,
        device: Device,
        *,
        slots: int,
        slot_bytes: int,
        digest: bytes,
        tag: str = "",
        nearer: float = NVLINK_NEARER,
    ) -> None:
        self.nearer = nearer
        self._device, self._slot_bytes, self._digest = device, slot_bytes, digest
        self._slots, self._name = slots, f"\0buddymoe-{os.geteuid()}-{digest.hex()[:20]}-{tag[:32]}-"
        self._at, listener = self._listen()
        self._memory = device.share(slots * slot_bytes)
        self._table, self._shared_table = SlotTable.made(slots)
        self._selector, self._sockets = selectors.DefaultSelector(), dict[int, socket.socket]()
        self._peers: dict[int, _Peer] = {}  # made anew at every change: others look at it
        self._silent, self._greeted = set[int](), threading.Event()
        self.hits = 0
        self.on_wanted: Callable[[], None] = lambda: None
        self._wants = dict[socket.socket, _Wants]()  # made anew at every change, too
        self._asking, self._said = dict[int, bytes](), dict[int, bytes]()  # to each peer, and what it was told of it
        self._wake, self._woken = socket.socketpair()
        self._wake.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ, self._accept)
        self._selector.register(self._woken, selectors.EVENT_READ, self._say)
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="slot-peers", daemon=True)
        self._thread.start()
        self._greeted.wait(_SECONDS)  # so that slots are filled from those of the others

    @property
    def memory(self) -> Tensor:
        """uint8, of all slots."""
        return self._memory.tensor

    @property
    def count(self) -> int:
        """Peers whose slots are mapped."""
        return len(self._peers)

    @property
    def place(self) -> int:
        """Among the node's workers, from 0."""
        return self._at

    @property
    def helpers(self) -> list[int]:
        """Places of the peers whose slots are mapped, those behind this worker's first."""
        return sorted(self._peers, key=lambda at: (at - self._at) % _MOST)

    def ask(self, keys_of: Mapping[int, Sequence[ExpertKey]]) -> None:
        """From now on these experts are wanted in the slots of the peers at these places, and nothing else in any."""
        numbers = {at: [pack_key(key) for key in keys] for at, keys in keys_of.items()}
        self._asking = {at: struct.pack(f"{len(each)}q", *each) for at, each in numbers.items()}
        self._nudge()

    def wanted(self) -> list[ExpertKey]:
        """What peers want in this worker's slots."""
        oldest = time.monotonic() - _WANTED_SECONDS
        return [key for wants in self._wants.values() if wants.since > oldest for key in wants.keys]

    @property
    def owes(self) -> bool:
        """Whether some of that is not there yet."""
        return bool(self._wants) and self._table.lacks(self.wanted())

    def experts(self, layer: int) -> list[int]:
        """Those of a layer that peers hold."""
        return [expert for peer in self._peers.values() for expert in peer.table.experts(layer).tolist()]

    def publish(self, slot: int, key: ExpertKey) -> None:
        """The slot's bytes have arrived on the device."""
        self._table.publish(slot, key)

    def withdraw(self, slot: int) -> None:
        """Before anything is written to the slot."""
        self._table.withdraw(slot)

    def read(self, key: ExpertKey, target: Tensor) -> PeerRead | None:
        """Begin to copy the expert from a peer's slot; None where no peer has it."""
        for peer in self._peers.values():
            found = peer.table.find(key)
            if found is not None:
                source = peer.memory_C[found[0]]
                self.hits += 1
                return PeerRead(self._device.copy(target, source), source, partial(peer.table.holds, *found))
        return None

    def close(self) -> None:
        """Nobody reads the slots from now on. Safe to call twice."""
        if self._stopping:
            return
        self._stopping, self._wants = True, {}
        self._table.retire()
        self._nudge()
        self._thread.join()
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]
        self._wake.close()
        self._selector.close()
        self._peers = {}
        for memory in (self._memory, self._shared_table):
            os.close(memory.fd)

    def _nudge(self) -> None:
        with suppress(BlockingIOError):  # then it is about to look
            self._wake.send(b"\0")

    def _listen(self) -> tuple[int, socket.socket]:
        """At the first place that is free."""
        for at in range(_MOST):
            listener = _socket()
            try:
                listener.bind(f"{self._name}{at}")
            except OSError:
                listener.close()
                continue
            listener.listen(_MOST)
            return at, listener
        raise CacheError(f"{_MOST} workers share their device slots, must be fewer. hint: run fewer workers per node")

    def _run(self) -> None:
        events = list[tuple[selectors.SelectorKey, int]]()
        while not self._stopping:
            if not all(key.data in (self._heed, self._say) for key, _ in events) or not events:
                self._look_for_peers()
            if not self._silent:
                self._greeted.set()
            events = self._selector.select(_SECONDS)
            for key, _ in events:
                if not self._stopping:
                    key.data(key.fileobj)

    def _accept(self, listener: socket.socket) -> None:
        """Tell who asks where the slots are; the connection stays for as long as they are there."""
        try:
            asker, _ = listener.accept()
        except OSError:  # it is gone again
            return
        asker.setblocking(False)
        if not _is_own(asker):
            asker.close()
            return
        hello = _HELLO.pack(_MAGIC, self._digest, self._slots, self._table.generation)
        try:
            socket.send_fds(asker, [hello], [self._memory.fd, self._shared_table.fd])
        except OSError:  # it is gone again
            asker.close()
            return
        self._selector.register(asker, selectors.EVENT_READ, self._heed)

    def _heed(self, asker: socket.socket) -> None:
        """Somebody says what is wanted of this worker, or is gone."""
        try:
            said = asker.recv(_LONGEST)
        except OSError:
            said = b""
        others = {other: wants for other, wants in self._wants.items() if other is not asker}
        if not said.startswith(_WANTED) or len(said) % 8:
            self._wants = others
            self._hang_up(asker)
            return
        keys = tuple(unpack_key(number) for (number,) in struct.iter_unpack("q", said[len(_WANTED) :]))
        self._wants = {**others, asker: _Wants(keys, time.monotonic())} if keys else others
        self.on_wanted()

    def _say(self, woken: socket.socket) -> None:
        """Tell every peer what is wanted of it now, if it was told something else."""
        woken.recv(_LONGEST)
        asking = self._asking
        for at, asked in self._sockets.items():
            wanted = asking.get(at, b"")
            if wanted != self._said.get(at, b""):
                with suppress(OSError):  # it is gone, or does not listen
                    asked.send(_WANTED + wanted)
                    self._said[at] = wanted

    def _hang_up(self, asker: socket.socket) -> None:
        self._selector.unregister(asker)
        asker.close()

    def _look_for_peers(self) -> None:
        for at in range(_MOST):
            if at == self._at or at in self._sockets:
                continue
            asked = _socket()
            try:
                asked.connect(f"{self._name}{at}")
            except OSError:  # nobody, or somebody who answers nobody now
                asked.close()
                continue
            if not _is_own(asked):
                asked.close()
                continue
            self._sockets[at] = asked
            self._silent.add(at)
            self._selector.register(asked, selectors.EVENT_READ, partial(self._hear, at))

    def _hear(self, at: int, asked: socket.socket) -> None:
        """A peer says where its slots are, once, or is gone."""
        self._silent.discard(at)
        try:
            hello, fds, _, _ = socket.recv_fds(asked, _HELLO.size, 2)
        except OSError:
            hello, fds = b"", []
        try:
            if not hello:
                self._peers = {other: peer for other, peer in self._peers.items() if other != at}
                self._said.pop(at, None)
                self._hang_up(self._sockets.pop(at))
            else:
                self._peers = {**self._peers, at: self._mapped(hello, fds)}
        except (BuddyMoEError, RuntimeError, struct.error) as error:  # it stays unmapped for as long as it is there
            log.warning("a peer's device slots cannot be read: %s", error)
        finally:
            for fd in fds:
                os.close(fd)

    def _mapped(self, hello: bytes, fds: list[int]) -> _Peer:
        magic, digest, slots, generation = _HELLO.unpack(hello)
        if (magic, digest, len(fds)) != (_MAGIC, self._digest, 2) or slots <= 0:
            raise CacheError("the peer has other experts, must have this worker's. hint: stop the other service")
        table = open_device("cpu").map(fds[1], SlotTable.nbytes_for(slots)).numpy()
        memory = self._device.map(fds[0], slots * self._slot_bytes)
        return _Peer(SlotTable(table, slots, generation), memory.view(slots, self._slot_bytes))


def _socket() -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    made.setblocking(False)
    return made


def _is_own(other: socket.socket) -> bool:
    """Whether the other end is a process of this user."""
    credentials = other.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return bool(_CREDENTIALS.unpack(credentials)[1] == os.geteuid())
