"""Blocks are handed out once, in one run where there is one, and come back whole."""

from __future__ import annotations

import random

import pytest

from buddymoe_ray.engine.blocks import BlockAllocator


def longest_run(free: set[int], count: int) -> int:
    """Brute force: the longest run of free neighbours."""
    best = run = 0
    for block in range(count):
        run = run + 1 if block in free else 0
        best = max(best, run)
    return best


def is_run(blocks: list[int]) -> bool:
    return blocks == list(range(blocks[0], blocks[0] + len(blocks)))


def test_a_fresh_pool_gives_neighbours_in_order() -> None:
    pool = BlockAllocator(8)
    assert pool.allocate(3) == [0, 1, 2]
    assert pool.allocate(5) == [3, 4, 5, 6, 7]
    assert pool.free == 0
    assert not pool.can_allocate(1)


def test_a_run_is_preferred_to_scattered_blocks() -> None:
    pool = BlockAllocator(10)
    first = pool.allocate(10)
    pool.release([first[0], first[2], first[5], first[6], first[7]])
    assert pool.allocate(3) == [5, 6, 7]
    assert pool.allocate(2) == [0, 2]  # no run of two is left


def test_a_run_at_the_very_end_is_found() -> None:
    pool = BlockAllocator(6)
    pool.allocate(6)
    pool.release([0, 2, 4, 5])
    assert pool.allocate(2) == [4, 5]


def test_nothing_is_a_fine_amount() -> None:
    pool = BlockAllocator(2)
    assert pool.allocate(0) == []
    pool.allocate(2)
    assert pool.allocate(0) == []
    pool.check_integrity()


def test_misuse_is_told() -> None:
    with pytest.raises(AssertionError, match="count is 0, must be positive"):
        BlockAllocator(0)
    pool = BlockAllocator(3)
    with pytest.raises(AssertionError, match="wanted 4 blocks, must be at most the 3 free"):
        pool.allocate(4)
    held = pool.allocate(2)
    pool.release(held)
    with pytest.raises(AssertionError, match="block 0 is released, must be held"):
        pool.release(held)
    pool.check_integrity()


def test_check_integrity_sees_a_lost_and_a_doubled_block() -> None:
    lost, doubled = BlockAllocator(4), BlockAllocator(4)
    lost._free.remove(2)
    with pytest.raises(AssertionError, match="free"):
        lost.check_integrity()
    doubled._held.add(1)
    with pytest.raises(AssertionError, match="free"):
        doubled.check_integrity()


@pytest.mark.parametrize("seed", range(4))
def test_random_operations_keep_every_block_accounted_for(seed: int) -> None:
    rng = random.Random(seed)
    count = rng.choice([1, 7, 40, 200])
    pool, owners, free = BlockAllocator(count), [], set(range(count))
    for _ in range(1000):
        if owners and rng.random() < 0.5:
            blocks = owners.pop(rng.randrange(len(owners)))
            rng.shuffle(blocks)
            pool.release(blocks)
            free |= set(blocks)
        else:
            wanted = rng.randint(1, max(1, count // 4))
            assert pool.can_allocate(wanted) == (wanted <= len(free))
            if pool.can_allocate(wanted):
                has_run = longest_run(free, count) >= wanted
                blocks = pool.allocate(wanted)
                assert len(blocks) == len(set(blocks)) == wanted
                assert set(blocks) <= free
                assert is_run(blocks) or not has_run, f"{blocks} is scattered although {sorted(free)} has a run"
                free -= set(blocks)
                owners.append(blocks)
        assert pool.free == len(free)
        pool.check_integrity()
