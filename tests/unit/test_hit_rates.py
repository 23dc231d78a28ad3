"""Hit rates: against caches simulated the slow way, against bounds, and on traces whose answer is known."""

from __future__ import annotations

from functools import cache
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from profiles import make_profile

from buddymoe_ray.calibrate.hit_rates import hit_rates, oracle_hits, static_hits
from buddymoe_ray.residency.routes import served_hits


def trace(tokens: int, layers: int, experts: int, top_k: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    weight_LE = rng.dirichlet(np.full(experts, 0.7), size=layers) + 1e-3
    race = rng.exponential(size=(tokens, layers, experts)) / weight_LE
    routes = np.argsort(race, axis=2)[:, :, :top_k]
    counts = np.stack([np.bincount(routes[:, la].ravel(), minlength=experts) for la in range(layers)])
    return routes, counts


def by_popularity(counts_E: np.ndarray) -> list[int]:
    return sorted(range(len(counts_E)), key=lambda e: (-counts_E[e], e))


def served_slowly(routes_TK: np.ndarray, counts_E: np.ndarray, size: int) -> int:
    """Counts that lose half in 32 tokens, as one writes it."""
    order = by_popularity(counts_E)
    held, hits = set(order[:size]), 0
    used = {expert: -float(rank) for rank, expert in enumerate(order)}  # before any access: by popularity
    for ids_K in routes_TK.tolist():
        used = {e: count * 0.5 ** (1 / 32) if count > 0 else count for e, count in used.items()}
        hits += len(held & set(ids_K))
        for expert in ids_K:
            used[expert] = max(used[expert], 0.0) + 1
        held |= set(ids_K)
        while len(held) > size:
            held.remove(min(held, key=lambda e: (e in ids_K, used[e], -e if used[e] <= 0 else e)))
    return hits


def best_by_search(routes_TK: np.ndarray, counts_E: np.ndarray, size: int) -> int:
    """The most hits of any choice of what to keep: all choices are tried."""
    tokens = [frozenset(ids) for ids in routes_TK.tolist()]

    @cache
    def best(t: int, held: frozenset[int]) -> int:
        if t == len(tokens):
            return 0
        pool = held | tokens[t]
        keeps = combinations(sorted(pool), min(size, len(pool)))
        return len(tokens[t] & held) + max(best(t + 1, frozenset(keep)) for keep in keeps)

    return best(0, frozenset(by_popularity(counts_E)[:size]))


@pytest.mark.parametrize(("layers", "experts", "top_k"), [(1, 4, 1), (2, 9, 3), (3, 16, 4), (1, 5, 5)])
def test_served_is_that_of_a_simulated_cache(layers: int, experts: int, top_k: int) -> None:
    routes, counts = trace(120, layers, experts, top_k)
    sizes = tuple(range(1, experts + 1))
    found = served_hits(routes, counts, sizes)
    for la in range(layers):
        wanted = [served_slowly(routes[:, la], counts[la], size) / (120 * top_k) for size in sizes]
        assert found[la].tolist() == pytest.approx(wanted)


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), experts=st.integers(2, 6), top_k=st.integers(1, 3), tokens=st.integers(1, 7))
def test_the_oracle_cannot_be_beaten(seed: int, experts: int, top_k: int, tokens: int) -> None:
    top_k = min(top_k, experts)
    routes, counts = trace(tokens, 1, experts, top_k, seed)
    sizes = tuple(range(1, experts + 1))
    wanted = [best_by_search(routes[:, 0], counts[0], size) / (tokens * top_k) for size in sizes]
    assert oracle_hits(routes, counts, sizes)[0].tolist() == pytest.approx(wanted)


def test_rules_are_ordered_and_grow() -> None:
    profile = make_profile(layers=3, tokens=600)
    rates = hit_rates(profile.counts_LE, profile.routes_TLK)
    assert rates.served_LC is not None and rates.oracle_LC is not None
    assert rates.sizes[0] == 1 and rates.sizes[-1] == rates.experts == 32 and len(rates.sizes) == 16
    for table in (rates.static_LC, rates.served_LC, rates.oracle_LC):
        assert table.shape == (3, 16)
        assert (np.diff(table, axis=1) >= 0).all() and table[:, -1] == pytest.approx(1.0)
    assert (rates.oracle_LC >= rates.served_LC).all() and (rates.oracle_LC >= rates.static_LC - 1e-9).all()
    assert (rates.static_LC >= rates.uniform_C - 1e-9).all()


def test_static_counts_the_most_frequent() -> None:
    counts = np.array([[1, 6, 3, 0], [0, 0, 0, 0]])
    assert static_hits(counts, (1, 2, 4)).tolist() == [[0.6, 0.9, 1.0], [0.0, 0.0, 0.0]]


def test_layers_do_not_mix() -> None:
    routes, counts = trace(80, 3, 10, 2)
    sizes = (2, 5)
    for rule in (served_hits, oracle_hits):
        alone = [rule(routes[:, [la]], counts[[la]], sizes)[0] for la in range(3)]
        assert np.array_equal(rule(routes, counts, sizes), np.stack(alone))


def test_a_cycle_defeats_what_is_served_and_not_the_oracle() -> None:
    """Experts 0..4 in turn over 4 places: counts drop most just before their access, the oracle keeps four for good."""
    routes = np.tile(np.arange(5), 40)[:, None, None]
    counts = np.bincount(routes.ravel(), minlength=5)[None]
    assert served_hits(routes, counts, (4,))[0, 0] < 0.05
    assert oracle_hits(routes, counts, (4,))[0, 0] == 0.8


def test_without_a_trace_there_is_no_simulation() -> None:
    rates = hit_rates(np.ones((2, 8), np.uint32), np.zeros((0, 2, 2), np.uint8))
    assert rates.served_LC is None and rates.oracle_LC is None
    assert rates.static_LC.tolist() == pytest.approx(np.tile(rates.uniform_C, (2, 1)))


def test_one_expert_is_always_there() -> None:
    rates = hit_rates(np.array([[9]]), np.zeros((9, 1, 1), np.uint8))
    assert rates.sizes == (1,) and rates.served_LC == rates.oracle_LC == rates.static_LC == 1


def test_ids_wider_than_a_byte() -> None:
    routes, counts = trace(50, 1, 300, 8)
    rates = hit_rates(counts.astype(np.uint32), routes.astype(np.uint16))
    assert rates.served_LC is not None and rates.served_LC[0, -1] == 1
