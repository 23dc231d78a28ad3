"""Background migration in a shared store: experts come and go while workers compute, and nothing stops.

An expert that has to go is first lent to nobody any more; its bytes stay until the last lease ends, then the new one is
read into the slot. Reads keep to a bandwidth and wait for a worker that waits for an expert. Does not decide what
should move: `policy.placement` does. Used by whoever owns the store, on an attachment of its own. Where a stopped
process holds the tables it waits: nobody waits for it, workers free what the dead held themselves, and what it is
reading another worker reads for itself.
Invariant: interrupted anywhere, the store is whole and the moves made so far hold.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from buddymoe_ray.cache.disk import DiskReader, ReadTicket
from buddymoe_ray.cache.shared.store import SharedStore
from buddymoe_ray.cache.shared.tables import FREE, READY, WAVE
from buddymoe_ray.types import ExpertKey

__all__ = ["Move", "Moved", "Mover"]

_POLL_SECONDS = 1e-3
_LONGEST_GIVING_WAY = 0.25
_LONGEST_DRAIN = 5.0


@dataclass(frozen=True, kw_only=True)
class Move:
    """Bring `load` in; `evict`, where given, goes for it, else something unpinned of the same layer."""

    load: ExpertKey
    evict: ExpertKey | None = None


@dataclass(kw_only=True)
class Moved:
    """What a run came to. `skipped` moves found no slot that could be had."""

    moves: int = 0
    nbytes: int = 0
    skipped: int = 0


class Mover:
    """Moves experts of `store` at `bytes_per_second` at most."""

    def __init__(self, store: SharedStore, reader: DiskReader, *, bytes_per_second: float) -> None:
        assert bytes_per_second > 0, f"bytes_per_second is {bytes_per_second}, must be positive"
        self._store, self._reader, self._rate = store, reader, bytes_per_second
        self._tables = store.tables
        self._next = time.monotonic()

    def run(self, moves: Iterable[Move], stop: Callable[[], bool] = lambda: False) -> Moved:
        """Make the moves in order until `stop()`. Raises CacheError when an expert cannot be read."""
        moved = Moved()
        for move in moves:
            if stop():
                break
            self._wait_for_demand(stop)
            self._one(move, moved)
        return moved

    def pin(self, pins: Iterable[ExpertKey]) -> None:
        """Say which experts keep their slots from now on; the others may are evicted."""
        with self._tables.locked():
            self._tables.pinned[...] = 0
            for key in pins:
                self._tables.pinned[key.layer, key.expert] = 1

    def close(self) -> None:
        """Close the reader; the store is its owner's."""
        self._reader.close()

    def _one(self, move: Move, moved: Moved) -> None:
        slot = self._empty_slot(move)
        tables, key = self._tables, move.load
        if slot is None:
            moved.skipped += not tables.entry[key.layer, key.expert]
            return
        with tables.locked():
            if (now := int(tables.slot_of[key.layer, key.expert])) >= 0:  # came by demand meanwhile
                tables.vacate(slot)
                self._exchange(now, slot)
                return
            tables.take(slot, key)
            tables.partition[slot] = key.layer
        ticket = ReadTicket(())
        try:
            ticket = self._reader.submit(self._store.layout.pieces[key], self._store.bytes_C[slot])
            ticket.wait()
        except BaseException:
            ticket.settle()
            with tables.locked():
                tables.vacate(slot)
            tables.release([slot])
            raise
        with tables.locked():
            tables.commit([slot])
        tables.release([slot])
        moved.moves += 1
        moved.nbytes += self._store.layout.expert_bytes

    def _empty_slot(self, move: Move) -> int | None:
        """A slot that nobody uses any more, kept for this row; None when the expert is there or no slot can be had."""
        tables, load = self._tables, move.load
        with tables.locked():
            now, slot = int(tables.slot_of[load.layer, load.expert]), self._chosen(move)
            if slot is None:
                return None
            if now >= 0:
                # no byte moves; but one who holds the slot may wait for a wave slot
                if not tables.leased(np.array([slot]))[0]:
                    self._exchange(now, slot)
                return None
            if tables.state[slot] == FREE:
                tables.reserve(slot)
                return slot
            gone = ExpertKey(int(tables.key_layer[slot]), int(tables.key_expert[slot]))
            tables.retire(slot)
        return self._drained(slot, gone)

    def _exchange(self, now: int, slot: int) -> None:
        """Give the expert in wave slot `now`, if it is one, the role of `slot`; the caller holds the lock."""
        tables = self._tables
        lent = slot >= tables.shape.slots - tables.shape.lent  # it may go, and wave slots may not
        if tables.partition[now] == WAVE and not lent:
            tables.partition[slot] = WAVE  # first: killed in between there is one wave slot more, and not less
            tables.partition[now] = tables.key_layer[now]

    def _chosen(self, move: Move) -> int | None:
        """The slot that is evicted; the caller holds the lock."""
        tables, layer = self._tables, move.load.layer
        if move.evict is not None:
            slot = int(tables.slot_of[move.evict.layer, move.evict.expert])
            if slot >= 0 and tables.partition[slot] != WAVE and tables.state[slot] == READY:
                return slot
        mine = np.flatnonzero(tables.partition == layer)
        free = tables.free_of(mine)
        if free is not None:
            return free
        mine = mine[tables.state[mine] == READY]
        mine = mine[tables.pinned[tables.key_layer[mine], tables.key_expert[mine]] == 0]
        return int(mine[tables.usage.usage_LE[layer, tables.key_expert[mine]].argmin()]) if len(mine) else None

    def _drained(self, slot: int, gone: ExpertKey) -> int | None:
        """Wait until nobody leases the retired slot; a holder that hangs keeps it, and its expert comes back."""
        tables, end = self._tables, time.monotonic() + _LONGEST_DRAIN
        while tables.leased(np.array([slot]))[0]:
            time.sleep(_POLL_SECONDS)
            tables.reap_now_and_then()
            if time.monotonic() > end:
                with tables.locked():
                    if tables.leased(np.array([slot]))[0]:
                        tables.restore(slot, gone)
                        return None
        return slot

    def _wait_for_demand(self, stop: Callable[[], bool]) -> None:
        """Keep to the bandwidth, and let a worker that waits for an expert read first (not for ever)."""
        pause = self._next - time.monotonic()
        while pause > 0 and not stop():
            time.sleep(min(pause, 0.05))
            pause = self._next - time.monotonic()
        patience = time.monotonic() + _LONGEST_GIVING_WAY
        while self._tables.others_loading() and time.monotonic() < patience and not stop():
            time.sleep(_POLL_SECONDS)
        self._next = max(self._next, time.monotonic()) + self._store.layout.expert_bytes / self._rate
