"""The ingress's own HTTP server, where no proxy of Serve's stands before it: on the ray that `buddymoe serve` starts.

Through a proxy a request is a call of one actor, two calls back for its body, and an object of ray's for each message:
one of a token takes 19 ms of CPU, and 7.7 here (2.7 are the engine's; a busy machine). Knows sockets, not routes.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from ray.serve._private.http_util import RequestIdMiddleware
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.types import ASGIApp
from uvicorn import Config, Server

from buddymoe_ray.errors import ConfigError

__all__ = ["Address", "bind", "listening"]

BACKLOG, KEEP_ALIVE_SECONDS = 2048, 90  # as many seconds as Serve's proxies keep a connection
GRACE_SECONDS = 5


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where HTTP is answered, under `prefix`."""

    host: str
    port: int
    prefix: str = "/"


def bind(address: Address) -> socket.socket:
    """A socket there, at which others do not listen. Raises ConfigError."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    try:
        return socket.create_server((address.host, address.port), family=family, backlog=BACKLOG)
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise ConfigError(
            f"{address.host}:{address.port} cannot be listened at ({reason}). hint: another --port or --host"
        ) from error


@asynccontextmanager
async def listening(bound: socket.socket, app: ASGIApp, *, prefix: str) -> AsyncGenerator[None, None]:
    """`app` is served at a socket meanwhile, with the ids of requests that Serve's proxies write; in the end what runs
    has a moment to come to its own."""
    placed = app if prefix == "/" else Starlette(routes=[Mount(prefix, app=app)])
    logging.getLogger("uvicorn").parent = logging.getLogger("ray.serve")  # what Serve keeps of a replica
    config = Config(
        RequestIdMiddleware(placed),
        lifespan="off",
        log_config=None,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    server = Server(config)
    serving = asyncio.create_task(server.serve(sockets=[bound]))
    try:
        yield
    finally:
        server.should_exit = True
        await serving
