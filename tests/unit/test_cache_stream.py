"""The expert cache against the bytes on disk: random operations, every tier, waves, leases, failures."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import numpy as np
import pytest
from experts_on_disk import expert_bytes_of, make_layout, plan_of

from buddymoe_ray.cache import DiskReader, ExpertCache, open_private
from buddymoe_ray.device import open_device
from buddymoe_ray.errors import CacheError
from buddymoe_ray.types import ExpertKey, ExpertLayout


def open_cache(layout: ExpertLayout, slots: int, *, host_slots: int = 0, direct: bool = True) -> ExpertCache:
    plan = plan_of(layout, slots)
    reader = DiskReader(depth=4, buffer_bytes=8192, direct=direct)
    device = open_device("interpret" if host_slots >= 4 else "cpu")  # with the copies of a GPU
    return open_private(layout, plan, reader=reader, device=device, host_slots=host_slots)


def access(
    cache: ExpertCache, truth: dict[ExpertKey, bytes], layer: int, experts: list[int], protect: bool
) -> list[int]:
    """Stream the experts, compare every byte, return the order in which they were lent."""
    order = []
    for leases in cache.stream(layer, experts, protect_residency=protect):
        for lease in leases:
            assert expert_bytes_of(dict(lease.tensors())) == truth[lease.key], f"{lease.key} is not as in its file"
            order.append(lease.key.expert)
    assert sorted(order) == sorted(experts), f"asked for {experts}, lent {order}"
    return order


@pytest.mark.parametrize(("slots", "host_slots"), [(2, 0), (3, 0), (7, 0), (11, 4), (18, 0), (40, 0)])
def test_ten_thousand_random_operations(tmp_path: Path, slots: int, host_slots: int) -> None:
    """2,000 operations at each of six budgets, the byte truth and every invariant checked after each."""
    layout, truth = make_layout(tmp_path, experts_per_layer=(6, 4, 8))
    rng = random.Random(slots)
    with open_cache(layout, slots, host_slots=host_slots) as cache:
        assert cache.device_bytes <= min(slots, 18) * layout.slot_bytes
        for step in range(2000):
            layer = rng.randrange(3)
            count = layout.experts_per_layer[layer]
            experts = sorted(rng.sample(range(count), rng.randint(1, count)))
            protect = rng.random() < 0.3
            if not protect:
                cache.count(layer, np.array([experts]))
            before = cache.resident(layer)
            own = [e for e in before if in_own_partition(cache, layer, e)]
            if rng.random() < 0.1:  # leave in the middle, as a failing kernel does
                stream = cache.stream(layer, experts, protect_residency=protect)
                for _ in range(rng.randint(0, 2)):
                    next(stream, None)
                stream.close()
            else:
                access(cache, truth, layer, experts, protect)
                hits = [e for e in experts if e in before]
                assert cache.stats().hits >= len(hits)
            if protect:
                assert all(e in cache.resident(layer) for e in own), f"step {step}: prefill disturbed layer {layer}"
            cache.check_integrity()
        stats = cache.stats()
        assert stats.bytes_loaded_device % layout.expert_bytes == 0
        assert stats.bytes_requested_disk <= stats.bytes_read_disk


def test_a_miss_takes_few_calls(tmp_path: Path) -> None:
    """Decode of a small model is made of them: 163 of Python and C; 260 before a read was planned once."""
    layout, truth = make_layout(tmp_path, experts_per_layer=(16,))
    rng, calls = random.Random(0), 0

    def count(frame: object, event: str, arg: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    with open_cache(layout, 8) as cache:
        asked = [sorted(rng.sample(range(16), 4)) for _ in range(60)]
        for experts in asked[:30]:
            access(cache, truth, 0, experts, False)
        before = cache.stats().misses
        sys.setprofile(count)
        for experts in asked[30:]:
            for _leases in cache.stream(0, experts, protect_residency=False):
                pass
        sys.setprofile(None)
        missed = cache.stats().misses - before
    assert missed > 40
    assert calls < 200 * missed, f"{calls / missed:.0f} calls a miss"


def in_own_partition(cache: ExpertCache, layer: int, expert: int) -> bool:
    """Whether a resident expert is in one of its layer's slots, not in a wave slot."""
    tables = cache.store.tables
    return int(tables.partition[tables.slot_of[layer, expert]]) == layer


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("host_slots", [0, 3, 18])
def test_bytes_are_equal_through_every_tier(tmp_path: Path, direct: bool, host_slots: int) -> None:
    layout, truth = make_layout(tmp_path)
    with open_cache(layout, 5, host_slots=host_slots, direct=direct) as cache:
        for _ in range(3):
            for layer in range(3):
                access(cache, truth, layer, list(range(6)), False)
        stats = cache.stats()
        assert stats.bytes_loaded_device == stats.misses * layout.expert_bytes
        if host_slots == 18:  # everything is in the host tier after the first round
            assert stats.bytes_requested_disk == 18 * layout.expert_bytes
        if not host_slots:
            assert stats.bytes_requested_disk == stats.bytes_loaded_device


def test_resident_experts_are_lent_first_while_the_rest_is_read(tmp_path: Path) -> None:
    layout, truth = make_layout(tmp_path)
    with open_cache(layout, 14) as cache:
        access(cache, truth, 0, [3, 4], False)
        waves = [
            [lease.key.expert for lease in leases] for leases in cache.stream(0, [0, 3, 4], protect_residency=False)
        ]
        assert waves[0] == [3, 4] and waves[1:] == [[0]]


def test_a_full_budget_is_fully_resident_and_never_reads_again(tmp_path: Path) -> None:
    layout, truth = make_layout(tmp_path)
    with open_cache(layout, 18) as cache:
        cache.warm()
        read = cache.stats().bytes_read_disk
        assert cache.plan.fully_resident and all(len(cache.resident(layer)) == 6 for layer in range(3))
        for layer in range(3):
            access(cache, truth, layer, list(range(6)), False)
        assert cache.stats().bytes_read_disk == read and cache.stats().misses == 0


def test_two_slots_serve_a_layer_of_any_size(tmp_path: Path) -> None:
    layout, _truth = make_layout(tmp_path, experts_per_layer=(32,))
    with open_cache(layout, 2) as cache:
        waves = 0
        for leases in cache.stream(0, list(range(32)), protect_residency=True):
            assert len(leases) <= 2
            waves += 1
        assert waves >= 16 and cache.device_bytes == 2 * layout.slot_bytes


def test_a_lease_is_void_once_its_slot_has_another_expert(tmp_path: Path) -> None:
    layout, truth = make_layout(tmp_path)
    with open_cache(layout, 2) as cache:
        (kept,) = next(iter(cache.stream(0, [0], protect_residency=False)))
        access(cache, truth, 1, [0, 1, 2], False)
        with pytest.raises(AssertionError, match="generation"):
            kept.tensors()


def test_least_used_gives_way(tmp_path: Path) -> None:
    layout, truth = make_layout(tmp_path, experts_per_layer=(8,))
    with open_cache(layout, 5) as cache:  # 3 of the layer, 2 waves
        for expert in (0, 1, 2, 0):
            cache.count(0, np.array([[expert]]))
            access(cache, truth, 0, [expert], False)
        access(cache, truth, 0, [3], False)
        assert cache.resident(0) == {0, 2, 3}


def test_a_truncated_file_fails_clearly_and_the_cache_goes_on(tmp_path: Path) -> None:
    layout, truth = make_layout(tmp_path)
    path = Path(layout.pieces[ExpertKey(1, 0)][0].path)
    whole = path.read_bytes()
    with open_cache(layout, 5) as cache:
        access(cache, truth, 1, [0, 1], False)
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(CacheError, match=r"layer1\.bin"):
            access(cache, truth, 1, [0, 1, 2, 3, 4, 5], False)
        cache.check_integrity()
        access(cache, truth, 0, [0, 1, 2], False)  # other layers are unharmed
        path.write_bytes(whole)
        access(cache, truth, 1, list(range(6)), False)  # and a repaired file is read again
        cache.check_integrity()


@pytest.mark.parametrize("host_slots", [0, 4])
def test_a_missing_file_names_itself(tmp_path: Path, host_slots: int) -> None:
    layout, truth = make_layout(tmp_path)
    (tmp_path / "layer2.bin").unlink()
    with open_cache(layout, 5, host_slots=host_slots) as cache:
        with pytest.raises(CacheError, match=r"layer2\.bin"):
            access(cache, truth, 2, [0, 1], False)
        cache.check_integrity()
        access(cache, truth, 0, [0, 1], False)


def test_a_closed_cache_says_so(tmp_path: Path) -> None:
    layout, truth = make_layout(tmp_path)
    cache = open_cache(layout, 5)
    cache.close()
    cache.close()
    with pytest.raises(CacheError, match="closed"):
        access(cache, truth, 0, [0], False)
    cache.check_integrity()


def test_resident_mask_follows_residency(tmp_path: Path) -> None:
    layout, truth = make_layout(tmp_path)
    with open_cache(layout, 8) as cache:
        assert not cache.resident_mask(0).any()
        access(cache, truth, 0, [1, 5], False)
        assert cache.resident_mask(0).nonzero()[0].tolist() == [1, 5]
