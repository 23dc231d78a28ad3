"""Plain rounding straight to the packed format: machine code on a CPU, else rounding.py, which is the spec.

Does not know what a matrix is for. Invariant: codes and scales are those of `round_plain`, but where two are equally
near.

Legend: N outputs, K inputs, G groups of a row, A tiles of 16 outputs.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from buddymoe_ray.kernels.cpu import Kernel
from buddymoe_ray.kernels.lowbit_format import BLOCK, LowbitFormat, PackedMatrix, groups_of, pack, pack_scales
from buddymoe_ray.kernels.rounding import PLAIN_SHARES, base_for, least_squares, nearest_code, round_plain
from buddymoe_ray.kernels.rounding_calls import RoundingCall, RoundingPlan

__all__ = ["pack_plain"]


def pack_plain(W_NK: Tensor, fmt: LowbitFormat) -> PackedMatrix:
    """`pack(*round_plain(W_NK, fmt), fmt)`, of 4 and 8 bits several times as fast on a CPU."""
    if fmt.trellis or W_NK.device.type != "cpu":
        return pack(*round_plain(W_NK.contiguous(), fmt), fmt)
    W = (W_NK if W_NK.dtype in (torch.float32, torch.bfloat16) else W_NK.float()).contiguous()
    (N, K), G = W.shape, groups_of(W.shape[1])
    A = -(-N // BLOCK)
    scale, kept = torch.empty(2, A * BLOCK, G)
    codes = torch.empty(A, G, fmt.tile_bytes, dtype=torch.uint8)
    shares = np.array(PLAIN_SHARES[fmt.bits], np.float32)
    plan = np.array(RoundingPlan(fmt.bits, shares.ctypes.data, len(shares)), np.int64)
    call = RoundingCall(W.data_ptr(), W.itemsize, N, K, scale.data_ptr(), kept.data_ptr(), codes=0)
    rounding_kernel()(tuple(call), plan.ctypes.data)
    base = base_for(kept[:N], fmt)
    code = nearest_code(kept, base)
    scale.copy_(least_squares(code, base, scale, kept))
    code[N:] = 0
    rounding_kernel()(tuple(call._replace(codes=codes.data_ptr())), plan.ctypes.data)
    return PackedMatrix(
        codes=codes,
        scales=pack_scales(code, fmt),
        base=base,
        sizes=codes.new_empty(N, K, 0),
    )


@cache
def rounding_kernel() -> Kernel:
    """See `RoundingCall` and `RoundingPlan`."""
    from buddymoe_ray.kernels.numba_calls import kernel
    from buddymoe_ray.kernels.rounding_numba import compile_rounding

    return kernel(compile_rounding, len(RoundingCall._fields))
