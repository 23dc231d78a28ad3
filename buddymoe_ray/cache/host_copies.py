"""Copies out of a host tier's slots to a device: begun early, admitted when asked for, slots given back when done.

Nobody waits for a copy but who needs its host slot. Used from one thread. Invariant: a host slot is given back once its
copy is done, and not before.
"""

from __future__ import annotations

from collections import deque

from buddymoe_ray.cache.host import Host
from buddymoe_ray.cache.pool import SlotPool
from buddymoe_ray.device import Copy, Device
from buddymoe_ray.types import ExpertKey

__all__ = ["HostCopies"]


class HostCopies:
    """From the slots of `host` to those of `pool`, which is on `device`."""

    def __init__(self, host: Host, pool: SlotPool, device: Device) -> None:
        self._host, self._pool, self._device = host, pool, device
        self._admitted = deque[tuple[ExpertKey, int, int, Copy]]()  # with slot and generation

    def begin(self, slot: int, host_slot: int) -> Copy:
        """Copy a host slot that has its bytes, once what was computed so far has read the device slot."""
        return self._device.copy(self._pool.bytes_C[slot], self._host.pool.bytes_C[host_slot])

    def admit(self, key: ExpertKey, slot: int, copy: Copy) -> None:
        """What is computed from now on may read the expert in its slot."""
        self._device.admit(copy)
        self._admitted.append((key, slot, self._pool.generation[slot], copy))
        self.release()

    def release(self, *, wait: bool = False) -> bool:
        """Give back the host slots whose copies are done, with `wait` of the oldest at least; whether one was."""
        released = False
        while self._admitted and ((wait and not released) or self._admitted[0][-1].done()):
            key, slot, generation, copy = self._admitted.popleft()
            copy.wait()
            self._pool.publish(key, slot, generation)
            self._host.release(key)
            released = True
        return released

    def settle(self) -> None:
        """Give back all of them."""
        while self.release(wait=True):
            pass
