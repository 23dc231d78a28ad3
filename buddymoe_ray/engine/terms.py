"""From the requests of a decode step to the terms its pass is computed on, and back to their accounts.

Knows accounts and replays, not the model. Neighbours: the engine calls it around `Runner.decode`.

Legend: T rows (one per sequence), N recorded uses.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows

import numpy as np

from buddymoe_ray.engine.sequence import Sequence
from buddymoe_ray.moe import Overlay, StepOutcome, StepTerms, Substitution
from buddymoe_ray.policy import RowBudgets

__all__ = ["settle", "terms_of"]

_MODES = {"exact": 0, "bounded": 1, "fast": 2}


def terms_of(sequences: Rows[Sequence]) -> StepTerms:
    """What each sequence may spend in the coming step; accrues the step's allowance."""
    accounts = [seq.account for seq in sequences]
    for account in accounts:
        account.accrue()
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
        record=frozenset(row for row, account in enumerate(accounts) if account.record),
        overlays=overlays,
    )


def settle(sequences: Rows[Sequence], outcome: StepOutcome) -> None:
    """Book what the step's expert uses came to."""
    hits, peer, fetched = outcome.hits_T.tolist(), outcome.peer_T.tolist(), outcome.fetched_T.tolist()
    harms, standins = outcome.harm_T.tolist(), outcome.standins_TS.tolist()
    for row, seq in enumerate(sequences):
        seq.account.settle(
            hits=hits[row],
            peer=peer[row],
            fetched=fetched[row],
            standins=standins[row],
            harm=harms[row],
            uses=[use for use in outcome.substitutions if use.row == row],
        )


def _overlays(sequences: Rows[Sequence]) -> dict[int, Overlay]:
    uses: dict[int, list[tuple[int, Substitution]]] = {}
    for row, seq in enumerate(sequences):
        for use in seq.replay.get(seq.account.steps, ()):
            uses.setdefault(use.layer, []).append((row, use))
    return {
        layer: Overlay(
            row_N=np.array([row for row, _ in named]),
            slot_N=np.array([use.slot for _, use in named]),
            action_N=np.array([use.action for _, use in named], np.int8),
            expert_N=np.array([use.expert for _, use in named]),
            weight_N=np.array([use.weight for _, use in named], np.float32),
        )
        for layer, named in uses.items()
    }
