"""Who answers a layer's accesses on a device, against the host's policy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from buddymoe_ray.kernels import RowTerms, resolve_on_device
from buddymoe_ray.policy import Action, Ladder, Misses, Own, RowBudgets
from buddymoe_ray.types import BOUNDED, EXACT, FAST

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
T, K, E, PADDING = 3, 2, 6, 1


def case(seed: int) -> tuple[Misses, Own]:
    rng = np.random.default_rng(seed)
    mode_T = rng.choice([EXACT, BOUNDED, BOUNDED, FAST, FAST], T).astype(np.int8)
    rows = RowBudgets(
        mode_T=mode_T,
        allowance_T=np.where(mode_T == FAST, np.inf, rng.choice([0.0, 0.02, 1.0], T)).astype(np.float32),
        price_T=np.where(mode_T == FAST, np.inf, rng.choice([0.01, 1.0], T)).astype(np.float32),
    )
    misses = Misses(
        layer=0,
        ids_TK=np.stack([rng.permutation(E)[:K] for _ in range(T)]),
        weight_TK=rng.random((T, K), np.float32),
        resident_E=rng.random(E) < 0.6,
        score_TE=None,
        rows=rows,
    )
    loss_LE = rng.choice([0.001, 0.05, np.nan], (1, E), p=[0.5, 0.4, 0.1]).astype(np.float32)
    return misses, Own("lowbit", loss_LE=loss_LE, has_LE=(rng.random((1, E)) < 0.9) & ~np.isnan(loss_LE))


def answered(misses: Misses, own: Own | None, *, stalled: int = 1) -> tuple[torch.Tensor, int, np.ndarray]:
    """What the device says of layer 0 with a row of padding: accesses, hits and records, the flag, what is left."""
    rows, none = misses.rows, np.zeros(PADDING, np.float32)

    def put(values: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(DEVICE, dtype)

    terms = RowTerms(
        stalled_L=put(np.array([stalled, 99]), torch.int64),
        count=put(np.array([T]), torch.int64),
        mode_T=put(np.concatenate([rows.mode_T, none]), torch.int32),
        price_T=put(np.concatenate([rows.price_T, none]), torch.float32),
        left_LT=put(np.stack([np.concatenate([rows.allowance_T, none]), np.full(T + PADDING, np.nan)]), torch.float32),
        lengths_LT=put(np.stack([np.arange(7, 7 + T + PADDING), np.full(T + PADDING, 99)]), torch.int64),
    )
    told = torch.full((3, T + PADDING, K), 99, device=DEVICE)
    ids = put(np.concatenate([misses.ids_TK, np.zeros((PADDING, K), np.int64)]), torch.int64)
    weight = put(np.concatenate([misses.weight_TK, np.ones((PADDING, K), np.float32)]), torch.float32)
    at_E = put(np.where(misses.resident_E, 64, -1), torch.int64)
    records = own and (put(own.has_LE[0], torch.uint8), put(own.loss_LE[0], torch.float32))
    resolve_on_device(0, ids, weight, at_E, records, terms, told)
    assert bool((told[1:, T:] == -1).all()), "padding is nobody's"
    behind = terms.lengths_LT[1].tolist()
    assert behind == ([0] * (T + PADDING) if terms.stalled_L[1] < 1 else terms.lengths_LT[0].tolist()), "tokens seen"
    left_T = terms.left_LT[0 if own is None else 1, :T]
    return told[:, :T].cpu(), int(terms.stalled_L[1]), left_T.cpu().numpy()


def test_it_decides_as_the_policy_or_leaves_it_to_the_host() -> None:
    seen = set[tuple[bool, bool]]()
    for seed in range(60):
        misses, own = case(seed)
        told, stalled, left_T = answered(misses, own)
        resolution, rows = Ladder(own).resolve(misses), misses.rows
        fetches = bool((resolution.action_TK == Action.FETCH).any())
        assert (stalled == 0) is fetches, f"case {seed}"
        hit_TK, own_TK = misses.resident_E[misses.ids_TK], resolution.action_TK == Action.OWN
        assert np.array_equal(told[0], misses.ids_TK)
        assert np.array_equal(told[1], np.where(hit_TK, misses.ids_TK, -1))
        assert np.array_equal(told[2], np.where(own_TK & (not fetches), misses.ids_TK, -1))
        spent_T = 0 if fetches else resolution.loss_TK.sum(axis=1)
        bounded_T = rows.mode_T == BOUNDED
        assert np.allclose(left_T[bounded_T], (rows.allowance_T - spent_T)[bounded_T])
        seen.add((fetches, bool(own_TK.any())))
    assert seen == {(True, True), (True, False), (False, True), (False, False)}


@pytest.mark.parametrize("stands_in", [True, False])
def test_behind_a_layer_that_stalled_nothing_runs_and_nothing_is_charged(stands_in: bool) -> None:
    misses, own = next((m, o) for seed in range(60) for m, o in [case(seed)] if answered(m, o)[1] == 1)
    told, stalled, left_T = answered(misses, own if stands_in else None, stalled=-1)
    assert stalled == -1 and bool((told[1:] == -1).all()) and np.array_equal(left_T, misses.rows.allowance_T)


def test_without_records_every_miss_stalls() -> None:
    for seed in range(8):
        misses, _ = case(seed)
        assert (answered(misses, None)[1] == 0) is bool(~misses.resident_E[misses.ids_TK].all())
