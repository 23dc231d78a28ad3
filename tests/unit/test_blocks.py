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
    doubled._held[1] += 1
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


def held(pool: BlockAllocator, digests: list[bytes]) -> list[int]:
    """A sequence's blocks with known contents."""
    found = pool.find(digests)
    pool.share(found)
    blocks = found + pool.allocate(len(digests) - len(found))
    for block, digest in zip(blocks, digests, strict=True):
        pool.remember(block, digest)
    return blocks


def test_what_is_known_is_found_until_its_room_is_needed() -> None:
    pool = BlockAllocator(6)
    first = held(pool, [b"a", b"b", b"c"])
    pool.release(first)
    assert pool.free == 6 and pool.find([b"a", b"b", b"x", b"c"]) == first[:2]
    assert pool.idle(first) == 3 and pool.can_allocate(6)
    others = pool.allocate(4)  # one of the three must go: the end of the text
    assert pool.find([b"a", b"b", b"c"]) == first[:2] and others == [2, 3, 4, 5]
    again = held(pool, [b"a", b"b"])
    assert again == first[:2] and pool.free == 0
    pool.check_integrity()


def test_a_block_is_free_when_its_last_owner_has_let_go() -> None:
    pool = BlockAllocator(4)
    one, two = held(pool, [b"a", b"b"]), held(pool, [b"a", b"c"])
    assert one[0] == two[0] and pool.free == 1
    pool.release(one)
    assert pool.free == 2 and pool.idle([one[0]]) == 0, "the other still reads it"
    pool.release(two)
    assert pool.free == 4 and pool.idle([*one, *two]) == 4
    pool.check_integrity()


def test_of_two_with_the_same_content_the_first_is_found() -> None:
    pool = BlockAllocator(4)
    one, two = pool.allocate(2)
    pool.remember(one, b"a")
    pool.remember(two, b"a")
    assert pool.find([b"a"]) == [one]
    pool.release([two])
    assert pool.find([b"a"]) == [one] and pool.idle([two]) == 0
    pool.check_integrity()


@pytest.mark.parametrize("seed", range(6))
def test_random_texts_share_and_evict_without_a_block_lost_or_wrong(seed: int) -> None:
    """What is found always holds what was written there last: a model of the memory itself."""
    rng = random.Random(seed)
    pool, memory, running = BlockAllocator(rng.choice([5, 12, 40])), dict[int, bytes](), list[list[int]]()
    for _ in range(1500):
        if running and rng.random() < 0.5:
            pool.release(running.pop(rng.randrange(len(running))))
        else:
            text = [bytes(rng.randrange(3) for _ in range(at)) for at in range(1, rng.randint(2, 5))]
            digests = [text[0][:1]] + [text[at][: at + 1] + bytes([at]) for at in range(1, len(text))]
            found = pool.find(digests)
            assert [memory[block] for block in found] == digests[: len(found)]
            if not pool.can_allocate(len(digests) - len(found) + pool.idle(found)):
                continue
            pool.share(found)
            fresh = pool.allocate(len(digests) - len(found))
            in_use = {block for blocks in running for block in blocks}
            assert not in_use.intersection(fresh) and not set(found).intersection(fresh)
            for block, digest in zip(fresh, digests[len(found) :], strict=True):
                memory[block] = digest
                if rng.random() < 0.8:
                    pool.remember(block, digest)
            running.append(found + fresh)
        pool.check_integrity()
    for blocks in running:
        pool.release(blocks)
    assert pool.free == pool.count
