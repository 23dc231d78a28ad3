"""When stand-ins of an engine's own making are trusted: bounds that hold however often one looks."""

from __future__ import annotations

import math

import numpy as np
import pytest

from buddymoe_ray.policy import Measured, Trust, may_replay
from buddymoe_ray.policy.calibration import upper_ratio


def texts(ratio: float, count: int, *, seed: int = 0, spread: float = 0.0) -> list[Measured]:
    """Texts whose stand-ins cost `ratio` times what was expected, give or take."""
    rng = np.random.default_rng(seed)
    expected = rng.uniform(0.1, 0.3, count)
    factor = ratio * rng.gamma(1 / spread**2, spread**2, count) if spread else np.full(count, ratio)
    return [Measured(tokens=64, kl=float(e * f), predicted=float(e)) for e, f in zip(expected, factor, strict=True)]


def test_the_bound_is_students_where_texts_are_alike() -> None:
    """Of 8 texts with the same expectation: mean + t standard errors; t(.975, 7) is 2.3646, t(.999, 7) 4.785."""
    costs = [0.5, 1.0, 1.5, 0.9, 1.1, 0.7, 1.3, 1.0]
    samples = [Measured(tokens=1, kl=cost, predicted=1.0) for cost in costs]
    error = np.std(costs, ddof=1) / math.sqrt(8)
    assert upper_ratio(samples, 0.025) == pytest.approx(1.0 + 2.3646 * error, rel=1e-3)
    assert upper_ratio(samples, 0.001) == pytest.approx(1.0 + 4.785 * error, rel=2e-3)


def test_of_few_texts_or_of_nothing_nothing_is_known() -> None:
    assert upper_ratio(texts(1.0, 7), 0.025) == math.inf and math.isfinite(upper_ratio(texts(1.0, 8), 0.025))
    assert upper_ratio([Measured(tokens=9, kl=0.0, predicted=0.0)] * 20, 0.025) == math.inf
    assert upper_ratio([Measured(tokens=9, kl=math.nan, predicted=1.0)] * 20, 0.025) == math.inf


def test_whoever_looks_often_is_not_fooled_more_often() -> None:
    """Requests that cost a tenth more than the most that is trusted: hardly any service ever trusts them."""
    fooled = 0
    for seed in range(200):
        trust = Trust()
        for sample in texts(2.2, 300, seed=seed, spread=0.8):
            trust.observe(sample)
            if trust.state == "ready":
                fooled += 1
                break
    assert fooled <= 0.05 * 200, f"{fooled} of 200 were fooled"


def test_own_texts_count_for_half_the_budget_until_requests_confirm_them() -> None:
    trust = Trust(texts(1.0, 16))
    assert (trust.state, trust.confirmed, trust.factor) == ("ready", False, pytest.approx(2.0))
    looks = [trust.observe(sample) for sample in texts(1.2, 8)]
    assert looks == [False] * 7 + [True] and trust.confirmed
    assert trust.state == "ready" and trust.factor == pytest.approx(1.2)
    assert trust.tokens == (16 + 8) * 64


def test_requests_that_cost_more_take_the_trust_back_and_others_give_it_again() -> None:
    trust = Trust(texts(1.0, 16))
    for sample in texts(3.0, 8):
        trust.observe(sample)
    assert trust.state == "collecting" and trust.factor == math.inf and "3.00 times" in trust.reason
    for sample in texts(0.5, 200):
        trust.observe(sample)
    assert trust.state == "ready" and 1.0 <= trust.factor < 2.0


def test_easy_requests_are_not_trusted_without_end_and_odd_ones_say_nothing() -> None:
    trust = Trust()
    assert trust.state == "collecting" and not trust.observe(Measured(tokens=0, kl=0.0, predicted=0.0))
    for sample in texts(0.1, 30):
        trust.observe(sample)
    assert trust.factor == 1.0
    for sample in [Measured(tokens=5, kl=math.nan, predicted=0.1)] * 60:
        trust.observe(sample)
    assert trust.state == "collecting"


def test_replays_take_a_fiftieth_of_the_time_or_what_nobody_needs() -> None:
    assert may_replay(0.0, 0.0, idle=False) and may_replay(2.0, 100.0, idle=False)
    assert not may_replay(2.1, 100.0, idle=False) and may_replay(50.0, 100.0, idle=True)
