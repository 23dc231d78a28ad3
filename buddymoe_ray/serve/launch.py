"""Starts Ray Serve in this process with one application, as `serve run` does, and says why when it cannot start.

Knows ray's ways, neither files nor command lines: `commands/serve` checks those before.
"""

from __future__ import annotations

import time
from typing import Any

import ray
from ray import serve

from buddymoe_ray.errors import BuddyMoEError
from buddymoe_ray.serve.app import build_app
from buddymoe_ray.serve.args import ServeArgs

__all__ = ["start", "wait"]


def start(options: ServeArgs, *, name: str, route_prefix: str, http: dict[str, Any]) -> None:
    """Start Serve and wait for the workers. Raises BuddyMoEError, with the reason, when they cannot start."""
    if not ray.is_initialized():
        ray.init(namespace="serve", log_to_driver=False, logging_level="warning")
    serve.start(proxy_location="HeadOnly", http_options=http)
    try:
        serve.run(build_app(options), name=name, route_prefix=route_prefix)
    except RuntimeError as error:
        found = serve.status().applications.get(name)
        said = [] if found is None else [found.message, *(each.message for each in found.deployments.values())]
        lines = [line.strip() for line in "\n".join([str(error), *said]).splitlines() if line.strip()]
        reasons = [line.rpartition("Error: ")[2] for line in lines if "Error: " in line]
        serve.shutdown()
        raise BuddyMoEError((reasons or lines)[-1]) from error


def wait() -> None:
    """Until Ctrl-C; then running requests end and Serve stops."""
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        serve.shutdown()
