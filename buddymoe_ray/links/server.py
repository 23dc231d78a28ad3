"""Where peers connect: listens, lets in who knows the secret, and ends everything when closed.

Knows connections, not what is asked over them (`guest`). Invariant: no more than `max_connections` at once, those that
have not proved themselves included; after `close` no thread, socket or file of it is left, unless the service itself
hangs, which is said in the log.
"""

from __future__ import annotations

import logging
import os
import select
import threading
import time
from collections.abc import Sequence

from buddymoe_ray.links.address import Address, Listener
from buddymoe_ray.links.auth import check_secret
from buddymoe_ray.links.counters import ServerSnapshot, Tally
from buddymoe_ray.links.gate import Gate
from buddymoe_ray.links.guest import Guest, House
from buddymoe_ray.links.options import ServerOptions
from buddymoe_ray.links.service import ExpertService
from buddymoe_ray.links.shared_files import sweep_leftovers

__all__ = ["LinkServer"]

log = logging.getLogger(__name__)

_ROUND_SECONDS = 1.0
"""How often ended connections are forgotten though nobody connects."""


class LinkServer:
    """Serves from construction until `close`.

    Args:
        service: what is asked of this worker; its calls come from the server's threads.
        secret: the cluster's, at least 16 bytes.
        addresses: `host:port` (port 0 takes a free one), `unix:/path`.

    Raises:
        LinkError: an address cannot be listened on, or the secret is too short.
    """

    def __init__(
        self,
        service: ExpertService,
        *,
        secret: bytes,
        addresses: Sequence[str] = ("127.0.0.1:0",),
        options: ServerOptions | None = None,
    ) -> None:
        options = options or ServerOptions()
        self._options = options
        self._gate = Gate(max_concurrent=options.max_concurrent, max_waiting=options.max_waiting)
        self._tally = Tally(
            *("accepted", "wrong_secret", "bad_peers", "turned_away"),
            *("computed", "read", "echoed", "declined", "failed"),
        )
        self._house = House(
            service=service, secret=check_secret(secret), options=options, gate=self._gate, tally=self._tally
        )
        self._guests: list[Guest] = []
        self._lock = threading.Lock()
        self._closing = False
        sweep_leftovers()
        self._listeners: list[Listener] = []
        try:
            for address in addresses:
                self._listeners.append(Listener(Address.parse(address)))
        except BaseException:
            for listener in self._listeners:
                listener.close()
            raise
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._acceptor = threading.Thread(target=self._accept_all, name="link-accept", daemon=True)
        self._acceptor.start()

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where it listens, with the ports that were taken."""
        return tuple(str(listener.address) for listener in self._listeners)

    def snapshot(self) -> ServerSnapshot:
        """What the server has done so far."""
        with self._lock:
            connections = sum(not guest.done for guest in self._guests)
        return ServerSnapshot(connections=connections, inside=self._gate.inside, **self._tally.read())

    def close(self, seconds: float = 5.0) -> None:
        """Cut all connections and end all threads, waiting at most that long for the service's own calls to return.

        Safe to call twice.
        """
        with self._lock:
            if self._closing:
                return
            self._closing = True
        os.eventfd_write(self._wake_fd, 1)
        self._acceptor.join()
        os.close(self._wake_fd)
        for listener in self._listeners:
            listener.close()
        self._gate.close()
        with self._lock:
            guests, self._guests = self._guests, []
        for guest in guests:
            guest.wake()
        deadline = time.monotonic() + seconds
        hanging = sum(not guest.join(deadline - time.monotonic()) for guest in guests)
        if hanging:
            log.warning("%d calls of peers have not returned %.1f s after the end of the server", hanging, seconds)

    def _accept_all(self) -> None:
        poll = select.poll()
        poll.register(self._wake_fd, select.POLLIN)
        by_fd = {listener.socket.fileno(): listener for listener in self._listeners}
        for fd in by_fd:
            poll.register(fd, select.POLLIN)
        while not self._closing:
            for fd, _ in poll.poll(_ROUND_SECONDS * 1000):
                if fd in by_fd:
                    self._accept(by_fd[fd])
            with self._lock:
                self._guests = [guest for guest in self._guests if not guest.done]

    def _accept(self, listener: Listener) -> None:
        try:
            accepted = listener.accept()
        except OSError as error:  # out of descriptors or memory: let some end first
            log.warning("a peer could not be accepted: %s", error)
            time.sleep(0.05)
            return
        if accepted is None:
            return
        with self._lock:
            full = sum(not guest.done for guest in self._guests) >= self._options.max_connections
            if full or self._closing:
                self._tally.add("turned_away")
                accepted.close()
                return
            try:
                self._guests.append(Guest(accepted, self._house))
            except RuntimeError as error:  # the system gives no more threads
                log.warning("a peer could not be taken: %s", error)
                self._tally.add("turned_away")
                accepted.close()
                return
            self._tally.add("accepted")
