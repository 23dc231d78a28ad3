"""The expert cache: brings experts into device slots and lends them out, in waves when there are more than slots.

`stream` is the only way in. It starts reading what is missing, lends what is resident meanwhile, then the rest as it
arrives. All bookkeeping is the caller's thread's; reader threads only write bytes. Does not know models nor policy.

Invariants: device bytes never exceed the plan; a slot that is lent or being filled is never claimed; after a failed
load the cache is consistent and usable.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from buddymoe_ray.cache.ahead import ReadsAhead
from buddymoe_ray.cache.directory import Directory
from buddymoe_ray.cache.disk import DiskReader, Ticket
from buddymoe_ray.cache.host import Host, HostTier, ReadLost
from buddymoe_ray.cache.host_copies import HostCopies
from buddymoe_ray.cache.pool import CacheStats, Glance, Lease, SlotPool
from buddymoe_ray.cache.slot_peers import SlotPeers
from buddymoe_ray.device import Copy, Device, open_device
from buddymoe_ray.errors import CacheError
from buddymoe_ray.types import ExpertKey, ExpertLayout, SlotPlan

__all__ = ["ExpertCache", "blame"]

_STAGING_SLOTS = 4
_POLL_SECONDS = 200e-6


@dataclass(frozen=True, slots=True)
class _DeviceLoad:
    """An expert on its way into a claimed device slot; `host_slot` is where it passes through, if it does, `copy` what
    has begun behind it."""

    key: ExpertKey
    slot: int
    ticket: Ticket
    host_slot: int | None = None
    copy: Copy | None = None


class ExpertCache:
    """Device slots over an optional host tier over the checkpoint's files.

    Args:
        layout: how an expert lies in a slot and where its bytes are on disk.
        plan: slots per layer and for waves; its `slot_bytes` must be the layout's.
        reader: the disk tier; closed with the cache.
        device: where the slots are; None is the CPU. One apart always goes through host slots (at least 4).
        host_slots: experts a host tier of this cache's own keeps; 0 is none.
        host: a host tier shared with others, closed with the cache, instead.
        peers: memory for the slots, of a device apart, and others' slots to read from; closed with the cache.
    """

    def __init__(
        self,
        layout: ExpertLayout,
        plan: SlotPlan,
        *,
        reader: DiskReader,
        device: Device | None = None,
        host_slots: int = 0,
        host: Host | None = None,
        peers: SlotPeers | None = None,
    ) -> None:
        assert plan.slot_bytes == layout.slot_bytes, f"plan {plan.slot_bytes}, layout {layout.slot_bytes} bytes a slot"
        self.layout, self.plan = layout, plan
        self._device = device or open_device("cpu")
        apart = self._device.apart
        host_slots = min(host_slots, sum(layout.experts_per_layer))  # more would be pinned and never filled
        host_slots = max(host_slots, _STAGING_SLOTS) if apart else host_slots
        self._reader = reader
        self._pool = SlotPool(layout, plan.slots_total, self._device.torch, lent=any(plan.lent_slots), shared=peers)
        self.host, self._peers = host, peers
        if host is None and host_slots:
            self.host = HostTier(layout, slots=host_slots, reader=reader, device=self._device)
        self._copies = HostCopies(self.host, self._pool, self._device) if self.host is not None else None
        self._bytes = None if apart else self._pool.bytes_C.numpy()
        self._directory = Directory(plan, layout.experts_per_layer, self._pool.address, peers)
        self.usage = self._directory.usage
        self._glances = [Glance(at_E, partial(self._used, layer)) for layer, at_E in enumerate(self._directory.at_E)]
        self._leases: list[Lease | None] = [None] * plan.slots_total
        self._ahead = ReadsAhead[_DeviceLoad](lambda load: self._directory.bring(self._finish(self._ahead, load)))
        self._hits = self._misses = self._loaded = 0
        self.stall_seconds = 0.0  # waited for bytes
        self._closed = False

    @property
    def device_bytes(self) -> int:
        """Bytes of the slots in use."""
        return self.plan.slots_total * self.layout.slot_bytes

    @property
    def read_mode(self) -> str:
        """How the disk is read: `direct` or `buffered`."""
        return self._reader.mode

    @property
    def read_seconds(self) -> float:
        """What the disk takes for an expert, of what it has read so far; 0 before."""
        return self._reader.seconds(self.layout.expert_bytes)

    def resident(self, layer: int) -> frozenset[int]:
        """Experts of a layer that are in device slots."""
        return frozenset(self.resident_mask(layer).nonzero()[0].tolist())

    def resident_mask(self, layer: int) -> npt.NDArray[np.bool_]:
        """`[E]`, True where resident; a live view, not to be written."""
        return self._directory.resident_E[layer]

    def holding(self, layer: int, experts: Sequence[int]) -> AbstractContextManager[Sequence[int]]:
        """Those of the experts that are resident, for a block in which none is evicted but by this thread's loads."""
        resident_E = self.resident_mask(layer)
        return nullcontext([expert for expert in experts if resident_E[expert]])

    def read_ahead(self, layer: int, experts: Sequence[int], *, protect_residency: bool = False) -> bool:
        """Begin to read those of the experts that are missing, as far as the layer has slots that hold none of them;
        with `protect_residency`, for prompts, as far as wave slots do. Returns whether all are there or on their way.

        `stream` takes over what it asks for; one that does not protect residency, as decode does, gives up the rest, as
        far as it was not begun; what was is kept. An error is met by whoever asks for the expert.
        """
        self._ahead.land()
        slots = self._directory.slot_of[layer]
        staying = {slots[expert] for expert in experts}
        if protect_residency:
            self._directory.expect(staying)
        for expert in experts:
            key = ExpertKey(layer, expert)
            if slots[expert] >= 0 or key in self._ahead:
                continue
            slot = self._directory.claim_ahead(layer, staying, protect_residency=protect_residency)
            if slot is None:
                return False
            with suppress(CacheError):
                load = self._begin(key, slot)
                if load is None:
                    return False
                self._ahead.add(load)
        return True

    def settle_ahead(self) -> None:
        """Give up what was read ahead and not asked for; waits for what is under way."""
        self._ahead.settle()
        if self._copies is not None:
            self._copies.settle()

    def glance(self, layer: int) -> Glance:
        """Where the layer's experts are; they stay until this thread streams."""
        self._ahead.land()
        return self._glances[layer]

    def count(self, layer: int, ids: npt.NDArray[np.int64]) -> None:
        """Note accesses of experts, of any shape: what is used least is evicted first."""
        if not (self.plan.fully_resident or self.plan.pinned):  # else nothing of a layer's is evicted
            self._directory.usage.note(layer, ids)

    def stream(
        self, layer: int, experts: Sequence[int], *, protect_residency: bool
    ) -> Generator[tuple[Lease, ...], None, None]:
        """Lend every expert once, resident ones first, the others as they arrive.

        Leases end when the iterator advances or closes. With `protect_residency` (prefill) no resident expert of the
        layer is evicted: misses pass through wave slots; so it is in every phase when the plan pins experts.

        Raises:
            CacheError: an expert's bytes could not be read. Other loads of the call are finished and kept.
        """
        slots, loads = self._directory.slot_of[layer], self._taken_over(layer, experts)
        if not protect_residency:
            self._ahead.give_up()
        protect_residency = protect_residency or bool(self.plan.pinned)
        resident = [slots[e] for e in experts if slots[e] >= 0]
        self._hits += len(resident)
        if len(resident) == len(experts):
            yield from self._lend(resident)
            return
        absent = [ExpertKey(layer, e) for e in experts if slots[e] < 0]
        assert len(set(absent)) == len(absent), f"experts are {list(experts)}, must each be named once"
        self._misses += len(absent)
        coming = {load.key for load in loads}
        missing = deque(key for key in absent if key not in coming)
        self._directory.leased.update(resident)
        self._directory.kept.update(resident)
        try:
            self._start(missing, loads, protect_residency)
            yield from self._lend(resident)
            while missing or loads:
                self._start(missing, loads, protect_residency)
                if loads:
                    yield from self._lend(self._arrived(loads, missing))
                else:
                    self._await_slot(layer)
        finally:
            self._directory.leased.difference_update(resident)
            try:
                self._settle(loads)
            finally:
                self._directory.kept.clear()

    def warm(self, progress: Callable[..., Iterable[int]] = lambda items, **_: items) -> None:
        """Fill every layer's slots: with the experts the plan pins, else with any, but others than peers have."""
        for layer in progress(range(len(self.plan.layer_slots)), total=len(self.plan.layer_slots), desc="experts"):
            for _ in self.stream(layer, self._directory.to_fill(layer), protect_residency=True):
                pass
        self._hits = self._misses = 0
        self.stall_seconds = 0.0

    def resize(self, plan: SlotPlan) -> None:
        """Keep to another plan from now on, of no more slots in any layer than at first; between two steps."""
        self._ahead.settle()
        first = 0
        for layer, most in enumerate(self._directory.plan.layer_slots):
            for slot, to in self._directory.resize(layer, plan.layer_slots[layer]):
                self._pool.bytes_C[to] = self._pool.bytes_C[slot]
                key = self._directory.key_of[to]
                assert key is not None, f"slot {to} was moved to and holds nothing"
                self._leases[slot], self._leases[to] = None, Lease(key, to, self._pool.renew(to), self._pool)
            self._pool.release(first + plan.layer_slots[layer], first + most)
            first += most
        self.plan = plan

    def stats(self) -> CacheStats:
        """Counters so far; readable from any thread."""
        return CacheStats(
            hits=self._hits,
            misses=self._misses,
            bytes_loaded_device=self._loaded,
            bytes_read_disk=self._reader.bytes_read,
            bytes_requested_disk=self._reader.bytes_requested,
            host_hits=self.host.hits if self.host else 0,
            peer_hits=self._peers.hits if self._peers else 0,
            stall_seconds=self.stall_seconds,
            evictions=self._directory.evictions,
        )

    def check_integrity(self) -> None:
        """Assert every invariant; both sides are in the message."""
        self._directory.check_integrity()
        for slot, key in enumerate(self._directory.key_of):
            lease = self._leases[slot]
            if key is not None:
                assert lease is not None and lease.key == key, f"slot {slot} holds {key}, its lease says {lease}"
                assert lease.generation == self._pool.generation[slot], f"{lease} against {self._pool.generation[slot]}"
        if self.host is not None:
            self.host.check_integrity()

    def close(self) -> None:
        """Wait for what is in flight and close the files. Safe to call twice."""
        if not self._closed:
            self._closed = True
            self._reader.close()
            if self.host is not None and self._copies is not None:
                self._copies.settle()
                self.host.close()
            if self._peers is not None:
                self._peers.close()

    def __enter__(self) -> ExpertCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _used(self, layer: int, ids: npt.NDArray[np.int64]) -> None:
        slots, directory = self._directory.slot_of[layer], self._directory
        used = {slots[expert] for expert in ids.ravel().tolist() if slots[expert] >= 0}
        if used and max(used) >= directory.first_wave:
            for slot in used:
                directory.touch(slot)
        self._hits += len(used)

    def _taken_over(self, layer: int, experts: Sequence[int]) -> deque[_DeviceLoad]:
        """Loads of the experts that were begun ahead."""
        self._ahead.land()
        asked = [key for key in (ExpertKey(layer, expert) for expert in experts) if key in self._ahead]
        return deque(self._ahead.take(key) for key in asked)

    def _lend(self, slots: Sequence[int]) -> Iterator[tuple[Lease, ...]]:
        """One wave of resident experts; nothing to lend is no wave."""
        if not slots:
            return
        leased, touch = self._directory.leased, self._directory.touch
        for slot in slots:
            touch(slot)
        leased.update(slots)
        try:
            yield tuple(self._leases[slot] for slot in slots)  # type: ignore[misc]
        finally:
            leased.difference_update(slots)

    def _start(self, missing: deque[ExpertKey], loads: deque[_DeviceLoad], protect: bool) -> None:
        """Start loads while there are experts missing and slots to be had."""
        while missing:
            protected = protect or not self._directory.admits(missing[0])
            slot = self._directory.claim(missing[0].layer, protect_residency=protected)
            if slot is None:
                return
            load = self._begin(missing[0], slot)
            if load is None:
                return
            missing.popleft()
            loads.append(load)

    def _begin(self, key: ExpertKey, slot: int) -> _DeviceLoad | None:
        """Start one load; None when the host tier is busy to the last slot."""
        self._pool.renew(slot)
        self._leases[slot] = None
        try:
            if self.host is None or self._copies is None:
                assert self._bytes is not None, "a device without host tier must be the CPU"
                return _DeviceLoad(key, slot, self._reader.submit(self.layout.pieces[key], self._bytes[slot]))
            self._copies.release()
            if self._peers and (read := self._peers.read(key, self._pool.bytes_C[slot])) is not None:
                return _DeviceLoad(key, slot, read)
            fetched = self.host.fetch(key)
        except BaseException as error:
            self._directory.abandon(slot)
            blame(error, key)
            raise
        if fetched is None:
            self._directory.abandon(slot)
            return None
        host_slot, ticket = fetched
        copy = self._copies.begin(slot, host_slot) if ticket.done() else None  # beside what is computed meanwhile
        return _DeviceLoad(key, slot, ticket, host_slot, copy)

    def _arrived(self, loads: deque[_DeviceLoad], missing: deque[ExpertKey]) -> list[int]:
        """Slots of the oldest load and of every other that is done; waits for the oldest. What another worker should
        have read and did not is missing again."""
        slots, began = list[int](), time.perf_counter()
        try:
            for load in [loads[0], *(load for at, load in enumerate(loads) if at and load.ticket.done())]:
                try:
                    slots.append(self._finish(loads, load))
                except ReadLost:
                    missing.append(load.key)
        finally:
            self.stall_seconds += time.perf_counter() - began
        self._directory.kept.update(slots)
        return slots

    def _finish(self, loads: deque[_DeviceLoad] | ReadsAhead[_DeviceLoad], load: _DeviceLoad) -> int:
        """Wait for the bytes, copy them to the device if they passed through the host, make the expert resident."""
        try:
            load.ticket.wait()
        except BaseException as error:
            blame(error, load.key)
            load.ticket.settle()  # an interrupt leaves reads in flight; they must not land in a slot with a new owner
            if load.copy is not None:
                load.copy.wait()
            self._directory.abandon(load.slot)
            if self.host is not None and load.host_slot is not None:
                self.host.release(load.key, failed=True)
            raise
        finally:
            loads.remove(load)
        if self._copies is not None and load.host_slot is not None:
            self._copies.admit(load.key, load.slot, load.copy or self._copies.begin(load.slot, load.host_slot))
        else:
            self._pool.publish(load.key, load.slot, self._pool.generation[load.slot])
        self._loaded += self.layout.expert_bytes
        self._directory.commit(load.key, load.slot)
        self._leases[load.slot] = Lease(load.key, load.slot, self._pool.generation[load.slot], self._pool)
        return load.slot

    def _await_slot(self, layer: int) -> None:
        """Wait where no slot can be had for what is missing."""
        began = time.perf_counter()
        if not self._ahead.make_room() and not (self._copies is not None and self._copies.release(wait=True)):
            assert self.host is not None, f"no slot of layer {layer} can be claimed and nothing is in flight"
            time.sleep(_POLL_SECONDS)  # other workers lease every slot of the node's host tier
        self.stall_seconds += time.perf_counter() - began

    def _settle(self, loads: deque[_DeviceLoad]) -> None:
        """After an early end: keep what arrives, free what fails. Errors are met by whoever needs the expert."""
        try:
            while loads:
                with suppress(CacheError):
                    self._finish(loads, loads[0])
        finally:
            if loads:  # interrupted: the others must be settled all the same
                self._settle(loads)


def blame(error: BaseException, key: ExpertKey) -> None:
    """Note in a CacheError which expert could not be had."""
    if isinstance(error, CacheError):
        error.expert = key.expert
