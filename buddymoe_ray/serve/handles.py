"""Workers behind a Ray Serve deployment handle: streaming calls to one of them, and calls to every replica for health.

The one place where ray's ways to fail become refusals or `WorkerLost`. Knows neither HTTP nor engines. Invariant:
leaving `generate` early, for whatever reason, cancels the call in whichever replica runs it. Serve's router forgets a
replica when a call to it dies, so the next attempt meets another one.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import ray
from grpc.aio import AioRpcError
from ray import serve
from ray.exceptions import NodeDiedError, ObjectLostError, RayActorError, RayError, RayTaskError, WorkerCrashedError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException, RequestCancelledError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from ray.serve.schema import ApplicationStatus

from buddymoe_ray.errors import CapacityError, ConfigError
from buddymoe_ray.observe import EngineSnapshot
from buddymoe_ray.serve.channel import Channel
from buddymoe_ray.serve.refusals import STOPPED, failure, overloaded, unavailable
from buddymoe_ray.serve.resume import WorkerLost
from buddymoe_ray.serve.work import Refusal, Reply, Work, WorkerInfo, WorkerReport

__all__ = ["APP_NAME", "WORKER_NAME", "ReplicaWorkers", "connect"]

log = logging.getLogger(__name__)

APP_NAME = "buddymoe"
WORKER_NAME = "worker"
HEALTH_SECONDS = 5.0
LOOK_SECONDS = 1.0  # while a worker runs, whether one does is asked so often at most, and only while requests come
LIGHT_CHARACTERS = 1 << 18
LOST = (RayActorError, NodeDiedError, ObjectLostError, WorkerCrashedError)  # the replica, or its node with its replies


class ReplicaWorkers:
    """All replicas of the worker deployment behind `handle`. Clients that are refused are told to come back after
    `retry_after_seconds`. A `lone` one, of this node, is asked on a channel once it was reached."""

    def __init__(
        self, handle: DeploymentHandle[Any], *, retry_after_seconds: int = 2, num_gpus: float = 0, lone: bool = False
    ) -> None:
        self._handle, self._num_gpus = handle, num_gpus
        self._looked_at, self._absent, self._ending = -math.inf, "", False
        self._streaming = handle.options(stream=True)
        self._light = handle.options(stream=True, _by_reference=False, response_serialization="pickle")
        self._retry_after = retry_after_seconds
        self._lone = lone
        self._reaching: asyncio.Task[Channel | None] | None = None

    def generate(self, work: Work) -> AsyncGenerator[Reply, None]:
        """Answer `work` on one replica: an attempt of `resume.resumable`. What moves waits for a replica while the
        application is to stay, new work is refused while none runs. Raises WorkerLost."""
        if (channel := self.channel()) is not None:
            with suppress(TypeError, ValueError):  # what a message of it cannot hold goes through Serve
                return channel.generate(work)
        return self._generate(work)

    def channel(self) -> Channel | None:
        """That of a lone worker, from a moment after it was asked for first, or is there again."""
        if self._lone and self._reaching is None:
            self._reaching = asyncio.create_task(self._reach())
        if self._reaching is None or not self._reaching.done():
            return None
        channel = self._reaching.result()
        if channel is None or not channel.is_open:
            self._reaching = channel = None
        return channel

    async def _reach(self) -> Channel | None:
        try:
            return await Channel.open(await self._handle.channel.remote())
        except (OSError, RayError, RayServeException) as error:
            log.info("the worker is asked through Serve: %s", error)
            return None

    async def _generate(self, work: Work) -> AsyncGenerator[Reply, None]:
        absent = await self._why_absent()
        if absent and (self._ending or not work.resume):
            refusal = unavailable(absent, retry_after_seconds=self._retry_after)
            yield replace(refusal, code=STOPPED) if self._ending else refusal
            return
        response = (self._light if _is_light(work) else self._streaming).generate.remote(work)
        assert isinstance(response, DeploymentResponseGenerator), f"a streaming handle answered {response!r}"
        try:
            async for reply in response:
                yield reply
        except (RayServeException, RayTaskError) as error:
            yield self._refusal(error)
        except LOST as error:
            raise WorkerLost(f"the worker is gone ({type(error).__name__})") from error
        except AioRpcError as error:
            raise WorkerLost(f"the worker is gone ({error.code()})") from error
        finally:
            response.cancel()  # type: ignore[no-untyped-call]

    async def info(self) -> WorkerInfo:
        """What is served, from any replica. Raises CapacityError while none runs."""
        absent = await self._why_absent()
        if absent:
            raise CapacityError(f"{absent}. hint: retry later, or see /health")
        try:
            async with asyncio.timeout(HEALTH_SECONDS):
                info: WorkerInfo = await self._handle.info.remote()
        except (TimeoutError, RayServeException, *LOST) as error:
            raise CapacityError(f"no worker answers ({type(error).__name__}). hint: retry later") from error
        return info

    def info_sync(self) -> WorkerInfo:
        """`info` for callers without an event loop."""
        if absent := self._look():
            raise CapacityError(f"{absent}. hint: retry later, or see /health")
        info: WorkerInfo = self._handle.info.remote().result()
        return info

    def snapshots_sync(self) -> tuple[EngineSnapshot, ...]:
        """The engines of all replicas that answer, now."""
        try:
            answers = self._handle.broadcast("snapshot").results(timeout_s=HEALTH_SECONDS, return_exceptions=True)
        except (TimeoutError, RayServeException):
            return ()
        return tuple(answer for answer in answers if isinstance(answer, EngineSnapshot))

    async def reports(self, *, experts: bool = False) -> tuple[WorkerReport, ...]:
        """Every replica's counters; a replica that does not answer is left out."""
        try:
            answers = await self._handle.broadcast("report", experts=experts).results_async(
                timeout_s=HEALTH_SECONDS, return_exceptions=True
            )
        except (TimeoutError, RayServeException):
            return ()
        return tuple(answer for answer in answers if isinstance(answer, WorkerReport))

    async def health(self) -> tuple[str | None, ...]:
        """Every running replica's health; a service without replicas reports one problem."""
        try:
            answers = await self._handle.broadcast("check_health").results_async(
                timeout_s=HEALTH_SECONDS, return_exceptions=True
            )
        except (TimeoutError, RayServeException) as error:
            return (f"{type(error).__name__}: no worker answers",)
        return tuple(None if answer is None else _one_line(answer) for answer in answers) or ("no worker runs",)

    async def _why_absent(self) -> str:
        """Why no replica runs; empty when one does, as of a moment ago. Nobody is refused for what was a moment ago."""
        now = time.monotonic()
        if self._absent or now - self._looked_at >= LOOK_SECONDS:
            self._looked_at = now
            self._absent = await asyncio.to_thread(self._look)
        return self._absent

    def _look(self) -> str:
        found = serve.status().applications.get(self._handle.app_name)
        self._ending = found is not None and found.status == ApplicationStatus.DELETING
        deployment = None if found is None else found.deployments.get(self._handle.deployment_name)
        counts = {} if deployment is None else {at.lower(): count for at, count in deployment.replica_states.items()}
        if deployment is None or counts.get("running"):
            return ""
        gpus = ray.cluster_resources().get("GPU", 0)
        if gpus < self._num_gpus:
            return f"no worker runs: num_gpus is {self._num_gpus:g} and the cluster has {gpus:g} GPUs"
        states = ", ".join(f"{count} {state}" for state, count in counts.items())
        said = deployment.message.strip().splitlines()
        return f"no worker runs yet ({states or 'none started'})" + (f": {said[-1][:300].rstrip('.')}" if said else "")

    def _refusal(self, error: Exception) -> Refusal:
        if isinstance(error, BackPressureError):
            return overloaded(calls=error.args[0], retry_after_seconds=self._retry_after)
        if isinstance(error, DeploymentUnavailableError):
            return unavailable("no worker is ready", retry_after_seconds=self._retry_after)
        if isinstance(error, RequestCancelledError):  # its client left: Serve logs that
            return unavailable("the request was cancelled", retry_after_seconds=self._retry_after)
        log.error("a worker failed", exc_info=error)
        return failure()


def connect(app_name: str, *, address: str) -> ReplicaWorkers:
    """The workers of a running application, from any process that reaches its ray cluster.

    Raises:
        ConfigError: there is no such cluster or application.
    """
    try:
        if not ray.is_initialized():
            ray.init(address=address, log_to_driver=False)
        return ReplicaWorkers(serve.get_deployment_handle(WORKER_NAME, app_name))
    except (RayServeException, ConnectionError, KeyError) as error:  # KeyError: serve runs, but not this app
        raise ConfigError(
            f"app is {app_name!r}, must be a running application ({error}). hint: serve run deployments/tiny-cpu.yaml"
        ) from error


def _is_light(work: Work) -> bool:
    """Whether it goes by gRPC, from process to process: a batch takes .6 ms of CPU less than as an object of ray's, of
    2 in worker and ingress, but may have no more than 4 MB. So streams of nothing but tokens do."""
    told = work.sampling.logprobs is not None or work.sampling.prompt_logprobs is not None
    return work.flush_seconds is not None and not (told or work.spells_only) and len(repr(work)) < LIGHT_CHARACTERS


def _one_line(error: BaseException) -> str:
    cause = error.cause if isinstance(error, RayTaskError) else error
    return f"{type(cause).__name__}: {cause}".splitlines()[0]
