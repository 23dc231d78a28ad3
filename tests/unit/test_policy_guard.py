"""The guard: catches what costs too much, lets noise pass, rests longer each time, and says why."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from buddymoe_ray.policy import Guard, GuardView

LIMIT = 0.003


def feed(guard: Guard, means: list[float], *, tokens: int = 64, predicted: float = 0.002) -> None:
    """One request of even divergence per mean."""
    for mean in means:
        guard.observe([mean] * tokens, [predicted] * tokens)


def request(rng: np.random.Generator, mean: float, tokens: int = 48) -> list[float]:
    """Divergences as they are: heavy tails within a request, and requests that differ."""
    harder = rng.gamma(4.0, 0.25)
    return (rng.gamma(0.25, 4.0, tokens) * mean * harder).tolist()


def test_it_trips_above_the_limit_and_says_so() -> None:
    guard = Guard(limit=LIMIT)
    feed(guard, [0.01, 0.011, 0.012])
    view = guard.snapshot()
    assert guard.state == view.state == "tripped"
    assert view.measured == pytest.approx(0.011) and view.predicted == pytest.approx(0.002)
    assert view.tokens == 192 and view.rearms_in == 4096
    assert view.reason == (
        "measured 0.011 ± 0.00058 nats per token over 192 tokens, limit 0.003, predicted 0.002; exact for 4096 tokens"
    )


def test_below_the_limit_it_only_watches() -> None:
    guard = Guard(limit=LIMIT)
    feed(guard, [0.001, 0.002, 0.0025] * 40)
    assert guard.snapshot() == GuardView(
        state="ok",
        measured=guard.snapshot().measured,
        standard_error=guard.snapshot().standard_error,
        predicted=pytest.approx(0.002),
        tokens=guard.snapshot().tokens,
        reason="",
        rearms_in=0,
    )


def test_before_anything_is_measured_it_is_ok() -> None:
    assert Guard(limit=LIMIT).snapshot() == GuardView(
        state="ok", measured=0.0, standard_error=0.0, predicted=0.0, tokens=0, reason=""
    )


def test_it_wants_enough_tokens_and_enough_requests() -> None:
    guard = Guard(limit=LIMIT, least=128, requests=3)
    feed(guard, [1.0] * 8, tokens=15)
    assert guard.state == "ok", "120 tokens are not enough"
    feed(guard, [1.0], tokens=15)
    assert guard.state == "tripped"
    one = Guard(limit=LIMIT, least=128, requests=3)
    feed(one, [1.0, 1.0], tokens=500)
    assert one.state == "ok", "two requests are not enough"
    feed(one, [1.0], tokens=1)
    assert one.state == "tripped"


def test_a_scattered_excess_is_not_yet_proof() -> None:
    """A mean above the limit within two standard errors does not trip; the same mean from requests that agree does."""
    scattered, agreed = Guard(limit=LIMIT), Guard(limit=LIMIT)
    feed(scattered, [0.0, 0.0, 0.012])
    feed(agreed, [0.0039, 0.004, 0.0041])
    assert scattered.snapshot().measured == pytest.approx(agreed.snapshot().measured)
    assert (scattered.state, agreed.state) == ("ok", "tripped")


def test_equal_to_the_limit_is_within_it() -> None:
    guard = Guard(limit=0.25)
    feed(guard, [0.25] * 10)
    assert guard.state == "ok" and guard.snapshot().standard_error == 0.0


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_what_is_no_number_trips_at_once(bad: float) -> None:
    guard = Guard(limit=LIMIT)
    guard.observe([0.001, bad], [0.0, 0.0])
    assert guard.state == "tripped" and str(bad) in guard.snapshot().reason
    guard.generated(4096)
    assert guard.state == "ok" and guard.snapshot().tokens == 0, "and is forgotten after the rest"


def test_the_standard_error_counts_requests_not_tokens() -> None:
    """Against the formula in numpy: tokens of one request are not independent."""
    rng = np.random.default_rng(0)
    guard = Guard(limit=100.0, window=10**6)
    requests = [request(rng, 0.002, int(n)) for n in rng.integers(8, 64, 40)]
    for kl in requests:
        guard.observe(kl, [0.001] * len(kl))
    counts = np.array([len(kl) for kl in requests])
    totals = np.array([sum(kl) for kl in requests])
    mean = totals.sum() / counts.sum()
    error = math.sqrt(((totals - mean * counts) ** 2).sum() * 40 / 39) / counts.sum()
    view = guard.snapshot()
    assert view.measured == pytest.approx(mean) and view.standard_error == pytest.approx(error)
    naive = float(np.std(np.concatenate(requests))) / math.sqrt(counts.sum())
    assert view.standard_error > naive, "requests that differ say less than their tokens seem to"


def test_the_standard_error_is_right() -> None:
    """Over many guards the means scatter as each of them says they do."""
    rng = np.random.default_rng(1)
    views = []
    for _ in range(200):
        guard = Guard(limit=100.0)
        for _ in range(30):
            guard.observe(request(rng, 0.002), [0.002] * 48)
        views.append(guard.snapshot())
    scatter = float(np.std([v.measured for v in views]))
    assert scatter == pytest.approx(float(np.mean([v.standard_error for v in views])), rel=0.15)


@pytest.mark.parametrize("ratio", [0.6, 1.0, 1.8])
def test_what_is_charged_comes_to_within_30_percent_of_what_is_measured(ratio: float) -> None:
    """Of 200 services most are right after some dozens of sampled requests, though single ones differ widely."""
    rng, right = np.random.default_rng(5), 0
    for _ in range(200):
        guard = Guard(limit=100.0)
        for _ in range(40):
            guard.observe(request(rng, 0.002 * ratio), [0.002] * 48)
        right += abs(guard.factor / ratio - 1) <= 0.3
    assert right >= 190, f"{right} of 200 are within 30 %"


def test_charges_are_corrected_no_further_than_the_measurements_are_certain() -> None:
    guard = Guard(limit=100.0)
    feed(guard, [0.001] * 7)
    assert guard.factor == 1.0, "of 7 requests nothing is known"
    feed(guard, [0.001])
    assert guard.factor == pytest.approx(0.5)
    feed(guard, [0.0] * 80)
    assert guard.factor == 0.5, "what was seen of a heavy tail may be too little"
    scattered = Guard(limit=100.0)
    feed(scattered, [0.0004, 0.0044] * 8)  # 1.2 times, give or take .26
    assert scattered.factor == 1.0
    scattered.observe([math.nan] * 64, [0.002] * 64)
    assert scattered.factor == 1.0


def test_what_was_learnt_outlives_a_trip() -> None:
    """Else a service would charge too little again, and trip again."""
    guard = Guard(limit=0.01)
    feed(guard, [0.008] * 10, predicted=0.002)
    assert guard.factor == pytest.approx(4.0) and guard.state == "ok"
    feed(guard, [0.05] * 6, predicted=0.002)
    assert guard.state == "tripped" and guard.factor > 4
    learnt = guard.factor
    guard.generated(4096)
    assert guard.state == "ok" and guard.snapshot().tokens == 0 and guard.factor == learnt


def test_honest_stand_ins_are_left_alone() -> None:
    """At two thirds of the limit, 100 services of 200 sampled requests each."""
    rng, tripped = np.random.default_rng(2), 0
    for _ in range(100):
        guard = Guard(limit=LIMIT)
        for _ in range(200):
            guard.observe(request(rng, LIMIT * 2 / 3), [LIMIT / 2] * 48)
        tripped += guard.state == "tripped"
    assert tripped <= 10, f"{tripped} of 100 tripped"


def test_a_threefold_breach_is_caught_soon() -> None:
    rng, needed = np.random.default_rng(3), []
    for _ in range(100):
        guard = Guard(limit=LIMIT)
        while guard.state == "ok":
            guard.observe(request(rng, 3 * LIMIT), [LIMIT / 2] * 48)
        needed.append(guard.snapshot().tokens)
    assert np.median(needed) <= 512 and max(needed) <= 2048, (np.median(needed), max(needed))


def test_the_window_forgets_old_requests() -> None:
    guard = Guard(limit=10.0, window=256, least=64)
    feed(guard, [1.0] * 10)
    assert (guard.snapshot().tokens, guard.snapshot().measured) == (256, 1.0)
    feed(guard, [3.0] * 2)
    assert (guard.snapshot().tokens, guard.snapshot().measured) == (256, 2.0)
    feed(guard, [3.0] * 2)
    assert guard.snapshot().measured == 3.0


def test_long_requests_do_not_push_out_all_others() -> None:
    guard = Guard(limit=10.0, window=256, least=64, requests=3)
    feed(guard, [1.0, 2.0, 3.0, 4.0], tokens=1000)
    assert (guard.snapshot().tokens, guard.snapshot().measured) == (3000, 3.0)
    feed(guard, [99.0] * 3, tokens=1000)
    assert guard.state == "tripped", "the window may be smaller than a request, and still it can trip"


def test_it_re_arms_after_a_rest_and_rests_twice_as_long_each_time() -> None:
    guard = Guard(limit=LIMIT, cooldown=100)
    for trip, rest in enumerate((100, 200, 400, 800), start=1):
        feed(guard, [1.0] * 3)
        assert guard.snapshot().rearms_in == rest and guard.state == "tripped"
        guard.generated(rest - 1)
        assert guard.snapshot().rearms_in == 1 and guard.state == "tripped"
        guard.generated(5)
        view = guard.snapshot()
        assert (view.state, view.rearms_in, view.tokens) == ("ok", 0, 0)
        assert view.reason == f"re-armed after trip {trip}"


def test_while_it_rests_nothing_is_measured() -> None:
    """What comes in late was generated before the trip."""
    guard = Guard(limit=LIMIT, cooldown=100)
    feed(guard, [1.0] * 3)
    before = guard.snapshot()
    feed(guard, [0.0] * 50)
    assert guard.snapshot() == before


def test_generated_tokens_count_only_while_it_rests() -> None:
    guard = Guard(limit=LIMIT, cooldown=100)
    guard.generated(10**6)
    feed(guard, [1.0] * 3)
    assert guard.snapshot().rearms_in == 100


def test_requests_of_no_tokens_say_nothing() -> None:
    guard = Guard(limit=LIMIT, least=1)
    for _ in range(10):
        guard.observe([], [])
    assert guard.snapshot().tokens == 0 and guard.state == "ok"


def test_a_limit_of_nothing_is_a_limit() -> None:
    """`bounded` with a budget of 0."""
    guard = Guard(limit=0.0)
    feed(guard, [0.0] * 5)
    assert guard.state == "ok"
    feed(guard, [0.1] * 50)
    assert guard.state == "tripped"


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(AssertionError, match="2 divergences, 1 predictions"):
        Guard(limit=LIMIT).observe([0.1, 0.1], [0.1])
    with pytest.raises(AssertionError, match="limit is -1"):
        Guard(limit=-1)
    with pytest.raises(AssertionError, match="must be positive"):
        Guard(limit=LIMIT, window=10, least=20)
    with pytest.raises(AssertionError, match="requests is 1, must be at least 2"):
        Guard(limit=LIMIT, requests=1)


@given(
    steps=st.lists(
        st.one_of(
            st.integers(1, 400),
            st.lists(st.floats(0, 0.02) | st.just(math.inf), min_size=1, max_size=80),
        ),
        max_size=40,
    )
)
def test_the_state_machine_is_never_stuck(steps: list[int | list[float]]) -> None:
    """Whatever comes: tripped means a rest of known length, and counting it down always ends it."""
    guard = Guard(limit=LIMIT, window=256, least=32, cooldown=64)
    trips = 0
    for step in steps:
        before = guard.snapshot()
        if isinstance(step, int):
            guard.generated(step)
            assert guard.snapshot().rearms_in == max(0, before.rearms_in - step)
        else:
            guard.observe(step, [0.001] * len(step))
            if before.state == "ok" and guard.state == "tripped":
                assert guard.snapshot().rearms_in == 64 * 2**trips and "exact for" in guard.snapshot().reason
                trips += 1
        view = guard.snapshot()
        assert (view.state == "tripped") == (view.rearms_in > 0)
    guard.generated(guard.snapshot().rearms_in)
    assert guard.state == "ok"
