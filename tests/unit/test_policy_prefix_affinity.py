"""Routing by prefix: nobody far longer than the shortest, the same for the same dice, a bounded memory, no ghosts; and
that it does not cost balance, in a simulation against power of two choices."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from buddymoe_ray.policy import PrefixAffinity, RouteCandidate, RouteReason, prefix_blocks

NAMES = "abcde"
pieces = st.lists(st.binary(max_size=9), max_size=4)
queues = st.lists(st.integers(0, 12), min_size=1, max_size=len(NAMES))
history = st.lists(st.tuples(st.sampled_from(NAMES), pieces), max_size=20)


def blocks(*texts: bytes) -> list[bytes]:
    return prefix_blocks(texts, block_bytes=4)


def candidates(queue: list[int], residency: list[float | None] | None = None) -> list[RouteCandidate]:
    shares = residency or [None] * len(queue)
    return [RouteCandidate(name=NAMES[at], queue=length, residency=shares[at]) for at, length in enumerate(queue)]


def after(past: list[tuple[str, list[bytes]]], *, slack: int = 2, capacity: int = 64) -> PrefixAffinity:
    affinity = PrefixAffinity(slack=slack, capacity=capacity)
    for name, prompt in past:
        affinity.note(name, blocks(*prompt))
    return affinity


@given(history, queues, pieces, st.integers(0, 4), st.integers())
def test_nobody_is_chosen_who_is_longer_than_the_shortest_by_more_than_slack(
    past: list[tuple[str, list[bytes]]], queue: list[int], prompt: list[bytes], slack: int, seed: int
) -> None:
    chosen = after(past, slack=slack).choose(candidates(queue), blocks(*prompt), random.Random(seed))
    assert queue[chosen.index] <= min(queue) + slack


@given(history, queues, pieces, st.integers(0, 4), st.integers())
def test_the_longest_prefix_within_slack_wins(
    past: list[tuple[str, list[bytes]]], queue: list[int], prompt: list[bytes], slack: int, seed: int
) -> None:
    affinity, wanted = after(past, slack=slack), blocks(*prompt)
    chosen = affinity.choose(candidates(queue), wanted, random.Random(seed))

    def served(name: str) -> int:  # by the past itself: the longest common beginning with any prompt of this worker
        mine = [blocks(*other) for at, other in past if at == name]
        return max((sum(x == y for x, y in zip(wanted, other, strict=False)) for other in mine), default=0)

    lengths = [served(NAMES[at]) for at in range(len(queue))]
    best = max(lengths[at] for at in range(len(queue)) if queue[at] <= min(queue) + slack)
    assert (chosen.reason is RouteReason.PREFIX) == (best > 0)
    assert chosen.matched == best and lengths[chosen.index] == best
    assert (chosen.reason is RouteReason.BUSY) == (best == 0 and max(lengths) > 0)


@given(history, queues, pieces, st.integers())
def test_the_same_dice_give_the_same_choice(
    past: list[tuple[str, list[bytes]]], queue: list[int], prompt: list[bytes], seed: int
) -> None:
    first, second = (after(past).choose(candidates(queue), blocks(*prompt), random.Random(seed)) for _ in range(2))
    assert first == second


@given(history, st.integers(1, 8))
def test_memory_is_bounded_and_holds_no_block_without_those_before_it(
    past: list[tuple[str, list[bytes]]], capacity: int
) -> None:
    affinity = after(past, capacity=capacity)
    for name, served in affinity._served.items():
        held = len(served)
        assert 0 <= held <= capacity
        mine = [blocks(*prompt) for at, prompt in past if at == name]
        reachable = {block for prompt in mine for block in prompt[: affinity.matched(name, prompt)]}
        assert len(reachable) == held, "a block is held that no prompt can reach any more"


@given(history, st.sets(st.sampled_from(NAMES)))
def test_who_is_gone_is_forgotten(past: list[tuple[str, list[bytes]]], there: set[str]) -> None:
    affinity = after(past)
    affinity.keep(there)
    assert affinity._served.keys() == {name for name, _ in past} & there
    for name, prompt in past:
        assert affinity.matched(name, blocks(*prompt)) == (len(blocks(*prompt)) if name in there else 0)


@given(pieces, pieces)
def test_equal_digests_are_equal_prefixes(one: list[bytes], other: list[bytes]) -> None:
    cut_one, cut_other = (
        [(p[at : at + 4], at + 4 >= len(p)) for p in x for at in range(0, len(p), 4)] for x in (one, other)
    )
    for at, (x, y) in enumerate(zip(blocks(*one), blocks(*other), strict=False)):
        assert (x == y) == (cut_one[: at + 1] == cut_other[: at + 1])


def test_digests_are_the_same_in_every_process_and_for_long_prompts_few() -> None:
    assert prefix_blocks([b"hello"])[0].hex() == "cb01be789938cef5"
    assert len(prefix_blocks([bytes(10**6)])) == 512
    assert prefix_blocks([bytes(10**6)]) == prefix_blocks([bytes(10**6), b"more"])


def test_a_conversations_turns_stay_at_one_worker() -> None:
    affinity, rng = PrefixAffinity(slack=2), random.Random(0)
    turns: list[bytes] = [b"be brief"]
    where = set()
    for turn in range(8):
        turns.append(b"question %d" % turn)
        chosen = affinity.choose(candidates([0] * 5), prefix_blocks(turns), rng)
        assert chosen.matched == (len(turns) - 2 if turn else 0), "all but the answer and the question that are new"
        affinity.note(NAMES[chosen.index], prefix_blocks(turns))
        where.add(chosen.index)
        turns.append(b"answer %d" % turn)
    assert len(where) == 1


def test_ties_go_by_residency_then_by_queue() -> None:
    affinity, rng = after([(name, [b"x"]) for name in "abc"]), random.Random(0)
    picks = [
        affinity.choose(candidates(queue, residency), blocks(b"x"), rng).index
        for queue, residency in [([1, 1, 0], [0.5, 0.9, None]), ([1, 0, 2], [0.5, 0.5, 0.4]), ([3, 2, 1], None)]
    ]
    assert picks == [1, 1, 2]
    ties = {affinity.choose(candidates([1, 1, 1]), blocks(b"x"), rng).index for _ in range(100)}
    assert ties == {0, 1, 2}


def test_of_two_idle_ones_the_warmer_gets_what_is_new() -> None:
    affinity, rng = PrefixAffinity(slack=2), random.Random(0)
    assert {affinity.choose(candidates([0, 0], [0.1, 0.9]), blocks(b"x"), rng).index for _ in range(20)} == {1}
    assert {affinity.choose(candidates([0, 1], [0.1, 0.9]), blocks(b"x"), rng).index for _ in range(20)} == {0}


def test_a_prompt_without_blocks_goes_by_queues() -> None:
    affinity, rng = after([("a", [b"x"])]), random.Random(0)
    chosen = [affinity.choose(candidates([2, 0]), [], rng) for _ in range(20)]
    assert {(choice.index, choice.reason) for choice in chosen} == {(1, RouteReason.NEW)}


def test_nobody_to_choose_from_is_a_mistake() -> None:
    with pytest.raises(AssertionError, match="nobody"):
        PrefixAffinity(slack=1).choose([], [], random.Random(0))


Router = Callable[[list[int], bytes], int]


def simulate(route: Router, *, workers: int, load: float, skewed: bool, requests: int = 8000) -> tuple[float, float]:
    """One server per worker, Poisson arrivals, exponential service of mean 1: max/mean work and mean wait."""
    rng = random.Random(1)
    weights = list(itertools.accumulate(1 / (rank + 1) ** 1.1 for rank in range(200)))
    now, wait, ends = 0.0, 0.0, [0.0] * workers
    work, queue, leaving = [0.0] * workers, [0] * workers, list[tuple[float, int]]()
    for number in range(requests):
        now += rng.expovariate(load * workers)
        service = rng.expovariate(1.0)
        rank = rng.choices(range(200), cum_weights=weights)[0]
        while leaving and leaving[0][0] <= now:
            queue[heapq.heappop(leaving)[1]] -= 1
        at = route(queue, b"%d" % (rank if skewed else number))
        wait += max(0.0, ends[at] - now)
        ends[at] = max(ends[at], now) + service
        heapq.heappush(leaving, (ends[at], at))
        queue[at] += 1
        work[at] += service
    return max(work) / (sum(work) / workers), wait / requests


def power_of_two(workers: int) -> Router:
    rng = random.Random(2)
    return lambda queue, _: min(rng.sample(range(workers), 2), key=queue.__getitem__)


def by_affinity(workers: int, kept: list[bool]) -> Router:
    affinity, rng = PrefixAffinity(slack=1), random.Random(2)

    def route(queue: list[int], prompt: bytes) -> int:
        names = [RouteCandidate(name=at, queue=queue[at]) for at in range(workers)]
        chosen = affinity.choose(names, prefix_blocks([prompt]), rng)
        affinity.note(chosen.index, prefix_blocks([prompt]))
        kept.append(chosen.reason is RouteReason.PREFIX)
        return chosen.index

    return route


@pytest.mark.parametrize("skewed", [True, False], ids=["zipf", "uniform"])
@pytest.mark.parametrize("workers", [4, 16])
def test_balance_is_not_hurt(workers: int, skewed: bool) -> None:
    kept: list[bool] = []
    most, wait = simulate(by_affinity(workers, kept), workers=workers, load=0.8, skewed=skewed)
    _, plain_wait = simulate(power_of_two(workers), workers=workers, load=0.8, skewed=skewed)
    print(
        f"{workers} workers, {'zipf' if skewed else 'uniform'}: max/mean {most:.3f}, wait {wait:.3f} / {plain_wait:.3f}"
    )
    assert wait <= 1.1 * plain_wait
    assert most <= 1.15
    assert (sum(kept) > len(kept) / 2) == skewed
