"""Root-mean-square norms of rows without the GIL: sums of squares in 16 lanes, added in a fixed tree, so that the bits
of a row depend on that row alone. Imports numba at the top: only `norm` may import this module, and late.

Legend: R rows, n items of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numba import carray, float32, int32, njit, types

from buddymoe_ray.kernels.expert_numba import compiled, stamp_of
from buddymoe_ray.kernels.expert_rows import floats_at, from_bits, read_row, rounded_row, write_row

__all__ = ["compile_norm"]

LANES = 16


@njit
def _norm(x: Any, weight: Any, out: Any, sizes: Any, eps_bits: Any) -> None:
    """`out = x / sqrt(mean(x ** 2) + eps)`, in the dtype of x, times `weight` [n] float32."""
    R, n, item_bytes = sizes
    scale, row, sums = (
        carray(floats_at(weight), (n,)),
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
        inverse = float32(1.0) / np.sqrt(sums[0] / float32(n) + from_bits(int32(eps_bits)))
        for i in range(n):
            row[i] *= inverse
        if item_bytes == 2:
            rounded_row(row)
        for i in range(n):
            row[i] *= scale[i]
        write_row(row[:n], out + r * n * item_bytes, item_bytes)


def compile_norm(folder: Path | None) -> Callable[..., None]:
    """Machine code of `_norm`, from `folder` when an earlier process left it there; None keeps none."""
    stamp = stamp_of("norm_numba")

    def norm(x: Any, weight: Any, out: Any, sizes: Any, eps_bits: Any) -> None:
        if stamp >= 0:
            _norm(x, weight, out, sizes, eps_bits)

    i64 = types.int64
    return compiled(types.void(i64, i64, i64, types.UniTuple(i64, 3), i64), norm, folder)
