"""Where a worker listens, as text: `host:port`, `[v6]:port` or `unix:/absolute/path`.

Makes sockets, knows nothing of what is said over them. Invariant: a Unix socket's file is 0600 before anyone can
connect to it, and a file that somebody else made is never removed.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from dataclasses import dataclass

from buddymoe_ray.errors import LinkError

__all__ = ["Address", "Listener"]

_UNIX = "unix:"
_BACKLOG = 128


@dataclass(frozen=True, kw_only=True)
class Address:
    """`path` of a Unix socket, or `host` and `port` where it is empty."""

    host: str = ""
    port: int = 0
    path: str = ""

    @classmethod
    def parse(cls, text: str) -> Address:
        """Raises LinkError where the text is no address."""
        if text.startswith(_UNIX):
            path = text.removeprefix(_UNIX)
            if not path.startswith("/") or len(os.fsencode(path)) > 107:
                raise LinkError(f"address {text!r} must be unix: and an absolute path of at most 107 bytes")
            return cls(path=path)
        host, colon, port = text.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
            raise LinkError(f"address {text!r} must be host:port, [v6]:port or unix:/path. hint: 127.0.0.1:0")
        return cls(host=host, port=int(port))

    def __str__(self) -> str:
        if self.path:
            return _UNIX + self.path
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def connect(self, *, seconds: float) -> socket.socket:
        """A connected socket. Raises LinkError when nobody answers in time."""
        try:
            if not self.path:
                return _tuned(socket.create_connection((self.host, self.port), timeout=seconds))
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                sock.settimeout(seconds)
                sock.connect(self.path)
            except BaseException:
                sock.close()
                raise
            return sock
        except OSError as error:
            raise LinkError(f"{self} cannot be reached: {error}. hint: is that worker running?") from error


class Listener:
    """A listening socket on `address`; port 0 takes a free one. Raises LinkError when it cannot be had."""

    def __init__(self, address: Address) -> None:
        self._made: tuple[int, int] | None = None
        try:
            if address.path:
                self.socket = self._listen_on_file(address.path)
                self.address = address
            else:
                family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
                self.socket = socket.create_server((address.host, address.port), family=family, backlog=_BACKLOG)
                self.address = Address(host=address.host, port=self.socket.getsockname()[1])
        except OSError as error:
            raise LinkError(f"{address} cannot be listened on: {error}. hint: give a free port or path") from error
        self.socket.setblocking(False)

    def accept(self) -> socket.socket | None:
        """The next connection, None when there is none now. Raises OSError when out of descriptors."""
        try:
            accepted, _ = self.socket.accept()
        except (BlockingIOError, ConnectionError):
            return None
        return accepted if self.address.path else _tuned(accepted)

    def close(self) -> None:
        """Stop listening and remove the Unix socket's file, where it is still this one's. Safe to call twice."""
        self.socket.close()
        if self._made is not None:
            with contextlib.suppress(FileNotFoundError):
                found = os.lstat(self.address.path)
                if (found.st_dev, found.st_ino) == self._made:
                    os.unlink(self.address.path)
            self._made = None

    def _listen_on_file(self, path: str) -> socket.socket:
        _remove_stale(path)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.bind(path)
            os.chmod(path, 0o600)  # before listen: until then every connect is refused
            sock.listen(_BACKLOG)
            found = os.lstat(path)
        except BaseException:
            sock.close()
            raise
        self._made = (found.st_dev, found.st_ino)
        return sock


def _remove_stale(path: str) -> None:
    """Remove the socket file of a server that was killed; one that answers stays."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise LinkError(f"{path} is no socket, must be free. hint: give another path")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
    raise LinkError(f"{path} is in use by another server, must be free. hint: give another path")


def _tuned(sock: socket.socket) -> socket.socket:
    """Small frames leave at once; a host that vanished is noticed though nothing is said."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 25_000)
    return sock
