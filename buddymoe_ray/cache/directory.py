"""Which expert is in which slot, and which slot may be claimed next. Bookkeeping only: moves no bytes.

Slots are partitioned: `layer_slots[l]` for each layer, wave slots for whoever needs one for a moment. One thread calls
this.
Invariant (`check_integrity`): slot table and expert tables mirror each other; claimed slots hold nothing yet.

Legend: E experts of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from buddymoe_ray.cache.usage import Usage
from buddymoe_ray.types import ExpertKey, SlotPlan

__all__ = ["Directory"]

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

_PEERS_NEARER = 2.0
"""log2 of how much nearer a peer's slots are than what is below: NVLink carries four times what PCIe 5 does."""


class Held(Protocol):
    """What the node's other workers hold: `slot_peers.SlotPeers`."""

    @property
    def place(self) -> int:
        """This worker's among all of them, from 0."""

    def experts(self, layer: int) -> Sequence[int]:
        """Those of a layer that some other has."""


class Directory:
    """Tables of a slot plan; `at_E` is the `address` of every expert's slot, -1 where it has none. Of a layer's slots
    the one whose expert is least in `usage` is evicted first, of wave slots the one used longest ago. What `peers`
    hold is worth as much less as it is nearer there than below: so what all use is in the slots of all, and of the rest
    a node holds one of each as far as it can (after SYMI, 2504.19925: replicas by popularity)."""

    def __init__(
        self,
        plan: SlotPlan,
        experts_per_layer: tuple[int, ...],
        address: Callable[[int], int] = int,
        peers: Held | None = None,
    ) -> None:
        self.plan, self._address, self._peers = plan, address, peers
        self.at_E = [np.full(count, -1, np.int64) for count in experts_per_layer]
        self.key_of: list[ExpertKey | None] = [None] * plan.slots_total
        self.slot_of: list[list[int]] = [[-1] * count for count in experts_per_layer]
        self.resident_E = [np.zeros(count, np.bool_) for count in experts_per_layer]
        widest = (len(experts_per_layer), max(experts_per_layer))
        self.usage = Usage(np.full(widest, -np.inf), np.zeros(len(experts_per_layer), np.int64))
        self._expert_C = np.full(plan.slots_total, -1)
        self._used_at_C = np.zeros(plan.slots_total, np.int64)
        self._clock = 0
        self._free: list[list[int]] = []
        self._partition: list[int] = []
        self._waves, self._begin = len(plan.layer_slots), [0]
        for partition, count in enumerate((*plan.layer_slots, plan.wave_slots)):
            start = len(self._partition)
            self._free.append(list(range(start + count - 1, start - 1, -1)))
            self._partition += [partition] * count
            self._begin.append(start + count)
        self.first_wave = self._begin[self._waves]
        self._count = list(plan.layer_slots)  # of each layer's slots, how many are in use
        self.leased: set[int] = set()
        self.kept: set[int] = set()  # of the call in progress: they stay in their layer's slots until it ends
        self.awaited: set[int] = set()  # wave slots with what will be asked for: nothing is read ahead into them
        self._claimed: set[int] = set()
        self.evictions = 0

    def to_fill(self, layer: int) -> list[int]:
        """Experts for all slots of a layer, of those that it does not hold: pinned ones, else the first that are there,
        after those of workers before this one."""
        slots, count = self.slot_of[layer], self.plan.layer_slots[layer]
        first = self._peers.place * count if self._peers else 0
        wanted = self.plan.pinned[layer] if self.plan.pinned else range(first, first + count)
        return [expert for expert in (e % len(slots) for e in wanted) if slots[expert] < 0]

    def claim(self, layer: int, *, protect_residency: bool) -> int | None:
        """A slot for an expert of `layer` that is to be loaded, emptied; None when all are leased or being filled.

        The layer's own free slots come first; then, unless residency is protected, its least used expert that the
        call in progress does not name is evicted; then wave slots. So a call that names more experts than the layer
        has slots keeps what is resident and passes the rest through wave slots: plain LRU would push every expert out
        just before its turn comes again.
        """
        waves = self._waves
        slot = self._take_free(layer)
        if slot is None and not protect_residency:
            slot = self._evict(layer, self.leased | self.kept)
        if slot is None:
            slot = self._take_free(waves)
        if slot is None:
            slot = self._evict(waves, self.leased)
        if slot is not None:
            self._claimed.add(slot)
        return slot

    def admits(self, key: ExpertKey) -> bool:
        """Whether an expert is worth more in its layer's slots than what would go for it: one that a peer has and that
        is not passes through a wave slot."""
        if self._peers is None or key.expert not in self._peers.experts(key.layer):
            return True
        expert_C = self._expert_C[slice(*self._begin[key.layer : key.layer + 2])]
        mine = self._worth(key.layer, np.array([key.expert]))
        return bool((self._worth(key.layer, expert_C[expert_C >= 0]) < mine).any())

    def claim_ahead(self, layer: int, staying: set[int], *, protect_residency: bool) -> int | None:
        """A slot for an expert that was not asked for yet; none of `staying` is evicted. One of the layer's own or,
        where residency is protected, of the wave slots: not with what was brought there and waits to be asked for."""
        waves = self._waves
        slot = self._take_free(layer)
        if slot is None and not protect_residency:
            slot = self._evict(layer, self.leased | self.kept | staying)
        if slot is None and protect_residency:
            slot = self._take_free(waves)
        if slot is None and protect_residency:
            slot = self._evict(waves, self.leased | self.awaited)
        if slot is not None:
            self._claimed.add(slot)
        return slot

    def commit(self, key: ExpertKey, slot: int) -> None:
        """The claimed slot now holds `key`."""
        assert slot in self._claimed, f"slot {slot} is committed, must be claimed"
        now = self.slot_of[key.layer][key.expert]
        assert now < 0, f"{key} is already in slot {now}"
        self._claimed.remove(slot)
        self.key_of[slot] = key
        self.slot_of[key.layer][key.expert] = slot
        self.resident_E[key.layer][key.expert] = True
        self.at_E[key.layer][key.expert] = self._address(slot)
        self._expert_C[slot] = key.expert
        self.touch(slot)

    def resize(self, layer: int, count: int) -> list[tuple[int, int]]:
        """Use the first `count` of the layer's slots only, from now on; between calls. What is used least of what they
        cannot hold is evicted; returns moves (from, to) of what they can, whose bytes are still to follow."""
        assert not (self._claimed or self.leased), f"slots {self._claimed | self.leased} are in use, must not be"
        begin, end = self._begin[layer : layer + 2]
        limit = begin + count
        assert limit <= end, f"layer {layer} has {end - begin} slots, cannot use {count}"
        for _ in range(sum(key is not None for key in self.key_of[begin:end]) - count):
            self._evict(layer, set())
        self._count[layer] = count
        self._free[layer] = [slot for slot in range(limit - 1, begin - 1, -1) if self.key_of[slot] is None]
        moves = []
        for slot in range(limit, end):
            key = self.key_of[slot]
            if key is not None:
                to = self._free[layer].pop()
                self._forget(slot, key)
                self._claimed.add(to)
                self.commit(key, to)
                moves.append((slot, to))
        return moves

    def bring(self, slot: int) -> None:
        """Nobody has asked for what the slot now holds."""
        if self._is_wave(slot):
            self.awaited.add(slot)

    def expect(self, slots: Iterable[int]) -> None:
        """What these hold will be asked for, again where it was before."""
        self.awaited.update(slot for slot in slots if slot >= 0 and self._is_wave(slot))

    def abandon(self, slot: int) -> None:
        """The claimed slot could not be filled; it is free again."""
        self._claimed.remove(slot)
        self._free[self._partition[slot]].append(slot)

    def touch(self, slot: int) -> None:
        """Note an access to what a slot holds."""
        if self._is_wave(slot):
            self.awaited.discard(slot)
            self._clock += 1
            self._used_at_C[slot] = self._clock

    def check_integrity(self) -> None:
        """Tables mirror each other and every slot is in exactly one state."""
        forward = {(la, e): slot for la, row in enumerate(self.slot_of) for e, slot in enumerate(row) if slot >= 0}
        backward = {(key.layer, key.expert): slot for slot, key in enumerate(self.key_of) if key is not None}
        assert forward == backward, f"experts say {forward}, slots say {backward}"
        flags = {(la, e) for la, row in enumerate(self.resident_E) for e in row.nonzero()[0].tolist()}
        assert flags == set(forward), f"flags say {flags}, tables say {set(forward)}"
        places = {(la, e): int(row[e]) for la, row in enumerate(self.at_E) for e in (row >= 0).nonzero()[0].tolist()}
        assert places == {k: self._address(s) for k, s in forward.items()}, f"addresses {places}, tables {forward}"
        free = [slot for slots in self._free for slot in slots]
        unused = [
            s for b, n, e in zip(self._begin, self._count, self._begin[1:], strict=False) for s in range(b + n, e)
        ]
        held = [slot for slot, key in enumerate(self.key_of) if key is not None]
        every = sorted([*free, *held, *self._claimed, *unused])
        assert every == list(range(self.plan.slots_total)), (
            f"free {free}, held {held}, claimed {self._claimed}, {unused}"
        )
        experts = [-1 if key is None else key.expert for key in self.key_of]
        assert experts == self._expert_C.tolist(), f"slots hold {experts}, of which {self._expert_C.tolist()} is known"
        assert self.awaited <= set(held), f"awaited {self.awaited}, held {held}"
        assert self.leased <= set(held), f"leased {self.leased}, held {held}"
        for slot in held:
            key = self.key_of[slot]
            home = self._partition[slot]
            assert key is not None and home in (key.layer, self._waves), f"{key} is in partition {home}"

    def _is_wave(self, slot: int) -> bool:
        return slot >= self.first_wave

    def _take_free(self, partition: int) -> int | None:
        return self._free[partition].pop() if self._free[partition] else None

    def _evict(self, partition: int, staying: set[int]) -> int | None:
        begin, end = self._begin[partition : partition + 2]
        expert_C = self._expert_C[begin:end]
        usage_C = self._used_at_C[begin:end] if partition == self._waves else self._worth(partition, expert_C)
        may_go = expert_C >= 0
        may_go[[slot - begin for slot in staying if begin <= slot < end]] = False
        allowed = may_go.nonzero()[0]
        if not allowed.size:
            return None
        slot = begin + int(allowed[usage_C[allowed].argmin()])
        key = self.key_of[slot]
        assert key is not None, f"slot {slot} is evicted but empty"
        self._forget(slot, key)
        self.evictions += 1
        return slot

    def _worth(self, layer: int, expert_C: Ints) -> Floats:
        """log2 of the accesses that each of a layer's experts gets, times how far away it is."""
        usage_C = self.usage.usage_LE[layer, expert_C]
        if self._peers is None:
            return usage_C
        return usage_C - _PEERS_NEARER * np.isin(expert_C, self._peers.experts(layer))

    def _forget(self, slot: int, key: ExpertKey) -> None:
        """The slot no longer holds `key`."""
        self._expert_C[slot] = -1
        self.awaited.discard(slot)
        self.key_of[slot] = None
        self.slot_of[key.layer][key.expert] = -1
        self.resident_E[key.layer][key.expert] = False
        self.at_E[key.layer][key.expert] = -1
