"""What became of the expert uses of one decode pass, per row: hits, peers, fetches, stand-ins and their charge.

Counts only. Knows neither requests nor the model.

Legend: T rows of the pass, K slots of a token, E experts, S kinds of stand-in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from buddymoe_ray.policy import Action, Resolution

__all__ = ["STANDIN_KINDS", "StepOutcome", "Substitution", "standin_kind"]

STANDIN_KINDS = ("lowbit", "lowrank", "buddy", "mean", "drop")
"""Columns of `StepOutcome.standins_TS`, and the fields of `types.StandinUses`."""

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

# what a use counts as: a hit, a fetch, then STANDIN_KINDS; OWN is looked up by the expert's record
_COLUMN_OF = np.array([0, 1, -1, 2 + STANDIN_KINDS.index("buddy"), 2 + STANDIN_KINDS.index("drop")])


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

    hits_T: Ints
    peer_T: Ints
    fetched_T: Ints
    standins_TS: Ints
    harm_T: Floats
    record: frozenset[int] = frozenset()
    substitutions: list[Substitution] = field(default_factory=list)

    @classmethod
    def empty(cls, rows: int, record: frozenset[int] = frozenset()) -> StepOutcome:
        """Nothing counted yet."""
        return cls(
            hits_T=np.zeros(rows, np.int64),
            peer_T=np.zeros(rows, np.int64),
            fetched_T=np.zeros(rows, np.int64),
            standins_TS=np.zeros((rows, len(STANDIN_KINDS)), np.int64),
            harm_T=np.zeros(rows, np.float32),
            record=record,
        )

    @classmethod
    def joined(cls, outcomes: Sequence[StepOutcome]) -> StepOutcome:
        """Outcomes of passes of one row each, as one outcome of as many rows."""
        return cls(
            hits_T=np.concatenate([o.hits_T for o in outcomes]),
            peer_T=np.concatenate([o.peer_T for o in outcomes]),
            fetched_T=np.concatenate([o.fetched_T for o in outcomes]),
            standins_TS=np.concatenate([o.standins_TS for o in outcomes]),
            harm_T=np.concatenate([o.harm_T for o in outcomes]),
            substitutions=[replace(s, row=row) for row, o in enumerate(outcomes) for s in o.substitutions],
        )

    def count_exact(self, hit_TK: npt.NDArray[np.bool_]) -> None:
        """Add a layer that stood in for nothing; `hit_TK` is True where the expert was resident at its begin."""
        hits_T = hit_TK.sum(axis=1)
        self.hits_T += hits_T
        self.fetched_T += hit_TK.shape[1] - hits_T

    def count_peer(self, uses_T: Ints) -> None:
        """Say that `uses_T` of each row's fetched uses were computed exactly by another worker instead."""
        fits = ((uses_T >= 0) & (uses_T <= self.fetched_T)).all()
        assert fits, f"peer uses are {uses_T.tolist()}, must be at most the fetched {self.fetched_T.tolist()}"
        self.peer_T += uses_T
        self.fetched_T -= uses_T

    def count(self, layer: int, resolution: Resolution, own_column_E: Ints, kind_of_E: Sequence[str]) -> Floats:
        """Add a layer's resolution; returns the harm of each row.

        Args:
            own_column_E: column of `standins_TS` that each expert's own record counts in.
            kind_of_E: full name of the kind of each expert's own record.
        """
        action_TK, T = resolution.action_TK, len(self.hits_T)
        own_TK = action_TK == Action.OWN
        column_TK = np.where(own_TK, own_column_E[resolution.expert_TK] + 2, _COLUMN_OF[action_TK])
        columns = 2 + len(STANDIN_KINDS)
        uses_TC = np.bincount((column_TK + columns * np.arange(T)[:, None]).ravel(), minlength=columns * T)
        uses_TC = uses_TC.reshape(T, columns)
        self.hits_T += uses_TC[:, 0]
        self.fetched_T += uses_TC[:, 1]
        self.standins_TS += uses_TC[:, 2:]
        harm_T: Floats = resolution.harm_TK.sum(axis=1)
        self.harm_T += harm_T
        if self.record:
            self._keep(layer, resolution, kind_of_E)
        return harm_T

    def _keep(self, layer: int, resolution: Resolution, kind_of_E: Sequence[str]) -> None:
        for row, slot in np.argwhere(resolution.action_TK >= Action.OWN).tolist():
            if row in self.record:
                action, expert = int(resolution.action_TK[row, slot]), int(resolution.expert_TK[row, slot])
                kind = {Action.BUDDY: "buddy", Action.DROP: "drop"}.get(Action(action)) or kind_of_E[expert]
                weight = float(resolution.weight_TK[row, slot])
                self.substitutions.append(
                    Substitution(
                        row=row, layer=layer, slot=slot, action=action, expert=expert, weight=weight, kind=kind
                    )
                )
