"""Starts a ray of its own with Serve and one application, and says why when that cannot start.

Only a cluster that `RAY_ADDRESS` names is joined: one that happens to run here is somebody else's, with its own port,
and applications. There Serve's proxy answers HTTP, on the head node; on a ray of its own the ingress does itself.
Ray's memory monitor is off there: where another process fills the machine's memory it ends all of a service's actors,
store, placement and ingress too, .2 GB each (64 of 64 streams were lost so). Memory is bounded by the plan; where it
runs out all the same the kernel ends who has most.
Knows neither files nor command lines: `commands/serve` checks those before.
"""

from __future__ import annotations

import logging
import signal
import time
from contextlib import ExitStack
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from buddymoe_ray.config import ray_address_from_environment
from buddymoe_ray.errors import BuddyMoEError
from buddymoe_ray.serve.app import application
from buddymoe_ray.serve.args import ServeArgs
from buddymoe_ray.serve.listening import Address, keeping
from buddymoe_ray.serve.replica import open_async_engine

__all__ = ["start", "wait"]

log = logging.getLogger(__name__)

REPLY_SECONDS = 5.0
"""For an ingress to say that it is done."""


def start(options: ServeArgs, *, name: str, route_prefix: str, http: dict[str, Any]) -> ExitStack:
    """Start Serve and wait for the workers. Returns what is kept open meanwhile, for `wait` to close. Raises
    BuddyMoEError, with the reason, when they cannot start."""
    joined = ray_address_from_environment()
    with ExitStack() as kept:
        address = None if joined else kept.enter_context(keeping(Address(**http, prefix=route_prefix)))
        if not ray.is_initialized():
            ray.init(
                address=joined or "local",
                namespace="serve",
                log_to_driver=False,
                logging_level=logging.WARNING,
                _system_config=None if joined else {"memory_monitor_refresh_ms": 0},
            )
        logging.getLogger("ray.serve").setLevel(logging.WARNING)  # the ready line is our own
        serve.start(proxy_location="HeadOnly" if joined else "Disabled", http_options=http)
        try:
            app = application(options, open_engine=open_async_engine, address=address)
            serve.run(app, name=name, route_prefix=route_prefix)
        except RuntimeError as error:
            found = serve.status().applications.get(name)
            said = [] if found is None else [found.message, *(each.message for each in found.deployments.values())]
            lines = [line.strip() for line in "\n".join([str(error), *said]).splitlines() if line.strip()]
            reasons = [line.rpartition("Error: ")[2] for line in lines if "Error: " in line]
            _stop(name)
            raise BuddyMoEError((reasons or lines)[-1]) from error
        return kept.pop_all()


def wait(name: str, *, drain_seconds: float, kept: ExitStack) -> None:
    """Until Ctrl-C or SIGTERM; then new requests are refused, running ones end, and the application stops."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        kept.close()
        _drain(name, drain_seconds)
        _stop(name)


def _drain(name: str, seconds: float) -> None:
    """Give running requests their time; a second Ctrl-C takes it from them. Serve, told to stop, ends its proxies at
    once, and all streams with them."""
    try:
        left = serve.get_app_handle(name).drain.remote(seconds).result(timeout_s=seconds + REPLY_SECONDS)
        if left:
            log.warning("%d requests did not end within drain_seconds (%g s)", left, seconds)
        elif not ray_address_from_environment():
            serve.delete(name)  # waits until the last bytes are sent
    except (RayError, RayServeException, TimeoutError) as error:
        log.warning("the service could not be drained: %s", error)
    except KeyboardInterrupt:
        log.warning("running requests are cut off")


def _stop(name: str) -> None:
    """The application alone where the cluster was joined; with a ray of its own everything."""
    if ray_address_from_environment():
        serve.delete(name)
    else:
        serve.shutdown()
        ray.shutdown()
