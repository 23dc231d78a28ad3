"""The expert cache: brings experts into slots and lends them out, in waves when there are more than slots.

`stream` is the only way in. It starts reading what is missing, lends what is resident meanwhile, then the rest as it
arrives. Slots are a store's: private, of which this is the one user, or a node's, with neighbours in the same slots. An
expert that any worker of the node loaded is a hit for all; two that miss the same one read it once. Waiting is always
for something that goes on without this worker (a read, or a lease that its holder is computing with), and while it
waits it holds nothing that others need: so there is no deadlock. Where those it waits for stand still, it reads for
itself (`calls.OwnSlot`), and what it has loaded becomes READY once it may. Does not know models, routing or policy.
Invariants: those of `tables`; slots never exceed the plan; after a failed or interrupted load the slot is free.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from typing import Self

import numpy as np
import numpy.typing as npt

from buddymoe_ray.cache.disk import DiskReader
from buddymoe_ray.cache.host import HostTier
from buddymoe_ray.cache.loads import Loads
from buddymoe_ray.cache.pool import CacheStats, Glance, Lease
from buddymoe_ray.cache.private_store import PrivateStore
from buddymoe_ray.cache.shared.calls import Stalled, StreamState
from buddymoe_ray.cache.shared.interface import Store
from buddymoe_ray.cache.shared.shape import places_of
from buddymoe_ray.cache.shared.tables import READY, WAVE
from buddymoe_ray.cache.slot_peers import SlotPeers
from buddymoe_ray.cache.sources import DiskSource, HostSource, Source
from buddymoe_ray.device import Device, open_device
from buddymoe_ray.types import ExpertKey, ExpertLayout, SlotPlan

__all__ = ["ExpertCache", "open_private"]

Bools = npt.NDArray[np.bool_]
_STAGING_SLOTS = 4

_LOADS_IN_ORDER = platform.machine() in ("x86_64", "AMD64")
"""Whether bytes, entries and generations are seen in the order in which they were written; else leases are taken."""


class ExpertCache:
    """Slots of `store`, filled from `source` (None: straight from disk) with what `reader` reads; all of them belong to
    this object from now on."""

    def __init__(self, store: Store, *, reader: DiskReader, source: Source | None = None) -> None:
        self.store, self._reader, self._tables = store, reader, store.tables
        self.layout, self.plan = store.layout, store.plan
        self._source = source or DiskSource(store, reader)
        self._words_at, self.usage = self._tables.generation.ctypes.data, self._tables.usage
        self._held: tuple[int, dict[int, int]] | None = None
        self._loads = Loads(store, self._source, reader)
        self._entries: list[bytes] = [b""] * self.layout.layers  # of which these are
        self._glances: list[Glance | None] = [None] * self.layout.layers

    @property
    def host(self) -> HostTier | None:
        """The tier below; None where the slots are in host memory themselves."""
        return self._source.host

    @property
    def device_bytes(self) -> int:
        """Bytes of the slots in use, of a node's store by all of its workers."""
        return self._tables.nbytes

    @property
    def read_seconds(self) -> float:
        """What the disk takes for an expert, of what this worker has read so far; 0 before."""
        return self._reader.seconds(self.layout.expert_bytes)

    @property
    def fetch_seconds(self) -> float:
        """What one expert takes from the disk, lately, with all that is waited for."""
        return self._loads.fetch_seconds

    @property
    def stall_seconds(self) -> float:
        """The time waited for bytes so far."""
        return self._loads.stall_seconds

    def resident(self, layer: int) -> frozenset[int]:
        """Experts of a layer that are in slots now."""
        return frozenset(self.resident_mask(layer).nonzero()[0].tolist())

    def resident_mask(self, layer: int) -> Bools:
        """`[E]`, True where resident now: other workers change it."""
        found: Bools = self._tables.entry[layer, : self.layout.experts_per_layer[layer]] != 0
        return found

    @contextmanager
    def holding(self, layer: int, experts: Sequence[int]) -> Iterator[Sequence[int]]:
        """Those of the experts that are resident, none of which is evicted inside the block but by this thread's loads;
        none if that is not known."""
        assert self._held is None, f"layer {self._held} is held, must be none"
        if self.store.alone:
            resident_E = self.resident_mask(layer)
            yield [expert for expert in experts if resident_E[expert]]
            return
        self._tables.look(over=True)
        if not experts:
            yield experts
            return
        held = dict[int, int]()
        with suppress(Stalled), self._tables.locked_soon():
            held = self._tables.hold(layer, experts)
        self._held = (layer, held)
        try:
            yield list(held)
        finally:
            self._held = None
            self._tables.release(list(held.values()))

    def glance(self, layer: int) -> Glance | None:
        """Where the layer's experts are that are READY; None where a glance is not safe. Takes no lock and no lease:
        others may evict them meanwhile, which the slots' words tell: these are their generations.

        Made anew only where something moved: with the check afterwards 4 µs of a layer of 64 experts, 11 before.
        """
        if not (_LOADS_IN_ORDER or self.store.alone):
            return None
        self._loads.ahead.land()
        self._tables.look()
        entries = self._tables.glance(layer)
        if entries != self._entries[layer]:
            self._entries[layer], self._glances[layer] = (
                entries,
                self._glance_at(entries[: 8 * self.layout.experts_per_layer[layer]]),
            )
        return self._glances[layer]

    def _glance_at(self, entries: bytes) -> Glance:
        tables, counts, (slots_E, generations_E) = self._tables, self._loads.counts, places_of(entries)
        slots_E[slots_E >= self.store.shape.slots] = -1  # others could write what leads out of the store
        at_E = np.where(slots_E >= 0, self.store.address(0) + slots_E * self.store.shape.slot_bytes, -1)
        words_2E = None
        if not self.store.alone:
            words_2E = np.stack([np.where(slots_E >= 0, self._words_at + 8 * slots_E, 0), generations_E])
        wave_E = (slots_E >= 0) & (tables.partition[slots_E] == WAVE)
        slots, waves = slots_E.tolist(), frozenset(slots_E[wave_E].tolist())

        def used(ids: npt.NDArray[np.int64]) -> None:
            tables.look(over=True)
            there = {slots[expert] for expert in ids.ravel().tolist()}
            there.discard(-1)
            if not waves.isdisjoint(there):
                tables.touch(np.array([*waves & there]))
            counts.hits += len(there)

        return Glance(at_E, used, words_2E)

    def read_ahead(self, layer: int, experts: Sequence[int], *, protect_residency: bool = False) -> bool:
        """Begin to read those of the experts that are missing, as far as the layer has slots that hold none of them;
        with `protect_residency`, for prompts, as far as wave slots do. Returns whether all are there or on their way.

        `stream` takes over what it asks for; one that does not protect residency, as decode does, gives up the rest, as
        far as it was not begun; what was is kept. An error is met by whoever asks for the expert. Nobody sees an expert
        before its reader looks again: so `settle_ahead`.
        """
        return self._loads.read_ahead(layer, experts, protect=protect_residency)

    @contextmanager
    def shared_reads(self, layer: int, experts: Sequence[int]) -> Iterator[None]:
        """While a prompt wants these, the node's other GPUs read their parts of what is missing: `sharded_reads`."""
        shards = self._source.shards
        if shards is None:
            yield
            return
        shards.deal(layer, [expert for expert in experts if self._tables.slot_of[layer, expert] < 0])
        try:
            yield
        finally:
            shards.end()

    @property
    def errands(self) -> bool:
        """Whether another worker's prompt, or a placement, waits for what this one reads."""
        return self._loads.errands

    def run_errands(self, *, idle: bool) -> None:
        """Begin and end reads for other workers' prompts and for placement; with nothing else to do, now and then."""
        self._loads.run_errands(idle=idle)

    def place(self, pins: Sequence[ExpertKey], bytes_per_second: float) -> None:
        """From any thread: these keep their layers' slots from now on, and are brought at that pace."""
        self._loads.place(pins, bytes_per_second)
        if self._source.shards is not None:
            self._source.shards.peers.on_wanted()

    def call_when_asked(self, wake: Callable[[], None]) -> None:
        """`wake` is called from another thread when there may be errands."""
        if self._source.shards is not None:
            self._source.shards.peers.on_wanted = wake

    def settle_ahead(self) -> None:
        """Give up what was read ahead and not asked for; waits for what is under way."""
        self._tables.look(over=True)
        self._loads.ahead.settle()
        self._source.settle()

    def count(self, layer: int, ids: npt.NDArray[np.int64]) -> None:
        """Note accesses of experts, of any shape, for whoever places them; what is used least is evicted first."""
        if self.store.alone and (self.plan.fully_resident or self.plan.pinned):  # nothing of a layer's is evicted
            return
        if not self.store.alone or self._source.shards is not None:
            accesses_E = self._tables.accesses[self._tables.row, layer]
            accesses_E += np.bincount(ids.reshape(-1), minlength=len(accesses_E)).astype(np.uint64)
        self.usage.note(layer, ids)

    def stream(
        self, layer: int, experts: Sequence[int], *, protect_residency: bool
    ) -> Generator[tuple[Lease, ...], None, None]:
        """Lend every expert once, resident ones first, the others as they arrive.

        Leases end when the iterator advances or closes. With `protect_residency` (prefill) no resident expert of the
        layer is evicted: misses pass through wave slots; so it is in every phase when the plan pins experts.

        Raises:
            CacheError: an expert's bytes could not be read. Other loads of the call are finished and kept.
        """
        self._tables.look(over=True)
        if not experts:
            return
        assert len(set(experts)) == len(experts), f"experts are {list(experts)}, must each be named once"
        if self._held is not None and self._held[0] == layer and self._held[1].keys() >= set(experts):
            held = [(ExpertKey(layer, e), self._held[1][e]) for e in experts]  # leased, so there is nobody to ask
            self._tables.touch([slot for _, slot in held])
            self._loads.counts.hits += len(held)
            yield self._leases(held)
            return
        rest = dict.fromkeys(experts)
        try:
            with closing(self._stream(layer, experts, protect_residency)) as waves:
                for leases in waves:
                    for lease in leases:
                        del rest[lease.key.expert]
                    yield leases
        except Stalled:
            for expert in rest:
                yield (self._loads.alone(ExpertKey(layer, expert)),)

    def _stream(
        self, layer: int, experts: Sequence[int], protect_residency: bool
    ) -> Generator[tuple[Lease, ...], None, None]:
        """Together with the others; raises Stalled where that takes for ever, and holds nothing then."""
        self._loads.ahead.land()
        if not protect_residency:
            self._loads.ahead.give_up(layer, experts)
        protect, call = protect_residency or bool(self.plan.pinned), StreamState(time.monotonic())
        try:
            with self._tables.locked_soon():
                slots = self._tables.look_up(layer, experts)
                # of these the lease keeps the bytes from now on
                ready = (slots >= 0) & (self._tables.state[slots] == READY)
                self._sort([ExpertKey(layer, e) for e in experts], slots.tolist(), ready.tolist(), call)
                if call.missing:
                    self._loads.claim(call, protect)
            self._loads.submit_claimed(call)
            yield from self._lend(call)
            while call.missing or call.loads or call.waits:
                self._loads.start(call, protect)
                self._loads.wait(call)
                yield from self._lend(call)
        finally:
            self._loads.settle(call)
            self._loads.kept_C[:] = False

    def warm(self, progress: Callable[..., Iterable[int]] = lambda items, **_: items) -> None:
        """Fill every layer's slots, together with whoever else does: with what is pinned, else with any."""
        layers = len(self.plan.layer_slots)
        first = self._tables.row % layers  # workers that start together begin with different layers
        order = [(first + at) % layers for at in range(layers)]
        for layer in progress(order, total=layers, desc="experts"):
            absent = self._absent(layer)
            for _ in self.stream(layer, absent, protect_residency=True):
                pass
        counts = self._loads.counts
        counts.hits = counts.misses = counts.shared = 0
        self._loads.stall_seconds = 0.0

    def stats(self) -> CacheStats:
        """This worker's counters; readable from any thread."""
        counts, shards = self._loads.counts, self._source.shards
        return CacheStats(
            hits=counts.hits,
            misses=counts.misses,
            bytes_loaded_device=counts.nbytes,
            bytes_read_disk=self._reader.bytes_read,
            bytes_requested_disk=self._reader.bytes_requested,
            host_hits=counts.shared + (0 if self.host is None else self.host.hits),
            peer_hits=0 if shards is None else shards.peers.hits,
            peer_helped=0 if shards is None else shards.helped,
            peer_taken_back=0 if shards is None else shards.taken_back,
            stall_seconds=self.stall_seconds,
        )

    def check_integrity(self) -> None:
        """Assert every invariant of the tables; both sides are in the message."""
        self._tables.check_integrity()
        if self.host is not None:
            self.host.check_integrity()

    def close(self) -> None:
        """Wait for what is in flight, close the files, give the row back. Safe to call twice."""
        self._reader.close()
        self._source.close()
        self.store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _absent(self, layer: int) -> list[int]:
        tables, count = self._tables, self.layout.experts_per_layer[layer]
        pinned, slots = np.flatnonzero(tables.pinned[layer]).tolist(), int((tables.partition == layer).sum())
        first = tables.first(layer, slots)
        wanted = pinned or [e % count for e in range(first, first + min(count, slots))]
        return [e for e in wanted if not tables.entry[layer, e]]

    def _leases(self, ready: Sequence[tuple[ExpertKey, int]]) -> tuple[Lease, ...]:
        generations = self._tables.generation[[slot for _, slot in ready]].tolist()
        return tuple(
            [Lease(*where, generation, self.store) for where, generation in zip(ready, generations, strict=True)]
        )

    def _sort(
        self, keys: Sequence[ExpertKey], slots: Sequence[int], is_ready: Sequence[bool], call: StreamState
    ) -> None:
        """Sort the experts of a call: resident ones are ready, some are being read by others, some are missing."""
        tables, counts = self._tables, self._loads.counts
        for key, slot, ready in zip(keys, slots, is_ready, strict=True):
            if ready:
                call.ready.append((key, slot))
            elif key in self._loads.ahead:
                tables.release([slot])  # looked up, and held by the load already
                call.loads.append(self._loads.ahead.take(key))
            elif slot >= 0:
                call.waits.append((key, slot))
            else:
                call.missing.append(key)
        self._loads.kept_C[[slot for _, slot in call.ready]] = True
        counts.hits += len(call.ready)
        counts.misses += len(keys) - len(call.ready)
        counts.shared += len(call.waits)

    def _lend(self, call: StreamState) -> Iterator[tuple[Lease, ...]]:
        """One wave of what is ready; its leases end when the iterator advances or closes."""
        if not call.ready:
            return
        ready, call.ready = call.ready, []
        try:
            yield self._leases(ready)
        finally:
            self._tables.release([slot for _, slot in ready])


def open_private(
    layout: ExpertLayout,
    plan: SlotPlan,
    *,
    reader: DiskReader,
    device: Device | None = None,
    host_slots: int = 0,
    host: HostTier | None = None,
    peers: SlotPeers | None = None,
) -> ExpertCache:
    """A cache with slots of its own on `device`, None is the CPU; one apart always goes through host slots, at least 4.

    Args:
        host_slots: experts a host tier of this cache's own keeps; 0 is none.
        host: a host tier shared with others, closed with the cache, instead.
        peers: memory for the slots, of a device apart, and others' slots to read from; closed with the cache.
    """
    device = device or open_device("cpu")
    store = PrivateStore(layout, plan, device=device, peers=peers)
    host_slots = min(host_slots, sum(layout.experts_per_layer))  # more would be pinned and never filled
    host_slots = max(host_slots, _STAGING_SLOTS) if device.apart else host_slots
    if host is None and host_slots:
        host = HostTier(PrivateStore.of_waves(layout, host_slots), reader=reader, device=device)
    source = None if host is None else HostSource(store, host, device, peers)
    return ExpertCache(store, reader=reader, source=source)
