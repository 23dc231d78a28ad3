"""The ledger and its prices: never overdrawn, spent to the end, and priced as a search by hand would."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from policy_cases import LAYERS

from buddymoe_ray.policy import Action, Ladder, Ledger, Misses, Own, Pricer, RowBudgets

SAFETY = 0.9


@given(budget=st.floats(0, 1), asks=st.lists(st.floats(0, 3), max_size=60))
def test_what_is_spent_never_exceeds_what_was_earned(budget: float, asks: list[float]) -> None:
    ledger = Ledger(budget)
    for ask in asks:
        ledger.accrue()
        ledger.charge(min(ask, ledger.allowance))
        assert 0 <= ledger.allowance <= budget * ledger.tokens and ledger.spent <= budget * ledger.tokens


def test_unspent_allowance_is_kept() -> None:
    ledger = Ledger(0.25)
    assert ledger.allowance == 0.0, "nothing is earned before the first token"
    for _ in range(8):
        ledger.accrue()
    assert ledger.allowance == pytest.approx(2.0, rel=1e-4) and ledger.allowance < 2.0
    ledger.charge(1.5)
    assert ledger.allowance == pytest.approx(0.5, rel=1e-4) and (ledger.spent, ledger.tokens) == (1.5, 8)


def test_an_overdraft_is_a_bug() -> None:
    ledger = Ledger(0.25)
    ledger.accrue()
    with pytest.raises(AssertionError, match=r"spent 0.5 nats, must be at most 0.25"):
        ledger.charge(0.5)
    with pytest.raises(AssertionError, match="must not be negative"):
        Ledger(-0.1)


def test_without_budget_nothing_can_be_spent() -> None:
    ledger = Ledger(0.0)
    for _ in range(5):
        ledger.accrue()
    assert (ledger.allowance, ledger.generosity) == (0.0, 1.0)
    ledger.charge(0.0)


def test_generosity_grows_with_what_lies_unspent() -> None:
    ledger = Ledger(0.5)
    seen = []
    for _ in range(6):
        ledger.accrue()
        seen.append(ledger.generosity)
    assert seen[0] == seen[1] == 1.0 and seen == sorted(seen) and seen[-1] == pytest.approx(3.0, rel=1e-4)
    ledger.charge(ledger.allowance)
    assert ledger.generosity == 1.0


def by_hand(budget: float, loss_TN: np.ndarray) -> float:  # type: ignore[type-arg]
    """The largest expected loss that may be taken together with all that are not larger."""
    price = 0.0
    for candidate in sorted({float(h) for h in loss_TN.ravel()}):
        cost = math.fsum(float(h) for h in loss_TN.ravel() if h <= candidate) / len(loss_TN)
        if cost > SAFETY * budget:
            return price
        price = candidate
    return math.inf


@given(seed=st.integers(0, 2**31), tokens=st.integers(1, 12), accesses=st.integers(1, 6), budget=st.floats(0.001, 4))
def test_price_is_what_a_search_by_hand_finds(seed: int, tokens: int, accesses: int, budget: float) -> None:
    """On a coarse grid, so that many expected losses are equal and sums are exact."""
    loss_TN = np.random.default_rng(seed).integers(0, 9, (tokens, accesses)) / 8
    assert Pricer(loss_TN)(budget) == by_hand(budget, loss_TN)


def test_equal_harms_are_taken_together_or_not_at_all() -> None:
    loss_TN = np.array([[0.25, 0.5, 0.5, 0.5]] * 10)
    assert Pricer(loss_TN)(1.0) == 0.25
    assert Pricer(loss_TN)(1.76 / SAFETY) == math.inf


def test_expected_spend_at_the_price_is_within_the_budget_and_near_it() -> None:
    loss_TN = np.random.default_rng(0).gamma(0.3, 0.004, (4096, 16)) * (np.random.default_rng(1).random(16) < 0.8)
    pricer = Pricer(loss_TN)
    prices = []
    for budget in (0.0005, 0.001, 0.003, 0.006):
        price = pricer(budget)
        prices.append(price)
        spend = np.where(loss_TN <= price, loss_TN, 0).sum() / len(loss_TN)
        assert 0.98 * SAFETY * budget < spend <= SAFETY * budget
        assert Pricer(loss_TN)(budget) == price
    assert prices == sorted(prices) and len(set(prices)) == 4, "a larger budget buys dearer uses"


def test_prices_at_the_ends() -> None:
    loss_TN = np.array([[0.5, 1.0]])
    assert Pricer(loss_TN)(0.0) == 0.0 and Pricer(loss_TN)(0.1) == 0.0
    assert Pricer(loss_TN)(100.0) == math.inf
    assert Pricer(np.zeros((4, 4)))(0.1) == math.inf, "nothing was ever missing: take what comes"
    assert Pricer(np.zeros((0, 4)))(0.1) == 0.0 and Pricer(np.zeros((4, 0)))(0.1) == 0.0, "nothing is known"


def test_unknown_harms_are_never_bought() -> None:
    loss_TN = np.array([[0.25, math.nan], [0.25, math.inf]])
    assert Pricer(loss_TN)(100.0) == 0.25
    with pytest.raises(AssertionError, match="must not be negative"):
        Pricer(np.array([[-0.5]]))


L, K, E = LAYERS, 4, 32


class Served:
    """One bounded request, token by token through the layers of a ladder, with records for all its experts."""

    def __init__(self, budget: float, *, seed: int, free: float = 0.0) -> None:
        self.rng = np.random.default_rng(seed)
        loss_LE = np.random.default_rng(9).gamma(0.5, 0.02, (L, E)).astype(np.float32)
        self.ladder = Ladder(Own("lowbit3", loss_LE=loss_LE, has_LE=np.ones((L, E), np.bool_)))
        self.ledger, self.free, self.accesses, self.stood_in = Ledger(budget), free, 0, 0
        calibration = np.random.default_rng(8)
        ids, weights = (np.stack(part) for part in zip(*(self.route(calibration) for _ in range(512)), strict=True))
        loss_TLK = weights**2 * loss_LE[np.arange(L)[:, None], ids]
        self.price = Pricer(loss_TLK.reshape(len(ids), -1))(budget)

    @staticmethod
    def route(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:  # type: ignore[type-arg]
        ids = np.stack([rng.permutation(E)[:K] for _ in range(L)])
        return ids, rng.dirichlet(np.ones(K), L).astype(np.float32)

    def token(self, *, generous: bool = True) -> None:
        self.ledger.accrue()
        price = self.price * (self.ledger.generosity if generous else 1.0)
        ids, weights = self.route(self.rng)
        left = np.array([self.ledger.allowance], np.float32)
        spent = np.zeros(1, np.float32)
        for layer in range(L):
            misses = Misses(
                layer=layer,
                ids_TK=ids[layer : layer + 1],
                weight_TK=weights[layer : layer + 1],
                resident_E=self.rng.random(E) < self.free,
                score_TE=None,
                rows=RowBudgets(mode_T=np.ones(1, np.int8), allowance_T=left, price_T=np.array([price], np.float32)),
            )
            resolution = self.ladder.resolve(misses)
            loss = resolution.loss_TK.sum(axis=1)
            left, spent = left - loss, spent + loss
            self.stood_in += int((resolution.action_TK == Action.OWN).sum())
            self.accesses += int((resolution.action_TK != Action.HIT).sum())
        self.ledger.charge(float(spent[0]))
        assert self.ledger.spent <= self.ledger.budget * self.ledger.tokens


@pytest.mark.parametrize("budget", [0.0003, 0.003, 0.01])
def test_a_request_spends_its_budget_and_no_more(budget: float) -> None:
    """With float32 sums over layers, as the engine has them."""
    served = Served(budget, seed=1)
    for _ in range(300):
        served.token()
    spent = served.ledger.spent / (budget * 300)
    assert 0.8 < spent <= 1.0, f"spent {spent:.2f} of the budget"
    assert served.stood_in > 0


def test_what_others_answer_for_free_is_spent_later() -> None:
    """Half of the accesses turn out to be resident; the price follows, so fewer of the rest are fetched."""
    runs = {}
    for generous in (False, True):
        served = Served(0.003, seed=2, free=0.5)
        for _ in range(300):
            served.token(generous=generous)
        runs[generous] = served
    plain, generous_run = (runs[generous].ledger.spent / (0.003 * 300) for generous in (False, True))
    assert plain < 0.6 < 0.8 < generous_run <= 1.0, f"spent {plain:.2f} and {generous_run:.2f} of the budget"
    assert runs[True].stood_in / runs[True].accesses > runs[False].stood_in / runs[False].accesses


def test_more_budget_stands_in_for_more() -> None:
    shares = []
    for budget in (0.0003, 0.001, 0.003, 0.01, 1.0):
        served = Served(budget, seed=3)
        for _ in range(60):
            served.token()
        shares.append(served.stood_in / served.accesses)
    assert shares == sorted(shares) and shares[0] < 0.7 and shares[-1] == 1.0
