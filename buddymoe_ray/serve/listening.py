"""The ingress's own HTTP server, where no proxy of Serve's stands before it: on the ray that `buddymoe serve` starts.

Through a proxy a request is a call of one actor, two calls back for its body, and an object of ray's for each message:
one of a token takes 19 ms of CPU, and took 7.7 here before there was a `channel` (2.7 the engine; a busy machine).
A killed ingress answers again after 2.6 to 4.6 s, most of it imports; before Serve asked for its health each second,
after 8 to 10, the port refusing all. Knows sockets, not routes.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from asyncio import TimerHandle, Transport
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Thread

from ray.serve._private.http_util import RequestIdMiddleware
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.types import ASGIApp
from uvicorn import Config, Server
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from buddymoe_ray.errors import ConfigError
from buddymoe_ray.serve.channel import socket_folder

__all__ = ["Address", "bind", "keeping", "listening"]

BACKLOG, KEEP_ALIVE_SECONDS = 2048, 90  # as many seconds as Serve's proxies keep a connection
GRACE_SECONDS = 5
HEAD_SECONDS, HEAD_BYTES = 20.0, 1 << 16
"""For the first line and the headers of a request. Nothing else ends one that comes a byte a minute, or without end."""


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where HTTP is answered, under `prefix`. `kept` is a path at which its socket is given away, see `keeping`."""

    host: str
    port: int
    prefix: str = "/"
    kept: str = ""


def bind(address: Address) -> socket.socket:
    """A socket there, at which others do not listen, or the one that is kept. Raises ConfigError."""
    if address.kept:
        with socket.socket(socket.AF_UNIX) as keeper:
            keeper.connect(address.kept)
            return socket.socket(fileno=socket.recv_fds(keeper, 1, 1)[1][0])
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    try:
        return socket.create_server((address.host, address.port), family=family, backlog=BACKLOG)
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise ConfigError(
            f"{address.host}:{address.port} cannot be listened at ({reason}). hint: another --port or --host"
        ) from error


@contextmanager
def keeping(address: Address) -> Iterator[Address]:
    """The address with its socket kept here meanwhile: when the ingress dies, who comes waits for the next one, and is
    not refused. Raises ConfigError."""
    with bind(address) as bound, socket_folder() as folder:
        path = str(Path(folder, "socket"))
        with socket.socket(socket.AF_UNIX) as keeper:
            keeper.bind(path)
            keeper.listen()
            giving = Thread(target=_give, args=(keeper, bound), name="http-socket", daemon=True)
            giving.start()
            try:
                yield replace(address, kept=path)
            finally:
                keeper.shutdown(socket.SHUT_RDWR)
                giving.join()


def _give(keeper: socket.socket, bound: socket.socket) -> None:
    """`bound` to all who connect, until `keeper` is shut down."""
    while True:
        try:
            asking, _ = keeper.accept()
        except OSError:
            return
        with asking, suppress(OSError):  # who asked has died
            socket.send_fds(asking, [b"\0"], [bound.fileno()])


class _Connection(HttpToolsProtocol):
    """uvicorn's, which waits for the head of a request as long as it is, with limits to both."""

    _head: TimerHandle | None = None
    _head_bytes = 0

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_came()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._head is not None:
            self._head_bytes += len(data)
            if self._head_bytes > HEAD_BYTES:
                self._refuse(b"431 Request Header Fields Too Large")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._head is None:
            self._await_head()

    def on_headers_complete(self) -> None:
        self._head_came()
        super().on_headers_complete()

    def _await_head(self) -> None:
        self._head, self._head_bytes = self.loop.call_later(HEAD_SECONDS, self._refuse, b"408 Request Timeout"), 0

    def _head_came(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None

    def _refuse(self, status: bytes) -> None:
        """End the connection, once what was asked before on it is answered."""
        self._head_came()
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.keep_alive = False
            self.flow.pause_reading()
        elif not self.transport.is_closing():
            if self.headers is not None:  # browsers open connections that they ask nothing on, and read no answer there
                self.transport.write(b"HTTP/1.1 %b\r\nconnection: close\r\ncontent-length: 0\r\n\r\n" % status)
            self.transport.close()


@asynccontextmanager
async def listening(bound: socket.socket, app: ASGIApp, *, prefix: str) -> AsyncGenerator[None, None]:
    """`app` is served at a socket meanwhile, with the ids of requests that Serve's proxies write; in the end what runs
    has a moment to come to its own."""
    placed = app if prefix == "/" else Starlette(routes=[Mount(prefix, app=app)])
    logging.getLogger("uvicorn").parent = logging.getLogger("ray.serve")  # what Serve keeps of a replica
    logging.getLogger("uvicorn.access").propagate = True  # Serve, which runs no server for a replica, turns it off
    config = Config(
        RequestIdMiddleware(placed),
        http=_Connection,
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
