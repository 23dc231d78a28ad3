"""Products to about three digits, for what is rounded to far fewer afterwards. Knows no weights."""

from __future__ import annotations

from torch import Tensor

__all__ = ["rough_product"]

_LARGE = 1 << 26
"""Multiplications from which on it pays to round the factors first."""


def rough_product(A_MK: Tensor, B_KN: Tensor) -> Tensor:
    """float32 `[M, N]` of float32 factors. Large ones are rounded to bfloat16 where the CPU multiplies those: of 2,048
    inputs 2.5 to 4.5 times as fast."""
    from buddymoe_ray.kernels.stored_dots import has_dots

    if A_MK.shape[0] * B_KN.numel() < _LARGE or A_MK.device.type != "cpu" or not has_dots():
        return A_MK @ B_KN
    return (A_MK.bfloat16() @ B_KN.bfloat16()).float()
