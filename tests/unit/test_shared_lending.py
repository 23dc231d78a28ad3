"""Lent slots of a node's store: what is given back is not memory any more, what is had again holds experts."""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from experts_on_disk import expert_bytes_of, make_layout

from buddymoe_ray.cache import DiskReader, ExpertCache
from buddymoe_ray.cache.shared import Lender, SharedStore, store_digest, store_path
from buddymoe_ray.cache.shared.tables import UNUSED, WAVE
from buddymoe_ray.policy import lend_reserved, split_slots
from buddymoe_ray.types import ExpertKey, ExpertLayout, SlotPlan

COUNTS = (12, 5, 16)


@dataclasses.dataclass
class Node:
    """A store of 8 slots of its own and some lent ones, and who is attached."""

    layout: ExpertLayout
    truth: dict[ExpertKey, bytes]
    plan: SlotPlan
    path: Path
    stores: list[SharedStore] = dataclasses.field(default_factory=list)

    def store(self) -> SharedStore:
        self.stores.append(SharedStore(self.path, self.layout, self.plan, store_digest(self.layout, self.plan)))
        return self.stores[-1]

    def cache(self) -> ExpertCache:
        return ExpertCache(self.store(), reader=DiskReader(depth=1, buffer_bytes=1 << 16))

    @property
    def lent(self) -> int:
        return sum(self.plan.lent_slots)

    def use(self, cache: ExpertCache) -> None:
        for layer, count in enumerate(COUNTS):
            for leases in cache.stream(layer, range(count), protect_residency=False):
                assert all(expert_bytes_of(dict(lease.tensors())) == self.truth[lease.key] for lease in leases)

    def check(self, used: int) -> None:
        """So many of the lent slots are in use, and no more memory is taken than that."""
        store = self.stores[0]
        store.tables.check_integrity()
        _, end = store.shape.span(0, store.shape.slots - self.lent + used)
        assert self.path.stat().st_blocks * 512 <= end + 4096
        assert (store.tables.partition != UNUSED).sum() == store.shape.slots - self.lent + used
        assert store.tables.nbytes + self.plan.overhead_bytes <= self.plan.budget_bytes


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    layout, truth = make_layout(tmp_path, experts_per_layer=COUNTS, rows=48, cols=160)
    reserved, sizes = 16 * layout.slot_bytes, {"slot_bytes": layout.slot_bytes, "expert_bytes": layout.expert_bytes}
    budget = 8 * layout.slot_bytes + reserved
    plan = split_slots(budget_bytes=budget, experts_per_layer=COUNTS, overhead_bytes=reserved, **sizes)
    plan = lend_reserved(dataclasses.replace(plan, reserved_bytes=reserved), reserved, COUNTS)
    path = store_path(store_digest(layout, plan), folder=Path("/dev/shm"), tag=f"test{os.getpid()}")
    made = Node(layout, truth, plan, path)
    yield made
    for store in made.stores:
        store.close()
    assert not path.exists()


def test_memory_goes_and_comes_while_experts_are_used(node: Node) -> None:
    cache, first, second = node.cache(), Lender(node.store()), Lender(node.store())
    cache.warm()
    assert sum(len(cache.resident(layer)) for layer in range(3)) == sum(node.plan.layer_slots)
    says = {first: node.lent, second: node.lent}
    for whose, count in (
        (first, 9),
        (second, 3),
        (first, 0),
        (second, node.lent),
        (first, 12),
        (first, 4),
        (second, 0),
    ):
        says[whose] = count
        assert whose.lend(count, lambda: False)
        used = min(says.values())
        node.check(used)
        assert (cache.store.tables.partition == WAVE).sum() == node.plan.wave_slots
        now = lend_reserved(node.plan, (used * node.layout.slot_bytes) + 6 * 4096, COUNTS).layer_slots
        roles = cache.store.tables.partition
        assert [(roles == layer).sum() for layer in range(3)] == list(now), "as the plan has it"
        node.use(cache)
        node.use(cache)
        node.check(used)
    second.close()  # it says nothing any more
    assert first.lend(node.lent, lambda: False)
    node.check(node.lent)


def test_who_leases_or_looks_is_waited_for(node: Node) -> None:
    cache, lender = node.cache(), Lender(node.store())
    cache.warm()
    last = node.plan.slots_total - 1
    layer, expert = (int(table[last]) for table in (cache.store.tables.key_layer, cache.store.tables.key_expert))
    key, ended = ExpertKey(layer, expert), threading.Event()

    def lend() -> None:
        assert lender.lend(0, lambda: False)
        ended.set()

    with cache.holding(layer, [expert]) as held:
        assert list(held) == [expert]
        thread = threading.Thread(target=lend)
        thread.start()
        while cache.store.tables.partition[last] != UNUSED:
            time.sleep(0.001)
        assert expert not in cache.resident(layer), "nobody else finds it"
        assert bytes(cache.store.bytes_C[last][: len(node.truth[key])]) == node.truth[key]
        glance = cache.glance(layer)
    assert glance is not None and glance.at_E[expert] < 0
    assert not ended.wait(0.05), "a look is not over"
    glance.used(np.array([next(iter(cache.resident(layer)))]))
    thread.join(20)
    assert ended.is_set()
    node.check(0)


def test_a_lender_that_is_to_stop_does(node: Node) -> None:
    cache, lender = node.cache(), Lender(node.store())
    cache.warm()
    assert cache.glance(0) is not None
    assert not lender.lend(0, lambda: True)
    cache.settle_ahead()
    stopped = threading.Event()
    threading.Timer(0.1, stopped.set).start()
    with cache.store.tables.locked():
        assert not lender.lend(0, stopped.is_set), "one stands still with the tables"
    assert lender.lend(0, lambda: True)
    node.check(0)
