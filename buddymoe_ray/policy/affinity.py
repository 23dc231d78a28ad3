"""Which worker gets a request: the one that lately served the longest leading part of its prompt, unless it is busy.

A conversation's turns share a prefix, so they stay with one worker, whose node has the experts they use warm. That is
all there is to gain: no worker keeps KV of ended requests, so prompts are computed anew wherever they go. Knows neither
ray nor requests: a prompt is pieces of bytes, a worker is a name and a queue.
Invariants: nobody is chosen whose queue is longer than the shortest by more than `slack`; a memory never holds more
than `capacity` blocks per worker, and with a block always the blocks before it.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from hashlib import blake2b

__all__ = ["PrefixAffinity", "RouteCandidate", "RouteChoice", "RouteReason", "prefix_blocks"]

BLOCK_BYTES = 64
MOST_BLOCKS = 512  # of one prompt, 32 KiB: what lies beyond tells few conversations apart and costs every request
DIGEST_BYTES = 8


class RouteReason(StrEnum):
    """Why a worker was chosen."""

    PREFIX = "prefix"
    """It served the longest prefix among those within slack."""
    NEW = "new"
    """Nobody served any of it: power of two choices."""
    BUSY = "busy"
    """Whoever served some of it has too much to do: power of two choices."""


@dataclass(frozen=True, kw_only=True)
class RouteCandidate:
    """A worker that takes requests.

    Args:
        name: the same in every call.
        queue: requests it has, running ones included.
        residency: share of the experts that its node holds in memory, 0..1; None where it is not known counts as 0.
    """

    name: Hashable
    queue: int
    residency: float | None = None


@dataclass(frozen=True, kw_only=True)
class RouteChoice:
    """`index` of the chosen candidate, and how many leading blocks of the prompt it served."""

    index: int
    reason: RouteReason
    matched: int = 0


def prefix_blocks(pieces: Sequence[bytes], *, block_bytes: int = BLOCK_BYTES, most: int = MOST_BLOCKS) -> list[bytes]:
    """A digest per leading block of a prompt: equal digests mean equal prompts up to there (but for 2^-64).

    A block is `block_bytes` of a piece, or what is left of it; so two prompts share the blocks of every whole piece
    that they share (a message), and of their longest common run of full blocks within the first that differs.
    """
    digests: list[bytes] = []
    before = b""
    for piece in pieces:
        for at in range(0, len(piece), block_bytes):
            if len(digests) == most:
                return digests
            last = at + block_bytes >= len(piece)
            # whether a piece ends here is hashed too: "ab" + "c" is not "abc"
            before = blake2b(
                before + piece[at : at + block_bytes], digest_size=DIGEST_BYTES, salt=bytes([last])
            ).digest()
            digests.append(before)
    return digests


class PrefixAffinity:
    """What each worker served lately, and the choice it leads to.

    Args:
        slack: by how many requests a chosen worker's queue may exceed the shortest.
        capacity: blocks remembered per worker, least recently served ones go first; at least those of one prompt.
    """

    def __init__(self, *, slack: int, capacity: int = 16 * MOST_BLOCKS) -> None:
        assert slack >= 0, f"slack is {slack}, must be at least 0"
        assert capacity >= 1, f"capacity is {capacity}, must be at least 1"
        self._slack, self._capacity = slack, capacity
        self._served: dict[Hashable, OrderedDict[bytes, None]] = {}

    def choose(self, candidates: Sequence[RouteCandidate], blocks: Sequence[bytes], rng: random.Random) -> RouteChoice:
        """The candidate for a prompt of `blocks` (from `prefix_blocks`; empty: no preference).

        Of those within `slack`: longest served prefix, then residency, then the shortest queue, then `rng`. Where none
        of them served any of it, two are drawn and the shorter queue wins (power of two choices, Mitzenmacher 2001).
        The memory is not changed: `note` who really took the request.
        """
        assert candidates, "there is nobody to choose from"
        limit = min(candidate.queue for candidate in candidates) + self._slack
        matched = [self.matched(candidate.name, blocks) for candidate in candidates]
        fit = [at for at, candidate in enumerate(candidates) if candidate.queue <= limit]
        longest = max(matched[at] for at in fit)
        if longest:
            holders = [at for at in fit if matched[at] == longest]
            ranks = {at: (-(candidates[at].residency or 0.0), candidates[at].queue) for at in holders}
            best = min(ranks.values())
            index = rng.choice([at for at in holders if ranks[at] == best])
            return RouteChoice(index=index, reason=RouteReason.PREFIX, matched=longest)
        pair = rng.sample(fit, min(2, len(fit)))
        index = min(pair, key=lambda at: candidates[at].queue)  # they come in random order: ties fall evenly
        return RouteChoice(index=index, reason=RouteReason.BUSY if any(matched) else RouteReason.NEW)

    def matched(self, name: Hashable, blocks: Sequence[bytes]) -> int:
        """How many leading blocks this worker served."""
        served = self._served.get(name, ())
        return next((at for at, block in enumerate(blocks) if block not in served), len(blocks))

    def note(self, name: Hashable, blocks: Sequence[bytes]) -> None:
        """This worker has taken a prompt."""
        served = self._served.setdefault(name, OrderedDict())
        for block in reversed(blocks[: self._capacity]):  # the first block is the most recent: the last ones go first
            served[block] = None
            served.move_to_end(block)
        while len(served) > self._capacity:
            served.popitem(last=False)

    def forget(self, name: Hashable) -> None:
        """This worker is gone."""
        self._served.pop(name, None)

    def keep(self, names: Collection[Hashable]) -> None:
        """Those that are there; all others are gone."""
        for gone in self._served.keys() - set(names):
            del self._served[gone]

    def remembered(self) -> Iterator[tuple[Hashable, int]]:
        """Workers with how many blocks each is known to have served."""
        return ((name, len(served)) for name, served in self._served.items())
