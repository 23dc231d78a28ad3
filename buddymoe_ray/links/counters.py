"""What a link and a server have done, as records that may be read at any time.

Knows numbers only. Invariant of a `LinkSnapshot`: requests = answered + declined + failed + those under way.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

from buddymoe_ray.links.breaker import BreakerState

__all__ = ["LinkSnapshot", "ServerSnapshot", "Tally"]


@dataclass(frozen=True, kw_only=True)
class LinkSnapshot:
    """One peer as its client sees it; counts are cumulative since the link was made.

    `answered` had something in it, `declined` nothing (busy, absent); `refused` were not sent as the breaker was open
    and are not in `requests`. Bytes are of the socket, `shared_*` of shared memory beside it. `shares_memory` tells
    whether both ends proved to see the same. `last_error` is the latest failure's text.
    """

    address: str
    state: BreakerState
    connected: bool
    shares_memory: bool
    requests: int
    answered: int
    declined: int
    failed: int
    refused: int
    connects: int
    times_opened: int
    bytes_out: int
    bytes_in: int
    shared_out: int
    shared_in: int
    last_error: str


@dataclass(frozen=True, kw_only=True)
class ServerSnapshot:
    """One server; counts are cumulative but for `connections` and `inside` (computing or waiting), which are of now.

    `wrong_secret`, `bad_peers` (garbage, hangs, torn frames) and `turned_away` (too many) are connections, the rest
    questions. `declined` were busy, late, withdrawn or absent; `failed` are the service's errors.
    """

    connections: int
    inside: int
    accepted: int
    wrong_secret: int
    bad_peers: int
    turned_away: int
    computed: int
    read: int
    echoed: int
    declined: int
    failed: int


class Tally:
    """Counts by name, from any thread."""

    def __init__(self, *names: str) -> None:
        self._lock = threading.Lock()
        self._counts = dict.fromkeys(names, 0)

    def add(self, name: str) -> None:
        """One more."""
        with self._lock:
            self._counts[name] += 1

    def read(self) -> dict[str, int]:
        """All of them, at one moment."""
        with self._lock:
            return dict(self._counts)
