"""A real TCP proxy that delays every byte, for tests of slow, hanging and lost peers.

Each direction keeps its bytes in order and hands each chunk on `delay_seconds` after it came, so bandwidth stays as it
is. The delay may be changed at any time and holds for what is on its way too. Threads and sockets end with `close`.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections import deque

_CHUNK = 1 << 16
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close sends a reset


class DelayProxy:
    """Listens on `address` and connects each client to `target` (`host:port`)."""

    def __init__(self, target: str, delay_seconds: float = 0.0) -> None:
        self._target, self._delay = target, delay_seconds
        self._changed = threading.Condition()
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._closed = False
        self.connections = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._start(self._accept)

    @property
    def delay_seconds(self) -> float:
        return self._delay

    @delay_seconds.setter
    def delay_seconds(self, seconds: float) -> None:
        with self._changed:
            self._delay = seconds
            self._changed.notify_all()

    def cut(self) -> None:
        """Reset all connections; new ones are let through."""
        with self._lock:
            sockets, self._sockets = self._sockets, []
        for sock in sockets:
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        with self._changed:
            self._changed.notify_all()

    def close(self) -> None:
        """End everything. Safe to call twice."""
        self._closed = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        for thread in self._threads:
            thread.join()
        self.cut()  # what was accepted meanwhile

    def __enter__(self) -> DelayProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, run, *args: object) -> None:  # type: ignore[no-untyped-def]
        thread = threading.Thread(target=run, args=args, name="proxy", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._closed:
            try:
                client, _ = self._listener.accept()
                server = self._dial(client)
            except OSError:
                continue
            self.connections += 1
            with self._lock:
                self._sockets += [client, server]
            for source, sink in ((client, server), (server, client)):
                lane = _Lane()
                self._start(self._pull, source, lane)
                self._start(self._push, lane, sink)

    def _dial(self, client: socket.socket) -> socket.socket:
        try:
            host, _, port = self._target.rpartition(":")
            sock = socket.create_connection((host, int(port)))
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return sock
        except OSError:
            client.close()
            raise

    def _pull(self, source: socket.socket, lane: _Lane) -> None:
        chunk = b"more"
        while chunk:
            try:
                chunk = source.recv(_CHUNK)
            except OSError:
                chunk = b""
            with self._changed:
                lane.chunks.append((time.monotonic(), chunk))
                self._changed.notify_all()

    def _push(self, lane: _Lane, sink: socket.socket) -> None:
        while True:
            with self._changed:
                while not lane.chunks or time.monotonic() < lane.chunks[0][0] + self._delay:
                    if sink.fileno() < 0 or self._closed:
                        return
                    left = lane.chunks[0][0] + self._delay - time.monotonic() if lane.chunks else None
                    self._changed.wait(left)
                _, chunk = lane.chunks.popleft()
            try:
                if not chunk:
                    sink.shutdown(socket.SHUT_WR)
                    return
                sink.sendall(chunk)
            except OSError:
                return


class _Lane:
    """One direction's bytes on their way: when each chunk came; the empty one is the end."""

    def __init__(self) -> None:
        self.chunks: deque[tuple[float, bytes]] = deque()
