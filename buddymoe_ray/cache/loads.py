"""Experts on their way into a store's slots: what this worker reads, and what it waits for others to read.

Neighbours: `cache` asks for what a layer needs and lends it, `tables` says who holds what. Waits are bounded: where
those waited for stand still, what this worker needs is read into its own slot, and what it has loaded becomes READY
once it may. Invariant: after a failed or interrupted load the slot is free.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress

import numpy as np

from buddymoe_ray.cache.ahead import ReadsAhead
from buddymoe_ray.cache.disk import DiskReader
from buddymoe_ray.cache.pool import Lease
from buddymoe_ray.cache.shared.calls import Counts, NotBegun, OwnLoad, OwnSlot, ReadLost, Stalled, StreamState
from buddymoe_ray.cache.shared.interface import Store
from buddymoe_ray.cache.shared.tables import LOADING, PATIENCE_SECONDS, READY, WAVE
from buddymoe_ray.cache.sources import Source
from buddymoe_ray.errors import CacheError
from buddymoe_ray.types import ExpertKey

__all__ = ["Loads"]

_ASSUMED_BYTES_PER_SECOND, _SMOOTHING = 500e6, 0.1
_LONGEST_POLL_SECONDS, _HELPING_SECONDS, _MOVING_SECONDS = 2e-3, 2e-4, 5e-3
_NEVER = np.iinfo(np.uint64).max


class _Placed:
    """Experts that are to stay in the slots of their layers: those that are `absent`, as far as is known, are brought
    one every so many `seconds`, the most wanted first."""

    def __init__(self, pins: Sequence[ExpertKey], seconds: float, *, begun: bool = False) -> None:
        self.absent, self.seconds = deque(pins), seconds
        self.begun, self.next = begun, 0.0


class Loads:
    """Loads of one attachment. `fetch_seconds` is what one expert takes from the disk, lately, `stall_seconds` the time
    waited for bytes so far; `kept_C` are slots that the call in progress will lend again, `brought_C` the last use of
    what was read ahead, until one asks."""

    def __init__(self, store: Store, source: Source, reader: DiskReader) -> None:
        self._store, self._source, self._tables = store, source, store.tables
        self.fetch_seconds = store.layout.expert_bytes / _ASSUMED_BYTES_PER_SECOND
        self.stall_seconds, self.counts = 0.0, Counts()
        self.kept_C = np.zeros(store.shape.slots, dtype=bool)
        self.ahead = ReadsAhead(self._land)
        self.brought_C = np.full_like(self._tables.last_used, _NEVER)
        self._own_slot = None if store.alone else OwnSlot(store.layout, reader)
        self._stalled: dict[int, int] = {}  # slots that somebody did not fill in time, by their generation
        self._crowded = False  # no slot could be had in time, the last time
        self._placed = _Placed((), 0.0, begun=True)

    def start(self, call: StreamState, protect: bool) -> None:
        """Start reads while there are experts missing and slots to be had."""
        if call.missing:
            with self._tables.locked_soon():
                self.claim(call, protect)
            self.submit_claimed(call)

    def claim(self, call: StreamState, protect: bool) -> None:
        """Slots for what is missing, as far as there are some; the caller holds the lock."""
        tables = self._tables
        due = self._source.due(tuple(call.missing), reading=bool(call.loads))
        call.awaits = bool(call.missing) and not due
        keys = list[ExpertKey]()
        for key in due:
            slot = int(tables.slot_of[key.layer, key.expert])
            if slot < 0:
                keys.append(key)
                continue
            tables.lease[tables.row, slot] += 1  # another worker was faster
            call.missing.remove(key)
            call.waits.append((key, slot))
            self.counts.shared += 1
        call.claimed.extend(tables.claim(keys, protect=protect, kept=self.kept_C))
        self._crowded = self._crowded and not call.claimed

    def submit_claimed(self, call: StreamState) -> None:
        """Begin to read into slots that were claimed. Raises CacheError."""
        while call.claimed:
            load = self.submit(*call.claimed.popleft())
            if load is None:
                self._abandon(call.claimed)
                return
            call.missing.remove(load.key)
            call.loads.append(load)

    def read_ahead(self, layer: int, experts: Sequence[int], *, protect: bool) -> bool:
        """See ExpertCache."""
        self.ahead.land()
        slot_of_E, last_used_C = self._tables.slot_of[layer], self._tables.last_used
        slots = slot_of_E[list(experts)]
        there = slots[slots >= 0]
        self.brought_C[there] = last_used_C[there]
        kept_C = (self.brought_C == last_used_C) & protect
        kept_C[there] = True
        absent = [ExpertKey(layer, expert) for expert, slot in zip(experts, slots.tolist(), strict=True) if slot < 0]
        if not absent:
            return True
        call = StreamState(0.0, deque(absent))
        with suppress(CacheError):  # met by whoever asks for the expert
            try:
                with self._tables.locked_soon():
                    absent = [key for key in absent if slot_of_E[key.expert] < 0]
                    call.claimed.extend(self._tables.claim(absent, protect=protect, kept=kept_C, ahead=True))
                self.submit_claimed(call)
            finally:
                for load in call.loads:
                    self.ahead.add(load.untimed())
                self._abandon(call.claimed)
        return len(call.loads) == len(absent)

    @property
    def errands(self) -> bool:
        """See ExpertCache."""
        shards = self._source.shards
        return shards is not None and (shards.peers.owes or bool(self.ahead) or bool(self._placed.absent))

    def run_errands(self, *, idle: bool) -> None:
        """See ExpertCache. What is wanted stays until it is not any more, or this worker needs its slot."""
        if self._source.shards is None:
            return
        wanted, tables = self._source.wanted(), self._tables
        self.ahead.land()
        self.brought_C.fill(_NEVER)  # of which some was taken meanwhile
        slots = np.array([tables.slot_of[key.layer, key.expert] for key in wanted], dtype=int)
        self.brought_C[slots[slots >= 0]] = tables.last_used[slots[slots >= 0]]
        for layer in dict.fromkeys(key.layer for key in wanted):
            self.read_ahead(layer, [key.expert for key in wanted if key.layer == layer], protect=True)
        self._follow(self._placed)
        if idle and self.errands:
            time.sleep(_HELPING_SECONDS if self.ahead or wanted else _MOVING_SECONDS)

    def place(self, pins: Sequence[ExpertKey], bytes_per_second: float) -> None:
        """See ExpertCache."""
        self._placed = _Placed(pins, self._store.layout.expert_bytes / bytes_per_second)

    def _follow(self, placed: _Placed) -> None:
        """Bring one more of the experts that are to stay, when it is time; of a layer the least used goes for it."""
        tables = self._tables
        if not placed.begun:
            placed.begun = True
            tables.pinned[...] = 0
            for key in placed.absent:
                tables.pinned[key.layer, key.expert] = 1
        while placed.absent:
            key = placed.absent[0]
            slot = int(tables.slot_of[key.layer, key.expert])
            if slot >= 0 and tables.state[slot] == READY and tables.partition[slot] != WAVE:
                placed.absent.popleft()
                continue
            if time.monotonic() < placed.next:
                return
            if slot >= 0:
                if tables.state[slot] != READY or tables.leased(np.array([slot]))[0]:
                    return
                tables.vacate(slot)  # it passes through
            placed.next = time.monotonic() + placed.seconds
            self._spare(key.layer)
            if not self.read_ahead(key.layer, [key.expert], protect=False):
                placed.absent.rotate()  # what it waits for is in use

    def _spare(self, layer: int) -> None:
        """Have the layer a slot of its own that nothing placed is in: another layer's, if need be."""
        tables = self._tables
        slots = np.flatnonzero(tables.partition >= 0)
        layers, experts = tables.key_layer[slots], tables.key_expert[slots]
        slots = slots[(layers < 0) | (tables.pinned[layers, experts] == 0)]
        others = slots[(tables.state[slots] != LOADING) & ~tables.leased(slots)]
        if not len(others) or (tables.partition[slots] == layer).any():
            return
        usage = tables.usage.usage_LE[tables.key_layer[others], tables.key_expert[others]]
        slot = int(others[usage.argmin()])
        tables.vacate(slot)
        tables.partition[slot] = layer

    def submit(self, key: ExpertKey, slot: int) -> OwnLoad | None:
        """Begin to read an expert into the slot that was claimed for it; None where that must wait. Then, and where it
        raises CacheError, the slot is free."""
        ticket = None
        try:
            ticket = self._source.begin(key, slot)
        except BaseException as error:
            _blame(error, key)
            raise
        finally:
            if ticket is None:
                self._abandon([(key, slot)])
        return None if ticket is None else OwnLoad(key, slot, ticket, time.perf_counter())

    def wait(self, call: StreamState) -> None:
        """Wait until something is ready, or may be had that could not before."""
        began = time.perf_counter()
        try:
            while not self._gather(call):
                if call.loads:
                    call.loads[0].ticket.settle()
                    continue
                if call.awaits:  # as those who are to help may do
                    self.run_errands(idle=False)
                    time.sleep(_HELPING_SECONDS)
                    return
                if self._store.alone and (self.ahead.make_room() or self._source.make_room()):
                    return
                self._check_patience(call)
                time.sleep(call.pause)
                call.pause = min(2 * call.pause, _LONGEST_POLL_SECONDS)
                self._tables.reap_now_and_then()
                if call.missing:
                    return
            call.since = time.monotonic()
        finally:
            self.stall_seconds += time.perf_counter() - began

    def settle(self, call: StreamState, tries: int = 4) -> None:
        """After an end: keep what arrives, free what fails, let go of the rest."""
        self._tables.release([slot for _, slot in call.ready] + [slot for _, slot in call.waits])
        call.ready.clear()
        call.waits.clear()
        try:
            with suppress(Stalled):
                self._abandon(call.claimed)
            while call.loads:
                with suppress(CacheError):  # met by whoever needs the expert
                    load = call.loads[0]
                    self._read(load, call.loads)
                    self._tables.release(self._finish([load], call.loads))
        finally:
            if call.loads and tries:  # interrupted: the others must be settled all the same
                self.settle(call, tries - 1)

    def alone(self, key: ExpertKey) -> Lease:
        """The expert for this worker alone."""
        assert self._own_slot is not None, f"nobody but this worker has {key}"
        began = time.perf_counter()
        try:
            lease = self._own_slot.read(key)
        except BaseException as error:
            _blame(error, key)
            raise
        finally:
            self.stall_seconds += time.perf_counter() - began
        self.counts.nbytes += self._store.layout.expert_bytes
        return lease

    def _land(self, done: Sequence[OwnLoad]) -> None:
        came = list[OwnLoad]()
        try:
            for load in done:
                try:
                    self._read(load, self.ahead)
                    came.append(load)
                except Stalled:
                    break  # nor could the next one be freed
                except CacheError:
                    continue  # met by whoever asks for the expert
        finally:
            with suppress(Stalled):  # it is tried again
                slots = self._finish(came, self.ahead)
                self._tables.release(slots)
                self.brought_C[slots] = self._tables.last_used[slots]

    def _check_patience(self, call: StreamState) -> None:
        """Raises Stalled where nothing has come for long; whoever was not in time before is not waited for again."""
        if self._store.alone:  # whoever stands still with a node's host slots is not waited for below
            return
        slots, generation = [slot for _, slot in call.waits], self._tables.generation
        known = self._crowded if call.missing else True
        known = known and all(slot in self._stalled and self._stalled[slot] == generation[slot] for slot in slots)
        if not known and time.monotonic() - call.since <= PATIENCE_SECONDS + 4 * self.fetch_seconds:
            return
        self._stalled.update((slot, int(generation[slot])) for slot in slots)
        self._crowded = bool(call.missing)
        raise Stalled("an expert or a slot is held by a process that stands still. hint: continue it, or end it")

    def _gather(self, call: StreamState) -> bool:
        """Move what has arrived to `ready`; whether anything changed."""
        self.ahead.land()  # another worker may wait for it, and we for what that one has read ahead
        came = list[OwnLoad]()
        try:
            ended = [load for load in call.loads if load.ticket.done()]
            for load in ended:
                try:
                    self._read(load, call.loads)
                    came.append(load)
                except ReadLost:
                    call.missing.append(load.key)
        finally:
            slots = self._finish(came, call.loads)
            call.ready.extend((load.key, load.slot) for load in came)
            self.kept_C[slots] = True
        return self._others(call) or bool(came)

    def _others(self, call: StreamState) -> bool:
        """Note what other workers filled for us, and what they failed at, which is missing again."""
        if not call.waits:
            return False
        tables = self._tables
        with tables.locked_soon():
            arrived = [(wait, tables.arrived(wait[1])) for wait in call.waits]
        ended = [(wait, there) for wait, there in arrived if there is not None]
        for wait, there in ended:
            key, slot = wait
            call.waits.remove(wait)
            self._stalled.pop(slot, None)
            if there:
                call.ready.append((key, slot))
                self.kept_C[slot] = True
            else:
                tables.release([slot])
                call.missing.append(key)
        return bool(ended)

    def _read(self, load: OwnLoad, loads: deque[OwnLoad] | ReadsAhead) -> None:
        """Wait for its bytes; where there will be none it is none of the `loads` any more. Raises CacheError."""
        try:
            load.ticket.wait()
        except BaseException as error:
            _blame(error, load.key)
            load.ticket.settle()
            try:
                self._free([load.slot])
            except Stalled:
                self._put_off([load], loads)
                raise
            loads.remove(load)
            raise
        if load.began is not None:
            self.fetch_seconds += _SMOOTHING * (time.perf_counter() - load.began - self.fetch_seconds)

    def _finish(self, came: Sequence[OwnLoad], loads: deque[OwnLoad] | ReadsAhead) -> list[int]:
        """These were read: make them READY, and they are none of the `loads` any more. Their leases, on these slots,
        stay. What may not be made READY now will be before long: raises Stalled then."""
        slots = [load.slot for load in came]
        if not slots:
            return slots
        try:
            with self._tables.locked_soon():
                self._tables.commit(slots)
        except Stalled:
            self._put_off(came, loads)
            raise
        for load in came:
            loads.remove(load)
        self.counts.nbytes += len(slots) * self._store.layout.expert_bytes
        return slots

    def _put_off(self, over: Sequence[OwnLoad], loads: deque[OwnLoad] | ReadsAhead) -> None:
        """These have ended, and the tables are held: they are concluded with what is read ahead."""
        for load in over:
            loads.remove(load)
            self.ahead.add(load.untimed())  # how long it took is known

    def _abandon(self, claimed: list[tuple[ExpertKey, int]] | deque[tuple[ExpertKey, int]]) -> None:
        """Free slots that nothing is read into any more. Where that may not be now it will be before long: raises
        Stalled then."""
        try:
            self._free([slot for _, slot in claimed])
        except Stalled:
            for key, slot in claimed:
                self.ahead.add(OwnLoad(key, slot, NotBegun(), None))
            raise
        finally:
            claimed.clear()

    def _free(self, slots: Sequence[int]) -> None:
        if not slots:
            return
        with self._tables.locked_soon():
            for slot in slots:
                self._tables.vacate(slot)
        self._tables.release(slots)


def _blame(error: BaseException, key: ExpertKey) -> None:
    """Note in a CacheError which expert could not be had."""
    if isinstance(error, CacheError):
        error.expert = key.expert
