"""A worker with a device of its own that computes prompts and helps others with theirs, for ever: to be killed."""

from __future__ import annotations

import random
from pathlib import Path

from experts_on_disk import expert_bytes_of, make_layout, plan_of

from buddymoe_ray.cache import DiskReader, ExpertCache, SlotPeers, open_private, sharded_reads
from buddymoe_ray.device import open_device
from buddymoe_ray.types import ExpertKey

__all__ = ["Sharer", "share"]


class Sharer:
    """Two wave slots, and none that keep anything: every prompt lacks all experts."""

    def __init__(self, folder: Path, tag: str) -> None:
        layout, self.truth = make_layout(folder)
        plan = plan_of(layout, 2)
        sharded_reads.LEAST_BYTES, device = 1, open_device("interpret")
        self.peers = SlotPeers(device, slots=2, slot_bytes=layout.slot_bytes, digest=bytes(32), tag=tag)
        reader = DiskReader(depth=2, buffer_bytes=8192)
        self.cache: ExpertCache = open_private(
            layout, plan, reader=reader, device=device, host_slots=4, peers=self.peers
        )

    def prompt(self, layer: int, experts: list[int]) -> None:
        """Of one layer, with every byte compared."""
        lent = list[int]()
        with self.cache.shared_reads(layer, experts):
            for leases in self.cache.stream(layer, experts, protect_residency=True):
                for lease in leases:
                    right = self.truth[ExpertKey(layer, lease.key.expert)]
                    assert expert_bytes_of(dict(lease.tensors())) == right, f"{lease.key} is not as in its file"
                    lent.append(lease.key.expert)
        assert sorted(lent) == sorted(experts), f"asked for {experts}, lent {lent}"
        self.cache.check_integrity()

    def some(self, rng: random.Random) -> None:
        """A prompt, and what others ask for in between."""
        self.prompt(rng.randrange(3), rng.sample(range(6), rng.randint(2, 6)))
        for _ in range(rng.randrange(8)):
            self.cache.run_errands(idle=True)


def share(folder: Path, tag: str, box: float, seed: int) -> None:
    sharded_reads.BOX = box
    worker, rng = Sharer(folder, tag), random.Random(seed)
    while True:
        worker.some(rng)
