"""A layer's experts on a GPU, or in Triton's interpreter on a CPU: the twin of `expert_layer.ExpertLayer`.

Sizes and formats; imports triton at the first call. Every access is computed by itself, so an output's bits
depend on its row and its expert alone, at every number of rows. Nothing here waits for the device.

Legend: T tokens, K experts per token, N = T*K accesses, E experts, B bytes, D hidden, F ffn.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from buddymoe_ray.kernels.cpu import activation_of
from buddymoe_ray.kernels.lowbit_format import LowbitFormat, matrix_at
from buddymoe_ray.kernels.reference import ExpertMath
from buddymoe_ray.kernels.trellis import levels_above
from buddymoe_ray.kernels.trellis_tables import RINGS
from buddymoe_ray.kernels.triton import launching
from buddymoe_ray.kernels.triton.coded_forms import CodedForm, knows_codes
from buddymoe_ray.kernels.triton.forms import WEIGHTS, Form, Use, power_of_two
from buddymoe_ray.types import CodedMatrix, SlotTensor

__all__ = ["TritonExperts", "combine_on_device"]

_INTERPRETED = 256  # outputs of a program: what it costs there is the number of programs
_COMPILED = 1  # as few as fill its threads
_BLOCK = 256


class TritonExperts:
    """Computes experts where they lie: in records laid out by `record_tensors`, or in slots.

    Args:
        layout, fmt, math: experts that `covers` says yes to; `fmt` is None for plain weights as stored, `math` for maps
            of low rank (`down`, `up`, `bias`) and mean outputs (`bias`), as `lowrank` has them.
        coded: matrices that lie in slots quantised as a checkpoint stores them: all of an expert's, or none.
        outputs: of a program, at least; None for what suits the machine.

    Rows are multiplied in float32, whatever their dtype and that of the weights. Raises ValueError for records that are
    not packed as this version packs.
    """

    def __init__(
        self,
        *,
        layout: Sequence[SlotTensor],
        fmt: LowbitFormat | None,
        math: ExpertMath | None,
        coded: Sequence[CodedMatrix] = (),
        outputs: int | None = None,
    ) -> None:
        self._layout, self._fmt, self._math = {t.name: t for t in layout}, fmt, math
        self._coded = {matrix.name: matrix for matrix in coded}
        self._outputs = outputs or (_INTERPRETED if launching.interpreted() else _COMPILED)
        self._forms = cache(self._forms_of)
        self._formula = None if math is None else activation_of(math, self._forms(1, 1)[1].K)
        assert math is None or self._formula is not None, (
            "experts compute what no kernel does, must be as `covers` says"
        )

    @staticmethod
    def covers(
        layout: Sequence[SlotTensor], fmt: LowbitFormat | None, math: ExpertMath, coded: Sequence[CodedMatrix] = ()
    ) -> bool:
        """Whether the kernels know such experts. Raises ValueError for another version's packing."""
        stored = {tensor.name: tensor for tensor in layout}
        names = (math.first, "down_proj")
        biases = [stored[f"{name}_bias"].dtype for name in names if math.bias]
        if coded:
            plain, F = list[str](), next(matrix.K for matrix in coded if matrix.name == "down_proj")
        elif fmt is not None:
            plain, F = list[str](), matrix_at(layout, "down_proj", fmt).K
        else:
            plain, F = [stored[name].dtype for name in names], stored["down_proj"].shape[0 if math.transposed else 1]
        known = WEIGHTS.keys() >= {*plain, *biases} and knows_codes(coded)
        return known and activation_of(math, F) is not None

    def __call__(self, x_TD: Tensor, records_B: Tensor | None, at_E: Tensor, expert_TK: Tensor, out_ND: Tensor) -> None:
        """Write `out_ND[n] = expert expert_TK.flat[n] over x_TD[n // K]` where the expert has a record.

        All are on one device. `records_B` uint8 holds records at multiples of 64 bytes; that of expert e begins at byte
        `at_E[e]` (int64, negative: none). None: `at_E` are addresses. `expert_TK` int64 is negative for accesses that
        others answer. Rows of `out_ND` (float32, bfloat16 or float16) without a record are left alone.
        """
        (T, K), N = expert_TK.shape, expert_TK.numel()
        first, down = self._forms(K, len(at_E))
        assert x_TD.shape == (T, down.N), f"x is {tuple(x_TD.shape)}, must be {(T, down.N)}"
        assert out_ND.shape == (N, down.N) and out_ND.is_contiguous(), f"out is {tuple(out_ND.shape)}, must be {N} rows"
        assert expert_TK.dtype == at_E.dtype == torch.int64, f"experts are {expert_TK.dtype}, {at_E.dtype}, not int64"
        if not N:
            return
        programs, expert_N, rows = _programs(), expert_TK.contiguous(), x_TD.contiguous()
        if first is not None:
            x, rows = rows, torch.empty(N, first.N, dtype=torch.float32, device=x_TD.device)
            self._project(first, x, records_B, expert_N, at_E, rows)
        if self._formula is not None:
            both, E, F = rows, len(at_E), down.K
            rows, grid = torch.empty(N, F, dtype=torch.float32, device=x_TD.device), (-(-F // programs.WIDTH.value), N)
            launching.launch(programs.activate, grid, both, expert_N, at_E, rows, E, F, self._formula)
        self._project(down, rows, records_B, expert_N, at_E, out_ND)

    def _project(
        self, form: Form, x: Tensor, records_B: Tensor | None, expert_N: Tensor, at_E: Tensor, out: Tensor
    ) -> None:
        levels = _levels(form.bits, x.device) if form.bits in RINGS else None
        grid = (form.programs, expert_N.numel())
        launching.launch(_programs().project, grid, x, records_B, levels, expert_N, at_E, out, form)

    def _forms_of(self, shares: int, experts: int) -> tuple[Form | None, Form]:
        """Of the first product, where there is one, and the second."""
        names = ("down", "up") if self._math is None else (self._math.first, "down_proj")
        uses = [Use(experts=experts, shares=many, outputs=self._outputs) for many in (shares, 1)]
        if self._math is None and "up" not in self._layout:
            return None, Form.constant(self._layout["bias"], uses[1])
        return self._form(names[0], uses[0]), self._form(names[1], uses[1])

    def _form(self, name: str, use: Use) -> Form:
        bias = self._layout.get("bias" if name == "up" else f"{name}_bias")
        place = (0, "") if bias is None else (bias.offset, bias.dtype)
        if name in self._coded:
            return CodedForm.coded(self._layout, self._coded[name], place, use)
        if self._fmt is not None:
            return Form.packed([*self._layout.values()], name, self._fmt, place, use)
        transposed = self._math is not None and self._math.transposed
        return Form.plain(self._layout[name], place, use, transposed=transposed)


def combine_on_device(y_TKD: Tensor, weight_TK: Tensor) -> Tensor:
    """`reference.combine` in slot order: `[T, K, D], [T, K] -> [T, D]` in the dtype of `y_TKD`."""
    T, K, D = y_TKD.shape
    out_TD = torch.empty(T, D, dtype=y_TKD.dtype, device=y_TKD.device)
    block = min(power_of_two(D), _BLOCK)
    if T:
        y, weight = y_TKD.contiguous(), weight_TK.contiguous()
        launching.launch(_programs().combine, (-(-D // block), T), y, weight, out_TD, D, K, block)
    return out_TD


@cache
def _levels(bits: int, device: torch.device) -> Tensor:
    """As products look them up: halves of odd numbers below 256, which bfloat16 has."""
    return levels_above(bits, device).bfloat16()


def _programs() -> Any:
    from buddymoe_ray.kernels.triton import programs

    return programs
