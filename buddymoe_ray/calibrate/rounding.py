"""Makes the low-bit record of one expert: both projections rounded, packed, ready for kernels.lowbit.

Does not know layers, corpora or files: an expert's weights, its inputs and their slot weights come in. Invariant: the
second projection is rounded for what the *rounded* first one feeds it.
Neighbours: kernels.rounding and rounding_compensated.py round a matrix.
Tried on builtin:tiny and left out (3 bits, thousandths of a nat of KL per token, 8.1 as it is): moments without
slot weights +3 %; inputs from already rounded layers -1 %; damping .001 / .05 -1 / -3 %; no corrected target +5 % (2
bits: +12 %); groups of 16 / 64 -21 / +10 %, less than the same bytes bring as wider codes for the worst experts.
Scales and codes of all copies together by Adam on KL(exact || copies), held-out text: 46 -> 33 where every expert is a
2-bit copy (240 steps, 170 CPU-seconds), but 21.4 -> 19.9 in the mix of 15 % of memory. Tuned in that mix 17.2 (250
steps; rise 2.5 -> 2.2 %), which gains nothing at 25 % (2.28 -> 2.33), where the same copies have others beside them.
Units of the ffn left out, those that answer least: the last 16 of 64 give 1 to 6 % of an expert's answers, the last 32
6 to 19 %, and what is left is rounded to undo it. 48 units of 2 / 3 bits err .4 to 1.1 times as much as all in 2 bits,
at the same bytes; beside copies of 1 / 2 and 2 / 3 bits they lower the expected loss of the mix at 15 % by 3 %. Copies
of 1 / 1 (1 %) and 1 / 3 bits (.5 %) bring as little. Who gets which width is chosen as an exact solver does: 28.8
thousandths of expected loss at 15 %, 4.1 at 25.
Scales of 4 bits with one series for all matrices (steps of 1/6 octave): plain copies of those whose groups differ more
project 18 % (2 bits) to 52 % (1 bit) wrongly, so the 16 scales are each matrix's own (geometric, .6 to 6 octaves).
Beside trellis codes of 1 to 3 bits they lower KL at 15 % of memory from 12.4 to 10.8, at 25 % from 2.23 to 2.01. Copies
of 1 / 3 and 3 / 3 bits too bring 10.5 and 2.06 (one sample), rises as before.
The half of the units that answer most (82 to 89 %) in 2 / 3 bits, the others in 1 / 2: 10 % less error than copies of
one width interpolated to the same bytes, where energies alone promise 24 to 37 %, for two records an expert.
Codes that choose alone in place of a trellis (`kernels.trellis`), the same bytes: copies of 1 / 2, 2 / 2, 2 / 3 and
3 / 4 bits answer held rows with 1.39, 1.57, 1.45 and 1.16 times the error; at 15 % of memory 1.87, not 1.29 %.
Plain copies of 1 / 2 bits err by a third to all of an expert's answers, compensated ones by 5 to 25 %.
Rows that count for an output of the first projection as far as it moves the answer (its slope through the activation):
a moment of every output's own leaves .88, .97, .92 of the error of copies of 1 / 2, 2 / 2, 2 / 3 bits on held rows, one
by the mean of them .95, 1.00, .98, four for clustered outputs .92, .97, .94. With the kinds as they are, KL at 15 % of
memory is .93 of 10.9, with int4 experts at half .96 of 16.8 (+- .01), at 25 % as before; with all measured and chosen
anew 10.6, 17.0 and 2.10 for 2.02, rises 1.10, 1.00 and .20 for 1.09, .93 and .12 %: not worth two to three times the
rounding. Rows weighted besides by how unsure the model is of the next token (1 - sum p^2): KL 4 to 5 % less, but the
rise .24 +- .09 % more at 15 %, .25 +- .10 % with int4 experts at half. The first projection again for what the rounded
second one errs: .95 of the error at 2 / 2 bits, nothing at 1 / 2 and 2 / 3. Copies scaled to project on their experts'
answers as those do on themselves (6 % at 1 / 2 bits): KL as before, rise .02 +- .02 % less at 15 %, .04 +- .02 at int4.

Legend: R rows routed to the expert, D hidden, F ffn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from buddymoe_ray.calibrate.rounding_compensated import Metric, moment, round_in, unbiased
from buddymoe_ray.kernels.lowbit import LowbitFormat, PackedMatrix, pack
from buddymoe_ray.kernels.reference import ExpertMath
from buddymoe_ray.kernels.rough_product import rough_product
from buddymoe_ray.kernels.rounding import Rounded, dequantise_rounded, round_plain
from buddymoe_ray.kernels.rounding_cpu import pack_plain

__all__ = [
    "ExpertRows",
    "Metric",
    "Rounded",
    "dequantise_rounded",
    "moment",
    "quantise_expert",
    "quantise_expert_plain",
    "round_in",
    "round_plain",
    "unbiased",
]

_EXACT_BITS = 8
"""So many err so little that compensation gains nothing that can be measured."""
FEW_ROWS = 8.0  # damping is multiplied by 1 + FEW_ROWS * inputs / rows


class ExpertRows:
    """What an expert is rounded for: inputs `x_RD` that the router sent it and their slot weights, whose squares are
    what an error of a row counts. What all widths need of them is made once. `damping` is of the moments where rows are
    many; it is more where they are few.

    `weights` are matrices `[out, in]` (transposed families untransposed) and biases, under the module's names.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        x_RD: Tensor,
        weight_R: Tensor,
        math: ExpertMath,
        *,
        damping: float = 0.01,
    ) -> None:
        self.weights, self.x_RD, self.weight_R, self.math = weights, x_RD.float(), weight_R, math
        more = damping * FEW_ROWS / _effective_rows(weight_R)  # what few rows say of K inputs is mostly chance
        self.damping_D = damping + more * x_RD.shape[1]
        self.damping_F = damping + more * weights["down_proj"].shape[1]
        self._firsts = dict[tuple[LowbitFormat, int], _First]()

    @cached_property
    def moment_DD(self) -> Tensor:
        """Of the inputs."""
        return moment(self.x_RD, self.weight_R)

    @cached_property
    def metric(self) -> Metric | None:
        """Of the first projection."""
        return Metric.of(self.moment_DD, damping=self.damping_D)

    @cached_property
    def exact_RF(self) -> Tensor:
        """What the exact first projection feeds the second."""
        return self.hidden(self.weights[self.math.first].float())

    def first(self, fmt: LowbitFormat, passes: int) -> _First:
        """The rounded first projection, once for all records that have it."""
        if (fmt, passes) not in self._firsts:
            weight = self.weights[self.math.first].float()
            rounded = unbiased(round_in(weight, self.metric, fmt, passes=passes), weight, self.moment_DD, fmt)
            hidden_RF = self.hidden(dequantise_rounded(rounded, fmt))
            H_FF = moment(hidden_RF, self.weight_R)
            self._firsts[fmt, passes] = _First(
                packed=pack(*rounded, fmt),
                H_FF=H_FF,
                metric=Metric.of(H_FF, damping=self.damping_F),
                target=_corrected(self, hidden_RF, H_FF),
            )
        return self._firsts[fmt, passes]

    def hidden(self, first: Tensor) -> Tensor:
        """What a first projection feeds the second."""
        bias = self.weights[f"{self.math.first}_bias"].float() if self.math.bias else None
        first_RN = rough_product(self.x_RD, first.T)
        return self.math.activate(first_RN if bias is None else first_RN + bias)


@dataclass(frozen=True, kw_only=True)
class _First:
    """A rounded first projection, the moment of what it feeds the second, and what is best rounded for that."""

    packed: PackedMatrix
    H_FF: Tensor
    metric: Metric | None
    target: Tensor


def quantise_expert(rows: ExpertRows, fmt: LowbitFormat, *, passes: int = 4) -> dict[str, Tensor]:
    """The record of an expert by compensated rounding; plain where there are no rows. `passes` refit scales and codes
    after the error feedback; each costs about as much as that."""
    weights, math = rows.weights, rows.math
    if rows.x_RD.shape[0] == 0:
        return quantise_expert_plain(weights, fmt, math)
    first, narrow = rows.first(fmt.of(math.first), passes), fmt.of("down_proj")
    if narrow.bits >= _EXACT_BITS:
        down = pack_plain(first.target, narrow)
    else:
        rounded = round_in(first.target, first.metric, narrow, passes=passes)
        down = pack(*unbiased(rounded, first.target, first.H_FF, narrow), narrow)
    return _named(weights, {math.first: first.packed, "down_proj": down})


def _effective_rows(weight_R: Tensor) -> float:
    """(sum w^2)^2 / sum w^4: how many rows of equal weight would say as much."""
    square = weight_R.double().square()
    return max(1.0, float(square.sum() ** 2 / square.square().sum().clamp_min(1e-300)))


def _corrected(rows: ExpertRows, ours_RF: Tensor, H_FF: Tensor) -> Tensor:
    """The second projection that best undoes the first one's error: least squares from `ours` to the exact outputs.

    W C (H + d)^-1 with C = E[exact ours^T] + d and H = E[ours ours^T] (as in GPTAQ, Li et al. 2025).
    """
    W_DF = rows.weights["down_proj"].float()
    diagonal = rows.damping_F * H_FF.diagonal().mean().clamp_min(1e-30)
    ridge = diagonal * torch.eye(len(H_FF), device=H_FF.device)
    counted = rows.weight_R.float().square().unsqueeze(1)
    cross = (rows.exact_RF * counted).T @ ours_RF / counted.sum().clamp_min(1e-30)
    solution, failed = torch.linalg.solve_ex(H_FF + ridge, cross.T + ridge)  # [F, F]: (C (H + d)^-1)^T
    return W_DF if int(failed) else rough_product(W_DF, solution.T)


def quantise_expert_plain(
    weights: Mapping[str, Tensor],
    fmt: LowbitFormat,
    math: ExpertMath,
    packed: Callable[[Tensor, LowbitFormat], PackedMatrix] = pack_plain,
) -> dict[str, Tensor]:
    """The record of an expert by nearest rounding: needs no inputs, fast enough for large models."""
    return _named(weights, {name: packed(weights[name], fmt.of(name)) for name in (math.first, "down_proj")})


def _named(weights: Mapping[str, Tensor], packed: Mapping[str, PackedMatrix]) -> dict[str, Tensor]:
    """Tensors of a record under the names of `record_tensors`; vectors (biases) stay as they are."""
    made: dict[str, Tensor] = {}
    for name, weight in weights.items():
        made |= packed[name].named(name) if name in packed else {name: weight}
    return made
