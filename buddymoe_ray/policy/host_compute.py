"""Which missing experts a CPU computes where they lie in the host's memory, while a GPU's link brings it the others.

As in Fiddler (2402.07033, eq. 1), by times that were measured here: of a layer's missing experts the link brings one
after the other, the CPU computes one access after the other, and both go on beside each other. Pure: whoever computes
says what it took, with all that ran beside it. A core computes 9 (Cascade Lake) to 33 (Zen 5) GB of weights a second
for one row: to beat the 26 GB that PCIe 4 copies takes three cores or one, PCIe 5's 52 six or two; of several misses
fewer cores are worth some.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

__all__ = ["ExpectedMisses", "HostCost", "expected_misses", "host_count"]

_SMOOTHING = 0.1
_TRIALS = 0.01


def host_count(accesses: Sequence[int], access_seconds: float, fetch_seconds: float) -> int:
    """How many of a layer's missing experts, from the first on, the host computes so that all are answered soonest; as
    few as that takes. `accesses` has those of each; the others are fetched."""
    best, least, host = 0, len(accesses) * fetch_seconds, 0.0
    for count, uses in enumerate(accesses, start=1):
        host += uses * access_seconds
        seconds = max(host, (len(accesses) - count) * fetch_seconds)
        if seconds < least:
            best, least = count, seconds
    return best


@dataclass(frozen=True, kw_only=True)
class ExpectedMisses:
    """Of a token's misses in a layer, on average: how many, seconds until all are answered, how many the host
    computes."""

    missed: float
    seconds: float
    by_host: float


def expected_misses(
    accesses: int, missed: float, access_seconds: float, fetch_seconds: float, *, always: bool = False
) -> ExpectedMisses:
    """Where each of a token's accesses to a layer misses with the probability `missed`, and `host_count`, or all where
    it is `always`, are computed."""
    seconds = by_host = 0.0
    for count in range(1, accesses + 1):
        chance = comb(accesses, count) * missed**count * (1 - missed) ** (accesses - count)
        host = count if always else host_count([1] * count, access_seconds, fetch_seconds)
        seconds += chance * max(host and host * access_seconds, (count - host) * fetch_seconds)
        by_host += chance * host
    return ExpectedMisses(missed=accesses * missed, seconds=seconds, by_host=by_host)


class HostCost:
    """What the host takes for an access, lately: at first what was measured while nothing else ran.

    An expert whose accesses share a read of its weights takes less than their sum: then too few are computed here, not
    too many. Where it does not pay it is tried now and then, for that may have been a bad moment; trials take at most 1
    % of the time that fetches take.
    """

    def __init__(self, access_seconds: float) -> None:
        self.access_seconds = access_seconds
        self._fetched = 0.0  # seconds of fetches since the last trial

    def note(self, seconds: float, accesses: int) -> None:
        """So many accesses, computed one after the other, took so long."""
        self.access_seconds += _SMOOTHING * (seconds / accesses - self.access_seconds)

    def count(self, accesses: Sequence[int], fetch_seconds: float) -> int:
        """`host_count`, or a trial."""
        count = host_count(accesses, self.access_seconds, fetch_seconds)
        if not count and accesses:
            self._fetched += len(accesses) * fetch_seconds
            if accesses[0] * self.access_seconds <= _TRIALS * self._fetched:
                self._fetched, count = 0.0, 1
        return count
