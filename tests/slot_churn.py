"""A worker that gives its device slots to one expert after the other, for ever: a process to be killed."""

from __future__ import annotations

import random
import time

from buddymoe_ray.cache.slot_peers import SlotPeers
from buddymoe_ray.device import open_device
from buddymoe_ray.types import ExpertKey

__all__ = ["DIGEST", "SLOT", "churn", "open_peers"]

SLOT = 1 << 20
DIGEST = bytes(range(32))


def open_peers(tag: str, slots: int) -> SlotPeers:
    return SlotPeers(open_device("interpret"), slots=slots, slot_bytes=SLOT, digest=DIGEST, tag=tag)


def churn(tag: str, seed: int) -> None:
    """An expert's bytes are all its number."""
    mine, rng = open_peers(tag, 3), random.Random(seed)
    slots = mine.memory.view(3, SLOT)
    while True:
        slot, expert = rng.randrange(3), rng.randrange(6)
        mine.withdraw(slot)
        slots[slot] = expert
        mine.publish(slot, ExpertKey(1, expert))
        time.sleep(rng.choice((0, 0, 1e-4, 1e-3)))
