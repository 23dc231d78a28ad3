"""A request's account: what it may spend in each mode, and what the guard changes."""

from __future__ import annotations

import math
import random

import pytest

from buddymoe_ray.engine.account import Account
from buddymoe_ray.types import Mode, StandinUses

NONE = [0, 0, 0, 0, 0]


def account(mode: Mode, **changes: object) -> Account:
    fields = {"budget": 0.01, "price": 0.005, "record": False} | changes
    return Account(mode=mode, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(("mode", "allowance", "price"), [("exact", 0.0, 0.0), ("fast", math.inf, math.inf)])
def test_exact_spends_nothing_and_fast_anything(mode: Mode, allowance: float, price: float) -> None:
    one = account(mode)
    one.accrue()
    assert (one.allowance, one.price, one.budget) == (allowance, price, None)


def test_bounded_never_spends_more_than_it_accrued() -> None:
    rng = random.Random(0)
    one = account("bounded")
    for token in range(1, 2000):
        one.accrue()
        harm = rng.random() * min(one.allowance, 0.03)
        one.settle(hits=1, peer=0, fetched=0, standins=[1, 0, 0, 0, 0], harm=harm, uses=[])
        assert one.expected_rise <= 0.01 * token * (1 + 1e-9)
    assert one.standins == StandinUses(lowbit=1999) and one.hits == 1999 and one.budget == 0.01


def test_a_tripped_guard_makes_it_exact_and_says_so() -> None:
    for mode in ("bounded", "fast"):
        one = account(mode)  # type: ignore[arg-type]
        one.accrue()
        one.note_guard("tripped")
        assert (one.mode, one.requested_mode, one.guard) == ("exact", mode, "tripped")
        assert (one.allowance, one.price) == (0.0, 0.0)
        one.note_guard("ok")
        assert one.mode == mode and one.allowance > 0
    exact = account("exact")
    exact.note_guard("tripped")
    assert exact.guard == "off" and exact.mode == "exact"


def test_where_no_stand_in_keeps_a_budget_bounded_is_exact() -> None:
    one = account("bounded", refused=True)
    one.accrue()
    assert (one.mode, one.requested_mode, one.allowance) == ("exact", "bounded", 0.0)
    one.settle(hits=2, peer=0, fetched=2, standins=NONE, harm=0.0, uses=[])
    assert (one.hits, one.fetched, one.expected_rise) == (2, 2, 0.0)
