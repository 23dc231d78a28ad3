"""What a program in Triton has to know of a quantised matrix as a checkpoint stores it.

Does not know triton. Invariant as in `forms`: a tile is chosen by the matrix alone.

Legend: N outputs, K inputs of all parts of a matrix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from buddymoe_ray.kernels.coded_format import COLUMNS, coded_shapes
from buddymoe_ray.kernels.triton.forms import THREADS, WEIGHTS, Form, Use, lanes_of, power_of_two
from buddymoe_ray.types import CodedMatrix, CodeFormat, SlotTensor

__all__ = ["CodedForm", "knows_codes"]

_CODES: Mapping[str, int] = {"fp8": 4, "int8": 4, "int4": 8, "mxfp4": 8, "nvfp4": 8, "gptq": 8, "awq": 8}
"""Of 32 bits."""
_WORDS = 4  # of 32 bits that a lane reads at once: 16 bytes
_TOGETHER = 4  # outputs that share a load of inputs, as coded_products.py has them
_OUTPUTS_BESIDE = {"gptq": 32, "awq": 128}
_ROWS_ACROSS = {"gptq": 16, "awq": 32}


@dataclass(frozen=True, kw_only=True)
class CodedForm(Form):
    """A quantised matrix of `parts` within a record, `weights` being its `CodeFormat.codes`. A scale, of the dtype
    `scale`, is that of `block_outputs` by `block_inputs` weights, never 0; zero points begin at byte `zeros` of the
    record, and float32s by which all scales of a part are multiplied, or with `divides` divided, at byte `whole`,
    negative without any. `items` are words of 32 bits."""

    scale: str
    zeros: int
    whole: int
    divides: bool
    parts: int
    block_outputs: int
    block_inputs: int

    @property
    def kind(self) -> str:
        """`gptq` or `awq`, whose outputs lie side by side, else `rows`."""
        return self.weights if self.weights in COLUMNS else "rows"

    @property
    def per_word(self) -> int:
        """Codes in 32 bits."""
        return _CODES[self.weights]

    @property
    def scales_of_lane(self) -> int:
        """For the inputs that a lane of `rows` reads at once."""
        return max(1, self.per_word * self.items // self.block_inputs)

    @property
    def words(self) -> int:
        """Of all inputs of an output."""
        return self.K // self.per_word

    @property
    def programs(self) -> int:
        """Of a row; none has outputs of two parts where they lie side by side."""
        parts = self.parts if self.weights in COLUMNS else 1
        return parts * -(-(self.N // parts) // self.outputs)

    @classmethod
    def coded(cls, layout: Mapping[str, SlotTensor], matrix: CodedMatrix, bias: tuple[int, str], use: Use) -> CodedForm:
        """Of a matrix in a slot, in a format that `knows_codes` says yes to."""
        fmt = matrix.format
        if fmt.codes in COLUMNS:
            least, lanes = _OUTPUTS_BESIDE[fmt.codes], _ROWS_ACROSS[fmt.codes]
        else:
            lanes = lanes_of(-(-matrix.K // (_CODES[fmt.codes] * _WORDS)))
            least = _TOGETHER * max(4, THREADS // lanes)
        places = {part: layout[f"{matrix.name}.{part}"].offset for part in coded_shapes(matrix)}
        return cls(
            E=use.experts,
            shares=use.shares,
            N=matrix.N,
            K=matrix.K,
            weights=fmt.codes,
            transposed=False,
            bits=0,
            codes=places["codes"],
            scales=places["scales"],
            base=0,
            bias=bias[0],
            bias_dtype=bias[1],
            outputs=max(least, min(use.outputs, power_of_two(matrix.N // matrix.parts))),
            lanes=lanes,
            items=_WORDS,
            scale=fmt.scale,
            zeros=places.get("zeros", -1),
            whole=places.get("global_scale", -1),
            divides=fmt.global_scale == "/",
            parts=matrix.parts,
            block_outputs=fmt.block[0] or matrix.N // matrix.parts,
            block_inputs=fmt.block[1] or matrix.K,
        )


def knows_codes(coded: Sequence[CodedMatrix]) -> bool:
    """Whether there are products for all of these: those in rows whose lanes see whole blocks, or parts of one."""
    return all(_knows(matrix.format, matrix.K) for matrix in coded)


def _knows(fmt: CodeFormat, K: int) -> bool:
    if fmt.codes not in _CODES or fmt.scale not in (*WEIGHTS, "e8m0", "float8_e4m3fn"):
        return False
    at_once, inputs = _CODES[fmt.codes] * _WORDS, fmt.block[1] or K
    if fmt.codes in COLUMNS:
        fits = inputs % _ROWS_ACROSS["awq"] == 0 or inputs >= K
    else:
        fits = inputs % at_once == 0 or inputs >= K or (at_once % inputs == 0 and inputs % _TOGETHER == 0)
    return K % _CODES[fmt.codes] == 0 and fits
