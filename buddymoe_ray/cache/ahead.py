"""Reads of experts that nobody has asked for yet: taken over by who does, given up when nobody did.

Knows loads by their key and ticket; what it means that one has ended is its cache's. Used from one thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from buddymoe_ray.cache.shared.calls import OwnLoad
from buddymoe_ray.types import ExpertKey

__all__ = ["ReadsAhead"]


class ReadsAhead:
    """`finish` makes experts that have arrived resident, or frees the slots of those that failed: for whoever asks for
    them, to read them again. It calls `remove` once nothing is in flight."""

    def __init__(self, finish: Callable[[Sequence[OwnLoad]], None]) -> None:
        self._finish = finish
        self._loads: dict[ExpertKey, OwnLoad] = {}
        self._cancelled: list[OwnLoad] = []  # of which something is under way

    def __contains__(self, key: object) -> bool:
        return key in self._loads

    def __bool__(self) -> bool:
        """Whether anything is under way."""
        return bool(self._loads or self._cancelled)

    def add(self, load: OwnLoad) -> None:
        """One more is under way."""
        self._loads[load.key] = load

    def take(self, key: ExpertKey) -> OwnLoad:
        """Somebody asked for the expert, and finishes the load."""
        return self._loads.pop(key)

    def remove(self, load: OwnLoad) -> None:
        """It has ended, one way or the other."""
        if self._loads.get(load.key) is load:
            del self._loads[load.key]
        else:
            self._cancelled.remove(load)

    def land(self, *, waits: bool = False) -> None:
        """Finish what has arrived where it goes; one that `waits` does so for what is on its way to the device."""
        if self:
            loads = [*self._loads.values(), *self._cancelled]
            self._finish([load for load in loads if (load.ticket.done() if waits else load.ticket.landed())])

    def give_up(self, layer: int = -1, experts: Sequence[int] = ()) -> None:
        """Cancel what was not begun, but of these experts; one that is wholly under way arrives all the same."""
        for key in list(self._loads):
            if not (key.layer == layer and key.expert in experts) and self._loads[key].ticket.cancel():
                self._cancelled.append(self._loads.pop(key))

    def make_room(self) -> bool:
        """Give up all, and wait until one has ended, so that its slot may be had; whether there was any."""
        self.give_up()
        load = next(iter([*self._cancelled, *self._loads.values()]), None)
        if load is None:
            return False
        load.ticket.settle()
        self.land(waits=True)
        return True

    def settle(self) -> None:
        """Give up all, and wait for what is under way."""
        if self:
            self.give_up()
            for load in [*self._loads.values(), *self._cancelled]:
                load.ticket.settle()
            self.land(waits=True)
