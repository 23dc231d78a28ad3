"""What became of the expert accesses of one decode pass, per row: hits, fetches, others' answers, stand-ins.

Counts only. Knows neither requests nor the model.

Legend: T rows of the pass, K slots of a token, E experts, S kinds of stand-in, A kinds of answer: hit, fetch, peer,
host, then those of stand-ins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from buddymoe_ray.policy import Action, Resolution

__all__ = ["ANSWER_STANDINS", "STANDIN_KINDS", "StepOutcome", "Substitution"]

STANDIN_KINDS = ("lowbit", "lowrank", "buddy", "mean", "drop")
"""Columns of `StepOutcome.standins_TS`, and the fields of `types.StandinUses`."""

_HIT, _FETCH, _PEER, _HOST, ANSWER_STANDINS = 0, 1, 2, 3, 4
_ANSWERS = ANSWER_STANDINS + len(STANDIN_KINDS)

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

# what an action counts as, by `Action`; OWN is looked up by the expert's record
_BUDDY, _DROP = (ANSWER_STANDINS + STANDIN_KINDS.index(kind) for kind in ("buddy", "drop"))
_ANSWER_OF = np.array([_HIT, _FETCH, -1, _BUDDY, _DROP])


@dataclass(frozen=True, slots=True, kw_only=True)
class Substitution:
    """One access that a stand-in answered: `expert` is whose weights or record ran, `kind` the stand-in's full name."""

    layer: int
    slot: int
    action: int
    expert: int
    weight: float
    kind: str


@dataclass(kw_only=True)
class StepOutcome:
    """Sums over the layers of a pass. `loss_T` is in nats; `substitutions` has those of the rows in `record`."""

    accesses_TA: Ints
    loss_T: Floats
    record: frozenset[int] = frozenset()
    substitutions: dict[int, list[Substitution]] = field(default_factory=dict)

    @classmethod
    def empty(cls, rows: int, record: frozenset[int] = frozenset()) -> StepOutcome:
        """Nothing counted yet."""
        return cls(accesses_TA=np.zeros((rows, _ANSWERS), np.int64), loss_T=np.zeros(rows, np.float32), record=record)

    @property
    def hits_T(self) -> Ints:
        """Accesses that the resident expert answered; a view, like the next four."""
        return self.accesses_TA[:, _HIT]

    @property
    def fetched_T(self) -> Ints:
        """Accesses that waited for the expert's bytes."""
        return self.accesses_TA[:, _FETCH]

    @property
    def peer_T(self) -> Ints:
        """Accesses that another worker computed."""
        return self.accesses_TA[:, _PEER]

    @property
    def host_T(self) -> Ints:
        """Accesses that the host's CPU computed for a GPU."""
        return self.accesses_TA[:, _HOST]

    @property
    def standins_TS(self) -> Ints:
        """Accesses that stand-ins answered, by STANDIN_KINDS."""
        return self.accesses_TA[:, ANSWER_STANDINS:]

    def count_exact(self, hit_TK: npt.NDArray[np.bool_]) -> None:
        """Add a layer that stood in for nothing; `hit_TK` is True where the expert was resident at its begin."""
        hits_T = hit_TK.sum(axis=1)
        self.accesses_TA[:, _HIT] += hits_T
        self.accesses_TA[:, _FETCH] += hit_TK.shape[1] - hits_T

    def count_hits(self, per_row: int) -> None:
        """Add a layer whose every access was resident."""
        self.accesses_TA[:, _HIT] += per_row

    def count_elsewhere(self, accesses_T: Ints, *, exact: bool) -> None:
        """Say that `accesses_T` of each row's fetched accesses were computed by another worker instead, or, where not
        `exact`, by the host."""
        fits = ((accesses_T >= 0) & (accesses_T <= self.fetched_T)).all()
        assert fits, f"accesses are {accesses_T.tolist()}, must be at most the fetched {self.fetched_T.tolist()}"
        self.accesses_TA[:, _PEER if exact else _HOST] += accesses_T
        self.accesses_TA[:, _FETCH] -= accesses_T

    def count(self, layer: int, resolution: Resolution, own_column_E: Ints, kind_of_E: Sequence[str]) -> Floats:
        """Add a layer's resolution; returns the expected loss of each row.

        Args:
            own_column_E: column of `standins_TS` that each expert's own record counts in.
            kind_of_E: full name of the kind of each expert's own record.
        """
        answer_TK = _ANSWER_OF[resolution.action_TK]
        if answer_TK.min() < 0:
            answer_TK = np.where(answer_TK < 0, own_column_E[resolution.expert_TK] + ANSWER_STANDINS, answer_TK)
        if self.record:
            self._keep(layer, resolution, kind_of_E)
        return self.add(answer_TK, resolution.loss_TK)

    def add(self, answer_TK: Ints, loss_TK: Floats) -> Floats:
        """Add a layer whose accesses were answered by columns of `accesses_TA`; returns the expected loss of each
        row."""
        T = len(self.accesses_TA)
        begin_T1 = _ANSWERS * np.arange(T)[:, None]  # of each row, in the table end to end
        counts = np.bincount((answer_TK + begin_T1).ravel(), minlength=T * _ANSWERS)
        self.accesses_TA += counts.reshape(T, _ANSWERS)
        loss_T: Floats = loss_TK.sum(axis=1)
        self.loss_T += loss_T
        return loss_T

    def _keep(self, layer: int, resolution: Resolution, kind_of_E: Sequence[str]) -> None:
        for row, slot in np.argwhere(resolution.action_TK >= Action.OWN).tolist():
            if row in self.record:
                action, expert = int(resolution.action_TK[row, slot]), int(resolution.expert_TK[row, slot])
                kind = {Action.BUDDY: "buddy", Action.DROP: "drop"}.get(Action(action)) or kind_of_E[expert]
                weight = float(resolution.weight_TK[row, slot])
                self.substitutions.setdefault(row, []).append(
                    Substitution(layer=layer, slot=slot, action=action, expert=expert, weight=weight, kind=kind)
                )
