"""Which resident expert is evicted: least recently used, within one layer's slots.

A token walks the layers in a cycle, so one list over all layers would evict exactly what is needed next; every layer
has its own. Pure: knows slot numbers, no bytes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

__all__ = ["LRU"]


class LRU:
    """Slots in order of last access."""

    def __init__(self) -> None:
        self._order: OrderedDict[int, None] = OrderedDict()

    def touch(self, slot: int) -> None:
        """Note an access; adds a slot that is new."""
        self._order[slot] = None
        self._order.move_to_end(slot)

    def demote(self, slot: int) -> None:
        """Have the slot go before all others."""
        self._order.move_to_end(slot, last=False)

    def forget(self, slot: int) -> None:
        """The slot is empty now."""
        self._order.pop(slot, None)

    def victim(self, allowed: Callable[[int], bool]) -> int | None:
        """The least recently used slot that is allowed to go, or None."""
        return next((slot for slot in self._order if allowed(slot)), None)

    def __len__(self) -> int:
        return len(self._order)

    def __contains__(self, slot: object) -> bool:
        return slot in self._order
