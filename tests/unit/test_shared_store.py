"""The shared store: bytes are right whoever loaded them, under eviction, killed neighbours, restarts and migration."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from experts_on_disk import expert_bytes_of, make_layout

from buddymoe_ray.cache import DiskReader, ExpertCache, HostTier, open_private, slot_views
from buddymoe_ray.cache.disk import ReadTicket
from buddymoe_ray.cache.shared import Move, Mover, SharedStore, open_room, store, store_digest, sweep
from buddymoe_ray.cache.shared.locks import TABLES_BYTE
from buddymoe_ray.cache.shared.shape import entry_of
from buddymoe_ray.cache.shared.store import store_path
from buddymoe_ray.cache.shared.tables import LOADING, WAVE, SharedTables
from buddymoe_ray.device import open_device
from buddymoe_ray.errors import BudgetError, CacheError
from buddymoe_ray.kernels import unchanged
from buddymoe_ray.types import ExpertKey, ExpertLayout, SlotPlan

LAYERS, EXPERTS = 3, 6


@dataclass
class Node:
    """A folder that plays /dev/shm, with one store's layout and truth."""

    folder: Path
    layout: ExpertLayout
    truth: dict[ExpertKey, bytes]
    plan: SlotPlan
    opened: list[ExpertCache] = field(default_factory=list)

    @property
    def digest(self) -> bytes:
        return store_digest(self.layout, self.plan)

    @property
    def path(self) -> Path:
        return store_path(self.digest, folder=self.folder)

    def store(self) -> SharedStore:
        return SharedStore(self.path, self.layout, self.plan, self.digest)

    def cache(self) -> ExpertCache:
        self.opened.append(ExpertCache(self.store(), reader=DiskReader(depth=2, buffer_bytes=16384)))
        return self.opened[-1]


def make_plan(
    layout: ExpertLayout, *, layer_slots: int = 3, waves: int = 3, pinned: tuple[tuple[int, ...], ...] = ()
) -> SlotPlan:
    return SlotPlan(
        budget_bytes=1 << 30,
        slot_bytes=layout.slot_bytes,
        overhead_bytes=0,
        wave_slots=waves,
        layer_slots=(layer_slots,) * LAYERS,
        fully_resident=False,
        pinned=pinned,
    )


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    (tmp_path / "shm").mkdir()
    layout, truth = make_layout(tmp_path, experts_per_layer=(EXPERTS,) * LAYERS)
    made = Node(tmp_path / "shm", layout, truth, make_plan(layout))
    yield made
    for cache in made.opened:
        cache.close()


def access(
    node: Node, cache: ExpertCache | ExpertCache, layer: int, experts: list[int], *, protect: bool = False
) -> None:
    """Stream the experts and hold every lease against the truth."""
    seen = []
    for leases in cache.stream(layer, experts, protect_residency=protect):
        for lease in leases:
            assert expert_bytes_of(dict(lease.tensors())) == node.truth[lease.key], f"{lease.key} has wrong bytes"
            seen.append(lease.key.expert)
    assert sorted(seen) == sorted(experts)


def test_what_one_loads_is_a_hit_for_the_other(node: Node) -> None:
    first, second = node.cache(), node.cache()
    access(node, first, 0, [0, 1, 2])
    access(node, second, 0, [2, 0, 1])
    assert (first.stats().misses, second.stats().hits, second.stats().misses) == (3, 3, 0)
    assert second.stats().bytes_read_disk == 0
    assert first.resident(0) == second.resident(0) == {0, 1, 2}
    first.check_integrity()


def test_random_use_by_two_attachments_is_right(node: Node) -> None:
    caches = [node.cache(), node.cache()]
    rng = random.Random(1)
    for step in range(600):
        cache = rng.choice(caches)
        experts = rng.sample(range(EXPERTS), rng.randint(1, EXPERTS))
        access(node, cache, rng.randrange(LAYERS), experts, protect=rng.random() < 0.3)
        if step % 50 == 0:
            cache.check_integrity()


def test_threads_share_under_load(node: Node) -> None:
    caches = [node.cache() for _ in range(4)]
    errors: list[BaseException] = []

    def work(cache: ExpertCache, seed: int) -> None:
        rng = random.Random(seed)
        try:
            for _ in range(150):
                layer = rng.randrange(LAYERS)
                if rng.random() < 0.3:
                    with cache.holding(layer, sorted(cache.resident(layer))) as held:
                        access(node, cache, layer, held[:2])
                else:
                    access(node, cache, layer, rng.sample(range(EXPERTS), rng.randint(1, EXPERTS)))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(cache, at)) for at, cache in enumerate(caches)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not any(thread.is_alive() for thread in threads), "a worker waits for ever"
    assert not errors, errors
    caches[0].check_integrity()


def test_prompts_read_ahead_into_wave_slots_and_keep_what_they_will_ask_for(node: Node) -> None:
    first, second = node.cache(), node.cache()
    first.warm()
    assert first.read_ahead(0, [0, 3, 4, 5], protect_residency=True), "there is a wave slot for each of the three"
    assert not first.read_ahead(1, [3], protect_residency=True), "none of them is given away"
    assert first.resident(0) == set(range(6)) and first.resident(1) == {0, 1, 2}
    read = first.stats().bytes_read_disk
    access(node, first, 0, [3, 4, 5], protect=True)
    access(node, second, 0, [3], protect=True)
    assert first.stats().bytes_read_disk == read and second.stats().bytes_read_disk == 0
    assert first.read_ahead(0, [3], protect_residency=True)
    assert not first.read_ahead(1, [3, 4, 5], protect_residency=True), "one will be asked for again"
    first.settle_ahead()
    assert first.resident(0) == {0, 1, 2, 3} and first.resident(1) == {0, 1, 2, 3, 4}
    access(node, first, 0, [3], protect=True)
    assert first.read_ahead(1, [3, 4, 5], protect_residency=True)
    first.check_integrity()


def test_a_held_layer_does_not_give_way(node: Node) -> None:
    holder, other = node.cache(), node.cache()
    access(node, holder, 0, [0, 1, 2])
    with holder.holding(0, [0, 1, 2, 3]) as held:
        assert held == [0, 1, 2]
        access(node, other, 0, [3, 4, 5])
        assert {0, 1, 2} <= other.resident(0)
    access(node, other, 0, [3, 4, 5])


def _hold_and_hang(folder: Path, layout: ExpertLayout, plan: SlotPlan, ready: object) -> None:
    """A child that leases an expert and claims a slot it never fills."""
    digest = store_digest(layout, plan)
    store = SharedStore(store_path(digest, folder=folder), layout, plan, digest)
    cache = ExpertCache(store, reader=DiskReader(depth=1, buffer_bytes=16384))
    stream = cache.stream(0, [0], protect_residency=False)
    next(stream)
    with store.tables.locked():
        store.tables.take(5, ExpertKey(1, 4))
    ready.set()  # type: ignore[attr-defined]
    time.sleep(600)


def _die_in_the_lock(folder: Path, layout: ExpertLayout, plan: SlotPlan, ready: object) -> None:
    digest = store_digest(layout, plan)
    store = SharedStore(store_path(digest, folder=folder), layout, plan, digest)
    with store.tables.locked():
        store.tables.take(5, ExpertKey(1, 4))
        store.tables.slot_of[2, 2] = 7  # half a change
        store.tables.entry[2, 2] = 8 << 40 | 1
        ready.set()  # type: ignore[attr-defined]
        time.sleep(600)


def forking() -> ForkServerContext:
    """Children are forked off one process that has imported everything, and has no store."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["buddymoe_ray.engine.measure"])  # as `bench` has it: there is one
    return context


def _killed_child(node: Node, target: Callable[..., None]) -> None:
    context = forking()
    ready = context.Event()
    child = context.Process(target=target, args=(node.folder, node.layout, node.plan, ready), daemon=True)
    child.start()
    assert ready.wait(60)
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join()


def test_a_killed_neighbour_blocks_nobody(node: Node) -> None:
    mine = node.cache()
    _killed_child(node, _hold_and_hang)
    assert mine.store.tables.state[5] == LOADING
    access(node, mine, 1, [4, 0, 1, 2, 3, 5])  # expert 4 is being loaded by the dead: it is reaped and read again
    access(node, mine, 0, [1, 2, 3, 4, 5])
    access(node, mine, 0, [0])
    mine.check_integrity()
    assert len(mine.store.tables.pid.nonzero()[0]) == 1


def test_a_lock_holder_killed_half_way_is_repaired(node: Node) -> None:
    mine = node.cache()
    access(node, mine, 2, [0, 1])
    _killed_child(node, _die_in_the_lock)
    mine.check_integrity()
    assert mine.resident(2) == {0, 1}
    access(node, mine, 2, [2, 1])
    access(node, mine, 1, [4])


def test_the_store_survives_its_workers_when_it_has_an_owner(node: Node) -> None:
    owner = node.store()
    assert owner.own() and not node.store().own()
    first = node.cache()
    access(node, first, 0, [0, 1])
    first.close()
    again = node.cache()
    assert not again.store.made
    access(node, again, 0, [0, 1])
    assert again.stats().hits == 2 and again.stats().bytes_read_disk == 0
    again.close()
    owner.close()


def test_the_last_one_out_removes_the_file(node: Node) -> None:
    first, second = node.cache(), node.cache()
    first.close()
    assert node.path.exists()
    second.close()
    second.close()
    assert not list(node.folder.iterdir())


def test_leftovers_of_the_dead_are_swept_and_living_stores_are_not(node: Node) -> None:
    _killed_child(node, _hold_and_hang)
    assert node.path.exists()
    assert sweep(node.folder) == [node.path]
    cache = node.cache()
    assert sweep(node.folder) == [] and node.path.exists()
    access(node, cache, 0, [0])


def test_a_sweeper_that_waits_for_a_starting_worker_leaves_its_file(node: Node) -> None:
    sweeper = threading.Thread(target=sweep, args=(node.folder,))

    def begin_to_sweep() -> None:
        sweeper.start()
        time.sleep(0.3)  # it waits for the tables' lock, which this worker holds

    store = SharedStore(node.path, node.layout, node.plan, node.digest, before_making=begin_to_sweep)
    sweeper.join(30)
    assert node.path.exists(), "a live file was removed"
    store.close()
    assert not node.path.exists()


def test_who_starts_waits_for_whoever_makes_the_file_and_not_for_one_who_stands_still(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_START_SECONDS", 0.05)
    started: list[SharedStore] = []

    def start() -> None:
        started.append(node.store())

    other = threading.Thread(target=start)

    def make_long() -> None:
        other.start()
        time.sleep(0.3)

    still = SharedStore(node.path, node.layout, node.plan, node.digest, before_making=make_long)
    other.join(30)
    assert not started[0].made
    with still.tables.locked(), pytest.raises(CacheError, match="stands still"):
        node.store()
    for each in (still, *started):
        each.close()
    assert not node.path.exists()


def test_a_failed_attachment_leaves_neither_file_nor_lock(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: SharedTables) -> None:
        raise CacheError("every row is taken")

    def broken(_: object) -> None:
        raise CacheError("the records could not be read")

    files = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patched:
        patched.setattr(SharedTables, "join", full)
        with pytest.raises(CacheError, match="every row") as refused:
            node.store()
    with pytest.raises(CacheError, match="could not be read") as failed:
        open_room(node.folder / f"buddymoe-{os.geteuid()}-x.records", 10000, b"c" * 32, broken)
    assert not list(node.folder.iterdir())
    assert len(os.listdir("/proc/self/fd")) <= files + 2, "only the mappings that the tracebacks hold"
    access(node, node.cache(), 0, [0])
    del refused, failed


def test_a_survivor_of_a_crash_is_used_as_it_is(node: Node) -> None:
    _killed_child(node, _hold_and_hang)
    cache = node.cache()
    assert not cache.store.made
    access(node, cache, 0, [0])
    assert cache.stats().hits == 1


def test_another_checkpoint_does_not_find_the_old_bytes(node: Node) -> None:
    before = node.digest
    path = Path(next(iter(node.layout.pieces.values()))[0].path)
    os.utime(path, ns=(1, 1))
    assert node.digest != before
    before, content = node.digest, path.read_bytes()
    path.write_bytes(content[::-1])
    os.utime(path, ns=(1, 1))
    assert node.digest != before, "an image of a container may give all files one time"


def test_a_full_shared_memory_is_a_clear_error(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(BudgetError, match=r"must have \d+ .*--shm-size"):
        node.store()
    assert not node.path.exists()


def test_a_foreign_plan_is_refused_while_the_store_is_in_use(node: Node) -> None:
    node.cache()
    other = make_plan(node.layout, layer_slots=2)
    with pytest.raises(CacheError, match="another store in use"):
        SharedStore(node.path, node.layout, other, store_digest(node.layout, other))


def test_a_missing_file_fails_for_everybody_and_frees_the_slot(node: Node) -> None:
    first, second = node.cache(), node.cache()
    Path(next(iter(node.layout.pieces[ExpertKey(1, 0)])).path).unlink()
    for cache in (first, second):
        with pytest.raises(CacheError, match="layer1"):
            access(node, cache, 1, [0, 1])
    access(node, first, 0, [0, 1])
    first.check_integrity()
    assert not first.store.tables.lease.any()


def test_an_abandoned_stream_gives_everything_back(node: Node) -> None:
    cache = node.cache()
    access(node, cache, 0, [0])
    stream = cache.stream(0, [0, 1, 2, 3, 4, 5], protect_residency=False)
    next(stream)
    stream.close()
    assert not cache.store.tables.lease.any()
    cache.check_integrity()
    access(node, cache, 0, [0, 1, 2, 3, 4, 5])


def test_warm_is_shared_between_workers(node: Node) -> None:
    caches = [node.cache(), node.cache()]
    threads = [threading.Thread(target=cache.warm) for cache in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for layer in range(LAYERS):
        assert caches[0].resident(layer) >= {0, 1, 2}
    loaded = sum(cache.stats().bytes_requested_disk for cache in caches)
    assert loaded == LAYERS * 3 * node.layout.expert_bytes


def test_uses_are_counted_where_the_placement_can_read_them(node: Node) -> None:
    cache, other = node.cache(), node.cache()
    cache.count(1, torch.tensor([[0, 5], [5, 2]]))
    assert other.store.tables.accesses.sum(axis=0)[1].tolist() == [1, 0, 1, 0, 0, 2]


def test_migration_under_load_keeps_bytes_right(node: Node) -> None:
    node.plan = make_plan(node.layout, pinned=((0, 1, 2),) * LAYERS)
    cache, base = node.cache(), node.store()
    cache.warm()
    reader = DiskReader(depth=1, buffer_bytes=16384)
    mover = Mover(base, reader, bytes_per_second=1e9)
    done = threading.Event()
    errors: list[BaseException] = []

    def migrate() -> None:
        rng = random.Random(3)
        try:
            for _ in range(60):
                layer = rng.randrange(LAYERS)
                load, evict = rng.sample(range(EXPERTS), 2)
                mover.run([Move(load=ExpertKey(layer, load), evict=ExpertKey(layer, evict))])
        except BaseException as error:
            errors.append(error)
        finally:
            done.set()

    thread = threading.Thread(target=migrate)
    thread.start()
    rng = random.Random(4)
    while not done.is_set():
        layer = rng.randrange(LAYERS)
        with cache.holding(layer, sorted(cache.resident(layer))) as held:
            access(node, cache, layer, held)
        access(node, cache, layer, rng.sample(range(EXPERTS), 2))
    thread.join(60)
    assert not errors, errors
    cache.check_integrity()
    assert all(len(cache.resident(layer)) >= 3 for layer in range(LAYERS))
    reader.close()
    base.close()


def glanced(node: Node, cache: ExpertCache, layer: int, experts: list[int]) -> bool | None:
    """Copy experts without a lease: None when not all were there, else whether the copies count, and then they must be
    right."""
    ids, glance = np.array([experts]), cache.glance(layer)
    assert glance is not None
    if (glance.at_E[ids] < 0).any():
        return None
    size = node.layout.slot_bytes
    copies = {e: ctypes.string_at(int(glance.at_E[e]), size) for e in experts}
    assert glance.words_2E is not None
    if not unchanged(ids, glance.words_2E):
        return False
    glance.used(ids)
    for expert, raw in copies.items():
        views = slot_views(torch.frombuffer(bytearray(raw), dtype=torch.uint8), node.layout)
        assert expert_bytes_of(views) == node.truth[ExpertKey(layer, expert)], f"{layer}.{expert} has wrong bytes"
    return True


def test_what_is_read_without_a_lease_counts_only_where_nothing_moved(node: Node) -> None:
    cache, other = node.cache(), node.cache()
    assert glanced(node, cache, 0, [1]) is None
    access(node, other, 0, [0, 1, 2])
    assert glanced(node, cache, 0, [2, 0]) is True and cache.stats().hits == 2
    assert glanced(node, cache, 0, [2, 3]) is None
    glance = cache.glance(0)
    access(node, other, 0, [3, 4])  # room for them is made in the layer
    access(node, other, 0, [1, 0])
    assert glance is not None and glance.words_2E is not None
    assert not unchanged(np.array([[0, 1]]), glance.words_2E), "they came back, elsewhere"
    assert not cache.store.tables.lease.any()


def test_a_glance_writes_nothing(node: Node) -> None:
    """So nobody can tell how many readers there are, or that one was stopped."""
    cache = node.cache()
    access(node, cache, 0, [0, 1, 2])
    before = cache.store._array.copy()
    glance = cache.glance(0)
    assert glance is not None and glance.words_2E is not None and unchanged(np.array([[0, 1]]), glance.words_2E)
    assert cache.glance(0) is glance and np.array_equal(cache.store._array, before)
    cache.store.tables.entry[0, 1] = entry_of(cache.store.shape.slots, 1)
    outside = cache.glance(0)
    assert outside is not None and np.flatnonzero(outside.at_E >= 0).tolist() == [0, 2], "of what lies in the store"


def test_glances_under_load_are_right(node: Node) -> None:
    cache, others = node.cache(), [node.cache(), node.cache()]
    done, errors, seen = threading.Event(), list[BaseException](), Counter[bool | None]()

    def work(other: ExpertCache, seed: int) -> None:
        rng = random.Random(seed)
        try:
            for _ in range(300):
                access(node, other, rng.randrange(LAYERS), rng.sample(range(EXPERTS), 2))
        except BaseException as error:
            errors.append(error)
        finally:
            done.set()

    threads = [threading.Thread(target=work, args=(other, at)) for at, other in enumerate(others)]
    for thread in threads:
        thread.start()
    rng = random.Random(9)
    while not done.is_set():
        layer = rng.randrange(LAYERS)
        there = sorted(cache.resident(layer))
        seen[glanced(node, cache, layer, rng.sample(there, min(2, len(there))) or [0])] += 1
    for thread in threads:
        thread.join(60)
    assert not errors, errors
    assert seen[True] > 20, seen


class Interrupted(DiskReader):
    """After its first read a neighbour takes the tables."""

    neighbour: SharedStore | None = None
    refuses = False

    def submit(self, *args: Any) -> ReadTicket:
        ticket = super().submit(*args)
        if self.neighbour is not None:
            self.neighbour.tables._locks.lock(TABLES_BYTE)
            self.neighbour = None
            if self.refuses:
                ticket.settle()
                raise CacheError("too many open files")
        return ticket


def test_nobody_waits_for_one_who_stands_still_with_the_tables(node: Node) -> None:
    still, reader = node.store(), Interrupted(depth=2, buffer_bytes=16384)
    mine = ExpertCache(node.store(), reader=reader)
    node.opened.append(mine)
    access(node, mine, 0, [0, 1])
    with still.tables.locked():
        access(node, mine, 0, [1, 2, 3])
        access(node, mine, 1, [0, 1, 2, 3], protect=True)
        assert not mine.read_ahead(2, [0])
        with mine.holding(0, [0, 1]) as held:
            assert held == []
        assert mine.resident(0) == {0, 1} and glanced(node, mine, 0, [0, 1])
    reader.neighbour = still  # from now on in the middle of a call
    access(node, mine, 1, [4, 5])
    assert mine.glance(1) is not None, "which tries again"
    assert mine.resident(1) == frozenset() and LOADING in mine.store.tables.state
    still.tables._locks.unlock(TABLES_BYTE)
    assert mine.glance(1) is not None
    assert 4 in mine.resident(1) and LOADING not in mine.store.tables.state, "what was read is READY now"
    assert not mine.store.tables.lease.any()
    mine.check_integrity()
    still.close()


@pytest.mark.parametrize("ahead", [False, True])
def test_what_could_not_be_begun_while_one_stands_still_is_freed(node: Node, ahead: bool) -> None:
    """Neither the slot whose read failed to begin nor those claimed for the next may stay LOADING."""
    still, reader = node.store(), Interrupted(depth=2, buffer_bytes=16384)
    mine = ExpertCache(node.store(), reader=reader)
    node.opened.append(mine)
    reader.neighbour, reader.refuses = still, True
    if ahead:
        assert not mine.read_ahead(1, [0, 1, 2])
    else:
        access(node, mine, 1, [0, 1, 2])
    tables = mine.store.tables
    assert (tables.state == LOADING).sum() == 3
    access(node, mine, 1, [0, 3])
    still.tables._locks.unlock(TABLES_BYTE)
    assert mine.glance(1) is not None
    assert LOADING not in tables.state and not tables.lease.any()
    access(node, node.cache(), 1, [0, 1, 2])
    mine.check_integrity()
    still.close()


def test_nobody_waits_for_one_who_stands_still_with_slots(node: Node) -> None:
    """It reads into one, and computes with all that a prompt could have."""
    mine, other = node.cache(), node.store()
    mine.warm()
    still = other.tables
    with still.locked():
        still.take(0, ExpertKey(0, 4))
    still.lease[still.row, still.partition == WAVE] = 1
    for _ in range(2):
        access(node, mine, 0, [1, 4, 2])
        access(node, mine, 2, list(range(EXPERTS)), protect=True)
    assert mine.store.tables.state[0] == LOADING and still.lease.sum() == 1 + 3, "all that is the other's"
    other.close()
    with mine.store.tables.locked():
        assert mine.store.tables.reap() == 1
    access(node, mine, 0, [4])
    assert mine.store.tables.state[0] != LOADING
    mine.check_integrity()


def test_a_move_swaps_residents_and_pins_follow(node: Node) -> None:
    node.plan = make_plan(node.layout, pinned=((0, 1, 2),) * LAYERS)
    cache, base = node.cache(), node.store()
    cache.warm()
    reader = DiskReader(depth=1, buffer_bytes=16384)
    mover = Mover(base, reader, bytes_per_second=1e9)
    moved = mover.run([Move(load=ExpertKey(0, 4), evict=ExpertKey(0, 1)), Move(load=ExpertKey(0, 0))])
    mover.pin([ExpertKey(0, 0), ExpertKey(0, 2), ExpertKey(0, 4)])
    assert (moved.moves, moved.nbytes, moved.skipped) == (1, node.layout.expert_bytes, 0)
    assert cache.resident(0) == {0, 2, 4}
    access(node, cache, 0, [0, 2, 4])
    assert cache.stats().misses == 0
    access(node, cache, 1, [5])  # through a wave slot
    moved = mover.run([Move(load=ExpertKey(1, 5), evict=ExpertKey(1, 0))])
    assert moved.nbytes == 0 and 5 in cache.resident(1)
    across = mover.run([Move(load=ExpertKey(2, 5), evict=ExpertKey(0, 2))])  # a slot changes its layer
    assert across.moves == 1 and cache.resident(0) == {0, 4} and 5 in cache.resident(2)
    cache.check_integrity()
    reader.close()
    base.close()


def test_a_room_is_filled_once(tmp_path: Path) -> None:
    path, filled = tmp_path / "buddymoe-0-x.records", []

    def fill(target: torch.Tensor) -> None:
        filled.append(1)
        target.copy_(torch.arange(10000, dtype=torch.int64).to(torch.uint8))

    first = open_room(path, 10000, b"a" * 32, fill)
    second = open_room(path, 10000, b"a" * 32, fill)
    assert filled == [1] and torch.equal(first.bytes[:10000], second.bytes[:10000])
    with pytest.raises(CacheError, match="another content"):
        open_room(path, 10000, b"b" * 32, fill)
    first.close()
    second.close()
    assert not path.exists()

    def broken(target: torch.Tensor) -> None:
        raise CacheError("no")

    with pytest.raises(CacheError, match="no"):
        open_room(path, 10000, b"c" * 32, broken)
    open_room(path, 10000, b"c" * 32, fill).close()


def host_cache(node: Node) -> ExpertCache:
    """Two device slots a layer of its own over the node's host tier: a GPU worker, with the CPU as its device."""
    reader = DiskReader(depth=2, buffer_bytes=16384)
    host = HostTier(node.store(), reader=reader, device=open_device("cpu"))
    plan = make_plan(node.layout, layer_slots=2, waves=2)
    return open_private(node.layout, plan, reader=reader, host=host)


def test_two_devices_share_one_host_tier(node: Node) -> None:
    first, second = host_cache(node), host_cache(node)
    for cache in (first, second):
        for layer in range(LAYERS):
            access(node, cache, layer, [0, 1, 2])
        cache.check_integrity()
    assert first.stats().bytes_requested_disk == LAYERS * 3 * node.layout.expert_bytes
    assert second.stats().bytes_requested_disk == 0 and second.stats().host_hits == LAYERS * 3
    assert second.host is not None
    assert [expert for expert in range(EXPERTS) if second.host.holds(ExpertKey(0, expert))] == [0, 1, 2]
    first.close()
    second.close()
    assert not node.path.exists()


def test_devices_that_wait_for_each_others_reads_go_on(node: Node) -> None:
    caches = [host_cache(node) for _ in range(3)]
    errors: list[BaseException] = []

    def work(cache: ExpertCache, seed: int) -> None:
        rng = random.Random(seed)
        try:
            for _ in range(150):
                access(node, cache, rng.randrange(LAYERS), rng.sample(range(EXPERTS), rng.randint(1, EXPERTS)))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(cache, at)) for at, cache in enumerate(caches)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not any(thread.is_alive() for thread in threads), "two wait for each other"
    assert not errors, errors
    for cache in caches:
        cache.check_integrity()
        cache.close()


def _stand_still(folder: Path, layout: ExpertLayout, plan: SlotPlan, ready: Any, held: str) -> None:
    digest = store_digest(layout, plan)
    tables = SharedStore(store_path(digest, folder=folder), layout, plan, digest).tables
    with tables.locked():
        if held == "expert":
            tables.take(0, ExpertKey(0, 4))
        if held == "slots":
            tables.lease[tables.row] = 1
    if held == "tables":
        tables._locks.lock(TABLES_BYTE)
    ready.set()
    os.kill(os.getpid(), signal.SIGSTOP)


@pytest.mark.parametrize("held", ["tables", "expert", "slots"])
def test_a_device_waits_for_no_process_that_is_stopped(node: Node, held: str) -> None:
    """With what it holds of the node's host tier: what is asked for is read all the same, by way of a slot of one's
    own; and once the process is gone the tier is whole."""
    cache, context = host_cache(node), forking()
    assert cache.host is not None
    access(node, cache, 1, [0, 1])
    ready = context.Event()
    child = context.Process(target=_stand_still, args=(node.folder, node.layout, node.plan, ready, held), daemon=True)
    child.start()
    assert ready.wait(60) and child.pid is not None
    began = time.monotonic()
    for _ in range(2):
        access(node, cache, 0, [4, 1, 2, 3])
        access(node, cache, 2, [0, 5], protect=True)
    assert time.monotonic() - began < 20
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    time.sleep(0.3)  # it is reaped now and then
    access(node, cache, 0, [0, 1, 4])
    cache.check_integrity()
    tables = cache.host.store.tables
    assert LOADING not in tables.state and not tables.lease.any() and (tables.pid != 0).sum() == 1
    cache.close()


def test_a_failed_read_of_the_host_tier_frees_its_slot(node: Node) -> None:
    cache = host_cache(node)
    Path(next(iter(node.layout.pieces[ExpertKey(1, 0)])).path).unlink()
    with pytest.raises(CacheError, match="layer1"):
        access(node, cache, 1, [0])
    access(node, cache, 0, [0, 1])
    cache.check_integrity()
    cache.close()
