"""Misses to resolve, drawn at random from coarse grids, so that sums are exact in any order and ties do happen.

Legend: T rows, K slots, E experts, L layers, H candidates.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import strategies as st

from buddymoe_ray.policy import Misses, RowBudgets
from buddymoe_ray.policy.misses import Bools, Floats, Ints

INF = float("inf")
LAYERS = 3


def budgets(modes: list[int], *, allowance: float | list[float] = 0.0, price: float = INF) -> RowBudgets:
    """Row budgets as the engine makes them: exact rows have nothing, fast rows all."""
    given = allowance if isinstance(allowance, list) else [allowance] * len(modes)
    return RowBudgets(
        mode_T=np.array(modes, np.int8),
        allowance_T=floats([(0.0, a, INF)[m] for m, a in zip(modes, given, strict=True)]),
        price_T=floats([(0.0, price, INF)[m] for m in modes]),
    )


def floats(values: object) -> Floats:
    return np.array(values, np.float32)


def miss(
    ids: list[list[int]], weights: list[list[float]], resident: list[int], rows: RowBudgets, *, E: int = 8
) -> Misses:
    """A case written by hand, in layer 1."""
    resident_E = np.zeros(E, np.bool_)
    resident_E[resident] = True
    return Misses(
        layer=1, ids_TK=np.array(ids), weight_TK=floats(weights), resident_E=resident_E, score_TE=None, rows=rows
    )


class Dice:
    """Random tables of one seed."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def grid(self, *shape: int, steps: int = 64, low: int = 0) -> Floats:
        """Multiples of 1/steps from low/steps to 1."""
        return self.rng.integers(low, steps + 1, shape).astype(np.float32) / np.float32(steps)

    def coin(self, *shape: int, share: float = 0.5) -> Bools:
        return self.rng.random(shape) < share

    def distinct(self, rows: int, count: int, most: int) -> Ints:
        """`[rows, count]` numbers below `most`, no two alike in a row."""
        return self.rng.random((rows, most)).argsort(axis=1)[:, :count]

    def ranks(self, E: int, H: int) -> Ints:
        """Candidate tables `[LAYERS, E, H]`: others in random order, -1 from a random place on."""
        rank_LEH = self.rng.random((LAYERS, E, E))
        rank_LEH[:, np.arange(E), np.arange(E)] = 2.0  # itself comes last, and is cut off
        order_LEH = rank_LEH.argsort(axis=2)[..., : min(H, E - 1)]
        length_LE1 = self.rng.integers(0, order_LEH.shape[2] + 1, (LAYERS, E, 1))
        return np.where(np.arange(order_LEH.shape[2]) < length_LE1, order_LEH, -1)

    def misses(self, T: int, K: int, E: int, *, modes: tuple[int, ...] = (0, 1, 2), resident: float = 0.5) -> Misses:
        mode_T = np.array(modes, np.int8)[self.rng.integers(0, len(modes), T)]
        allowance_T, price_T = self.grid(T) * 2, self.grid(T)
        score_TE = self.grid(T, E)
        score_TE[np.arange(T), self.rng.integers(0, E, T)] = 1.0
        return Misses(
            layer=int(self.rng.integers(0, LAYERS)),
            ids_TK=self.distinct(T, K, E),
            weight_TK=self.grid(T, K, low=1),
            resident_E=self.coin(E, share=resident),
            score_TE=score_TE,
            rows=RowBudgets(
                mode_T=mode_T,
                allowance_T=np.where(mode_T == 2, INF, np.where(mode_T == 1, allowance_T, 0.0)).astype(np.float32),
                price_T=np.where(mode_T == 2, INF, np.where(mode_T == 1, price_T, 0.0)).astype(np.float32),
            ),
        )


@st.composite
def sizes(draw: st.DrawFn) -> tuple[int, int, int, int, float]:
    """`(seed, T, K, E, share of experts resident)`."""
    E = draw(st.integers(2, 20))
    share = draw(st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]))
    return draw(st.integers(0, 2**31)), draw(st.integers(1, 9)), draw(st.integers(1, min(E, 8))), E, share


def only_row(misses: Misses, row: int) -> Misses:
    """The same row, alone in its step."""
    one = slice(row, row + 1)
    rows = misses.rows
    return replace(
        misses,
        ids_TK=misses.ids_TK[one],
        weight_TK=misses.weight_TK[one],
        score_TE=None if misses.score_TE is None else misses.score_TE[one],
        rows=RowBudgets(mode_T=rows.mode_T[one], allowance_T=rows.allowance_T[one], price_T=rows.price_T[one]),
    )
