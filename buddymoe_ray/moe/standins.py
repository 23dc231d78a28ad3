"""Answers misses without waiting: asks the policy what to do with each, and computes with stand-in records.

Does not know budgets (the policy and the ledger do) nor where records come from. Invariant: a row that must be exact is
never answered by a stand-in, except where a replay says so.

Legend: T rows, K slots, N accesses (T*K), E experts, B bytes of all records, D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from buddymoe_ray.cache import StandinPool
from buddymoe_ray.device import upload
from buddymoe_ray.kernels import ExpertLayer, StandinRecords, TritonExperts
from buddymoe_ray.moe.outcome import ANSWER_STANDINS, STANDIN_KINDS
from buddymoe_ray.moe.standin_compute import RecordCompute
from buddymoe_ray.moe.step import Overlay, StepState
from buddymoe_ray.policy import Action, Ladder, Misses, MissPolicy, Reason, Resolution
from buddymoe_ray.types import ExpertKey

__all__ = ["Standins"]

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


class Standins:
    """What stands in on one engine.

    Args:
        policy: decides each miss.
        pool: records of the experts that have one.
        compute: arithmetic of each kind of record in the pool, by layer.
        experts_per_layer: E of each layer.
        layers: layers where stand-ins may answer; elsewhere every miss is fetched.
    """

    def __init__(
        self,
        *,
        policy: MissPolicy,
        pool: StandinPool,
        compute: Mapping[str, Sequence[RecordCompute]],
        experts_per_layer: tuple[int, ...],
        layers: frozenset[int],
    ) -> None:
        self.pool, self._policy, self._compute, self._layers = pool, policy, compute, layers
        self._kinds = [
            [pool.kind_of.get(ExpertKey(layer, e), "") for e in range(count)]
            for layer, count in enumerate(experts_per_layer)
        ]
        self._columns = [
            np.array([STANDIN_KINDS.index(k.rstrip("0123456789")) if k else 0 for k in row]) for row in self._kinds
        ]
        self._at = {
            kind: [
                torch.tensor(
                    [pool.offset_of[ExpertKey(la, e)] if k == kind else -1 for e, k in enumerate(row)],
                    device=pool.bytes.device,
                )
                for la, row in enumerate(self._kinds)
            ]
            for kind in compute
        }

    def resolve(self, layer: int, ids_TK: Ints, weight_TK: Tensor, resident_E: Bools, step: StepState) -> Resolution:
        """What is to answer each access of this layer."""
        assert step.budgets is not None, "resolve was called for an exact pass"
        score_TE = step.scores.get(layer)
        misses = Misses(
            layer=layer,
            ids_TK=ids_TK,
            weight_TK=weight_TK.float().cpu().numpy(),
            resident_E=resident_E,
            score_TE=None if score_TE is None else score_TE.cpu().numpy(),
            rows=step.budgets,
        )
        resolution = self._policy.resolve(misses)
        overlay = step.overlays.get(layer)
        if overlay is not None:
            resolution = _repeat(resolution, overlay)
        return resolution

    def book(self, layer: int, resolution: Resolution, step: StepState) -> None:
        """It will be done: count and charge it in `step`."""
        step.charge(step.outcome.count(layer, resolution, self._columns[layer], self._kinds[layer]))

    def loss_by_kind(self, layer: int, resolution: Resolution) -> dict[str, float]:
        """Expected loss of the accesses that each kind of record answers."""
        found: dict[str, float] = {}
        for expert, loss in zip(
            resolution.expert_TK.ravel().tolist(), resolution.loss_TK.ravel().tolist(), strict=True
        ):
            if loss:
                found[self._kinds[layer][expert]] = found.get(self._kinds[layer][expert], 0.0) + loss
        return found

    def records(self, layer: int) -> StandinRecords | None:
        """What answers for the layer's experts, where that is their own records alone and kernels know some of them."""
        own = self._policy.own if isinstance(self._policy, Ladder) else None
        computes = {kind: self._compute[kind][layer] for kind in self._compute}
        known = {kind: compute for kind, compute in computes.items() if isinstance(compute, ExpertLayer)}
        if own is None or not known or layer not in self._layers:
            return None
        numbers, has_E = {kind: number for number, kind in enumerate(known)}, own.has_LE[layer]
        kinds = [numbers.get(kind, -1) if has_E[e] else -1 for e, kind in enumerate(self._kinds[layer])]
        at_E = np.full(len(kinds), -1, np.int64)
        for kind in known:
            offset_E = self._at[kind][layer].numpy()
            at_E[offset_E >= 0] = offset_E[offset_E >= 0] + self.pool.bytes.data_ptr()
        return StandinRecords(
            computes=tuple(known.values()),
            kind_E=np.array(kinds, np.int64),
            at_E=at_E,
            loss_E=np.ascontiguousarray(own.loss_LE[layer], np.float32),
            column_E=self._columns[layer].astype(np.int64) + ANSWER_STANDINS,
        )

    def tables(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """Who has a record that kernels on its device know (uint8 `[E]`), and the expected loss of an access per
        squared router weight; None where others may answer too, or nobody does."""
        own = self._policy.own if isinstance(self._policy, Ladder) else None
        known = {kind for kind in self._compute if isinstance(self._compute[kind][layer], TritonExperts)}
        if own is None or not known or layer not in self._layers:
            return None
        can_E = own.has_LE[layer] & np.array([kind in known for kind in self._kinds[layer]])
        tables = (can_E.astype(np.uint8), own.loss_LE[layer].astype(np.float32))
        can_E, loss_E = (torch.from_numpy(table).to(self.pool.bytes.device) for table in tables)
        return can_E, loss_E

    def run(self, layer: int, x_TD: Tensor, own_TK: Tensor, out_ND: Tensor) -> None:
        """`answer` for whoever is named on the device."""
        for compute, at_LE in ((self._compute[kind], self._at[kind]) for kind in self._compute):
            if isinstance(compute[layer], TritonExperts):
                compute[layer](x_TD, self.pool.bytes, at_LE[layer], own_TK, out_ND)

    def taken(self, layer: int, ids_TK: Ints, own_TK: Ints, weight_TK: npt.NDArray[np.float32]) -> Resolution:
        """What `resolve` says where all that is missing is answered by experts' own records, those of `own_TK`."""
        own = self._policy.own if isinstance(self._policy, Ladder) else None
        assert own is not None, "records answered, must be by a policy of experts' own"
        taken_TK = own_TK >= 0
        loss_TK = np.where(taken_TK, np.square(weight_TK) * own.loss_LE[layer][ids_TK], np.float32(0))
        return Resolution(
            action_TK=np.where(taken_TK, np.int8(Action.OWN), np.int8(Action.HIT)),
            expert_TK=ids_TK,
            weight_TK=weight_TK,
            loss_TK=loss_TK,
            reason_TK=np.where(taken_TK, np.int8(Reason.SUBSTITUTED), np.int8(Reason.RESIDENT)),
        )

    def answer(self, layer: int, x_TD: Tensor, named_TK: Ints, out_ND: Tensor) -> None:
        """Fill the rows of `out_ND` that a record answers; `named_TK` is negative for all other accesses."""
        expert_TK = upload(torch.from_numpy(named_TK), x_TD.device)
        kinds = {self._kinds[layer][expert] for expert in named_TK.ravel().tolist() if expert >= 0}
        for kind in kinds & self._compute.keys():
            self._compute[kind][layer](x_TD, self.pool.bytes, self._at[kind][layer], expert_TK, out_ND)

    def covers(self, layer: int) -> bool:
        """Whether stand-ins answer in this layer."""
        return layer in self._layers

    def may_answer(self, layer: int, step: StepState) -> bool:
        """Whether any row of the pass may be answered by a stand-in in this layer."""
        return step.budgets is not None and (layer in self._layers or layer in step.overlays)


def _repeat(resolution: Resolution, overlay: Overlay) -> Resolution:
    """Force the recorded accesses upon a resolution; a replay is charged nothing, its expected loss was charged when
    recorded."""
    at = (overlay.row_N, overlay.slot_N)
    action_TK, expert_TK = resolution.action_TK.copy(), resolution.expert_TK.copy()
    weight_TK = resolution.weight_TK.copy()
    action_TK[at], expert_TK[at], weight_TK[at] = overlay.action_N, overlay.expert_N, overlay.weight_N
    assert int(action_TK.max()) <= Action.DROP, f"action is {int(action_TK.max())}, must be at most {Action.DROP}"
    return Resolution(
        action_TK=action_TK,
        expert_TK=expert_TK,
        weight_TK=weight_TK,
        loss_TK=resolution.loss_TK,
        reason_TK=resolution.reason_TK,
    )
