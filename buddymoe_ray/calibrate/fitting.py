"""Makes stand-in records and measures their output error, expert by expert.

Each kind is fitted on four fifths of an expert's rows and its error taken on the rest: on as many of them as it takes
to know it to a fifth. On builtin:tiny the widths chosen by errors so known lose at most .4 % more (expected) than those
chosen by errors on all rows, at 15, 25 and 50 % of memory; to a tenth .6 %, in twice the time. Does not know budgets,
losses or files.

Legend: R rows of one expert, n some of them, D hidden, B bytes of a record.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

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
    lowbit_forward,
    lowrank_forward,
    mean_forward,
    record_tensors,
)
from buddymoe_ray.types import SlotTensor

__all__ = ["Fitting", "RecordMaker", "energy_of", "error_of", "record_bytes", "record_views"]

_PASSES, _REFITTED_INPUTS = 2, 512
"""Of refitting after the error feedback, where matrices have at most so many inputs: larger ones take six times as long
for 2 to 5 % less divergence."""
_MAP_ROWS = 1024
"""Most rows that a low-rank map or a mean is fitted on: more of them cost more than they bring."""
_KNOWN, _LEAST_ROWS = 0.2, 128
"""Standard error, as a share, at which an error is known, and rows that it takes at least."""


@dataclass(frozen=True, kw_only=True)
class Fitting:
    """How records are fitted: `compensated` chooses error-compensated over plain rounding, for the worst experts first
    and as far as `minutes` of the `clock` allow; `rank` is that of a low-rank map, `fitted_on` names the text.
    """

    compensated: bool = True
    minutes: float = math.inf
    clock: Callable[[], float] = time.monotonic
    rank: int = 8
    fitted_on: str = ""


@dataclass(frozen=True, kw_only=True)
class RecordMaker:
    """Makes records of one kind: a `lowbit`, as `LowbitFormat.of_kind` has them, `lowrank` or `mean`."""

    kind: str
    math: ExpertMath
    fitting: Fitting = Fitting()

    @property
    def first(self) -> RecordMaker:
        """What makes the records that this one improves, or itself."""
        if self._plain or not self.kind.startswith("lowbit"):
            return self
        return replace(self, fitting=replace(self.fitting, compensated=False))

    @property
    def recipe(self) -> str:
        """How records are made and from what: files made otherwise are made again, not resumed."""
        if self._plain:
            return "plain, unbiased"  # needs no text
        how = "mean"
        if self.kind.startswith("lowbit"):
            how = f"compensated for {self.fitting.minutes:g} minutes, unbiased"
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
        if self._plain:
            return quantise_expert_plain(sample.weights, self._format, plain_math(self.math), sample.packed)
        if self.kind.startswith("lowbit"):
            inputs = max(weight.shape[-1] for weight in sample.weights.values())
            return quantise_expert(
                sample.rounded_for, self._format, passes=_PASSES if inputs <= _REFITTED_INPUTS else 0
            )
        rows_R = sample.fitted(_MAP_ROWS)
        x_RD, weight_R = sample.inputs(rows_R), sample.weight_R[rows_R]
        rank = self.fitting.rank if self.kind == "lowrank" else 0
        made = fit_lowrank(x_RD, sample.answers(x_RD), weight_R, rank)
        return made if self.kind == "lowrank" else {"bias": made["bias"]}

    def answer(self, x_nD: Tensor, record: Mapping[str, Tensor]) -> Tensor:
        """What the record answers where it serves, `[n, D]`."""
        if self.kind == "lowrank":
            return lowrank_forward(x_nD, record)
        if self.kind == "mean":
            return mean_forward(x_nD, record)
        return lowbit_forward(x_nD, record, self._format, plain_math(self.math))

    @property
    def _plain(self) -> bool:
        """8 bits err so little that compensation gains nothing that can be measured."""
        return self.kind.startswith("lowbit") and (not self.fitting.compensated or self._format.bits >= 8)

    @property
    def _format(self) -> LowbitFormat:
        return LowbitFormat.of_kind(self.kind)


def error_of(maker: RecordMaker, sample: ExpertSample, record: Mapping[str, Tensor]) -> float:
    """Mean squared norm of the record's output error on rows it was not fitted on, weighted by their squared slot
    weight; inputs are of the dtype that is computed in."""
    dtype = sample.hidden_TD.dtype
    return _mean_square(sample, lambda x_nD, y_nD: maker.answer(x_nD.to(dtype), record).float() - y_nD)


def energy_of(sample: ExpertSample) -> float:
    """Mean squared norm of the expert's output: the error of dropping it."""
    return _mean_square(sample, lambda _, y_nD: y_nD)


def _mean_square(sample: ExpertSample, value: Callable[[Tensor, Tensor], Tensor]) -> float:
    """The weighted mean over held rows of |value(x, y)|^2, from as many blocks of them as it takes to know it."""
    squares, shares = list[Tensor](), list[Tensor]()
    mean = 0.0
    for x_nD, y_nD, weight_n in sample.held():
        squares.append(value(x_nD, y_nD).double().square().sum(dim=1))
        shares.append(weight_n.double().square())
        square_n, share_n = torch.cat(squares), torch.cat(shares)
        total = share_n.sum().clamp_min(1e-300)
        mean = float((square_n * share_n).sum() / total)
        error = float(((square_n - mean) * share_n).norm() / total)  # of a ratio of sums
        if len(square_n) >= _LEAST_ROWS and error <= _KNOWN * mean:
            break
    return mean


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
