"""Turns of tenants, shares of a queue, rate limits and foretold waits, as pure numbers."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from buddymoe_ray.policy.fair import FairShare, may_queue
from buddymoe_ray.policy.forecast import Forecast
from buddymoe_ray.policy.rates import TokenBucket


def test_who_is_alone_looks_at_nobody() -> None:
    fair, looks = FairShare(), 0

    def present() -> Iterator[str]:
        nonlocal looks
        for _ in range(1000):
            looks += 1
            yield "a"

    fair.join("a", ())
    for _ in range(1000):
        fair.join("a", present())
        fair.charge(fair.next(present()), 5)
    assert looks == 1000
    fair.join("b", ["a"])
    assert fair.spent("b") == fair.spent("a") == 5000


@given(costs=st.lists(st.lists(st.integers(1, 50), min_size=40, max_size=40), min_size=2, max_size=5))
def test_who_waits_is_never_behind_by_more_than_one_request(costs: list[list[int]]) -> None:
    """The bound of the paper's theorem, for one request at a time: twice the largest."""
    fair, waiting = FairShare(), {str(at): deque(of_one) for at, of_one in enumerate(costs)}
    for name in waiting:
        fair.join(name, [other for other in waiting if other < name])
    served = dict.fromkeys(waiting, 0)
    while all(waiting.values()):
        name = fair.next(waiting)
        cost = waiting[name].popleft()
        fair.charge(name, cost)
        served[name] += cost
        assert max(served.values()) - min(served.values()) <= 2 * 50


def test_who_was_away_has_no_credit_and_no_debt_that_is_forgotten() -> None:
    fair = FairShare()
    fair.join("a", [])
    fair.charge("a", 1000)
    fair.join("b", ["a"])
    assert fair.spent("b") == 1000, "the time before it came is not made good"
    fair.charge("b", 10)
    assert fair.next(["b", "a"]) == "a"
    fair.charge("a", 500)
    fair.join("a", ["b"])  # away for a moment
    assert fair.next(["a", "b"]) == "b", "leaving pays nothing"
    fair.join("a", [])
    assert fair.spent("a") == fair.spent("b") == 0, "where nobody was all begin alike"


def test_one_tenant_leaves_room_in_the_queue_for_those_to_come() -> None:
    most = 288
    alone = max(n for n in range(most) if may_queue(1, own=n, total=n, most=most)) + 1
    assert alone == 230, "four fifths"
    assert may_queue(1, own=0, total=alone, most=most)
    held = [0] * 8
    while any(grown := [may_queue(1, own=own, total=sum(held), most=most) for own in held]):
        held[grown.index(True)] += 1
        assert sum(held) < most
    assert min(held) == 0 and may_queue(1, own=0, total=sum(held) - 1, most=most)


@given(
    amounts=st.lists(st.tuples(st.floats(0, 90), st.floats(0, 20)), min_size=1, max_size=60),
    rate=st.sampled_from((1, 7, 60, 1000)),
)
def test_a_bucket_never_gives_more_than_its_rate(amounts: list[tuple[float, float]], rate: int) -> None:
    now, taken, bucket = 0.0, 0.0, TokenBucket(rate, now=0.0)
    for amount, pause in amounts:
        now += pause
        amount = min(amount, rate)
        if bucket.wait(amount, now) == 0:
            bucket.take(amount, now)
            taken += amount
        assert taken <= rate + rate * now / 60 + 1e-6


def test_a_bucket_tells_when_to_come_back() -> None:
    bucket = TokenBucket(60, now=100.0)
    bucket.take(60, 100.0)
    assert bucket.wait(1, 100.0) == pytest.approx(1) and bucket.wait(30, 110.0) == pytest.approx(20)
    assert bucket.level(50.0) == bucket.level(110.0), "a clock that goes back gives nothing"
    bucket.take(100, 110.0)
    assert bucket.wait(1, 110.0) == pytest.approx(91), "who took more than was foreseen waits longer"
    bucket.take(-1000, 110.0)
    assert bucket.level(110.0) == 60, "what is given back does not overflow"
    assert bucket.wait(1e9, 110.0) == 0, "more than it holds is let through when it is full"
    bucket.resize(6, 110.0)
    assert bucket.wait(6, 110.0) == 0
    bucket.take(6, 110.0)
    bucket.resize(600, 110.0)
    assert bucket.level(110.0) == 594, "a raised limit forgets no use"


def served(places: int, seconds_each: float, ends: int, *, tokens: int = 10, used: int = 10) -> tuple[Forecast, float]:
    """A worker with always two in its queue, whose sequences take so long; and when that was."""
    forecast, now = Forecast(places=places, tokens=10_000), 0.0
    for _ in range(places + 2):
        forecast.arrive("a", tokens, now)
    for _ in range(ends):
        now += seconds_each / places
        forecast.end("a", tokens, used, now)
        forecast.arrive("a", tokens, now)
    return forecast, now


def test_a_wait_is_foretold_from_what_is_measured() -> None:
    forecast, now = served(4, 8.0, 40)
    assert forecast.seconds("a", 1, 10, now) == pytest.approx(6), "three must end, one every two seconds"
    assert forecast.seconds("a", 10, 100, now) == pytest.approx(24)
    assert forecast.seconds("a", 0, 0, now) == pytest.approx(4)
    stuck = forecast.seconds("a", 1, 10, now + 600)
    assert stuck > 600, "where nothing ends any more the wait grows"


def test_a_tenant_waits_for_its_own_share() -> None:
    forecast, now = served(4, 8.0, 40)
    for _ in range(100):
        forecast.arrive("a", 10, now)
    assert forecast.seconds("a", 1, 10, now) > 200
    assert forecast.seconds("b", 1, 10, now) == 0, "its turn is next"
    assert forecast.seconds("b", 5, 50, now) == pytest.approx(12), "three beyond its half, one every four seconds"
    for _ in range(3):
        forecast.arrive("b", 10, now)
    assert forecast.seconds("b", 1, 10, now) == pytest.approx(8)
    assert 0 < forecast.seconds("c", 2, 20, now) < 8, "a third has a third"
    assert forecast.seconds("c", 2, 20, now, weight=8.0) == 0, "or eight tenths, by its weight"


def test_nothing_is_foretold_that_was_not_measured() -> None:
    forecast = Forecast(places=4, tokens=100)
    for _ in range(50):
        forecast.arrive("a", 10, 0.0)
    assert forecast.seconds("a", 100, 1000, 1000.0) == 0, "none has ended"
    forecast, now = served(4, 8.0, 40)
    for _ in range(6):
        forecast.end("a", 10, 10, now)
    assert forecast.seconds("a", 4, 40, now) == 0, "there is room"


def test_room_in_the_cache_is_waited_for_as_it_is_really_used() -> None:
    forecast, now = Forecast(places=100, tokens=400), 0.0
    for _ in range(5):
        forecast.arrive("a", 100, now)
    for _ in range(200):
        now += 1.0
        forecast.end("a", 100, 100, now)
        forecast.arrive("a", 100, now)
    assert forecast.seconds("a", 1, 100, now) == pytest.approx(2, rel=0.01), "200 tokens too many, 100 free a second"
    for _ in range(2000):
        now += 1.0
        forecast.end("a", 100, 10, now)
        forecast.arrive("a", 100, now)
    assert forecast.seconds("a", 1, 100, now) == 0, "few come to what they may"


def test_a_forecast_stands_any_order_of_events() -> None:
    rng, forecast, live, now = random.Random(5), Forecast(places=3, tokens=50), 0, 0.0
    for _ in range(3000):
        now += rng.choice((0.0, 0.0, 0.1, 1000.0, -5.0))
        if live and rng.random() < 0.5:
            forecast.end("a", 20, rng.randrange(21), now)
            live -= 1
        else:
            forecast.arrive("a", 20, now)
            live += 1
        assert 0 <= forecast.seconds("a", rng.randrange(5), rng.randrange(100), now) < float("inf")
