"""Where a worker listens, as text: `host:port` or `[v6]:port`.

Makes sockets, knows nothing of what is said over them.
"""

from __future__ import annotations

import socket

from buddymoe_ray.errors import LinkError

__all__ = ["accept", "dial", "listen", "parse"]

_BACKLOG = 128


def parse(address: str) -> tuple[str, int]:
    """Host and port. Raises LinkError where the text is no address."""
    host, colon, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise LinkError(f"address is {address!r}, must be host:port or [v6]:port. hint: 127.0.0.1:0")
    return host, int(port)


def dial(address: str, *, seconds: float) -> socket.socket:
    """A connected socket. Raises LinkError when nobody answers in time."""
    try:
        return _tuned(socket.create_connection(parse(address), timeout=seconds))
    except OSError as error:
        raise LinkError(f"{address} cannot be reached: {error}. hint: is that worker running?") from error


def listen(address: str) -> tuple[socket.socket, str]:
    """A listening socket, and its address with the port it took where 0 was asked for.

    Raises:
        LinkError: it cannot be had.
    """
    host, port = parse(address)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        sock = socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise LinkError(f"{address} cannot be listened on: {error}. hint: give a free port") from error
    taken = sock.getsockname()[1]
    return sock, f"[{host}]:{taken}" if ":" in host else f"{host}:{taken}"


def accept(listener: socket.socket) -> socket.socket:
    """The next connection. Raises OSError when out of descriptors, or when the listener was shut down."""
    return _tuned(listener.accept()[0])


def _tuned(sock: socket.socket) -> socket.socket:
    """Small frames leave at once; a host that vanished is noticed though nothing is said."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 25_000)
    return sock
