"""Misses to resolve, drawn at random from coarse grids, so that sums are exact in any order and ties do happen.

Legend: T rows, K slots, E experts, L layers, H candidates.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from buddymoe_ray.policy import Misses, RowBudgets

INF = float("inf")
LAYERS = 3


def budgets(modes: list[int], *, allowance: float | list[float] = 0.0, price: float = INF) -> RowBudgets:
    """Row budgets as the engine makes them: exact rows have nothing, fast rows all."""
    given = allowance if isinstance(allowance, list) else [allowance] * len(modes)
    return RowBudgets(
        mode_T=torch.tensor(modes, dtype=torch.int8),
        allowance_T=torch.tensor([(0.0, a, INF)[m] for m, a in zip(modes, given, strict=True)]),
        price_T=torch.tensor([(0.0, price, INF)[m] for m in modes]),
    )


def miss(
    ids: list[list[int]], weights: list[list[float]], resident: list[int], rows: RowBudgets, *, E: int = 8
) -> Misses:
    """A case written by hand, in layer 1."""
    resident_E = torch.zeros(E, dtype=torch.bool)
    resident_E[resident] = True
    ids_TK = torch.tensor(ids)
    return Misses(
        layer=1, ids_TK=ids_TK, weight_TK=torch.tensor(weights), resident_E=resident_E, score_TE=None, rows=rows
    )


class Dice:
    """Random tables of one seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def grid(self, *shape: int, steps: int = 64, low: int = 0) -> Tensor:
        """Multiples of 1/steps from low/steps to 1."""
        return torch.randint(low, steps + 1, shape, generator=self.generator).float() / steps

    def coin(self, *shape: int, share: float = 0.5) -> Tensor:
        return torch.rand(shape, generator=self.generator) < share

    def distinct(self, rows: int, count: int, most: int) -> Tensor:
        """`[rows, count]` numbers below `most`, no two alike in a row."""
        return torch.rand(rows, most, generator=self.generator).argsort(dim=1)[:, :count]

    def ranks(self, E: int, H: int) -> Tensor:
        """Candidate tables `[LAYERS, E, H]`: others in random order, -1 from a random place on."""
        rank_LEH = torch.rand(LAYERS, E, E, generator=self.generator)
        rank_LEH[:, torch.arange(E), torch.arange(E)] = 2.0  # itself comes last, and is cut off
        rank_LEH = rank_LEH.argsort(dim=2)[..., : min(H, E - 1)]
        length_LE1 = torch.randint(0, rank_LEH.shape[2] + 1, (LAYERS, E, 1), generator=self.generator)
        return rank_LEH.where(torch.arange(rank_LEH.shape[2]) < length_LE1, -1)

    def misses(self, T: int, K: int, E: int, *, modes: tuple[int, ...] = (0, 1, 2), resident: float = 0.5) -> Misses:
        pick_T = torch.randint(0, len(modes), (T,), generator=self.generator)
        mode_T = torch.tensor(modes, dtype=torch.int8)[pick_T]
        allowance_T, price_T = self.grid(T) * 2, self.grid(T)
        score_TE = self.grid(T, E)
        score_TE[torch.arange(T), torch.randint(0, E, (T,), generator=self.generator)] = 1.0
        return Misses(
            layer=int(torch.randint(0, LAYERS, (1,), generator=self.generator)),
            ids_TK=self.distinct(T, K, E),
            weight_TK=self.grid(T, K, low=1),
            resident_E=self.coin(E, share=resident),
            score_TE=score_TE,
            rows=RowBudgets(
                mode_T=mode_T,
                allowance_T=torch.where(mode_T == 2, INF, torch.where(mode_T == 1, allowance_T, 0.0)),
                price_T=torch.where(mode_T == 2, INF, torch.where(mode_T == 1, price_T, 0.0)),
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
