"""What became of the expert uses of one decode pass, per row: hits, peers, fetches, stand-ins and their charge.

Counts only. Knows neither requests nor the model.

Legend: T rows of the pass, K slots of a token, E experts, S kinds of stand-in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from buddymoe_ray.policy import Action, Resolution

__all__ = ["STANDIN_KINDS", "StepOutcome", "Substitution", "standin_kind"]

STANDIN_KINDS = ("lowbit", "lowrank", "buddy", "mean", "drop")
"""Columns of `StepOutcome.standins_TS`, and the fields of `types.StandinUses`."""

_BUDDY, _DROP = STANDIN_KINDS.index("buddy"), STANDIN_KINDS.index("drop")


def standin_kind(name: str) -> str:
    """The kind that a record's full name counts as: `lowbit3` is a `lowbit`."""
    return name.rstrip("0123456789")


@dataclass(frozen=True, slots=True, kw_only=True)
class Substitution:
    """One use that a stand-in answered: `expert` is whose weights or record ran, `kind` the stand-in's full name."""

    row: int
    layer: int
    slot: int
    action: int
    expert: int
    weight: float
    kind: str


@dataclass(kw_only=True)
class StepOutcome:
    """Sums over the layers of a pass. `harm_T` is in nats; `substitutions` are those of the rows in `record`."""

    hits_T: Tensor
    peer_T: Tensor
    fetched_T: Tensor
    standins_TS: Tensor
    harm_T: Tensor
    record: frozenset[int] = frozenset()
    substitutions: list[Substitution] = field(default_factory=list)

    @classmethod
    def empty(cls, rows: int, record: frozenset[int] = frozenset()) -> StepOutcome:
        """Nothing counted yet."""
        return cls(
            hits_T=torch.zeros(rows, dtype=torch.int64),
            peer_T=torch.zeros(rows, dtype=torch.int64),
            fetched_T=torch.zeros(rows, dtype=torch.int64),
            standins_TS=torch.zeros(rows, len(STANDIN_KINDS), dtype=torch.int64),
            harm_T=torch.zeros(rows, dtype=torch.float32),
            record=record,
        )

    @classmethod
    def joined(cls, outcomes: Sequence[StepOutcome]) -> StepOutcome:
        """Outcomes of passes of one row each, as one outcome of as many rows."""
        return cls(
            hits_T=torch.cat([o.hits_T for o in outcomes]),
            peer_T=torch.cat([o.peer_T for o in outcomes]),
            fetched_T=torch.cat([o.fetched_T for o in outcomes]),
            standins_TS=torch.cat([o.standins_TS for o in outcomes]),
            harm_T=torch.cat([o.harm_T for o in outcomes]),
            substitutions=[replace(s, row=row) for row, o in enumerate(outcomes) for s in o.substitutions],
        )

    def count_exact(self, hit_TK: Tensor) -> None:
        """Add a layer that stood in for nothing; `hit_TK` is True where the expert was resident at its begin."""
        hits_T = hit_TK.sum(dim=1)
        self.hits_T += hits_T
        self.fetched_T += hit_TK.shape[1] - hits_T

    def count_peer(self, uses_T: Tensor) -> None:
        """Say that `uses_T` (int64) of each row's fetched uses were computed exactly by another worker instead."""
        uses_T = uses_T.cpu()
        fits = bool(((uses_T >= 0) & (uses_T <= self.fetched_T)).all())
        assert fits, f"peer uses are {uses_T.tolist()}, must be at most the fetched {self.fetched_T.tolist()}"
        self.peer_T += uses_T
        self.fetched_T -= uses_T

    def count(self, layer: int, resolution: Resolution, own_column_E: Tensor, kind_of_E: Sequence[str]) -> Tensor:
        """Add a layer's resolution; returns the harm of each row.

        Args:
            own_column_E: column of `standins_TS` that each expert's own record counts in.
            kind_of_E: full name of the kind of each expert's own record.
        """
        action_TK = resolution.action_TK.cpu()
        self.hits_T += (action_TK == Action.HIT).sum(dim=1)
        self.fetched_T += (action_TK == Action.FETCH).sum(dim=1)
        stood_in_TK = action_TK >= Action.OWN
        harm_T = resolution.harm_TK.sum(dim=1).cpu()
        self.harm_T += harm_T
        column_TK = own_column_E[resolution.expert_TK.cpu()]
        column_TK = torch.where(action_TK == Action.BUDDY, _BUDDY, column_TK)
        column_TK = torch.where(action_TK == Action.DROP, _DROP, column_TK)
        self.standins_TS.scatter_add_(1, column_TK, stood_in_TK.long())
        if self.record:
            self._keep(layer, resolution, stood_in_TK, kind_of_E)
        return harm_T

    def _keep(self, layer: int, resolution: Resolution, stood_in_TK: Tensor, kind_of_E: Sequence[str]) -> None:
        for row, slot in stood_in_TK.nonzero().tolist():
            if row in self.record:
                action, expert = int(resolution.action_TK[row, slot]), int(resolution.expert_TK[row, slot])
                kind = {Action.BUDDY: "buddy", Action.DROP: "drop"}.get(Action(action)) or kind_of_E[expert]
                weight = float(resolution.weight_TK[row, slot])
                self.substitutions.append(
                    Substitution(
                        row=row, layer=layer, slot=slot, action=action, expert=expert, weight=weight, kind=kind
                    )
                )
