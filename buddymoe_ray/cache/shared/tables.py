"""Who holds what in a shared store: every slot's state, every process's leases. Bookkeeping only: moves no bytes.

A slot is FREE, LOADING (one row reads into it) or READY. A row is one attached process or thread; it leases the slots
it computes with in a line of its own, so that giving back needs no lock. Everything else changes under one lock, held
for microseconds. The slot's own entries are the truth and the tables by expert are derived: whoever takes the lock
after its holder was killed half-way (`dirty`) derives them again.
A reader that only wants what is READY need not lease: an expert's `entry` says in one word where it is and under which
generation (`glance`), and what was computed counts where the slot still has that one. So nobody waits for a reader,
stopped or killed, and it computes again where a slot was taken meanwhile.
Invariants: a slot that anyone leases, or that is LOADING, is never claimed; bytes of a slot are used only if they were
read between a lease and its release, under an unchanged generation, or before READY by the loader itself; a dead row's
leases and loads are void. Writes are in such an order that, wherever a holder of the lock is killed, a FREE slot has no
expert, a READY one no loader, and one that has a layer has its expert.

Legend: C slots, L layers, E experts, P rows.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from buddymoe_ray.cache.shared.calls import Stalled
from buddymoe_ray.cache.shared.locks import ROW_BYTE, ROWS, TABLES_BYTE, FileLocks
from buddymoe_ray.cache.shared.shape import HeaderWord, StoreShape, entry_of, roles_of
from buddymoe_ray.cache.usage import Usage
from buddymoe_ray.errors import CacheError
from buddymoe_ray.types import ExpertKey, SlotPlan

__all__ = ["FREE", "LOADING", "PATIENCE_SECONDS", "READY", "UNUSED", "WAVE", "SharedTables"]

FREE, LOADING, READY = 0, 1, 2
WAVE, UNUSED = -1, -2
"""The partition of slots that belong to no layer, and of those whose memory is lent to nobody."""

PATIENCE_SECONDS, SHORT_PATIENCE_SECONDS = 0.5, 0.005
"""Nobody holds the tables for so long who is not stopped."""

_REAP_SECONDS = 0.2

SlotIds = npt.NDArray[np.int64]


class SharedTables:
    """The tables over `memory`, as seen by one row. Made by a store; one thread per row."""

    def __init__(self, memory: npt.NDArray[np.uint8], shape: StoreShape, locks: FileLocks) -> None:
        self.shape, self._locks = shape, locks
        self.head = shape.head(memory)
        views: dict[str, npt.NDArray[Any]] = shape.views(memory)
        self.pid, self.accesses = views["pid"], views["accesses"]
        self.generation, self.last_used = views["generation"], views["last_used"]
        self.usage = Usage(views["usage"], views["steps"])
        self.key_layer, self.key_expert = views["key_layer"], views["key_expert"]
        self.partition, self.loader, self.state = views["partition"], views["loader"], views["state"]
        self.slot_of, self.entry, self.pinned = views["slot_of"], views["entry"], views["pinned"]
        self.lease, self.lends, self.looks = views["lease"], views["lends"], views["looks"]
        self.row, self._reaped, self._patience = -1, time.monotonic(), PATIENCE_SECONDS
        self._within: float | None = None
        self._stop: Callable[[], bool] = lambda: True

    def locked(self) -> Self:
        """Hold the tables for a block. An exception in it leaves them dirty, and the next holder repairs them."""
        self._within = None
        return self

    def locked_until(self, stop: Callable[[], bool]) -> Self:
        """The same for whoever has the time: raises Stalled once nobody lets go of the tables and it comes to a
        `stop()`."""
        self._within, self._stop = PATIENCE_SECONDS, stop
        return self

    def locked_soon(self) -> Self:
        """The same for whoever can go on without: raises Stalled where nobody lets go of the tables for a while, and
        soon as long as that is so."""
        self._within, self._stop = self._patience, lambda: True
        return self

    def __enter__(self) -> None:
        while not self._locks.lock(TABLES_BYTE, self._within):
            if self._stop():
                self._patience = SHORT_PATIENCE_SECONDS
                raise Stalled("the store's tables are held by a process that stands still. hint: continue it or end it")
        self._patience = PATIENCE_SECONDS
        try:
            self._begin()
        except BaseException:
            self._locks.unlock(TABLES_BYTE)
            raise

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.head[HeaderWord.DIRTY] = kind is not None
        finally:
            self._locks.unlock(TABLES_BYTE)

    def _begin(self) -> None:
        if self.head[HeaderWord.DIRTY]:
            self._repair()
        self.head[HeaderWord.DIRTY] = 1

    def initialise(self, plan: SlotPlan) -> None:
        """Tables of a file that is all 0 as yet; the caller holds the lock and nobody is attached."""
        self.usage.usage_LE[...] = -np.inf
        self.key_layer[...] = self.key_expert[...] = self.slot_of[...] = self.loader[...] = -1
        self.partition[...] = roles_of(plan, WAVE)
        self.lends[...] = self.shape.lent
        for layer, named in enumerate(plan.pinned):
            self.pinned[layer, list(named)] = 1

    def join(self) -> None:
        """Take a row; the caller holds the lock, so that no sweeper comes between. Raises CacheError when all are
        taken."""
        self._begin()
        self.reap()
        for row in np.flatnonzero(self.pid == 0).tolist():
            if self._locks.try_lock(ROW_BYTE + row):
                self.pid[row] = os.getpid()
                self.row = row
                self.head[HeaderWord.DIRTY] = 0
                return
        raise CacheError(f"store has {ROWS} users, must have fewer to join. hint: run fewer workers per node")

    def reap(self) -> int:
        """Void the rows whose process died; the caller holds the lock. Returns how many."""
        dead = [row for row in np.flatnonzero(self.pid).tolist() if not self.alive(row)]
        for row in dead:
            self._void(row)
        return len(dead)

    def reap_now_and_then(self) -> None:
        """`reap` while waiting: what a killed row loads or leases would be waited for for ever. Takes the lock."""
        if time.monotonic() - self._reaped > _REAP_SECONDS:
            self._reaped = time.monotonic()
            with suppress(Stalled), self.locked_soon():
                self.reap()

    @property
    def resident(self) -> npt.NDArray[np.bool_]:
        """`[L, E]`, True where an expert is READY now."""
        found: npt.NDArray[np.bool_] = self.entry != 0
        return found

    def alive(self, row: int) -> bool:
        """Whether the process of a row lives."""
        return row == self.row or self._locks.held_elsewhere(ROW_BYTE + row)

    @property
    def nbytes(self) -> int:
        """Of the slots in use: of a node's, the one copy."""
        return int((self.partition != UNUSED).sum()) * self.shape.slot_bytes

    @property
    def lent(self) -> int:
        """How many of the lent slots may be used, as far as everybody is concerned; the caller holds the lock."""
        return int(self.lends.min())

    def look(self, *, over: bool = False) -> None:
        """From now on this row may be reading slots without a lease, until it is `over`; needs no lock.

        Its word is odd meanwhile, and another one each time: so whoever gives memory back can tell that it is over.
        """
        if self.shape.lent and int(self.looks[self.row, 0]) % 2 == over:
            self.looks[self.row, 0] += 1

    def hold(self, layer: int, experts: Sequence[int]) -> dict[int, int]:
        """Lease what is READY of the experts in `layer`'s own slots; returns the slot of each such expert. The caller
        holds the lock.

        Wave slots are left out: who holds one may need another next, and two that did would deadlock.
        One by one: a step names few, and ten array operations took longer.
        """
        slot_of_E, held = self.slot_of[layer], dict[int, int]()
        for expert in experts:
            slot = int(slot_of_E[expert])
            if slot >= 0 and self.state[slot] == READY and self.partition[slot] == layer:
                held[expert] = slot
        if held:
            self.lease[self.row, list(held.values())] += 1
        return held

    def glance(self, layer: int) -> bytes:
        """The entries of a layer's experts, for `places_of`; needs no lock.

        An entry is written after the bytes, and `take` moves the generation on before it overwrites one: so bytes count
        that were read before the generation is found to be the same (`kernels.unchanged`).
        """
        entries: bytes = self.entry[layer].tobytes()
        return entries

    def look_up(self, layer: int, experts: Sequence[int]) -> SlotIds:
        """The slot of each expert (-1: none), leased where there is one; the caller holds the lock."""
        slots: SlotIds = self.slot_of[layer, list(experts)].astype(np.int64)
        found = slots[slots >= 0]
        self.lease[self.row, found] += 1
        self.touch(found)
        return slots

    def release(self, slots: Sequence[int] | SlotIds) -> None:
        """End leases; needs no lock, for the line is this row's own."""
        if len(slots):
            self.lease[self.row, slots] -= 1

    def claim(
        self, keys: Sequence[ExpertKey], *, protect: bool, kept: npt.NDArray[np.bool_], ahead: bool = False
    ) -> list[tuple[ExpertKey, int]]:
        """Slots to load `keys`, all of one layer, into, LOADING and leased, for the first of them, as many as may be
        had. The caller holds the lock.

        The layer's free slots come first; then, unless residency is protected, its least used expert that nobody
        leases, that is not pinned and not `kept` by the call in progress; then wave slots, free or used longest ago.
        For what was not asked for yet wave slots are taken where residency is protected alone, and none that is `kept`.
        """
        claimed, waves = list[tuple[ExpertKey, int]](), None
        free, used = self._own(keys[0].layer, kept) if keys else ([], [])
        for key in keys:
            own = free or (used if not protect and (ahead or self.admits(key)) else [])
            if not own and (protect or not ahead):
                own = waves = self._waves((self.partition == WAVE) & ~(kept & ahead)) if waves is None else waves
            if not own:
                break
            claimed.append((key, own.pop(0)))
            self.take(claimed[-1][1], key)
        return claimed

    def admits(self, key: ExpertKey) -> bool:
        """Whether the expert may go where another of its layer was."""
        return True

    def first(self, layer: int, slots: int) -> int:
        """The first of the experts that so many slots of a layer are filled with."""
        return 0

    def arrived(self, slot: int) -> bool | None:
        """Whether the expert that another row was loading into `slot` when it was leased is there; False when that
        failed, None when it is not known yet. The caller holds the lock.

        A slot that was filled and has to go again is LOADING without an expert: the lease keeps its bytes.
        """
        if self.state[slot] == FREE:
            return False
        return True if self.state[slot] == READY or self.key_layer[slot] < 0 else None

    def take(self, slot: int, key: ExpertKey) -> None:
        """Make `slot` LOADING for `key`, whatever it held; the caller holds the lock and saw that nobody leases it."""
        self.vacate(slot)
        self.generation[slot] += 1
        self.loader[slot] = self.row
        self.state[slot] = LOADING
        self.key_expert[slot], self.key_layer[slot] = key.expert, key.layer
        self.slot_of[key.layer, key.expert] = slot
        self.lease[self.row, slot] += 1

    def retire(self, slot: int) -> None:
        """Lend the slot to nobody any more, but leave its bytes to those who lease it; the caller holds the lock.

        It is LOADING for this row, with no expert: `take` it once nobody else leases it.
        """
        assert self.state[slot] == READY, f"slot {slot} is in state {self.state[slot]}, must be READY"
        layer, expert = self.key_layer[slot], self.key_expert[slot]
        self.key_layer[slot] = self.key_expert[slot] = -1
        self.state[slot] = LOADING
        self.loader[slot] = self.row
        self.entry[layer, expert] = 0
        self.slot_of[layer, expert] = -1

    def reserve(self, slot: int) -> None:
        """Keep a FREE slot for this row, LOADING without an expert; the caller holds the lock."""
        assert self.state[slot] == FREE, f"slot {slot} is in state {self.state[slot]}, must be FREE"
        self.loader[slot] = self.row
        self.state[slot] = LOADING

    def restore(self, slot: int, key: ExpertKey) -> None:
        """Take back `retire`; where the expert came elsewhere meanwhile, free the slot. The caller holds the lock."""
        if self.slot_of[key.layer, key.expert] < 0:
            self.key_expert[slot], self.key_layer[slot] = key.expert, key.layer
            self.slot_of[key.layer, key.expert] = slot
            self.commit([slot])
        else:
            self.vacate(slot)

    def commit(self, slots: Sequence[int]) -> None:
        """The bytes are there; the caller holds the lock."""
        for slot in slots:
            self.loader[slot] = -1
            self.state[slot] = READY
            self._publish(slot)
        self.touch(slots)

    def vacate(self, slot: int) -> None:
        """The slot holds nothing that anybody may find; the caller holds the lock.

        Its generation stays, as its bytes do, until it is taken: which nobody may while it is leased.
        """
        self.loader[slot] = -1  # first: whoever waits takes a load without an expert for one that came
        if self.state[slot] != FREE:
            layer, expert = self.key_layer[slot], self.key_expert[slot]
            self.key_layer[slot] = self.key_expert[slot] = -1
            if layer >= 0:
                self.entry[layer, expert] = 0
                self.slot_of[layer, expert] = -1
            self.state[slot] = FREE

    def leased(self, slots: SlotIds) -> npt.NDArray[np.bool_]:
        """Which of the slots anybody leases."""
        found: npt.NDArray[np.bool_] = np.logical_or.reduce(self.lease[:, slots], axis=0)
        return found

    def others_loading(self) -> bool:
        """Whether another row is reading an expert now."""
        loading = self.state == LOADING
        return bool((loading & (self.loader != self.row)).any())

    def check_integrity(self) -> None:
        """Assert that tables and slots mirror each other; takes the lock."""
        with self.locked():
            held = np.flatnonzero((self.key_layer >= 0) | (self.state == READY))  # a retired slot is neither
            layers, experts, homes = self.key_layer[held], self.key_expert[held], self.partition[held]
            slot_of, entry = np.full(self.slot_of.shape, -1), np.zeros(self.entry.shape, np.uint64)
            slot_of[layers, experts] = held
            whole = np.array_equal(slot_of, np.asarray(self.slot_of)) and (slot_of >= 0).sum() == len(held)
            assert whole, f"experts say {self.slot_of.tolist()}, slots say {slot_of.tolist()} and are {held.tolist()}"
            for slot in held[self.state[held] == READY].tolist():
                entry[self.key_layer[slot], self.key_expert[slot]] = entry_of(slot, int(self.generation[slot]))
            found = np.asarray(self.entry)
            assert np.array_equal(entry, found), f"entries are {found.tolist()}, slots say {entry.tolist()}"
            loaders = {int(self.loader[s]) for s in held if self.state[s] == LOADING}
            assert all(self.pid[row] for row in loaders), f"rows {loaders} load, rows {np.flatnonzero(self.pid)} live"
            astray = held[(homes != WAVE) & (homes != layers)].tolist()
            assert not astray, f"slots {astray} hold experts of other layers than their own"

    def free_of(self, slots: SlotIds) -> int | None:
        """A FREE one of the slots that nobody leases; the caller holds the lock."""
        free, _ = self._idle(slots)
        return free[0] if free else None

    def _idle(self, slots: SlotIds) -> tuple[list[int], SlotIds]:
        """Of the slots that nobody leases those that are FREE, and those that are READY."""
        slots = slots[~self.leased(slots)]  # a retired slot whose mover was killed may still be in a computation
        state = self.state[slots]
        return slots[state == FREE].tolist(), slots[state == READY]

    def _own(self, layer: int, kept: npt.NDArray[np.bool_]) -> tuple[list[int], list[int]]:
        """A layer's own slots that may be had: free ones, and those whose expert may go, least used first."""
        free, used = self._idle((self.partition == layer).nonzero()[0])
        used = used[~kept[used]]
        if self.pinned[layer].any():
            used = used[self.pinned[self.key_layer[used], self.key_expert[used]] == 0]
        return free, used[self._worth(layer, self.key_expert[used]).argsort(kind="stable")].tolist()

    def _worth(self, layer: int, experts: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """log2 of the accesses that each of a layer's experts gets."""
        return self.usage.usage_LE[layer, experts]

    def _waves(self, among_C: npt.NDArray[np.bool_]) -> list[int]:
        """Those that may be had: free ones, then what was used longest ago."""
        free, used = self._idle(among_C.nonzero()[0])
        return free + used[self.last_used[used].argsort(kind="stable")].tolist()

    def touch(self, slots: Sequence[int] | SlotIds) -> None:
        """Note an access to slots; without the lock two accesses may get one time, which is harmless."""
        self.head[HeaderWord.CLOCK] += 1
        self.last_used[slots] = self.head[HeaderWord.CLOCK]

    def _publish(self, slot: int) -> None:
        """Whoever wants the slot's expert finds it."""
        self.entry[self.key_layer[slot], self.key_expert[slot]] = entry_of(slot, int(self.generation[slot]))

    def _void(self, row: int) -> None:
        """A row's leases end and what it was loading is free again."""
        for slot in np.flatnonzero(self.loader == row).tolist():
            self.vacate(slot)
        self.lease[row] = self.looks[row] = 0
        self.lends[row] = self.shape.lent
        self.pid[row] = 0  # last: until then whoever comes finds it dead, and does this again

    def _repair(self) -> None:
        """Derive the tables by expert from the slots, after a holder of the lock was killed."""
        self.slot_of[...] = -1
        self.entry[...] = 0
        for slot in np.flatnonzero(self.state != FREE).tolist():
            layer, ready = int(self.key_layer[slot]), self.state[slot] == READY
            if layer < 0 if ready else self.loader[slot] < 0:
                self.key_layer[slot] = self.key_expert[slot] = -1
                self.state[slot] = FREE
            elif layer >= 0:  # else a mover keeps it
                self.slot_of[layer, self.key_expert[slot]] = slot
                if ready:
                    self._publish(slot)
