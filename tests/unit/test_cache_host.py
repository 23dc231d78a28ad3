"""The host tier by itself: what it keeps, what it may overwrite, what it does when every slot is busy."""

from __future__ import annotations

import random
import threading
from contextlib import closing
from pathlib import Path

import pytest
from experts_on_disk import expert_bytes_of, make_layout, plan_of

from buddymoe_ray.cache import DiskReader, HostTier, open_private
from buddymoe_ray.cache.private_store import PrivateStore
from buddymoe_ray.cache.sources import HostSource
from buddymoe_ray.device import Copy, open_device
from buddymoe_ray.device import host as twin
from buddymoe_ray.errors import CacheError
from buddymoe_ray.types import ExpertKey

A, B, C = (ExpertKey(0, expert) for expert in range(3))


@pytest.fixture
def opened(tmp_path: Path):
    layout, truth = make_layout(tmp_path)
    reader = DiskReader(depth=2, buffer_bytes=8192)
    yield HostTier(PrivateStore.of_waves(layout, 2), reader=reader, device=open_device("cpu")), truth, reader
    reader.close()


def bring(tier: HostTier, key: ExpertKey) -> bytes:
    fetched = tier.fetch(key)
    assert fetched is not None, f"no slot for {key}"
    slot, ticket = fetched
    ticket.wait()
    data = expert_bytes_of(dict(tier.store.tensors(slot)))
    tier.release(slot)
    return data


def test_a_kept_expert_is_not_read_again(opened) -> None:
    tier, truth, reader = opened
    assert bring(tier, A) == truth[A]
    read = reader.bytes_read
    assert bring(tier, A) == truth[A] and reader.bytes_read == read
    assert (tier.hits, tier.misses) == (1, 1)


def test_least_recently_used_is_overwritten(opened) -> None:
    tier, truth, _ = opened
    for key in (A, B, A, C):  # B is the oldest when C comes
        assert bring(tier, key) == truth[key]
    assert [tier.holds(key) for key in (A, B, C)] == [True, False, True]
    misses = tier.misses
    bring(tier, A)
    assert tier.misses == misses
    bring(tier, B)
    assert tier.misses == misses + 1


def test_busy_slots_are_never_overwritten(opened) -> None:
    tier, truth, _ = opened
    first, second = tier.fetch(A), tier.fetch(B)
    assert first is not None and second is not None
    assert tier.fetch(C) is None, "both slots are busy"
    first[1].wait()
    second[1].wait()
    tier.release(first[0])
    assert bring(tier, C) == truth[C]
    assert expert_bytes_of(dict(tier.store.tensors(second[0]))) == truth[B]
    tier.release(second[0])
    tier.check_integrity()


def test_an_expert_fetched_twice_is_busy_until_released_twice(opened) -> None:
    tier, _, _ = opened
    for _ in range(2):
        fetched = tier.fetch(A)
        assert fetched is not None
        fetched[1].wait()
    tier.release(fetched[0])
    assert tier.fetch(B) is not None and tier.fetch(C) is None
    tier.release(fetched[0])
    assert tier.fetch(C) is not None


def test_a_failed_read_leaves_nothing_to_find(opened) -> None:
    tier, truth, _ = opened
    path = Path(tier.store.layout.pieces[A][0].path)
    whole = path.read_bytes()
    path.write_bytes(b"")
    fetched = tier.fetch(A)
    assert fetched is not None
    with pytest.raises(CacheError, match="ends before byte"):
        fetched[1].wait()
    tier.release(fetched[0])
    tier.check_integrity()
    path.write_bytes(whole)
    assert bring(tier, A) == truth[A] and tier.hits == 0


def test_a_closed_reader_leaves_nothing_to_find(opened) -> None:
    tier, _, reader = opened
    reader.close()
    for _ in range(3):
        with pytest.raises(CacheError, match="closed"):
            tier.fetch(A)
        tier.check_integrity()
    assert (tier.hits, tier.misses) == (0, 0)


def test_random_fetches_and_releases_keep_every_byte(opened) -> None:
    tier, truth, _ = opened
    rng, held = random.Random(1), []
    keys = sorted(truth)
    for _ in range(2000):
        if held and rng.random() < 0.5:
            key, slot = held.pop(rng.randrange(len(held)))
            assert expert_bytes_of(dict(tier.store.tensors(slot))) == truth[key], f"{key} was overwritten while busy"
            tier.release(slot)
        else:
            key = rng.choice(keys)
            fetched = tier.fetch(key)
            if fetched is None:
                assert len({k for k, _ in held}) == 2, f"refused {key} with {held} busy"
            else:
                fetched[1].wait()
                held.append((key, fetched[0]))
        tier.check_integrity()


def test_no_more_host_slots_than_experts_are_allocated(tmp_path: Path) -> None:
    """`--host-memory` may be larger than the model; pinning the rest would only take memory from others."""
    layout, _ = make_layout(tmp_path)
    plan = plan_of(layout, 4)
    with open_private(layout, plan, reader=DiskReader(buffer_bytes=8192), host_slots=10**4) as cache:
        assert cache.host is not None and cache.host.store.shape.slots == 18


def test_a_host_slot_is_given_back_once_its_copy_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that computes beside the host nobody waits for a copy, so its source must not be overwritten."""

    class Beside(twin.Host):
        def admit(self, copy: Copy) -> None:
            """As on a GPU: only what is computed waits."""

    may_go, moved = threading.Event(), twin._move
    monkeypatch.setattr(twin, "_move", lambda *args: may_go.wait(10) and moved(*args))
    layout, _ = make_layout(tmp_path, experts_per_layer=(2,))
    reader = DiskReader(buffer_bytes=8192)
    host = HostTier(PrivateStore.of_waves(layout, 1), reader=reader, device=open_device("cpu"))
    store = PrivateStore.of_waves(layout, 2)
    source = HostSource(store, host, Beside(apart=True))
    ticket = source.begin(ExpertKey(0, 0), 0)
    assert ticket is not None
    ticket.wait()
    assert source.begin(ExpertKey(0, 1), 1) is None
    may_go.set()
    assert source.make_room() and source.begin(ExpertKey(0, 1), 1) is not None
    assert bytes(store.bytes_C[0]) != bytes(layout.slot_bytes)
    reader.close()


def test_a_read_that_was_given_up_is_begun_anew_by_the_next_who_asks(tmp_path: Path) -> None:
    """Some of it may still be on its way, and never will all of it be there."""
    layout, truth = make_layout(tmp_path, rows=400, cols=400)
    with closing(DiskReader(depth=1, buffer_bytes=8192)) as reader:
        tier = HostTier(PrivateStore.of_waves(layout, 2), reader=reader, device=open_device("cpu"))
        gate = threading.Event()
        blocked = reader._pool.submit(gate.wait, 30)
        fetched = tier.fetch(A)
        assert fetched is not None and fetched[1].cancel()
        gate.set()
        again = tier.fetch(A)
        assert again is not None
        again[1].wait()
        assert expert_bytes_of(dict(tier.store.tensors(again[0]))) == truth[A]
        tier.release(fetched[0])  # of the one that gave up
        tier.release(again[0])
        blocked.result()
        assert bring(tier, A) == truth[A]
        tier.check_integrity()
