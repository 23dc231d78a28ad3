"""Where peers connect: listens, lets in who knows the secret, and ends everything when closed.

Knows connections, not what is asked over them (`guest`). Invariant: no more than `MAX_CONNECTIONS` at once, those that
have not proved themselves included; after `close` no thread or socket of it is left, unless the service itself hangs,
which is said in the log.
"""

from __future__ import annotations

import logging
import socket
import threading
import time

from buddymoe_ray.links.address import accept, listen
from buddymoe_ray.links.auth import check_secret
from buddymoe_ray.links.guest import ExpertService, Guest, House

__all__ = ["LinkServer"]

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 64


class LinkServer:
    """Serves from construction until `close`.

    Args:
        service: what is asked of this worker; its calls come from the server's threads.
        secret: the cluster's, at least 16 bytes.
        address: `host:port`; port 0 takes a free one.

    Raises:
        LinkError: the address cannot be listened on, or the secret is too short.
    """

    def __init__(self, service: ExpertService, *, secret: bytes, address: str = "127.0.0.1:0") -> None:
        self._house = House(service=service, secret=check_secret(secret))
        self._guests: list[Guest] = []
        self._closing = False
        self._listener, self.address = listen(address)
        self._acceptor = threading.Thread(target=self._accept_all, name="link-accept", daemon=True)
        self._acceptor.start()

    def close(self, seconds: float = 5.0) -> None:
        """Cut all connections and end all threads, waiting at most that long for the service's own calls to return.

        Safe to call twice.
        """
        self._closing = True
        try:
            self._listener.shutdown(socket.SHUT_RDWR)  # the acceptor returns at once
        except OSError:
            return  # closed before
        self._acceptor.join()
        self._listener.close()
        for guest in self._guests:
            guest.wake()
        deadline = time.monotonic() + seconds
        hanging = sum(not guest.join(deadline - time.monotonic()) for guest in self._guests)
        if hanging:
            log.warning("%d calls of peers have not returned %.1f s after the end of the server", hanging, seconds)

    def _accept_all(self) -> None:
        while not self._closing:
            try:
                sock = accept(self._listener)
            except OSError as error:
                if not self._closing:  # out of descriptors or memory: let some end first
                    log.warning("a peer could not be accepted: %s", error)
                    time.sleep(0.05)
                continue
            self._guests = [guest for guest in self._guests if not guest.done]
            try:
                if len(self._guests) >= MAX_CONNECTIONS:
                    raise RuntimeError(f"{MAX_CONNECTIONS} peers are connected")
                self._guests.append(Guest(sock, self._house))
            except RuntimeError as error:  # the system may give no more threads, too
                log.warning("a peer was turned away: %s", error)
                sock.close()
