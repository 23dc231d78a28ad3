"""What a link costs, for those who decide where experts are placed.

Knows echoes and a clock. Invariant: medians of whole round trips, so that a moment's load does not decide.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

from buddymoe_ray.errors import LinkError
from buddymoe_ray.links.client import PeerLink

__all__ = ["LinkCost", "measure"]

_SMALL_BYTES = 64


@dataclass(frozen=True, kw_only=True)
class LinkCost:
    """Seconds of the smallest question with its answer, and bytes per second of big payloads in one direction."""

    round_trip_seconds: float
    bytes_per_second: float

    def seconds(self, nbytes: int) -> float:
        """A question and an answer that move `nbytes` in all."""
        return self.round_trip_seconds + nbytes / self.bytes_per_second


def measure(
    link: PeerLink, *, rounds: int = 50, big_rounds: int = 9, big_bytes: int = 4 << 20, deadline_seconds: float = 10.0
) -> LinkCost:
    """Measure over the link as it is, shared memory included.

    Args:
        rounds, big_rounds: how many round trips the medians are of.
        big_bytes: of a big payload, which goes both ways.
        deadline_seconds: of one round trip.

    Raises:
        LinkError: the peer does not answer, or answers with other bytes.
    """
    assert rounds > 0 and big_rounds > 0 and big_bytes > _SMALL_BYTES, "measure needs rounds and a big payload"
    small = _median(link, bytes(_SMALL_BYTES), rounds, deadline_seconds)
    big = _median(link, bytes(range(256)) * (big_bytes // 256), big_rounds, deadline_seconds)
    moved = 2 * (big_bytes // 256 * 256)
    return LinkCost(round_trip_seconds=small, bytes_per_second=moved / max(big - small, 1e-9))


def _median(link: PeerLink, payload: bytes, rounds: int, deadline_seconds: float) -> float:
    if link.echo(payload, deadline_seconds=deadline_seconds) != payload:  # also opens the connection
        raise LinkError(f"{link.address} echoes other bytes than it was sent")
    taken = []
    for _ in range(rounds):
        began = time.perf_counter()
        link.echo(payload, deadline_seconds=deadline_seconds)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)
