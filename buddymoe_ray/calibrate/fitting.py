"""Makes stand-in records and measures their output error, layer by layer, expert by expert.

Each kind is fitted on four fifths of an expert's rows and its error taken on the rest. Resumable: a finished layer's
files are kept and only measured again. Does not know budgets or losses.

Legend: R rows of one expert, D hidden, L layers, E experts, B bytes of a record.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from buddymoe_ray.calibrate.lowrank import fit_lowrank
from buddymoe_ray.calibrate.rounding import quantise_expert, quantise_expert_plain
from buddymoe_ray.calibrate.samples import ExpertSample, plain_math
from buddymoe_ray.kernels import (
    ExpertMath,
    LowbitFormat,
    dequantise,
    expert_forward,
    lowrank_forward,
    mean_forward,
    packed_parts,
    record_tensors,
)
from buddymoe_ray.types import SlotTensor

__all__ = [
    "ENOUGH",
    "PASSES",
    "Fitting",
    "RecordMaker",
    "energy_of",
    "error_of",
    "fit_and_error",
    "record_bytes",
    "record_views",
]

PASSES = 2
"""Of refitting after the error feedback."""
ENOUGH = 20
"""Rows that the router must have sent an expert for its own error to mean something."""
_MOST_ERROR_ROWS = 512


@dataclass(frozen=True, kw_only=True)
class Fitting:
    """How records are fitted: `compensated` chooses error-compensated over plain rounding, `rank` is that of a low-rank
    map, `fitted_on` names the text.
    """

    compensated: bool = True
    rank: int = 8
    fitted_on: str = ""


@dataclass(frozen=True, kw_only=True)
class RecordMaker:
    """Makes records of one kind: `lowbit2`, `lowbit3`, `lowbit4`, `lowbit8`, `lowrank` or `mean`."""

    kind: str
    math: ExpertMath
    fitting: Fitting = Fitting()

    @property
    def recipe(self) -> str:
        """How records are made and from what: files made otherwise are made again, not resumed."""
        if self._plain:
            return "plain"  # needs no text
        how = "compensated" if self.kind.startswith("lowbit") else "mean"
        return f"{f'rank {self.fitting.rank}' if self.kind == 'lowrank' else how} on {self.fitting.fitted_on}"

    def layout(self, shapes: Mapping[str, tuple[int, ...]], hidden: int) -> tuple[tuple[SlotTensor, ...], int]:
        """Tensors of a record and its bytes. `shapes` are the expert's parameters, matrices `[out, in]`."""
        if self.kind.startswith("lowbit"):
            return record_tensors(shapes, self._format)
        named: dict[str, tuple[int, ...]] = {"bias": (hidden,)}
        if self.kind == "lowrank":
            named = {"down": (self.fitting.rank, hidden), "up": (hidden, self.fitting.rank), **named}
        return _plain_layout(named)

    def make(self, sample: ExpertSample) -> dict[str, Tensor]:
        """The record of one expert."""
        fit = _fitted_rows(sample)
        if self.kind.startswith("lowbit"):
            if self._plain:
                return quantise_expert_plain(sample.weights, self._format, plain_math(self.math))
            x_RD, weight_R = sample.x_RD[fit], sample.weight_R[fit]
            return quantise_expert(sample.weights, x_RD, weight_R, self._format, plain_math(self.math), passes=PASSES)
        made = fit_lowrank(
            sample.x_RD[fit], sample.y_RD[fit], sample.weight_R[fit], self.fitting.rank if self.kind == "lowrank" else 0
        )
        return made if self.kind == "lowrank" else {"bias": made["bias"]}

    def answer(self, sample: ExpertSample, record: Mapping[str, Tensor], rows: Tensor) -> Tensor:
        """What the record answers for some of the expert's rows, `[len(rows), D]`."""
        x_RD = sample.x_RD[rows]
        if self.kind == "lowrank":
            return lowrank_forward(x_RD, record)
        if self.kind == "mean":
            return mean_forward(x_RD, record)
        wide = {name: dequantised(record, name, self._format) for name in (self.math.first, "down_proj")}
        vectors = {name: t for name, t in sample.weights.items() if t.ndim == 1}
        return expert_forward(x_RD, wide | vectors, plain_math(self.math))

    @property
    def _plain(self) -> bool:
        """8 bits err so little that compensation gains nothing that can be measured."""
        return self.kind.startswith("lowbit") and (not self.fitting.compensated or self._format.bits >= 8)

    @property
    def _format(self) -> LowbitFormat:
        return LowbitFormat(bits=int(self.kind.removeprefix("lowbit")))


def dequantised(record: Mapping[str, Tensor], name: str, fmt: LowbitFormat) -> Tensor:
    """One matrix of a record as float32 `[out, in]`."""
    return dequantise(packed_parts(record, name), fmt)


def fit_and_error(maker: RecordMaker, sample: ExpertSample) -> tuple[dict[str, Tensor], float]:
    """A record and its mean squared output error on rows it was not fitted on, weighted as uses are."""
    record = maker.make(sample)
    return record, error_of(maker, sample, record)


def error_of(maker: RecordMaker, sample: ExpertSample, record: Mapping[str, Tensor]) -> float:
    """Mean squared norm of the record's output error, rows weighted by their squared slot weight."""
    rows = _held_rows(sample)
    missed_RD = maker.answer(sample, record, rows) - sample.y_RD[rows]
    return _weighted_mean(missed_RD, sample.weight_R[rows])


def energy_of(sample: ExpertSample) -> float:
    """Mean squared norm of the expert's output: the error of dropping it."""
    rows = _held_rows(sample)
    return _weighted_mean(sample.y_RD[rows], sample.weight_R[rows])


def record_bytes(record: Mapping[str, Tensor], layout: Sequence[SlotTensor], nbytes: int) -> npt.NDArray[np.uint8]:
    """The record as it lies in a pool: `[nbytes]` uint8."""
    made = torch.zeros(nbytes, dtype=torch.uint8)
    for tensor in layout:
        part = record[tensor.name].to(getattr(torch, tensor.dtype)).contiguous().view(torch.uint8).reshape(-1)
        assert len(part) == tensor.nbytes, f"{tensor.name} has {len(part)} bytes, must have {tensor.nbytes}"
        made[tensor.offset : tensor.offset + tensor.nbytes] = part
    return made.numpy()


def record_views(record_B: npt.NDArray[np.uint8], layout: Sequence[SlotTensor]) -> dict[str, Tensor]:
    """The tensors of a record's bytes, by name."""
    whole = torch.from_numpy(record_B)
    return {t.name: whole[t.offset : t.offset + t.nbytes].view(getattr(torch, t.dtype)).view(t.shape) for t in layout}


def _plain_layout(named: Mapping[str, tuple[int, ...]]) -> tuple[tuple[SlotTensor, ...], int]:
    """Tensors in bfloat16, each at a multiple of 64 bytes."""
    made, at = [], 0
    for name, shape in named.items():
        nbytes = 2 * int(np.prod(shape))
        made.append(SlotTensor(name=name, shape=shape, dtype="bfloat16", offset=at, nbytes=nbytes))
        at += -(-nbytes // 64) * 64
    return tuple(made), at


def _fitted_rows(sample: ExpertSample) -> Tensor:
    rows = torch.arange(len(sample.x_RD))
    held = (rows % 5 == 4) & (rows < sample.own) & (sample.own >= ENOUGH)
    return rows[~held]


def _held_rows(sample: ExpertSample) -> Tensor:
    """Every fifth row the router sent; with too few of those, all rows there are."""
    if sample.own < ENOUGH:
        return torch.arange(len(sample.x_RD))[-_MOST_ERROR_ROWS:]
    return torch.arange(4, sample.own, 5)[:_MOST_ERROR_ROWS]


def _weighted_mean(value_RD: Tensor, weight_R: Tensor) -> float:
    share_R = weight_R.double().square()
    return float((value_RD.double().square().sum(dim=1) * share_R).sum() / share_R.sum().clamp_min(1e-300))
