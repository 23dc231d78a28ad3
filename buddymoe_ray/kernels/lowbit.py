"""One expert's feed-forward straight from its packed low-bit record.

`lowbit_forward` picks the machine code of cpu.py on CPUs and else the torch reference below, which is the spec.
Does not know where records lie. Invariant: the same row gives the same bits however many rows are beside it.

Legend: R rows routed to one expert, D hidden, F ffn.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from buddymoe_ray.kernels.cpu import forward
from buddymoe_ray.kernels.lowbit_format import (
    LowbitFormat,
    PackedMatrix,
    dequantise,
    pack,
    packed_parts,
    record_tensors,
    unpack,
)
from buddymoe_ray.kernels.reference import ENTERED, ExpertMath
from buddymoe_ray.kernels.rowwise import rowwise, rowwise_linear

__all__ = [
    "LowbitFormat",
    "PackedMatrix",
    "dequantise",
    "lowbit_forward",
    "lowbit_forward_reference",
    "pack",
    "packed_parts",
    "record_tensors",
    "unpack",
]


def lowbit_forward(x_RD: Tensor, tensors: Mapping[str, Tensor], fmt: LowbitFormat, math: ExpertMath) -> Tensor:
    """`[R, D] -> [R, D]` in the dtype of `x_RD`, before the router weight; sums are taken in float32.

    On CPUs float32 rows are multiplied as they are, others as 16-bit integers (error 4e-5). `tensors` are views of a
    record laid out by `record_tensors`. `math.transposed` does not apply: packed matrices are `[out, in]`.
    """
    if x_RD.device.type == "cpu":
        return forward(x_RD, tensors, fmt, math)
    return lowbit_forward_reference(x_RD, tensors, fmt, math)


def lowbit_forward_reference(
    x_RD: Tensor, tensors: Mapping[str, Tensor], fmt: LowbitFormat, math: ExpertMath
) -> Tensor:
    """The spec: dequantise, then two linears whose rows do not see each other."""
    ENTERED["lowbit_forward"] += 1
    first, down = (dequantise(packed_parts(tensors, name), fmt.of(name)) for name in (math.first, "down_proj"))
    first_bias, down_bias = (
        tensors[f"{name}_bias"].float() if math.bias else None for name in (math.first, "down_proj")
    )
    hidden_RF = rowwise(math.activate, rowwise_linear(x_RD.float(), first, first_bias))
    y_RD = rowwise_linear(hidden_RF, down, down_bias).to(x_RD.dtype)
    return y_RD if math.post_norm is None else rowwise(math.post_norm, y_RD)
