"""The worker as Ray Serve runs it: an engine on its node's shared experts, registered with who keeps and places them.

Joins `worker.Worker` (requests), `actors.NodeMemory` (memory) and metrics; knows neither HTTP nor how either works.
Torch is imported where the replica runs: the process that builds the app needs none.
Invariant: what the constructor opened is closed when ray ends the replica, and freed by the others when it is killed.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

import ray
from ray import serve

from buddymoe_ray.config import EngineConfig, visible_gpus_from_environment
from buddymoe_ray.errors import CapacityError
from buddymoe_ray.serve.args import ServeArgs
from buddymoe_ray.serve.ray_metrics import RayMetrics
from buddymoe_ray.serve.resources import assigned_devices, own_device, workers_on_node
from buddymoe_ray.serve.work import Refusal, WorkerReport
from buddymoe_ray.serve.worker import EngineSeam, Worker

if TYPE_CHECKING:
    from buddymoe_ray.actors.node import NodeMemory
    from buddymoe_ray.residency.sharing import Sharing

log = logging.getLogger(__name__)

__all__ = ["OpenEngine", "WorkerReplica", "open_async_engine"]

LEAVE_SECONDS = 1.0  # at most until a worker without an engine has told those whom it answered

OpenEngine = Callable[[EngineConfig, str, "Sharing"], EngineSeam]
"""`open_engine(config, model name, with whom it shares its experts)`."""


def open_async_engine(config: EngineConfig, model_id: str, sharing: Sharing | None = None) -> EngineSeam:
    """The real engine; without `sharing` its experts are its own."""
    from buddymoe_ray.engine.async_engine import AsyncEngine
    from buddymoe_ray.engine.engine import Engine

    return AsyncEngine(Engine.from_config(config, sharing=sharing), model_id=model_id)


class WorkerReplica(Worker):
    """A worker that opens its engine where ray puts it.

    `secret` is what workers of a service prove to each other, `most_workers` how many there may be at once.
    """

    def __init__(self, args: ServeArgs, open_engine: OpenEngine, secret: str, most_workers: int) -> None:
        context = serve.get_replica_context()
        replica = context.replica_id.unique_id
        self._memory = _node_memory(args, service=context.app_name, secret=secret, most_workers=most_workers)
        super().__init__(
            open_engine(_on_own_gpu(args.engine_config()), args.served_name, self._memory.sharing()),
            default_max_tokens=args.default_max_tokens,
            max_queued_requests=args.max_queued_requests,
            retry_after_seconds=args.retry_after_seconds,
            name=replica,
            devices=assigned_devices(),
        )
        self._binding = args.binding()
        if assigned_devices() and not _cuda_is_here():
            log.warning("ray assigned GPU %s and torch sees no CUDA device: the CPU computes", assigned_devices())
        self._metrics = RayMetrics(model=args.served_name, replica=replica)
        self._memory.join(replica, self._engine)
        self._leaving: asyncio.Task[None] | None = None

    async def record_routing_stats(self) -> dict[str, float]:
        """Ray asks now and then, and shows it to the routers."""
        return {"residency": self.snapshot().residency}

    def report(self, *, experts: bool = False) -> WorkerReport:
        """The worker's, with the map that its node follows."""
        return replace(super().report(experts=experts), placement=self._memory.placement())

    async def check_health(self) -> None:
        """Ray asks every two seconds, which is a good pace for metrics too."""
        self._metrics.publish(self.snapshot())
        try:
            await super().check_health()
        except CapacityError as error:
            self._lost(error)
            raise

    def _lost(self, error: CapacityError) -> Refusal:
        if self._leaving is None or self._leaving.done():
            self._leaving = asyncio.create_task(self._leave_if_dead())
        return super()._lost(error)

    async def _leave_if_dead(self) -> None:
        """End the process when its engine has died. Serve replaces what fails three checks; for those six seconds its
        routers would send all that comes to this worker, which has the shortest queue."""
        with suppress(CapacityError):
            return await self._engine.check_health()
        log.critical("the engine has died, so this worker ends")
        with suppress(TimeoutError):
            async with asyncio.timeout(LEAVE_SECONDS):
                await self.settle()
        await asyncio.sleep(LEAVE_SECONDS / 10)  # what was said last is on its way
        os._exit(1)

    async def __del__(self) -> None:  # Serve awaits it once what came through it is done, before the process ends
        if hasattr(self, "_engine"):  # absent when it could not be opened
            await self.settle()
            self._memory.close()
            self.close()


def _on_own_gpu(config: EngineConfig) -> EngineConfig:
    """The config of the GPU that ray assigned, where there is one."""
    if not assigned_devices() or not _cuda_is_here():
        return config
    return replace(config, device=own_device(config.device, assigned_devices(), visible_gpus_from_environment()))


def _cuda_is_here() -> bool:
    from buddymoe_ray.device import open_device

    return open_device("auto").torch.type == "cuda"


def _node_memory(args: ServeArgs, *, service: str, secret: str, most_workers: int) -> NodeMemory:
    from buddymoe_ray.actors.host_store import KeeperOptions
    from buddymoe_ray.actors.node import MemoryOptions, NodeMemory
    from buddymoe_ray.actors.placement import PlacementOptions

    node = ray.get_runtime_context().get_node_id()
    resources = next(entry["Resources"] for entry in ray.nodes() if entry["NodeID"] == node)
    rate, window = 1e6 * args.migration_mb_per_second, args.placement_window_seconds
    return NodeMemory(
        MemoryOptions(
            service=service,
            workers=workers_on_node(most_workers, num_cpus=args.num_cpus, num_gpus=args.num_gpus, node=resources),
            movable=args.placement == "dynamic",
            secret=secret,
            keeper=KeeperOptions(window_seconds=window, bytes_per_second=rate),
            placement=PlacementOptions(window_seconds=window, bytes_per_second=rate),
        )
    )
