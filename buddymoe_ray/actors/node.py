"""A worker's side of its node: finds or starts the node's HostStore and the service's Placement, and stays registered.

The only place that names ray's actors. A worker never waits for them once it serves: what they would say (where peers
are, which map) is fetched by a thread of its own, and while they are away the last answer stands.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from buddymoe_ray.actors.host_store import HostStore, KeeperOptions
from buddymoe_ray.actors.placement import PlacementOptions
from buddymoe_ray.actors.placement_actor import PlacementActor, end_this_actor
from buddymoe_ray.actors.words import Directive, NodeReport, NodeView
from buddymoe_ray.errors import BuddyMoEError
from buddymoe_ray.observe import PlacementSnapshot
from buddymoe_ray.residency.device_pool import DevicePool
from buddymoe_ray.residency.sharing import Sharing, StoreSpec
from buddymoe_ray.types import ExpertLayout

__all__ = ["NAMESPACE", "MemoryOptions", "NodeMemory", "node_tag", "pool_report"]

log = logging.getLogger(__name__)

NAMESPACE = "buddymoe"
_CALL_SECONDS = 10.0
_START_SECONDS = 300.0
_BEAT_SECONDS = 1.0

PeerAddresses = tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class MemoryOptions:
    """How a service keeps its experts: `service` names it within the cluster, `workers` share a node, and are linked to
    those of other nodes, once there are any, that prove `secret`."""

    service: str
    workers: int
    movable: bool
    secret: str
    keeper: KeeperOptions
    placement: PlacementOptions


class Linked(Protocol):
    """An engine that may compute for others and ask them."""

    @property
    def link_address(self) -> str:
        """Where it answers; empty when it does not."""

    def link(self) -> None:
        """Begin to answer, and to ask; once."""

    def link_seconds(self) -> Mapping[str, float]:
        """How long each peer takes to answer."""

    def set_peers(self, peers: Mapping[str, str]) -> None:
        """From now on these are the other nodes' workers: name to address."""


class HostStoreActor(HostStore):
    """A HostStore that ray restarts when it is killed, and that ends itself when nobody needs it."""

    def __init__(self, spec: StoreSpec, *, node: str, options: KeeperOptions, service: str) -> None:
        os.nice(5)  # filling and moving must not take the cores from workers that compute
        planner = _RayPlanner(_placement_name(service, spec.layout))
        super().__init__(spec, node=node, options=options, planner=planner, on_idle=end_this_actor)

    def pid(self) -> int:
        """This actor's process."""
        return os.getpid()


class _RayPlanner:
    """The service's Placement, by name, whichever incarnation runs."""

    def __init__(self, name: str) -> None:
        self._name = name

    def report(self, report: NodeReport) -> Directive | None:
        directive: Directive
        try:
            handle = ray.get_actor(self._name, namespace=NAMESPACE)
            directive = _got(handle.report.remote(report))
        except (ValueError, RayError, GetTimeoutError) as error:
            log.warning("no placement now (%s): the last map stands", type(error).__name__)
            return None
        return directive


class NodeMemory:
    """The experts of this worker's node. Call `sharing` for the engine, then `join` once it is loaded."""

    def __init__(self, options: MemoryOptions) -> None:
        self._options = options
        self._node = ray.get_runtime_context().get_node_id()
        self._store: Any = None
        self._pool: DevicePool | None = None
        self._epoch, self._window = 0, 0.0  # of the device's pool
        self._followed: tuple[int, float] | None = None  # epoch and when the placement last said so
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._worker = ""

    def sharing(self) -> Sharing:
        """What the engine is to share, and with whom."""
        options = self._options
        return Sharing(
            workers=options.workers,
            tag=node_tag(self._node),
            movable=options.movable,
            linked=True,
            secret=options.secret,
            host=ray.util.get_node_ip_address(),
            keeper=self._keep,
            placer=self._place if options.movable else None,
        )

    def join(self, worker: str, engine: Linked) -> None:
        """Register `worker`, and tell its engine whenever the other nodes' addresses change. Does nothing when the
        engine shares nothing."""
        if self._store is None and self._pool is None:
            return
        self._worker = worker
        self._thread = threading.Thread(target=self._beat, args=(worker, engine), name="node-memory", daemon=True)
        self._thread.start()

    def placement(self) -> PlacementSnapshot | None:
        """The map that this worker's experts follow; None before the placement has said anything."""
        if self._followed is None:
            return None
        epoch, told = self._followed
        return PlacementSnapshot(epoch=epoch, age_seconds=time.monotonic() - told)

    def close(self) -> None:
        """Leave. Safe to call twice."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=_CALL_SECONDS)
            self._thread = None
            try:
                if self._store is not None:
                    self._store.forget.remote(self._worker)
            except RayError as error:
                log.debug("the host store is gone: %s", error)

    def _keep(self, spec: StoreSpec) -> None:
        """Called by the engine before it attaches: the store is made and kept by the actor, and so charged to it."""
        options = self._options
        _ensure_placement(options, spec.layout)
        tag = node_tag(self._node)
        self._store = (
            ray.remote(HostStoreActor)
            .options(
                name=f"host-store-{tag}-{spec.digest.hex()[:16]}",
                namespace=NAMESPACE,
                get_if_exists=True,
                lifetime="detached",
                num_cpus=0,
                max_restarts=-1,
                max_concurrency=4,
                scheduling_strategy=NodeAffinitySchedulingStrategy(self._node, soft=False),
            )
            .remote(spec, node=self._node, options=options.keeper, service=options.service)
        )
        ray.get(self._store.status.remote(), timeout=_START_SECONDS)

    def _place(self, pool: DevicePool) -> None:
        """Called by the engine: its device slots are one of the pools that the service places experts in."""
        _ensure_placement(self._options, pool.layout)
        self._pool = pool

    def _follow(self, pool: DevicePool) -> None:
        """Report a window of the device's, and take over a new map."""
        keeper, planner = self._options.keeper, _RayPlanner(_placement_name(self._options.service, pool.layout))
        self._window = time.monotonic() + keeper.window_seconds
        report = pool_report(pool, name=f"{self._node}/{self._worker}", machine=self._node, epoch=self._epoch)
        directive = planner.report(report)
        if directive is None:
            return
        if directive.epoch > self._epoch:
            self._epoch = directive.epoch
            pool.pin(directive.pins, keeper.bytes_per_second)
        self._followed = self._epoch, time.monotonic()

    def _beat(self, worker: str, engine: Linked) -> None:
        known: PeerAddresses | None = None
        while True:
            try:
                if self._pool is not None and time.monotonic() >= self._window:
                    self._follow(self._pool)
                if self._store is not None:
                    known = self._register(worker, engine, known)
            except (RayError, GetTimeoutError) as error:
                log.warning("no host store now (%s): the shared file stays in use", type(error).__name__)
            except BuddyMoEError as error:
                log.warning("other nodes cannot be linked now: %s", error)
            if self._stop.wait(_BEAT_SECONDS):
                return

    def _register(self, worker: str, engine: Linked, known: PeerAddresses | None) -> PeerAddresses:
        """Say that the worker is there; where the other nodes' are, told to the engine if that is news."""
        if not engine.link_address and sum(entry["Alive"] for entry in ray.nodes()) > 1:  # alone it does not listen
            engine.link()
        said = (worker, os.getpid(), engine.link_address, tuple(engine.link_seconds().items()))
        view: NodeView = _got(self._store.register.remote(*said))
        if view.placement is not None:
            self._followed = view.placement.epoch, time.monotonic() - view.placement.age_seconds
        if view.peers != known:
            engine.set_peers(dict(view.peers))
        return view.peers


def pool_report(pool: DevicePool, *, name: str, machine: str, epoch: int) -> NodeReport:
    """A device's window."""
    counts_LE = pool.counts()
    return NodeReport(
        node=name,
        machine=machine,
        links=(),
        experts_per_layer=pool.layout.experts_per_layer,
        expert_bytes=pool.layout.expert_bytes,
        pin_slots=pool.slots,
        counts_LE=counts_LE,
        fetch_seconds=pool.fetch_seconds,
        peer_seconds=pool.peer_seconds,
        link_seconds=(),
        standin_LE=np.ones_like(counts_LE),  # what no device holds is read from the host, and that is all it costs
        epoch=epoch,
        pins=pool.pins,
    )


def node_tag(node: str) -> str:
    """A node's id, short enough for file and actor names."""
    return node[:12]


def _got(call: Any) -> Any:
    return ray.get(call, timeout=_CALL_SECONDS)


def _ensure_placement(options: MemoryOptions, layout: ExpertLayout) -> None:
    ray.remote(PlacementActor).options(
        name=_placement_name(options.service, layout),
        namespace=NAMESPACE,
        get_if_exists=True,
        lifetime="detached",
        num_cpus=0,
        max_restarts=-1,
    ).remote(options.placement, idle_seconds=options.keeper.idle_seconds + 4 * options.placement.window_seconds)


def _placement_name(service: str, layout: ExpertLayout) -> str:
    """By what is placed, too: where a service is deployed again with another model, the store of the one before may
    report for a minute yet, and its map is of other experts."""
    placed = repr((layout.experts_per_layer, layout.expert_bytes)).encode()
    return f"placement-{service}-{hashlib.blake2b(placed, digest_size=6).hexdigest()}"
