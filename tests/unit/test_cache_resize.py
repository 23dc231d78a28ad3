"""Slots that give their memory up and get it back: who stays, whose bytes are where, what the process really holds."""

from __future__ import annotations

import mmap
import random
from pathlib import Path

import numpy as np
import torch
from experts_on_disk import expert_bytes_of, make_layout

from buddymoe_ray.cache import DiskReader, ExpertCache, open_private
from buddymoe_ray.cache.pool import SlotPool
from buddymoe_ray.cache.shared import Lender
from buddymoe_ray.policy import lend_reserved, split_slots
from buddymoe_ray.types import ExpertKey, ExpertLayout, SlotPlan

COUNTS = (12, 5, 16)


def reserving(layout: ExpertLayout, *, slots: int, reserved: int) -> SlotPlan:
    """A plan of so many slots beside `reserved` bytes."""
    sizes = {"slot_bytes": layout.slot_bytes, "expert_bytes": layout.expert_bytes}
    budget = slots * layout.slot_bytes + reserved
    plan = split_slots(budget_bytes=budget, experts_per_layer=COUNTS, overhead_bytes=reserved, **sizes)
    return SlotPlan(**{**vars(plan), "reserved_bytes": reserved})


def held_bytes(cache: ExpertCache) -> int:
    """Of the slots' memory, as the kernel's page table has it."""
    begin = cache.store.address(0)
    with Path("/proc/self/pagemap").open("rb") as table:
        table.seek(begin // mmap.PAGESIZE * 8)
        entries = np.frombuffer(table.read(-(-cache.store.tensor_C.numel() // mmap.PAGESIZE) * 8), np.uint64)
    return int((entries >> np.uint64(62) > 0).sum()) * mmap.PAGESIZE  # present, or swapped out


def test_what_is_lent_comes_from_what_is_reserved_and_goes_back(tmp_path: Path) -> None:
    layout, _ = make_layout(tmp_path, experts_per_layer=COUNTS, rows=48, cols=160)
    reserved = 11 * layout.slot_bytes + 2 * mmap.PAGESIZE * len(COUNTS)
    plan = reserving(layout, slots=12, reserved=reserved)
    for lent, count in ((0, 0), (reserved, 11), (reserved // 2, 5), (10 * reserved, 11), (-5, 0)):
        now = lend_reserved(plan, lent, COUNTS)
        assert sum(now.lent_slots) == count and sum(now.layer_slots) == sum(plan.layer_slots) + count
        assert now.slots_total * now.slot_bytes + now.overhead_bytes == plan.budget_bytes, "bytes came from nowhere"
        assert all(a <= min(b, E) for a, b, E in zip(plan.layer_slots, now.layer_slots, COUNTS, strict=True))
        back = lend_reserved(now, 0, COUNTS)
        assert (back.layer_slots, back.overhead_bytes) == (plan.layer_slots, plan.overhead_bytes)


def test_slots_shrink_and_grow_under_a_cache_in_use(tmp_path: Path) -> None:
    layout, truth = make_layout(tmp_path, experts_per_layer=COUNTS, rows=48, cols=160)
    assert layout.slot_bytes > 8 * mmap.PAGESIZE, "pages would say nothing"
    plan = lend_reserved(reserving(layout, slots=8, reserved=(most := 24 * layout.slot_bytes)), most, COUNTS)
    rng = random.Random(0)
    with open_private(layout, plan, reader=DiskReader(depth=2, buffer_bytes=1 << 16)) as cache:
        cache.warm()
        lender = Lender(cache.store)
        for _ in range(60):
            for layer, count in enumerate(COUNTS):
                experts = sorted(rng.sample(range(count), 4))
                cache.count(layer, np.array([experts]))
                for leases in cache.stream(layer, experts, protect_residency=rng.random() < 0.2):
                    for lease in leases:
                        assert expert_bytes_of(dict(lease.tensors())) == truth[lease.key]
                assert lender.lend(lent := rng.randrange(sum(plan.lent_slots) + 1), lambda: False)
                cache.check_integrity()
                for expert in cache.resident(layer):  # what stayed was not read again
                    slot = int(cache.store.tables.slot_of[layer, expert])
                    assert expert_bytes_of(dict(cache.store.tensors(slot))) == truth[ExpertKey(layer, expert)]
                assert cache.device_bytes == (plan.slots_total - sum(plan.lent_slots) + lent) * plan.slot_bytes
                assert held_bytes(cache) <= cache.device_bytes + 2 * mmap.PAGESIZE


def test_slots_that_may_be_given_back_are_in_small_pages(tmp_path: Path) -> None:
    """Of a huge page the kernel keeps what is given back, until somebody is short of memory."""
    layout, _ = make_layout(tmp_path)

    def flags(pool: SlotPool) -> set[str]:
        found, here = set[str](), False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            if line.startswith("VmFlags:"):
                found |= {*line.split()[1:]} if here else set()
            elif "-" in line.split(" ")[0]:
                begin, end = (int(text, 16) for text in line.split(" ")[0].split("-"))
                here = begin <= pool.address(0) < end
        return found

    sized = {"layout": layout, "count": 64, "device": torch.device("cpu")}
    assert "nh" in flags(SlotPool(**sized, lent=True)) and "hg" in flags(SlotPool(**sized))  # type: ignore[arg-type]
