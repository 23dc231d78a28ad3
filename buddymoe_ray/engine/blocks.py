"""Hands out KV blocks. Pure Python: no torch, no sequences.

Prefers a run of neighbouring blocks, because a sequence in one run is read without a copy. Invariant: every block is
either free or held by exactly one owner (`check_integrity`).
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["BlockAllocator"]


class BlockAllocator:
    """`count` blocks numbered from 0."""

    def __init__(self, count: int) -> None:
        assert count > 0, f"count is {count}, must be positive"
        self.count = count
        self._free = list(range(count))  # ascending
        self._held: set[int] = set()

    @property
    def free(self) -> int:
        """Blocks nobody holds."""
        return len(self._free)

    def can_allocate(self, wanted: int) -> bool:
        """Whether `allocate(wanted)` would succeed."""
        return wanted <= len(self._free)

    def allocate(self, wanted: int) -> list[int]:
        """Take `wanted` blocks, in one run of neighbours when there is one."""
        assert self.can_allocate(wanted), f"wanted {wanted} blocks, must be at most the {len(self._free)} free"
        at = self._run_of(wanted)
        taken = self._free[at : at + wanted]
        del self._free[at : at + wanted]
        self._held.update(taken)
        return taken

    def release(self, blocks: Iterable[int]) -> None:
        """Give blocks back."""
        blocks = list(blocks)
        for block in blocks:
            assert block in self._held, f"block {block} is released, must be held"
            self._held.remove(block)
        self._free = sorted(self._free + blocks)

    def check_integrity(self) -> None:
        """Every block is free or held, never both, never neither."""
        everything = sorted([*self._free, *self._held])
        assert everything == list(range(self.count)), f"free {self._free} and held {sorted(self._held)} of {self.count}"

    def _run_of(self, wanted: int) -> int:
        free, start = self._free, 0
        for at in range(1, len(free) + 1):
            if at - start == wanted:
                return start
            if at < len(free) and free[at] != free[at - 1] + 1:
                start = at
        return 0
