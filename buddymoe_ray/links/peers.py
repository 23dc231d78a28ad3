"""The links of one worker to its peers, by name: follows who is there, keeps the rest as it is.

Knows names and addresses, not experts. Invariant: a peer whose address did not change keeps its connection, breaker
and counts through an update; one that was dropped answers nothing any more.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

from buddymoe_ray.errors import LinkError
from buddymoe_ray.links.client import PeerLink
from buddymoe_ray.links.counters import LinkSnapshot
from buddymoe_ray.links.options import LinkOptions

__all__ = ["PeerLinks"]


class PeerLinks:
    """From any thread. Arguments as those of `PeerLink`."""

    def __init__(self, secret: bytes, *, timeout: float = 1.0, options: LinkOptions | None = None) -> None:
        self._secret, self._timeout, self._options = secret, timeout, options
        self._lock = threading.Lock()
        self._links: dict[str, PeerLink] = {}
        self._closed = False

    def update(self, addresses: Mapping[str, str]) -> None:
        """Exactly these peers, address by name. Connections are opened by the first question, or `PeerLink.connect`.

        Raises:
            LinkError: an address is none; nothing was changed then.
        """
        with self._lock:
            if self._closed:
                raise LinkError("the links are closed")
            kept = {n: link for n, link in self._links.items() if addresses.get(n) == link.address}
            made = {n: self._open(address) for n, address in addresses.items() if n not in kept}
            dropped = [link for n, link in self._links.items() if n not in kept]
            self._links = kept | made
        for link in dropped:
            link.close()

    def get(self, name: str) -> PeerLink:
        """The link to a peer. Raises LinkError when there is none of that name."""
        link = self._links.get(name)
        if link is None:
            raise LinkError(f"peer {name!r} is unknown, must be one of {sorted(self._links)}")
        return link

    def names(self) -> tuple[str, ...]:
        """All peers, sorted."""
        return tuple(sorted(self._links))

    def snapshot(self) -> dict[str, LinkSnapshot]:
        """Every link's counts and breaker, by name."""
        return {name: link.snapshot() for name, link in sorted(self._links.items())}

    def close(self) -> None:
        """End all links. Safe to call twice."""
        with self._lock:
            self._closed = True
            links, self._links = list(self._links.values()), {}
        for link in links:
            link.close()

    def _open(self, address: str) -> PeerLink:
        return PeerLink(address, self._secret, timeout=self._timeout, options=self._options)
