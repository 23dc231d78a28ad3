"""How quantised matrices lie in slots and in memory, as checkpoints store them: shapes of codes, scales, zero points.

Knows neither files nor what codes mean (coded.py). Invariant: the bytes of the shapes are those of the checkpoint.

Legend: N outputs, K inputs of all parts of a matrix, R rows and C columns of a part's scales.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from buddymoe_ray.types import CodedMatrix, CodeFormat

__all__ = ["AWQ_ORDER", "COLUMNS", "E2M1", "FP4", "CodedWeight", "coded_shapes"]

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Values of the lower three bits of a code of FP4; the fourth is the sign."""
FP4 = ("mxfp4", "nvfp4")
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight outputs is at each four bits of a word."""
COLUMNS = ("gptq", "awq")
"""Codes of matrices whose outputs lie side by side."""
_ZEROS_PER_WORD = 8


def _scale_grid(fmt: CodeFormat, N: int, K: int) -> tuple[int, int]:
    """Rows and columns of the scales of a matrix in one part."""
    outputs, inputs = fmt.block
    return -(-N // outputs) if outputs else 1, -(-K // inputs) if inputs else 1


def coded_shapes(matrix: CodedMatrix) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype, by torch's name, of what the matrix is in a slot: `codes`, `scales`, and maybe one of `zeros`
    and `global_scale`."""
    fmt, N, K = matrix.format, matrix.N, matrix.K
    R, C = _scale_grid(fmt, N // matrix.parts, K)
    if fmt.codes in COLUMNS:
        P, n = matrix.parts, N // matrix.parts
        return {
            "codes": ((P * K // 8, n) if fmt.codes == "gptq" else (P * K, n // 8), "int32"),
            "scales": ((P * C, n), fmt.scale),
            "zeros": ((P * C, n // 8), "int32"),
        }
    codes: tuple[tuple[int, ...], str] = {
        "fp8": ((N, K), "float8_e4m3fn"),
        "int8": ((N, K), "int8"),
        "int4": ((N, -(-K // 8)), "int32"),
        "mxfp4": ((N, -(-K // 32), 16), "uint8"),
        "nvfp4": ((N, K // 2), "uint8"),
    }[fmt.codes]
    shapes = {"codes": codes, "scales": ((matrix.parts * R, C), "uint8" if fmt.scale == "e8m0" else fmt.scale)}
    if fmt.zeros:
        shapes["zeros"] = ((matrix.parts * -(-(N // matrix.parts) // _ZEROS_PER_WORD), C), "int32")
    if fmt.global_scale:
        shapes["global_scale"] = ((matrix.parts,), "float32")
    return shapes


@dataclass(frozen=True, kw_only=True)
class CodedWeight:
    """A matrix of one part in memory; tensors are as `coded_shapes` says."""

    matrix: CodedMatrix
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    global_scale: Tensor | None = None

    def places(self, begin: int) -> dict[str, int]:
        """Addresses for outputs from `begin` on, which is where a block of them begins."""
        (outputs, _), places = self.matrix.format.block, {"codes": self.codes[begin:].data_ptr()}
        places["scales"] = self.scales[begin // outputs if outputs else 0 :].data_ptr()
        if self.global_scale is not None:
            places["global_scale"] = self.global_scale.data_ptr()
        return places if self.zeros is None else places | {"zeros": self.zeros[begin // _ZEROS_PER_WORD :].data_ptr()}

    def named(self) -> dict[str, Tensor]:
        """As `decoded` takes them."""
        return {f"{self.matrix.name}.{part}": getattr(self, part) for part in coded_shapes(self.matrix)}
