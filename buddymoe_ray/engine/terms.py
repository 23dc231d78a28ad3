"""From the requests of a decode step to the terms its pass is computed on.

Knows accounts and replays, not the model. Neighbours: the engine calls it around `Runner.decode`.

Legend: T rows (one per sequence), N recorded accesses.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows

import numpy as np

from buddymoe_ray.engine.sequence import Sequence
from buddymoe_ray.moe import Overlay, StepTerms
from buddymoe_ray.policy import RowBudgets
from buddymoe_ray.types import BOUNDED, EXACT, FAST

__all__ = ["terms_of"]

_MODES = {"exact": EXACT, "bounded": BOUNDED, "fast": FAST}


def terms_of(sequences: Rows[Sequence]) -> StepTerms:
    """What each sequence may spend in the coming step."""
    accounts = [seq.account for seq in sequences]
    overlays = _overlays(sequences)
    if not overlays and all(account.mode == "exact" for account in accounts):
        return StepTerms()
    budgets = RowBudgets(
        mode_T=np.array([_MODES[a.mode] for a in accounts], np.int8),
        allowance_T=np.array([a.allowance for a in accounts], np.float32),
        price_T=np.array([a.price for a in accounts], np.float32),
    )
    return StepTerms(
        budgets=budgets,
        record=frozenset(row for row, account in enumerate(accounts) if account.recorder is not None),
        overlays=overlays,
    )


def _overlays(sequences: Rows[Sequence]) -> dict[int, Overlay]:
    replayed = [
        (row, seq.replay[seq.account.steps]) for row, seq in enumerate(sequences) if seq.account.steps in seq.replay
    ]
    if not replayed:
        return {}
    row_N = np.repeat([row for row, _ in replayed], [len(accesses) for _, accesses in replayed])
    accesses_N = np.concatenate([accesses for _, accesses in replayed])
    return {
        layer: Overlay(
            row_N=row_N[mine_N],
            slot_N=accesses_N["slot"][mine_N].astype(np.int64),
            action_N=accesses_N["action"][mine_N].astype(np.int8),
            expert_N=accesses_N["expert"][mine_N].astype(np.int64),
            weight_N=accesses_N["weight"][mine_N],
        )
        for layer in np.unique(accesses_N["layer"]).tolist()
        for mine_N in [accesses_N["layer"] == layer]
    }
