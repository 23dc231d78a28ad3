"""Quantised matrices as checkpoints store them, and what their codes mean: weight = code × scale, in float32.

    fp8     e4m3, a byte                      OCP 8-bit floating point
    mxfp4   e2m1, 16 bytes to 32 inputs       OCP microscaling; the scale is a power of two, biased by 127
    nvfp4   e2m1, 8 bytes to 16 inputs        the scale is e4m3, × (modelopt) or ÷ (compressed-tensors) a float32
    int8    two's complement
    int4    the code less 8, or less the zero point of its block; 8 codes to an int32, the first in its lowest bits
    gptq    as int4 with zero points, which are stored less 1, but [in, out]: 8 inputs to an int32
    awq     the same with 8 outputs to an int32, in AWQ_ORDER, and zero points as they are

`decoded` is the spec of the products: coded_tiles.py and coded_columns.py for float32 rows; for rows of bfloat16, where
the CPU has what they need, coded_pairs.py (fp8), coded_wide.py (FP4, int4), coded_columns_wide.py (gptq, awq). GB/s by
the time of its own thread on a core of Zen 5 that reads 44, one row of bfloat16, weights in huge pages, 2,048 x 2,048
and experts of 2,048 x 768: fp8 44 37, int8 33, mxfp4 36 33, nvfp4 36 35, int4 33 31, with zero points 36 30, gptq 30
29, awq 29 28, our own int8 38 and int4 36.

Knows no files. Scales that are not finite are the caller's to refuse; codes that are no number are so for `decoded`.

Legend: N outputs, K inputs of all parts of a matrix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from buddymoe_ray.kernels.coded_format import AWQ_ORDER, COLUMNS, E2M1
from buddymoe_ray.kernels.reference import ENTERED, ExpertMath
from buddymoe_ray.kernels.rowwise import rowwise, rowwise_linear
from buddymoe_ray.types import CodedMatrix

__all__ = ["coded_forward", "decoded", "plain_weights"]


def decoded(tensors: Mapping[str, Tensor], matrix: CodedMatrix) -> Tensor:
    """float32 `[N, K]` of a matrix among the tensors of a slot."""
    fmt, name, n = matrix.format, matrix.name, matrix.N // matrix.parts
    if fmt.codes in COLUMNS:
        return _decoded_columns(tensors, matrix)
    scale = tensors[f"{name}.scales"]
    scale = torch.exp2(scale.double() - 127).float() if fmt.scale == "e8m0" else scale.float()
    if fmt.global_scale:
        whole = tensors[f"{name}.global_scale"].repeat_interleave(len(scale) // matrix.parts)[:, None]
        scale = scale * whole if fmt.global_scale == "*" else scale / whole
    spread = _spread(scale, matrix)
    codes = _values(tensors[f"{name}.codes"], fmt.codes)[:, : matrix.K]
    if fmt.zeros:
        nibbles = _nibbles(tensors[f"{name}.zeros"].T.contiguous()).T  # packed along the outputs
        zeros = nibbles.reshape(matrix.parts, -1, scale.shape[1])[:, :n].reshape(matrix.N, -1).float()
        return (codes - zeros.repeat_interleave(fmt.block[1], dim=1)[:, : matrix.K]) * spread
    return (codes - 8 * (fmt.codes == "int4")) * spread


def _decoded_columns(tensors: Mapping[str, Tensor], matrix: CodedMatrix) -> Tensor:
    """Part by part, `[in, out]` until the end."""
    fmt = matrix.format
    codes, scales, zeros = (tensors[f"{matrix.name}.{part}"] for part in ("codes", "scales", "zeros"))
    order = range(8) if fmt.codes == "gptq" else [AWQ_ORDER.index(n) for n in range(8)]
    plain = []
    for code, scale, zero in zip(*(t.chunk(matrix.parts) for t in (codes, scales, zeros)), strict=True):
        along = _nibbles(code.T.contiguous()).T if fmt.codes == "gptq" else _in_order(_nibbles(code), order)
        middle = _in_order(_nibbles(zero), order).float() + (fmt.codes == "gptq")
        middle_KN, scale_KN = (t.repeat_interleave(fmt.block[1], dim=0)[: matrix.K] for t in (middle, scale.float()))
        plain.append(((along.float() - middle_KN) * scale_KN).T)
    return torch.cat(plain).contiguous()


def _in_order(nibbles: Tensor, order: Sequence[int]) -> Tensor:
    """Each eight of a row by where they are."""
    return nibbles.view(len(nibbles), -1, 8)[:, :, list(order)].flatten(1)


def coded_forward(
    x_RD: Tensor, tensors: Mapping[str, Tensor], coded: Sequence[CodedMatrix], math: ExpertMath
) -> Tensor:
    """One expert over its rows, `[R, D] -> [R, D]`, in float32 from matrices that are decoded one at a time: the spec
    of an expert's machine code, and what computes where there is none."""
    ENTERED["coded_forward"] += 1
    known = {matrix.name: matrix for matrix in coded}

    def project(x: Tensor, name: str) -> Tensor:
        return rowwise_linear(x, decoded(tensors, known[name]), tensors[f"{name}_bias"].float() if math.bias else None)

    hidden_RF = rowwise(math.activate, project(x_RD.float(), math.first))
    y_RD = project(hidden_RF, "down_proj").to(x_RD.dtype)
    return y_RD if math.post_norm is None else rowwise(math.post_norm, y_RD)


def plain_weights(tensors: Mapping[str, Tensor], coded: Sequence[CodedMatrix]) -> Mapping[str, Tensor]:
    """The tensors of a slot with its quantised matrices in float32, `[out, in]`; themselves where there are none."""
    if not coded:
        return tensors
    plain = {matrix.name: decoded(tensors, matrix) for matrix in coded}
    return plain | {name: tensor for name, tensor in tensors.items() if name.partition(".")[0] not in plain}


def _spread(scale: Tensor, matrix: CodedMatrix) -> Tensor:
    """A scale for each weight, or one that broadcasts."""
    (outputs, inputs), n = matrix.format.block, matrix.N // matrix.parts
    rows = scale.view(matrix.parts, -1, scale.shape[1]).repeat_interleave(outputs or n, dim=1)[:, :n].flatten(0, 1)
    return rows.repeat_interleave(inputs, dim=1)[:, : matrix.K] if inputs else rows


def _values(codes: Tensor, kind: str) -> Tensor:
    """float32 [N, K or more]; of int4 the codes themselves."""
    if kind in ("fp8", "int8"):
        return codes.float()
    nibbles = _nibbles(codes)
    if kind == "int4":
        return nibbles.float()
    table = torch.tensor((*E2M1, *(-value for value in E2M1)), device=codes.device)
    return table[nibbles.long()]


def _nibbles(words: Tensor) -> Tensor:
    """uint8 [N, twice as many as bytes], the low ones first."""
    held = words.contiguous().flatten().view(torch.uint8).view(len(words), -1)  # flat: a single column has any stride
    return torch.stack((held & 15, held >> 4), dim=2).flatten(1)
