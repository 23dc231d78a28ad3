"""Memory of equal slots, allocated once, and the leases that make using it safe.

A slot's generation moves on whenever its content does; a lease remembers the generation it was given, so stale use is
an assertion and never a wrong weight. Knows slots and bytes, not which expert should be where.

Legend: C slots.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from buddymoe_ray.types import ExpertKey, ExpertLayout

Ints = npt.NDArray[np.int64]

__all__ = ["CacheStats", "Glance", "Lease", "SlotPool", "SlotMemory", "slot_views"]


class SlotMemory(Protocol):
    """Where leased slots are: a store, or a `SlotPool`."""

    @property
    def generation(self) -> Any:
        """How often each slot's content changed; indexed by slot."""

    def tensors(self, slot: int) -> Mapping[str, Tensor]:
        """The slot's parameters by name."""

    def address(self, slot: int) -> int:
        """Where the slot's bytes begin in this process."""


class SlotPool:
    """`count` slots on `device`, laid out as `layout` says. On a CPU their memory is pages of its own, which take no
    room before they are written, nor once they are `release`d: those that may be are small, for of a huge page what is
    given back may stay. `memory`: uint8 to use instead."""

    def __init__(
        self,
        layout: ExpertLayout,
        count: int,
        device: torch.device,
        *,
        lent: bool = False,
        memory: Tensor | None = None,
    ) -> None:
        assert layout.slot_bytes % 64 == 0, f"slot_bytes is {layout.slot_bytes}, must be a multiple of 64"
        self.device = device
        self._pages: mmap.mmap | None = None
        if memory is None and device.type == "cpu" and count:
            self._pages = mmap.mmap(-1, count * layout.slot_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            with suppress(OSError):  # kernels without huge pages
                self._pages.madvise(mmap.MADV_NOHUGEPAGE if lent else mmap.MADV_HUGEPAGE)
            memory = torch.frombuffer(self._pages, dtype=torch.uint8)
        elif memory is None:
            memory = torch.empty(count * layout.slot_bytes, dtype=torch.uint8, device=device)
        self.bytes_C = memory.view(count, layout.slot_bytes)
        self._begin = self.bytes_C.data_ptr()
        self.generation = [0] * count
        self._views = [slot_views(self.bytes_C[slot], layout) for slot in range(count)]

    def tensors(self, slot: int) -> Mapping[str, Tensor]:
        """The slot's parameters by name, as views in their stored dtype."""
        return self._views[slot]

    def address(self, slot: int) -> int:
        """Where the slot's bytes begin."""
        return self._begin + slot * self.bytes_C.shape[1]

    def release(self, first: int, end: int) -> None:
        """Give back the memory of slots that hold nothing, but for what shares a page with others: it is 0 until it is
        written again."""
        assert self._pages is not None, f"slots are on {self.device}, must be in pages of this process"
        size, page = self.bytes_C.shape[1], mmap.PAGESIZE
        begin, stop = -(-first * size // page) * page, end * size // page * page
        if begin < stop:
            self._pages.madvise(mmap.MADV_DONTNEED, begin, stop - begin)

    def renew(self, slot: int) -> int:
        """Void every lease of the slot; returns the new generation."""
        self.generation[slot] += 1
        return self.generation[slot]


@dataclass(frozen=True, kw_only=True)
class CacheStats:
    """Counters since start. Lookups are per (layer, expert) and call, none where nobody need look; `stall_seconds` is
    time waiting for bytes. Of `peer_hits`, copies out of a peer's slots, `peer_helped` had been read there for a prompt
    of this worker's; `peer_taken_back` were to be, and were read here."""

    hits: int
    misses: int
    bytes_loaded_device: int
    bytes_read_disk: int
    bytes_requested_disk: int
    host_hits: int
    peer_hits: int
    peer_helped: int
    peer_taken_back: int
    stall_seconds: float


class Lease(NamedTuple):
    """The right to use one expert's weights until the stream that gave it advances."""

    key: ExpertKey
    slot: int
    generation: int
    pool: SlotMemory

    def tensors(self) -> Mapping[str, Tensor]:
        """The expert's parameters by name, without their expert dimension."""
        self._check()
        return self.pool.tensors(self.slot)

    def address(self) -> int:
        """Where the expert's bytes begin, for as long as the lease holds."""
        self._check()
        return self.pool.address(self.slot)

    def _check(self) -> None:
        now = self.pool.generation[self.slot]
        assert now == self.generation, f"lease {self.key} is of generation {self.generation}, slot {self.slot} of {now}"


class Glance:
    """Where experts of a layer are, for a computation that begins now and holds nothing: `at_E` has their addresses,
    negative ones of those that are not there, and `address` is where that table is.

    Where others may write to the slots, `words_2E` int64 are the address of each expert's word (0 of those that are not
    there) and what it was, else None; `words_address` is where it is, 0 for None. What is computed is worth something
    only if the words are the same afterwards; until then nothing may depend on it. `used` notes that some of the
    experts, where they were there, have answered.
    """

    def __init__(self, at_E: Ints, used: Callable[[Ints], None], words_2E: Ints | None = None) -> None:
        self.at_E, self.address, self.used = at_E, at_E.ctypes.data, used
        self.words_2E, self.words_address = words_2E, 0 if words_2E is None else words_2E.ctypes.data


def slot_views(slot_bytes: Tensor, layout: ExpertLayout) -> dict[str, Tensor]:
    """The named tensors of `layout` as views of one slot's bytes."""
    return {
        t.name: slot_bytes[t.offset : t.offset + t.nbytes].view(getattr(torch, t.dtype)).view(t.shape)
        for t in layout.tensors
    }
