"""A decode step that a device began before the host knew the tokens of the one before: it read them where they were
chosen.

Once the host has caught up, the step it wants is compared with this one. Rows that ended meanwhile, at an end token or
cancelled, are left out, and their token is dropped. Where anything else differs, a layer stalled, or a row cannot pay
for what records answered, all of it was in vain: nothing was booked, and what it wrote are keys and values of positions
that the step, computed again, writes again, in blocks that were its rows' own.

Legend: B rows, L MoE layers, K slots, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Rows
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from buddymoe_ray.device import upload
from buddymoe_ray.engine.attention import ChunkRows
from buddymoe_ray.engine.sequence import Sequence
from buddymoe_ray.policy import RowBudgets

__all__ = ["AHEAD", "Chosen", "StepInFlight", "budgets_of", "chooses_alone", "rows_behind"]

AHEAD = Counter[str]()
"""In this process: steps `begun` ahead of the host, those `taken`, and `waits`, of the host for the device while that
had nothing to do next."""

Chosen = Mapping[Sequence, tuple[int, int]]
"""Tokens that a device chose for sequences: position and id."""


@dataclass(frozen=True, kw_only=True)
class StepInFlight:
    """`stalled` is the first layer that did, L for none. `arrive` waits for the step's tokens `[B]`, and, unless all
    experts are there for good, for `stalled` and what was told of its accesses, `[L, 3, T, K]` and `[L, T, K]`."""

    rows: tuple[ChunkRows, ...]
    budgets: RowBudgets | None
    logits_BV: Tensor
    tokens_B: Tensor
    stalled: Tensor
    arrive: Callable[[], list[Tensor]]

    def find(self, rows: Rows[ChunkRows], ids: Rows[int], budgets: RowBudgets | None, known: Chosen) -> list[int]:
        """Which of its rows these are; none where it is not the step that is wanted."""
        place_of = {row.owner: place for place, row in enumerate(self.rows)}
        at = [place_of.get(row.owner, -1) for row in rows]
        if min(at) < 0 or (budgets is None) != (self.budgets is None):
            return []
        for place, row, token in zip(at, rows, ids, strict=True):
            owner = row.owner
            assert isinstance(owner, Sequence), "rows that are begun ahead are sequences'"
            if self.rows[place].blocks != row.blocks or known.get(owner) != (row.start, token):
                return []
        if budgets is not None and self.budgets is not None and (self.budgets.mode_T[at] != budgets.mode_T).any():
            return []
        return at

    def logits(self, at: list[int]) -> Tensor:
        """Of some of its rows."""
        if at == list(range(len(self.rows))):
            return self.logits_BV
        return self.logits_BV.index_select(0, upload(torch.tensor(at), self.logits_BV.device))


def chooses_alone(rows: Rows[ChunkRows]) -> list[Sequence]:
    """Whose rows these are, where logits and settings alone say which tokens come next; none where the host must."""
    owners = [row.owner for row in rows if isinstance(row.owner, Sequence) and row.owner.unruled]
    return owners if len(owners) == len(rows) else []


def rows_behind(rows: Rows[ChunkRows], block_size: int) -> dict[int, ChunkRows]:
    """The rows of the next step by those that they follow: of sequences that have another token after that. None where
    one has no block for it."""
    found = dict[int, ChunkRows]()
    for place, row in enumerate(rows):
        owner = row.owner
        if isinstance(owner, Sequence) and owner.num_output + 1 < owner.max_tokens:
            found[place] = replace(row, row=len(found), start=row.start + 1)
    return found if all(row.end <= len(row.blocks) * block_size for row in found.values()) else {}


def budgets_of(budgets: RowBudgets | None, places: list[int]) -> RowBudgets | None:
    """Of some of the rows."""
    if budgets is None:
        return None
    return RowBudgets(
        mode_T=budgets.mode_T[places], allowance_T=budgets.allowance_T[places], price_T=budgets.price_T[places]
    )
