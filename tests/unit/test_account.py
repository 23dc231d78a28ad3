"""A request's account: what it may spend in each mode, and what the guard changes."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from buddymoe_ray.engine.account import Account
from buddymoe_ray.moe import StepOutcome
from buddymoe_ray.types import Mode, StandinAccesses


def outcome(hits: int, fetched: int, standins: list[int], loss: float) -> StepOutcome:
    return StepOutcome(accesses_TA=np.array([[hits, fetched, 0, 0, *standins]]), loss_T=np.array([loss]))


def account(mode: Mode, **changes: object) -> Account:
    fields = {"budget": 0.01, "price": 0.005} | changes
    return Account(mode=mode, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(("mode", "allowance", "price"), [("exact", 0.0, 0.0), ("fast", math.inf, math.inf)])
def test_exact_spends_nothing_and_fast_anything(mode: Mode, allowance: float, price: float) -> None:
    one = account(mode)
    one.begin("off")
    assert (one.allowance, one.price, one.budget) == (allowance, price, None)


def test_bounded_never_spends_more_than_it_accrued() -> None:
    rng = random.Random(0)
    one = account("bounded")
    for token in range(1, 2000):
        one.begin("off")
        loss = rng.random() * min(one.allowance, 0.03)
        one.settle(outcome(1, 0, [1, 0, 0, 0, 0], loss), 0)
        assert one.expected_rise <= 0.01 * token * (1 + 1e-9)
    assert one.standins == StandinAccesses(lowbit=1999) and one.hits == 1999 and one.budget == 0.01


def test_losses_count_as_often_as_they_are_not_trusted() -> None:
    """A row may spend half of what its ledger has where each nat is charged twice."""
    one, half = account("bounded"), account("bounded", factor=2.0)
    for each in (one, half):
        each.begin("off")
    assert half.allowance == one.allowance / 2 and half.allowance > 0
    half.settle(outcome(1, 0, [1, 0, 0, 0, 0], half.allowance), 0)
    assert half.expected_rise == pytest.approx(one.allowance) and half.allowance == pytest.approx(0.0, abs=1e-6)


def test_a_tripped_guard_makes_it_exact_and_says_so() -> None:
    for mode in ("bounded", "fast"):
        one = account(mode)  # type: ignore[arg-type]
        one.begin("tripped")
        assert (one.mode, one.requested_mode, one.guard) == ("exact", mode, "tripped")
        assert (one.allowance, one.price) == (0.0, 0.0)
        one.begin("ok")
        assert one.mode == mode and one.allowance > 0
    exact = account("exact")
    exact.begin("tripped")
    assert exact.guard == "off" and exact.mode == "exact"


def test_where_no_stand_in_keeps_a_budget_bounded_is_exact() -> None:
    one = account("bounded", factor=math.inf)
    one.begin("off")
    assert (one.mode, one.requested_mode, one.allowance) == ("exact", "bounded", 0.0)
    one.settle(outcome(2, 2, [0, 0, 0, 0, 0], 0.0), 0)
    assert (one.hits, one.fetched, one.expected_rise) == (2, 2, 0.0)
