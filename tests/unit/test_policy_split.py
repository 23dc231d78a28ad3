"""The split: held against an exact solver, never over its budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from buddymoe_ray.policy import Split, choose

Array = np.ndarray  # any numbers


def exact(bytes_ON: Array, loss_ON: Array, budget: int) -> float:
    """Least expected loss by dynamic programming over bytes."""
    best = np.zeros(budget + 1)
    for n in range(bytes_ON.shape[1]):
        after = np.full(budget + 1, np.inf)
        for nbytes, loss in zip(bytes_ON[:, n], loss_ON[:, n], strict=True):
            if nbytes <= budget:
                after[nbytes:] = np.minimum(after[nbytes:], best[: budget + 1 - nbytes] + loss)
        best = after
    return float(best[-1])


def hull_steps(nbytes: Sequence[int], losses: Sequence[float]) -> list[tuple[float, int]]:
    """`(expected loss saved, bytes)` along the lower convex hull, in plain loops: always the steepest way down."""
    now = min(range(len(nbytes)), key=lambda o: (nbytes[o], losses[o]))
    steps = []
    while True:
        ways = [o for o in range(len(nbytes)) if nbytes[o] > nbytes[now] and losses[o] < losses[now]]
        if not ways:
            return steps
        then = max(ways, key=lambda o: ((losses[now] - losses[o]) / (nbytes[o] - nbytes[now]), -nbytes[o]))
        steps.append((losses[now] - losses[then], nbytes[then] - nbytes[now]))
        now = then


def relaxed(bytes_ON: Array, loss_ON: Array, budget: int) -> tuple[float, float]:
    """Expected loss of the relaxation, where the last step may be taken in part, and the most that one step saves."""
    steps = [s for n in range(bytes_ON.shape[1]) for s in hull_steps(bytes_ON[:, n].tolist(), loss_ON[:, n].tolist())]
    cheapest = bytes_ON.min(axis=0)
    left = budget - int(cheapest.sum())
    loss = float(np.where(bytes_ON == cheapest, loss_ON, np.inf).min(axis=0).sum())
    for saved, cost in sorted(steps, key=lambda s: -s[0] / s[1]):
        part = min(1.0, left / cost)
        loss, left = loss - part * saved, left - part * cost
        if part < 1:
            break
    return loss, max((saved for saved, _ in steps), default=0.0)


class Case:
    """A random split: full experts and records of a few kinds, for layers of different sizes."""

    def __init__(self, seed: int, *, layers: int = 3, experts: int = 5, kinds: int = 4, each: bool = False) -> None:
        rng = np.random.default_rng(seed)
        self.counts = rng.integers(1, experts + 1, layers).tolist()
        shape = (kinds, layers, experts)
        self.bytes_of = rng.integers(0, 30, shape if each else kinds)
        self.bytes_of[0] = 40
        self.loss_of = rng.gamma(0.5, 1.0, shape)
        self.loss_of[0] = 0.0
        self.bytes_of = self.bytes_of.astype(np.int64)
        spread = self.bytes_of if each else np.broadcast_to(self.bytes_of[:, None, None], shape)
        self.bytes_ON = np.concatenate([spread[:, la, :n] for la, n in enumerate(self.counts)], axis=1)
        self.loss_ON = np.concatenate([self.loss_of[:, la, :n] for la, n in enumerate(self.counts)], axis=1)
        self.least = int(self.bytes_ON.min(axis=0).sum())
        self.budget = self.least + int(rng.integers(0, 40 * sum(self.counts) - self.least + 20))

    def solve(self, **options: object) -> Split:
        given = {"budget_bytes": self.budget} | options
        return choose(bytes_of=self.bytes_of, loss_of=self.loss_of, experts_per_layer=self.counts, **given)  # type: ignore[arg-type]

    def kinds(self, split: Split) -> Array:
        """`[N]` options, and a check of the totals on the way."""
        kind_N = np.concatenate([split.kind_LE[la, :n] for la, n in enumerate(self.counts)])
        each_N = np.arange(len(kind_N))
        assert split.nbytes == self.bytes_ON[kind_N, each_N].sum()
        assert split.loss == pytest.approx(self.loss_ON[kind_N, each_N].sum())
        assert all((split.kind_LE[la, n:] == -1).all() for la, n in enumerate(self.counts))
        return kind_N


@given(seed=st.integers(0, 2**31), each=st.booleans())
def test_it_is_within_one_step_of_the_exact_optimum(seed: int, each: bool) -> None:
    case = Case(seed, each=each)
    split = case.solve()
    case.kinds(split)
    assert split.nbytes <= case.budget
    optimum = exact(case.bytes_ON, case.loss_ON, case.budget)
    bound, one_step = relaxed(case.bytes_ON, case.loss_ON, case.budget)
    assert bound - 1e-9 <= optimum <= split.loss + 1e-9
    assert split.loss <= bound + one_step + 1e-9


def test_most_often_it_is_the_optimum() -> None:
    exactly, worse = 0, []
    for seed in range(200):
        case = Case(seed, layers=4, experts=6)
        found, optimum = case.solve().loss, exact(case.bytes_ON, case.loss_ON, case.budget)
        exactly += found <= optimum + 1e-9
        worse.append((found - optimum) / max(optimum, 1e-2))
    assert exactly >= 100 and float(np.mean(worse)) < 0.03, (exactly, np.mean(worse))


@given(seed=st.integers(0, 2**31))
def test_no_single_change_helps(seed: int) -> None:
    """What is left buys no upgrade of any expert."""
    case = Case(seed)
    split = case.solve()
    kind_N, left = case.kinds(split), case.budget - split.nbytes
    for n, now in enumerate(kind_N):
        for option in range(len(case.bytes_ON)):
            if case.bytes_ON[option, n] - case.bytes_ON[now, n] <= left:
                assert case.loss_ON[option, n] >= case.loss_ON[now, n]


@given(seed=st.integers(0, 2**31), each=st.booleans())
def test_the_ends_of_the_budget(seed: int, each: bool) -> None:
    case = Case(seed, each=each)
    assert case.solve(budget_bytes=10**6).loss == 0.0
    cheapest = case.solve(budget_bytes=case.least)
    assert cheapest.nbytes == case.least
    with pytest.raises(AssertionError, match=f"budget is {case.least - 1} bytes, must be at least {case.least}"):
        case.solve(budget_bytes=case.least - 1)


def test_bytes_go_where_they_save_most() -> None:
    """One layer is ten times as sensitive: it gets the full experts, and the split follows the marginal saving."""
    loss_of = np.ones((3, 2, 8)) * np.array([0.0, 0.1, 1.0])[:, None, None]
    loss_of[:, 1] *= 10
    split = choose(bytes_of=np.array([100, 20, 2]), loss_of=loss_of, budget_bytes=1000, experts_per_layer=[8, 8])
    assert (split.kind_LE[1] == 0).sum() > (split.kind_LE[0] == 0).sum()
    assert (split.kind_LE[1] <= split.kind_LE[0]).all() and split.nbytes <= 1000


def test_options_that_are_dear_and_bad_are_ignored() -> None:
    loss_of = np.array([0.0, 5.0, 1.0])[:, None, None] * np.ones((3, 1, 6))
    split = choose(bytes_of=np.array([100, 50, 10]), loss_of=loss_of, budget_bytes=399, experts_per_layer=[6])
    assert set(split.kind_LE[0].tolist()) == {0, 2} and (split.kind_LE[0] == 0).sum() == 3


def test_a_single_option_is_taken() -> None:
    split = choose(bytes_of=np.array([5]), loss_of=np.ones((1, 2, 3)), budget_bytes=25, experts_per_layer=[3, 2])
    assert split.kind_LE.tolist() == [[0, 0, 0], [0, 0, -1]] and (split.nbytes, split.loss) == (25, 5.0)


def test_unknown_harms_are_refused() -> None:
    loss_of = np.ones((2, 1, 3))
    loss_of[1, 0, 2] = math.nan
    tables = {"bytes_of": np.array([5, 1]), "loss_of": loss_of, "budget_bytes": 25}
    with pytest.raises(AssertionError, match="must be finite"):
        choose(**tables, experts_per_layer=[3])  # type: ignore[arg-type]
    assert choose(**tables, experts_per_layer=[2]).nbytes == 2, "what is beyond a layer's experts is ignored"  # type: ignore[arg-type]


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.9])
def test_a_large_model_is_within_one_step_of_the_relaxation(share: float) -> None:
    """48 layers of 128 experts, six options; expected loss never rises with the budget by more than a step."""
    rng = np.random.default_rng(0)
    bytes_of = np.array([600_000, 40_000, 90_000, 120_000, 150_000, 3_000])
    loss_of = rng.gamma(0.5, 1.0, (1, 48, 128)) * np.array([0, 0.5, 0.1, 0.02, 0.005, 1])[:, None, None]
    budget = int(share * 600_000 * 48 * 128)
    split = choose(bytes_of=bytes_of, loss_of=loss_of, budget_bytes=budget, experts_per_layer=[128] * 48)
    flat_ON = loss_of.reshape(6, -1)
    bound, one_step = relaxed(np.broadcast_to(bytes_of[:, None], flat_ON.shape), flat_ON, budget)
    assert budget - 600_000 < split.nbytes <= budget
    assert bound - 1e-6 <= split.loss <= bound + one_step


def test_more_bytes_never_mean_more_harm_here() -> None:
    case = Case(11, layers=6, experts=9)
    losses = [case.solve(budget_bytes=b).loss for b in range(case.least, case.least + 600, 60)]
    assert all(later <= sooner + 1e-9 for sooner, later in pairwise(losses))
