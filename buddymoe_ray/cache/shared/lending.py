"""Slots whose memory is reserved for others: used while nobody asks for it, and given back to the kernel before that.

What is reserved for stand-ins has experts in it until there are some. Every row says how many of the lent slots, which
are a store's last, may be used as far as it is concerned, and the fewest count: a row that dies says nothing any more.
Whoever wants memory says so, takes experts out, waits until nobody leases or looks, and punches a hole in the file.
Bytes of a hole are 0, and come back as memory when they are read: so a generation moves on first, and a look, which
takes no lease, is waited for. Runs on an attachment of its own, in a thread of its own. Does not know what the memory
is for. Invariant: when `lend` has returned True no slot beyond its count has memory, until it is called again or its
row is gone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress

import numpy as np

from buddymoe_ray.cache.shared.calls import Stalled
from buddymoe_ray.cache.shared.interface import Store
from buddymoe_ray.cache.shared.shape import roles_of
from buddymoe_ray.cache.shared.tables import FREE, READY, UNUSED, WAVE

__all__ = ["Lender"]

_POLL_SECONDS = 2e-3


class Lender:
    """`store` is an attachment of this object's own."""

    def __init__(self, store: Store) -> None:
        self._store, self._tables = store, store.tables
        self._first = store.shape.slots - store.shape.lent

    def lend(self, count: int, stop: Callable[[], bool]) -> bool:
        """Let slots have the memory of so many, as far as others let them too, and take it back of all others; False
        where it came to a `stop()` before. Whoever stands still with a lease, a look or the tables is waited for."""
        self._tables.lends[self._tables.row] = count
        with suppress(Stalled):
            while not self._emptied(count, stop):
                if stop():
                    return False
                time.sleep(_POLL_SECONDS)
            if not self._looked(stop):
                return False
            self._store.give_back(self._first + count)
            self._use(stop)
            return True
        return False

    def close(self) -> None:
        """Let go of the store: others decide from now on. Safe to call twice."""
        self._store.close()

    def _emptied(self, count: int, stop: Callable[[], bool]) -> bool:
        """Take experts out of the lent slots beyond `count`; whether nobody has any of them any more."""
        tables, slots = self._tables, np.arange(self._first + count, self._store.shape.slots)
        with tables.locked_until(stop):
            tables.reap()
            for slot in slots[(tables.state[slots] == READY) | (tables.partition[slots] != UNUSED)].tolist():
                if tables.state[slot] in (FREE, READY):  # else somebody reads into it
                    tables.vacate(slot)
                    tables.partition[slot] = UNUSED
            if (tables.state[slots] != FREE).any() or tables.leased(slots).any():
                return False
            tables.generation[slots] += 1
            return True

    def _looked(self, stop: Callable[[], bool]) -> bool:
        """Wait until every look is over that has begun by now."""
        tables = self._tables
        _pause()
        words = tables.looks[:, 0].tolist()
        for row in np.flatnonzero(tables.pid).tolist():
            while words[row] % 2 and tables.looks[row, 0] == words[row] and tables.alive(row):
                if stop():
                    return False
                time.sleep(_POLL_SECONDS)
        return True

    def _use(self, stop: Callable[[], bool]) -> None:
        """Have memory for the slots that may be used and are not; as many as there is memory for."""
        tables, roles = self._tables, roles_of(self._store.plan, WAVE)
        if not (tables.partition[self._first :] == UNUSED).any():
            return
        for slot in range(self._first, self._store.shape.slots):
            with tables.locked_until(stop):
                if stop() or slot >= self._first + tables.lent:
                    return
                if tables.free_of(np.array([slot])) is None:  # in use, or another row is about to
                    continue
                tables.reserve(slot)
            try:
                self._store.take_back(slot)
            except OSError:
                with tables.locked_until(stop):
                    tables.vacate(slot)
                return
            with tables.locked_until(stop):
                tables.vacate(slot)
                tables.partition[slot] = roles[slot]  # whoever has come to want it waits for this, and takes it out


def _pause() -> None:
    """What a look wrote before it read entries may still be on its way to memory: not any longer than this."""
    time.sleep(_POLL_SECONDS)
