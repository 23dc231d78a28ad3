"""A GPU's expert slots as a pool of the service's placement: what was asked of them, and what is to stay in them.

Workers of a node read each other's slots, so each need not hold what another does; which experts have one holder, and
which of the most used have several, is solved for all of them (`policy.placement`), with unequal numbers of slots too.
What it says is brought between steps, at a pace; wave slots follow demand. From any thread. Knows no ray.

Against slots that follow use alone, each worker weighing what others hold (`cache.private_store`), in what reads cost
(a peer's 1, the host's 4; routers of skew 1.2 and .7, 32 experts, 4 in a step, 4 or 8 workers of 8 slots and 4 wave
slots each): .47 instead of .54 an access, .56 for .77, with 8 workers .30 for .39; reads from the host 3.6 % of all
accesses for 8.2, 0 for 10.2, 0 for 3.7. With half of the slots placed, and half following use, nothing is gained. What
did not help either: fading counts more slowly, weighing peers' slots at a sixteenth (.52, .75, .38), or keeping out
what is used less than all that is there.

Legend: L layers, E experts of the widest layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from buddymoe_ray.cache import ExpertCache, SlotPeers
from buddymoe_ray.types import ExpertKey

__all__ = ["DevicePool"]

_LINK_BYTES_S = 26e9  # of PCIe 4; what is solved depends on what a peer's slots cost of it


class DevicePool:
    """The layers' own slots of `cache`, which others read by way of `peers`; `fetch_seconds` and `peer_seconds` are
    what a read of an expert from the host and from a peer takes."""

    def __init__(self, cache: ExpertCache, peers: SlotPeers) -> None:
        self._cache, self._tables = cache, cache.store.tables
        self.layout, self.slots = cache.layout, sum(cache.plan.layer_slots)
        self._before_LE = self._accesses()
        self.fetch_seconds = self.layout.expert_bytes / _LINK_BYTES_S
        self.peer_seconds = self.fetch_seconds / 2**peers.nearer

    def counts(self) -> npt.NDArray[np.float32]:
        """Accesses `[L, E]` since the last call."""
        before_LE, self._before_LE = self._before_LE, self._accesses()
        return (self._before_LE - before_LE).astype(np.float32)

    @property
    def pins(self) -> tuple[tuple[int, int], ...]:
        """(layer, expert) of what is to stay."""
        return tuple((int(layer), int(expert)) for layer, expert in np.argwhere(self._tables.pinned))

    def pin(self, pins: Sequence[tuple[int, int]], bytes_per_second: float) -> None:
        """These are to stay, the most wanted first, read at that pace; a slot may become another layer's for it."""
        self._cache.place([ExpertKey(*pin) for pin in pins], bytes_per_second)

    def _accesses(self) -> npt.NDArray[np.uint64]:
        accesses_LE: npt.NDArray[np.uint64] = self._tables.accesses[0].copy()
        return accesses_LE
