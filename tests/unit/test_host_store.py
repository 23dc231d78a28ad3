"""The keeper of a node's store, without ray: fills, reports, follows a map under load, ends itself, comes back."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from experts_on_disk import expert_bytes_of, make_layout

from buddymoe_ray.actors.host_store import HostStore, KeeperOptions
from buddymoe_ray.actors.words import Directive, NodeReport, NodeView
from buddymoe_ray.cache import DiskReader, ExpertCache
from buddymoe_ray.cache.shared import watch
from buddymoe_ray.cache.shared.locks import ROW_BYTE, FileLocks
from buddymoe_ray.residency.sharing import Sharing, StoreSpec, spec_of
from buddymoe_ray.types import ExpertKey, SlotPlan

LAYERS, EXPERTS = 2, 8
QUICK = KeeperOptions(window_seconds=0.1, bytes_per_second=1e9, pin_share=1.0, idle_seconds=60)


class Planned:
    """A planner that says what a test wants, and keeps what it was told."""

    def __init__(self) -> None:
        self.reports: list[NodeReport] = []
        self.directive: Directive | None = None

    def report(self, report: NodeReport) -> Directive | None:
        self.reports.append(report)
        return self.directive


@pytest.fixture
def spec(tmp_path: Path) -> StoreSpec:
    (tmp_path / "shm").mkdir()
    layout, truth = make_layout(tmp_path, experts_per_layer=(EXPERTS,) * LAYERS)
    plan = SlotPlan(
        budget_bytes=1 << 30,
        slot_bytes=layout.slot_bytes,
        overhead_bytes=0,
        wave_slots=2,
        layer_slots=(4,) * LAYERS,
        fully_resident=False,
        pinned=((0, 1, 2, 3),) * LAYERS,
    )
    made = spec_of(Sharing(workers=2, tag="t", folder=tmp_path / "shm"), layout, plan)
    object.__setattr__(made, "truth", truth)
    return made


def worker(spec: StoreSpec) -> ExpertCache:
    return ExpertCache(spec.open(), reader=DiskReader(depth=2, buffer_bytes=16384))


@pytest.fixture
def keep(spec: StoreSpec) -> Iterator[Callable[..., HostStore]]:
    made: list[HostStore] = []

    def start(**options: object) -> HostStore:
        made.append(HostStore(spec, node="n1", **({"options": QUICK} | options)))  # type: ignore[arg-type]
        return made[-1]

    yield start
    for store in made:
        store.close()


def aged(store: HostStore, pid: int) -> float:
    view = store.register("w0", pid)
    assert view.placement is not None and view.placement.epoch == 3
    return view.placement.age_seconds


def eventually(condition: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not reached within {seconds} s"
        time.sleep(0.01)


def test_it_fills_the_store_before_workers_come(spec: StoreSpec, keep: Callable[..., HostStore]) -> None:
    store = keep()
    eventually(lambda: store.status().filled)
    status = store.status()
    assert (status.resident, status.attached, status.made, status.error) == (8, 0, True, "")
    cache = worker(spec)
    assert cache.resident(0) == {0, 1, 2, 3} and cache.stats().bytes_read_disk == 0
    assert store.status().attached == 1
    cache.close()
    assert spec.path.exists(), "the keeper keeps the file while no worker is there"


def test_it_reports_what_was_used(spec: StoreSpec, keep: Callable[..., HostStore]) -> None:
    planner = Planned()
    store = keep(planner=planner)
    eventually(lambda: store.status().filled)
    cache = worker(spec)
    view = store.register("w0", cache.store.tables.pid[cache.store.tables.row], "127.0.0.1:1")
    assert view == NodeView(), "nothing was said yet"
    cache.count(1, torch.tensor([[2, 7], [7, 7]]))
    eventually(lambda: sum(r.counts_LE for r in planner.reports)[1, 7] == 3 if planner.reports else False)
    total = sum(report.counts_LE for report in planner.reports)
    assert total[1].tolist() == [0, 0, 1, 0, 0, 0, 0, 3] and not total[0].any()
    assert planner.reports[-1].links == ("127.0.0.1:1",)
    assert planner.reports[-1].pin_slots == 8 and planner.reports[-1].fetch_seconds > 0
    cache.close()


def test_it_follows_the_map_while_workers_compute(spec: StoreSpec, keep: Callable[..., HostStore]) -> None:
    planner = Planned()
    store = keep(planner=planner)
    cache = worker(spec)
    eventually(lambda: store.status().filled)
    truth: dict[ExpertKey, bytes] = spec.truth  # type: ignore[attr-defined]
    stop, errors = threading.Event(), list[BaseException]()

    def compute() -> None:
        rng = random.Random(1)
        try:
            while not stop.is_set():
                layer = rng.randrange(LAYERS)
                with cache.holding(layer, sorted(cache.resident(layer))) as held:
                    for leases in cache.stream(layer, held, protect_residency=True):
                        for lease in leases:
                            assert expert_bytes_of(dict(lease.tensors())) == truth[lease.key]
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=compute)
    thread.start()
    pins = tuple((layer, e) for layer in range(LAYERS) for e in (4, 5, 6, 0))
    planner.directive = Directive(epoch=3, pins=pins, peers=(("n2/0", "127.0.0.1:9"),))
    eventually(lambda: store.status().epoch == 3 and store.status().moves == 6)
    stop.set()
    thread.join(30)
    assert not errors, errors
    assert cache.resident(0) >= {0, 4, 5, 6} and cache.resident(1) >= {0, 4, 5, 6}
    status = store.status()
    assert (status.moves, status.pinned, status.skipped) == (6, 8, 0)
    assert status.moved_bytes == 6 * spec.layout.expert_bytes
    pid = int(cache.store.tables.pid[cache.store.tables.row])
    view = store.register("w0", pid)
    assert view.peers == (("n2/0", "127.0.0.1:9"),) and view.placement is not None and view.placement.epoch == 3
    planner.directive = None  # the placement is away: its map stands, and ages
    eventually(lambda: aged(store, pid) > 0.5)
    planner.directive = Directive(epoch=3, pins=pins, peers=())
    eventually(lambda: aged(store, pid) < 0.3)
    store.register("w1", pid)
    shards = store.status().shards
    assert sorted(pin for shard in shards for pin in shard) == sorted(pins)
    assert not set(shards[0]) & set(shards[1])
    eventually(lambda: planner.reports[-1].pins == tuple(sorted(pins)) and planner.reports[-1].epoch == 3)
    planner.directive = Directive(
        epoch=4, pins=((0, 1), (0, 2), (0, 3), (0, 4), (0, 5), (0, 6), (1, 0), (1, 4)), peers=()
    )
    eventually(lambda: cache.resident(0) >= {1, 2, 3, 4, 5, 6})  # two slots change their layer
    assert cache.resident(1) >= {0, 4}
    cache.check_integrity()
    cache.close()


def test_a_restarted_keeper_finds_its_file(spec: StoreSpec, keep: Callable[..., HostStore]) -> None:
    first = keep()
    eventually(lambda: first.status().filled)
    cache = worker(spec)
    first.close()
    again = keep()
    eventually(lambda: again.status().filled)
    status = again.status()
    assert not status.made and status.resident == 8
    cache.close()


def test_it_ends_when_nobody_needs_it(spec: StoreSpec, keep: Callable[..., HostStore]) -> None:
    ended = threading.Event()
    keep(options=KeeperOptions(idle_seconds=0.5), on_idle=ended.set)
    assert ended.wait(30)
    eventually(lambda: not spec.path.exists())


def test_a_disk_that_fails_is_said_and_workers_get_their_own_error(
    spec: StoreSpec, keep: Callable[..., HostStore]
) -> None:
    Path(next(iter(spec.layout.pieces[ExpertKey(1, 0)])).path).unlink()
    store = keep()
    eventually(lambda: bool(store.status().error))
    assert "layer1" in store.status().error


def test_counts_survive_a_worker_that_leaves(spec: StoreSpec, keep: Callable[..., HostStore]) -> None:
    planner = Planned()
    store = keep(planner=planner)
    eventually(lambda: store.status().filled)
    for _ in range(3):
        cache = worker(spec)
        cache.count(0, torch.tensor([1]))
        cache.close()
    eventually(lambda: float(np.sum([report.counts_LE.sum() for report in planner.reports])) == 3.0)
    assert all((report.counts_LE >= 0).all() for report in planner.reports)


def _hold_and_be_killed(folder: Path, tag: str, paths: list[Path]) -> None:
    """A keeper and worker in one: watches, locks one file as a row does, and is killed."""
    import os
    import signal

    from buddymoe_ray.cache.shared.locks import ROW_BYTE, FileLocks

    watch(folder, tag, grace=1.5)
    fd = os.open(paths[0], os.O_RDWR | os.O_CREAT)
    FileLocks(fd).lock(ROW_BYTE)
    paths[1].write_bytes(b"x")
    os.kill(os.getpid(), signal.SIGKILL)


def test_the_janitor_removes_what_the_killed_left_and_nothing_else(tmp_path: Path) -> None:
    import multiprocessing
    import os

    user = os.geteuid()
    mine = [tmp_path / f"buddymoe-{user}-{name}-tag1.{kind}" for name, kind in (("a", "experts"), ("b", "records"))]
    other = tmp_path / f"buddymoe-{user}-c-tag2.experts"
    other.write_bytes(b"y")
    child = multiprocessing.get_context("spawn").Process(target=_hold_and_be_killed, args=(tmp_path, "tag1", mine))
    child.start()
    child.join(60)
    assert child.exitcode == -9 and mine[1].exists()
    held = os.open(mine[0], os.O_RDWR)
    FileLocks(held).lock(ROW_BYTE)  # a worker that lives on
    eventually(lambda: not mine[1].exists())
    assert mine[0].exists() and other.exists()
    os.close(held)
    eventually(lambda: not mine[0].exists())
    assert other.exists()
