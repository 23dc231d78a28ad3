"""What `serve run deployments/*.yaml` deploys: one ingress, and `workers` replicas that each hold an engine.

Knows ray's options, not requests. `import_path: buddymoe_ray.serve.app:build_app`. No postponed annotations in this
file: ray reads the builder's annotation to type-check the YAML's `args`.
"""

import secrets
from typing import Any

import ray
from ray import serve
from ray.serve import Application
from ray.serve.schema import LoggingConfig

from buddymoe_ray.serve.args import ServeArgs
from buddymoe_ray.serve.handles import WORKER_NAME
from buddymoe_ray.serve.ingress import Ingress
from buddymoe_ray.serve.listening import Address
from buddymoe_ray.serve.replica import OpenEngine, WorkerReplica, open_async_engine
from buddymoe_ray.serve.resources import SEES_ALL_GPUS, resolve_workers
from buddymoe_ray.serve.router import affinity_routing

__all__ = ["application", "build_app"]

INGRESS_NAME = "ingress"
HEAD = "node:__internal_head__"  # what ray calls the head node among its resources
INGRESS_ONGOING = 10_000  # the workers' queues are the limit; the ingress must always have room to say so
CONSTRUCTOR_TRIES = 2  # a model that cannot be served is said soon; a device that is being freed gets a second chance
QUIET = LoggingConfig(enable_access_log=False)  # whoever speaks HTTP logs every request and its status
CONTROL_CALLS = 16  # room for health checks and snapshots beside a worker's full queue


def _cluster_resources() -> dict[str, float]:
    """What the cluster has that this process is, or can be, connected to."""
    if not ray.is_initialized():
        ray.init(address="auto", log_to_driver=False)
    return ray.cluster_resources()


def build_app(args: ServeArgs) -> Application:
    """The application that `args` describe."""
    return application(args, open_engine=open_async_engine)


def application(args: ServeArgs, *, open_engine: OpenEngine, address: Address | None = None) -> Application:
    """The same with another way to open engines (tests pass a fake), whose ingress listens at `address` itself, on the
    head node."""
    workers = resolve_workers(args.workers, args.num_gpus, _cluster_resources() if args.workers == "auto" else {})
    most = max(workers, args.max_workers or workers)
    options: dict[str, Any] = {"num_replicas": workers}
    if most > workers:
        target = max(1, args.max_running // 2)  # half the slots busy: room for a burst until the next worker is there
        options = {
            "autoscaling_config": {"min_replicas": workers, "max_replicas": most, "target_ongoing_requests": target}
        }
    if args.routing == "affinity":
        options["request_router_config"] = affinity_routing(args.max_running)
    actor: dict[str, Any] = {"num_cpus": args.num_cpus, "num_gpus": args.num_gpus}
    if args.num_gpus > 0:
        actor["runtime_env"] = {"env_vars": dict(SEES_ALL_GPUS)}
    worker = serve.deployment(
        name=WORKER_NAME,
        **options,
        ray_actor_options=actor,
        max_ongoing_requests=args.max_running + args.max_queued_requests + CONTROL_CALLS,
        max_queued_requests=args.max_queued_requests,
        max_constructor_retry_count=CONSTRUCTOR_TRIES,
        health_check_period_s=2,
        logging_config=QUIET,
        health_check_timeout_s=60,
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=args.drain_seconds,
    )(WorkerReplica)
    ingress = serve.deployment(
        name=INGRESS_NAME,
        num_replicas=1,
        ray_actor_options={"num_cpus": 0, "resources": {HEAD: 0.001} if address else {}},
        max_ongoing_requests=INGRESS_ONGOING,
        logging_config=QUIET,
        max_constructor_retry_count=CONSTRUCTOR_TRIES,
        health_check_period_s=1,  # a dead one is replaced so much later at most
        graceful_shutdown_wait_loop_s=0.2,
        # when all is replaced, the old ingress sees its streams through, which go on at the new workers
        graceful_shutdown_timeout_s=args.drain_seconds + args.request_timeout_seconds,
    )(serve.ingress()(Ingress))
    replicas = worker.bind(args, open_engine, secrets.token_hex(32), most)
    app: Application = ingress.bind(args, replicas, address, most == 1)
    return app
