"""Hands out KV blocks, and finds those again that hold a known text. Pure Python: no torch, no sequences.

A block may be held by several owners who read it. One whose content is known by a digest stays findable when nobody
holds it any more, until its room is needed: the least recently used one goes first. Prefers a run of neighbouring
blocks, because a sequence in one run is read without a copy. Invariant: every block is free, idle (findable, held by
nobody) or held (`check_integrity`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import islice

__all__ = ["BlockAllocator"]


class BlockAllocator:
    """`count` blocks numbered from 0."""

    def __init__(self, count: int) -> None:
        assert count > 0, f"count is {count}, must be positive"
        self.count = count
        self._free = list(range(count))  # ascending
        self._idle: dict[int, None] = {}  # in order of last use
        self._held: Counter[int] = Counter()
        self._digest_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def free(self) -> int:
        """Blocks nobody holds."""
        return len(self._free) + len(self._idle)

    def can_allocate(self, wanted: int) -> bool:
        """Whether `allocate(wanted)` would succeed."""
        return wanted <= self.free

    def allocate(self, wanted: int) -> list[int]:
        """Take `wanted` blocks, in one run of neighbours when there is one."""
        assert self.can_allocate(wanted), f"wanted {wanted} blocks, must be at most the {self.free} free"
        if len(self._free) < wanted:
            self._forget(wanted - len(self._free))
        at = self._run_of(wanted)
        taken = self._free[at : at + wanted]
        del self._free[at : at + wanted]
        self._held.update(taken)
        return taken

    def find(self, digests: Sequence[bytes]) -> list[int]:
        """The blocks that hold the first of the digests, as many as are known."""
        found = []
        for digest in digests:
            block = self._block_of.get(digest)
            if block is None:
                break
            found.append(block)
        return found

    def idle(self, blocks: Sequence[int]) -> int:
        """How many of the blocks count as free."""
        return sum(block in self._idle for block in blocks)

    def share(self, blocks: Sequence[int]) -> None:
        """Hold blocks that were found, beside whoever else does."""
        for block in blocks:
            self._idle.pop(block, None)
            self._held[block] += 1

    def remember(self, block: int, digest: bytes) -> None:
        """From now on a held block is found by its content; of two with the same content the first."""
        assert block in self._held, f"block {block} is remembered, must be held"
        if digest not in self._block_of and block not in self._digest_of:
            self._block_of[digest], self._digest_of[block] = block, digest

    def release(self, blocks: Sequence[int]) -> None:
        """Give blocks back, in the order of their sequence: of what is findable its end goes first."""
        for block in blocks:
            assert block in self._held, f"block {block} is released, must be held"
        for block in reversed(blocks):
            self._held[block] -= 1
            if self._held[block]:
                continue
            del self._held[block]
            if block in self._digest_of:
                self._idle[block] = None
            else:
                self._free.append(block)
        self._free.sort()

    def check_integrity(self) -> None:
        """Every block is in exactly one state, and both tables of contents mirror each other."""
        everything = sorted([*self._free, *self._idle, *self._held])
        held = sorted(self._held)
        assert everything == list(range(self.count)), (
            f"free {self._free}, idle {[*self._idle]}, held {held} of {self.count}"
        )
        assert {block: digest for digest, block in self._block_of.items()} == self._digest_of, "contents disagree"
        assert self._idle.keys() <= self._digest_of.keys(), f"idle {[*self._idle]}, known {sorted(self._digest_of)}"
        assert min(self._held.values(), default=1) > 0, f"holders are {dict(self._held)}, must be at least 1"

    def _forget(self, count: int) -> None:
        """The least recently used ones: what they hold is not found any more."""
        oldest = list(islice(self._idle, count))
        for block in oldest:
            del self._idle[block]
            del self._block_of[self._digest_of.pop(block)]
        self._free = sorted(self._free + oldest)

    def _run_of(self, wanted: int) -> int:
        free, start = self._free, 0
        for at in range(1, len(free) + 1):
            if at - start == wanted:
                return start
            if at < len(free) and free[at] != free[at - 1] + 1:
                start = at
        return 0
