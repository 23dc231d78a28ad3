"""Where every table lies in a store's file: a header page, the tables, then the slots from a page boundary on.

Pure arithmetic and views; decides nothing.

Legend: C slots, L layers, E experts of the widest layer, P rows (processes that may be attached).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from buddymoe_ray.cache.shared.locks import ROWS
from buddymoe_ray.types import ExpertLayout, SlotPlan

__all__ = ["HeaderWord", "StoreShape", "entry_of", "places_of", "roles_of"]

_PAGE = 4096
_DIGEST_AT, _DIGEST_BYTES = 1024, 32
_SLOT_AT = 40  # the bit of an entry from which on it is a slot's number


class HeaderWord:
    """Positions in the header's 64-bit words."""

    MAGIC, VERSION, READY, CLOCK, DIRTY, EPOCH = range(6)
    MAGIC_WORD = 0x425544_44594D4F
    VERSION_WORD = 8


@dataclass(frozen=True, kw_only=True)
class StoreShape:
    """Sizes of one store; the last `lent` of its slots have memory that is reserved for others, and `rows` may be
    attached."""

    slots: int
    slot_bytes: int
    layers: int
    experts: int
    lent: int = 0
    rows: int = ROWS

    @classmethod
    def of(cls, layout: ExpertLayout, plan: SlotPlan, rows: int = ROWS) -> StoreShape:
        """The shape for a model's experts under a plan."""
        return cls(
            slots=plan.slots_total,
            slot_bytes=layout.slot_bytes,
            layers=len(layout.experts_per_layer),
            experts=max(layout.experts_per_layer),
            lent=sum(plan.lent_slots),
            rows=rows,
        )

    def fields(self) -> dict[str, tuple[Any, tuple[int, ...]]]:
        """Every table's dtype and shape, in file order. See `tables.SharedTables` for what they mean."""
        C, LE, P = self.slots, (self.layers, self.experts), self.rows
        return {
            "pid": (np.int64, (P,)),
            "generation": (np.uint64, (C,)),
            "last_used": (np.uint64, (C,)),
            "usage": (np.float64, LE),
            "entry": (np.uint64, LE),
            "steps": (np.int64, (self.layers,)),
            "accesses": (np.uint64, (P, *LE)),
            "looks": (np.uint64, (P, 8)),
            "lends": (np.int64, (P,)),
            "key_layer": (np.int32, (C,)),
            "key_expert": (np.int32, (C,)),
            "slot_of": (np.int32, LE),
            "partition": (np.int32, (C,)),
            "loader": (np.int32, (C,)),
            "state": (np.uint8, (C,)),
            "pinned": (np.uint8, LE),
            "lease": (np.uint8, (P, C)),
        }

    @property
    def data_offset(self) -> int:
        """Where slot 0 begins."""
        at = _PAGE
        for dtype, shape in self.fields().values():
            at = _aligned(at + np.dtype(dtype).itemsize * prod(shape), 64)
        return _aligned(at, _PAGE)

    @property
    def total_bytes(self) -> int:
        """Size of the file."""
        return _aligned(self.data_offset + self.slots * self.slot_bytes, _PAGE)

    def span(self, first: int, end: int) -> tuple[int, int]:
        """Where in the file the bytes of these slots are."""
        return self.data_offset + first * self.slot_bytes, self.data_offset + end * self.slot_bytes

    def head(self, memory: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
        """The header's words."""
        return memory[: 8 * 16].view(np.uint64)

    def digest(self, memory: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """The header's digest of what the store is for."""
        return memory[_DIGEST_AT : _DIGEST_AT + _DIGEST_BYTES]

    def views(self, memory: npt.NDArray[np.uint8]) -> dict[str, npt.NDArray[Any]]:
        """Every table as an array over the file's memory."""
        found: dict[str, npt.NDArray[Any]] = {}
        at = _PAGE
        for name, (dtype, shape) in self.fields().items():
            nbytes = np.dtype(dtype).itemsize * prod(shape)
            found[name] = memory[at : at + nbytes].view(dtype).reshape(shape)
            at = _aligned(at + nbytes, 64)
        return found

    def slot_bytes_of(self, memory: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """`[C, slot_bytes]` of the slots."""
        begin = self.data_offset
        return memory[begin : begin + self.slots * self.slot_bytes].reshape(self.slots, self.slot_bytes)


def roles_of(plan: SlotPlan, wave: int) -> list[int]:
    """The layer of each slot, `wave` of those that belong to none; lent ones come last, in the order in which
    `policy.lend_reserved` lends them."""
    lent = plan.lent_slots or (0,) * len(plan.layer_slots)
    own = [count - more for count, more in zip(plan.layer_slots, lent, strict=True)]
    tail = sorted(
        (count + at, la) for la, (count, more) in enumerate(zip(own, lent, strict=True)) for at in range(more)
    )
    roles = [layer for layer, count in enumerate(own) for _ in range(count)]
    return [*roles, *[wave] * plan.wave_slots, *(layer for _, layer in tail)]


def entry_of(slot: int, generation: int) -> int:
    """What an expert's entry says of where it is; 0 says nowhere."""
    return (slot + 1) << _SLOT_AT | generation


def places_of(entries: bytes) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The slot of each expert by its entry, -1 for nowhere, and the generation that it has there."""
    entries_E = np.frombuffer(entries, np.int64)
    return (entries_E >> _SLOT_AT) - 1, entries_E & ((1 << _SLOT_AT) - 1)


def _aligned(at: int, to: int) -> int:
    return -(-at // to) * to
