"""The keeper of one node's expert store: fills it, keeps it while workers come and go, moves experts by the map.

Workers attach to the file themselves and never call this actor for an expert. What it does: own the file (so that a
worker's restart finds it filled), free what killed workers held, count accesses per window for the Placement actor,
migrate in the background. Killed and restarted, it finds its file by the same spec and goes on. It ends itself, and the
file with it, when nobody was attached for a while. All work on the store is done by one thread; the methods that ray
calls only read.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from buddymoe_ray.actors.words import Directive, NodeReport, NodeView, StoreStatus
from buddymoe_ray.cache import DiskReader, ExpertCache
from buddymoe_ray.cache.shared import Move, Mover, watch
from buddymoe_ray.cache.shared.shape import HeaderWord
from buddymoe_ray.cache.shared.tables import READY, WAVE
from buddymoe_ray.errors import BuddyMoEError
from buddymoe_ray.observe import PlacementSnapshot, progress
from buddymoe_ray.residency.sharing import StoreSpec
from buddymoe_ray.types import ExpertKey

__all__ = ["HostStore", "KeeperOptions", "Planner"]

log = logging.getLogger(__name__)

_TICK_SECONDS = 0.25
_DEPTH, _BUFFER_BYTES = 2, 1 << 20
_ASSUMED_BYTES_PER_SECOND = 500e6  # of the disk, until this store has read enough to know


LinkSeconds = tuple[tuple[str, float], ...]


class Planner(Protocol):
    """Who decides what is pinned: the Placement actor, or a test's own."""

    def report(self, report: NodeReport) -> Directive | None:
        """Take a window's counts; None when there is nothing new (or nobody to ask now)."""


@dataclass(frozen=True, kw_only=True)
class KeeperOptions:
    """How a node's store is kept.

    Args:
        window_seconds: how often accesses are reported and the map followed.
        bytes_per_second: most that background migration reads.
        pin_share: share of the layers' slots that the map may pin; the rest follows demand.
        idle_seconds: how long the store outlives its last worker.
    """

    window_seconds: float = 5.0
    bytes_per_second: float = 200e6
    pin_share: float = 0.5
    idle_seconds: float = 60.0


@dataclass(frozen=True, kw_only=True)
class _Registered:
    pid: int
    address: str
    link_seconds: LinkSeconds


class HostStore:
    """Keeps the store of `spec` on `node`. `on_idle` is called once, when nobody used it for `idle_seconds`."""

    def __init__(
        self,
        spec: StoreSpec,
        *,
        node: str,
        options: KeeperOptions | None = None,
        planner: Planner | None = None,
        on_idle: Callable[[], None] = lambda: None,
    ) -> None:
        self._spec, self._node, self._options = spec, node, options or KeeperOptions()
        self._planner, self._on_idle = planner, on_idle
        self._workers: dict[str, _Registered] = {}
        self._peers: tuple[tuple[str, str], ...] = ()
        self._told = -np.inf  # when the placement last said something
        self._filled, self._error = threading.Event(), ""
        self._moves = self._moved_bytes = self._skipped = 0
        self._pins: tuple[tuple[int, int], ...] = ()
        self._stop = threading.Event()
        # another keeper may be on its way out: its lock is gone when its process is
        self._store = spec.open(progress)
        self._store.own()
        watch(spec.path.parent, spec.tag)
        self._tables = self._store.tables
        reader, own = (DiskReader(depth=n, buffer_bytes=_BUFFER_BYTES, files=spec.layout.files) for n in (_DEPTH, 1))
        self._cache = ExpertCache(self._store, reader=reader)
        self._mover = Mover(self._store, own, bytes_per_second=self._options.bytes_per_second)
        self._accesses_LE = self._tables.accesses.sum(axis=0)
        self._fetch_seconds = self._spec.layout.expert_bytes / _ASSUMED_BYTES_PER_SECOND
        self._thread = threading.Thread(target=self._run, name="host-store", daemon=True)
        self._thread.start()

    def register(self, worker: str, pid: int, address: str = "", link_seconds: LinkSeconds = ()) -> NodeView:
        """A worker of this node says that it is there, where it answers peers and how fast they answer it."""
        living = set(self._tables.pid.tolist())
        self._workers = {name: known for name, known in self._workers.items() if known.pid in living}
        self._workers[worker] = _Registered(pid=pid, address=address, link_seconds=link_seconds)
        age = time.monotonic() - self._told
        epoch = int(self._tables.head[HeaderWord.EPOCH])
        placement = None if age == np.inf else PlacementSnapshot(epoch=epoch, age_seconds=age)
        return NodeView(peers=self._peers, placement=placement)

    def forget(self, worker: str) -> None:
        """A worker says that it leaves."""
        self._workers.pop(worker, None)

    def status(self) -> StoreStatus:
        """The store, now."""
        tables, workers = self._tables, tuple(sorted(self._workers))
        return StoreStatus(
            path=str(self._spec.path),
            node=self._node,
            nbytes=self._store.tables.nbytes,
            attached=int((tables.pid != 0).sum()) - 1,
            resident=int((tables.state == READY).sum()),
            made=self._store.made,
            filled=self._filled.is_set(),
            epoch=int(tables.head[HeaderWord.EPOCH]),
            pinned=int(tables.pinned.sum()),
            moves=self._moves,
            moved_bytes=self._moved_bytes,
            skipped=self._skipped,
            pid=os.getpid(),
            workers=workers,
            shards=tuple(self._pins[at :: len(workers)] for at in range(len(workers))),
            error=self._error,
        )

    def close(self) -> None:
        """Stop the thread and let go of the file, which goes with its last user. Safe to call twice."""
        self._stop.set()
        self._thread.join(timeout=60)

    def _run(self) -> None:
        try:
            began = time.monotonic()
            self._cache.warm(progress)
            self._note_speed(time.monotonic() - began)
            self._filled.set()
            self._keep()
        except BuddyMoEError as error:  # workers meet the same error with their own request
            self._error = str(error)
            log.error("the store of %s is not kept: %s", self._node, error)
        finally:
            self._mover.close()
            self._cache.close()

    def _keep(self) -> None:
        window = time.monotonic() + self._options.window_seconds
        used = time.monotonic()
        while not self._stop.wait(_TICK_SECONDS):
            with self._tables.locked():
                self._tables.reap()
            now = time.monotonic()
            if (self._tables.pid != 0).sum() > 1:
                used = now
            elif now - used > self._options.idle_seconds:
                self._on_idle()
                return
            try:
                if now >= window:
                    window = now + self._options.window_seconds
                    self._follow()
                self._move(until=window)
            except Exception as error:  # placement is an improvement: without it the store is still kept
                self._error = f"{type(error).__name__}: {error}"
                log.exception("the map is not followed")

    def _note_speed(self, seconds: float) -> None:
        """What the fill says about the disk, if it read enough to say anything."""
        read = self._cache.stats().bytes_read_disk
        if read >= 16 * self._spec.layout.expert_bytes:
            self._fetch_seconds = self._spec.layout.expert_bytes * seconds / read

    def _follow(self) -> None:
        """Report a window, and take over a new map."""
        if self._planner is None or self._spec.below:
            return
        directive = self._planner.report(self._report())
        if directive is None:
            return
        self._peers, self._told = directive.peers, time.monotonic()
        if directive.epoch > int(self._tables.head[HeaderWord.EPOCH]):
            self._pins = directive.pins
            self._mover.pin([ExpertKey(*pin) for pin in directive.pins])
            self._tables.head[HeaderWord.EPOCH] = directive.epoch

    def _move(self, *, until: float) -> None:
        """Bring pinned experts that are not here, as far as this window lasts; the next one goes on."""
        moves = self._moves_to([ExpertKey(*pin) for pin in self._pins])
        if moves:
            moved = self._mover.run(moves, lambda: self._stop.is_set() or time.monotonic() >= until)
            self._moves += moved.moves
            self._moved_bytes += moved.nbytes
            self._skipped += moved.skipped

    def _report(self) -> NodeReport:
        accesses_LE = self._tables.accesses.sum(axis=0)
        counts_LE, self._accesses_LE = (accesses_LE - self._accesses_LE).astype(np.float32), accesses_LE
        plan, layer_slots = self._spec.plan, int((self._tables.partition >= 0).sum())
        return NodeReport(
            node=self._node,
            links=tuple(known.address for _, known in sorted(self._workers.items()) if known.address),
            experts_per_layer=self._spec.layout.experts_per_layer,
            expert_bytes=self._spec.layout.expert_bytes,
            pin_slots=int(layer_slots * (1.0 if plan.pinned or plan.fully_resident else self._options.pin_share)),
            counts_LE=counts_LE,
            fetch_seconds=self._fetch_seconds,
            link_seconds=self._link_seconds(),
            standin_LE=self._spec.standin_LE,
            epoch=int(self._tables.head[HeaderWord.EPOCH]),
            pins=tuple((int(la), int(e)) for la, e in np.argwhere(self._tables.pinned)),
        )

    def _link_seconds(self) -> LinkSeconds:
        """The fastest that any worker of this node was answered by each peer."""
        least: dict[str, float] = {}
        for known in list(self._workers.values()):
            for peer, seconds in known.link_seconds:
                least[peer] = min(seconds, least.get(peer, seconds))
        return tuple(sorted(least.items()))

    def _moves_to(self, wanted: list[ExpertKey]) -> list[Move]:
        """What is missing of `wanted`, each with something unwanted that goes for it: the least used of its layer, and
        once a layer has none left, of any. Only where the plan pins may a slot change its layer."""
        tables, chosen = self._tables, set(wanted)
        mine = np.flatnonzero((tables.partition != WAVE) & (tables.state == READY))
        keys = [ExpertKey(int(tables.key_layer[s]), int(tables.key_expert[s])) for s in mine]
        usage = tables.usage.usage_LE[tables.key_layer[mine], tables.key_expert[mine]]
        order = np.argsort(usage, kind="stable").tolist()
        spare = [keys[at] for at in order if keys[at] not in chosen]
        moves = []
        for key in wanted:
            if tables.entry[key.layer, key.expert]:
                continue
            evict = next((other for other in spare if other.layer == key.layer), None)
            if evict is None and spare and self._spec.plan.pinned:
                evict = spare[0]
            if evict is not None:
                spare.remove(evict)
                moves.append(Move(load=key, evict=evict))
        return moves
