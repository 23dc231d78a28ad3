"""Root-mean-square norms of rows without the GIL: sums of squares in 16 lanes, added in a fixed tree, so that the bits
of a row depend on that row alone. Imports numba at the top: only `norm` may import this module, and late.

Legend: R rows, n items of a row.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numba import carray, float32, int32, njit

from buddymoe_ray.kernels.expert_calls import OK
from buddymoe_ray.kernels.expert_rows import floats_at, from_bits, ints_at, read_row, rounded_row, write_row
from buddymoe_ray.kernels.numba_calls import compiled, stamp_of

__all__ = ["compile_norm"]

LANES = 16


@njit
def norm(call_at: Any, plan_at: Any) -> Any:
    """`out = x / sqrt(mean(x ** 2) + eps)`, in the dtype of x, times the weights; see `norm_kernel`. In place too."""
    c, p = carray(ints_at(call_at), (4,)), carray(ints_at(plan_at), (3,))
    x, out, R, item_bytes = c[0], c[1], c[2], c[3]
    n, eps = p[1], from_bits(int32(p[2]))
    scale, row, sums = (
        carray(floats_at(p[0]), (n,)),
        np.zeros((n + 15) // LANES * LANES, np.float32),
        np.empty(LANES, np.float32),
    )
    for r in range(R):
        read_row(x + r * n * item_bytes, item_bytes, row[:n])
        sums[:] = float32(0.0)
        for at in range(0, row.shape[0], LANES):
            for lane in range(LANES):
                sums[lane] += row[at + lane] * row[at + lane]
        width = LANES // 2
        while width:
            for lane in range(width):
                sums[lane] += sums[lane + width]
            width //= 2
        inverse = float32(1.0) / np.sqrt(sums[0] / float32(n) + eps)
        for i in range(n):
            row[i] *= inverse
        if item_bytes == 2:
            rounded_row(row)
        for i in range(n):
            row[i] *= scale[i]
        write_row(row[:n], out + r * n * item_bytes, item_bytes)
    return OK


def compile_norm(folder: Path | None) -> int:
    """The address of `norm`, from `folder` when an earlier process left it there; None keeps none."""
    stamp = stamp_of("norm_numba")

    def kernel(call_at: Any, plan_at: Any) -> Any:
        return norm(call_at, plan_at) if stamp >= 0 else OK

    return compiled(kernel, folder)
