"""One MoE layer of a decode step that a device records once: what it launches, and what the host does behind it.

On the device: who answers is resolved from the layer's table; hits and records run. Then a piece of the recording ends;
the next one begins with the sum. A layer that stalls is filled up by the host between the two: the block's own way of
what must be brought, in which nothing that ran runs again. Behind it, in that replay, no expert runs and nothing is
charged. Does not know requests nor the model. Neighbours: `engine.recorded` has the step.

Legend: L layers, T rows of the recording, K slots, D hidden, N = T*K accesses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from buddymoe_ray.kernels import RowTerms, resolve_on_device
from buddymoe_ray.moe.block import MoEBlock
from buddymoe_ray.moe.waves import OnDevice
from buddymoe_ray.policy import RowBudgets
from buddymoe_ray.types import BOUNDED

__all__ = ["DeviceTables", "RecordedLayer", "Told", "affordable"]

Ints = npt.NDArray[np.int64]
_MARGIN = 1 + 1e-4  # for sums of another order than the device's


@dataclass(kw_only=True)
class Told:
    """What the layers of a step share on the device: terms of the rows, `told_L3TK` as `resolve_on_device` has it,
    `weight_LTK` float32 as the router gave them. Outputs of accesses too: of one layer at a time, for behind one that
    stalled nothing is written."""

    rows: RowTerms
    told_L3TK: Tensor
    weight_LTK: Tensor
    outputs: dict[tuple[torch.dtype, int], Tensor] = field(default_factory=dict)

    def outputs_ND(self, hidden_TD: Tensor) -> Tensor:
        """Of so many accesses; numbers from the beginning, as rows of padding are never written."""
        key = (hidden_TD.dtype, hidden_TD.shape[1])
        if key not in self.outputs:
            self.outputs[key] = hidden_TD.new_zeros(self.weight_LTK[0].numel(), hidden_TD.shape[1])
        return self.outputs[key]


@dataclass(frozen=True, kw_only=True)
class DeviceTables:
    """A block's tables, made before anything is recorded: where experts are, and `records` as `Standins.tables`."""

    block: MoEBlock
    compute: OnDevice
    at_E: Tensor
    records: tuple[Tensor, Tensor] | None

    @classmethod
    def of(cls, block: MoEBlock, device: torch.device) -> DeviceTables | None:
        """None where something else computes the layer."""
        compute, glance = block.on_device, block.glance()
        if compute is None or glance is None:
            return None
        records = None if block.standins is None else block.standins.tables(block.layer)
        return cls(block=block, compute=compute, at_E=compute.table(glance.at_E, device), records=records)

    def renew(self) -> None:
        """What is launched from now on finds experts where they are by now."""
        glance = self.block.glance()
        assert glance is not None, "slots of a device apart can be looked at"
        self.compute.table(glance.at_E, self.at_E.device)


class RecordedLayer:
    """Launched once, in a pass that is being recorded; what it read stays where it is."""

    def __init__(
        self,
        tables: DeviceTables,
        told: Told,
        hidden_TD: Tensor,
        ids_TK: Tensor,
        weight_TK: Tensor,
        scores_TE: Tensor | None,
    ) -> None:
        layer = tables.block.layer
        self.block, self._hidden_TD, self._scores_TE = tables.block, hidden_TD, scores_TE
        self._y_ND, (_, hits_TK, own_TK) = told.outputs_ND(hidden_TD), told.told_L3TK[layer]
        weights_TK = told.weight_LTK[layer].copy_(weight_TK)
        resolve_on_device(layer, ids_TK, weights_TK, tables.at_E, tables.records, told.rows, told.told_L3TK[layer])
        tables.compute.kernels(hidden_TD, None, tables.at_E, hits_TK, self._y_ND)
        if tables.records is not None and self.block.standins is not None:
            self.block.standins.run(layer, hidden_TD, own_TK, self._y_ND)
        self._weight_TK = weight_TK.clone()

    def combined(self) -> Tensor:
        """The sum `[T, D]`, of the piece behind."""
        return self.block.combined(self._y_ND, self._weight_TK)

    def bring(self, ids_TK: Ints, scores: dict[int, Tensor]) -> None:
        """The layer stalled: have the host do what is left of it for these rows, and the sum be of all of it."""
        (T, K), layer = ids_TK.shape, self.block.layer
        if self._scores_TE is not None:
            scores[layer] = self._scores_TE[:T]
        weight_TK = self._weight_TK[:T]
        weight_TK.copy_(self.block.bring(self._hidden_TD[:T], ids_TK, weight_TK, self._y_ND[: T * K]))


def affordable(
    blocks: Sequence[MoEBlock], told_L3BK: Ints, weight_LBK: npt.NDArray[np.float32], budgets: RowBudgets | None
) -> bool:
    """Whether a step that did not stall would not have stalled with these `budgets` either, or this is not sure: then
    every access has the answer that it would have had. Modes are as they were."""
    own_LBK = told_L3BK[:, 2]
    if budgets is None or not (own_LBK[:, budgets.mode_T == BOUNDED] >= 0).any():
        return True
    spent_B, paid_B = np.zeros(own_LBK.shape[1]), np.ones(own_LBK.shape[1], np.bool_)
    for n, block in enumerate(blocks):
        if block.standins is not None and (own_LBK[n] >= 0).any():
            loss_BK = block.standins.taken(block.layer, told_L3BK[n, 0], own_LBK[n], weight_LBK[n]).loss_TK
            spent_B += loss_BK.sum(axis=1, dtype=np.float64)
            paid_B &= ((own_LBK[n] < 0) | (loss_BK <= budgets.price_T[:, None])).all(axis=1)
    paid_B &= spent_B * _MARGIN <= budgets.allowance_T
    return bool((paid_B | (budgets.mode_T != BOUNDED)).all())
