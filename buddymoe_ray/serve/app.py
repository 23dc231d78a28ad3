"""What `serve run deployments/*.yaml` deploys: one ingress, and `workers` replicas that each hold an engine.

Knows ray's options, not requests. `import_path: buddymoe_ray.serve.app:build_app`. No postponed annotations in this
file: ray reads the builder's annotation to type-check the YAML's `args`.
"""

from collections.abc import Callable

from ray import serve
from ray.serve import Application

from buddymoe_ray.config import EngineConfig
from buddymoe_ray.serve.args import ServeArgs
from buddymoe_ray.serve.handles import WORKER_NAME
from buddymoe_ray.serve.ingress import Ingress
from buddymoe_ray.serve.ray_metrics import RayMetrics
from buddymoe_ray.serve.worker import EngineSeam, Worker

__all__ = ["application", "build_app"]

INGRESS_NAME = "ingress"
INGRESS_ONGOING = 10_000  # the workers' queues are the limit; the ingress must always have room to say so
CONSTRUCTOR_TRIES = 2  # a model that cannot be served is said soon; a device that is being freed gets a second chance
CONTROL_CALLS = 16  # room for health checks and snapshots beside a worker's full queue

OpenEngine = Callable[[EngineConfig, str], EngineSeam]


def open_async_engine(config: EngineConfig, model_id: str) -> EngineSeam:
    """The real engine. Imported where it runs: the process that builds the app needs no torch."""
    from buddymoe_ray.engine.async_engine import AsyncEngine
    from buddymoe_ray.engine.engine import Engine

    return AsyncEngine(Engine.from_config(config), model_id=model_id)


class WorkerReplica(Worker):
    """A worker that opens its engine where ray puts it."""

    def __init__(self, args: ServeArgs, open_engine: OpenEngine) -> None:
        replica = serve.get_replica_context().replica_id.unique_id
        super().__init__(
            open_engine(args.engine_config(), args.served_name),
            default_max_tokens=args.default_max_tokens,
            max_queued_requests=args.max_queued_requests,
            retry_after_seconds=args.retry_after_seconds,
            name=replica,
        )
        self._metrics = RayMetrics(model=args.served_name, replica=replica)

    async def check_health(self) -> None:
        """Ray asks every two seconds, which is a good pace for metrics too."""
        self._metrics.publish(self.snapshot())
        await super().check_health()

    def __del__(self) -> None:  # ray calls it once running requests are done, before the process ends
        if hasattr(self, "_engine"):  # absent when it could not be opened
            self.close()


def build_app(args: ServeArgs) -> Application:
    """The application that `args` describe."""
    return application(args, open_engine=open_async_engine)


def application(args: ServeArgs, *, open_engine: OpenEngine) -> Application:
    """The same with another way to open engines; tests pass a fake."""
    worker = serve.deployment(
        name=WORKER_NAME,
        num_replicas=args.workers,
        ray_actor_options={"num_cpus": args.num_cpus, "num_gpus": args.num_gpus},
        max_ongoing_requests=args.max_running + args.max_queued_requests + CONTROL_CALLS,
        max_queued_requests=args.max_queued_requests,
        max_constructor_retry_count=CONSTRUCTOR_TRIES,
        health_check_period_s=2,
        health_check_timeout_s=60,
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=args.drain_seconds,
    )(WorkerReplica)
    ingress = serve.deployment(
        name=INGRESS_NAME,
        num_replicas=1,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=INGRESS_ONGOING,
        max_constructor_retry_count=CONSTRUCTOR_TRIES,
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=args.drain_seconds,
    )(serve.ingress()(Ingress))
    app: Application = ingress.bind(args, worker.bind(args, open_engine))
    return app
