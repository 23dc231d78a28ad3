"""How long error-compensated rounding of a whole model would take here, from a small try.

Knows shapes, not weights: the time does not depend on their values. Neighbour: run.py asks and chooses a rounding.

Legend: N outputs, K inputs of a matrix, R rows (tokens).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

from buddymoe_ray.calibrate.rounding import moment, round_compensated
from buddymoe_ray.kernels import LowbitFormat

__all__ = ["compensated_seconds"]

_TRIED_ROWS, _TRIED_OUTPUTS, _TRIED_INPUTS = 512, 256, 2048
_BITS = 3


def compensated_seconds(
    shapes: Mapping[str, tuple[int, ...]],
    *,
    experts: int,
    widths: int,
    rows: int,
    passes: int,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Seconds to round `experts` experts to each of `widths` widths, with `rows` calibration rows each.

    Every matrix of an expert (`shapes`, `[out, in]`) is tried cut to at most 256 x 2048, and the time taken for
    proportional to N K^2 (the error feedback), that of the moments to R K^2. Rough: within a factor of two or so.
    """
    if not experts or not widths:
        return 0.0
    total = 0.0
    for shape in shapes.values():
        if len(shape) == 2:
            total += _tried(shape[0], shape[1], rows, widths, passes, clock)
    return experts * total


def _tried(N: int, K: int, rows: int, widths: int, passes: int, clock: Callable[[], float]) -> float:
    n, k, r = min(N, _TRIED_OUTPUTS), min(K, _TRIED_INPUTS), min(rows, _TRIED_ROWS)
    generator = torch.Generator().manual_seed(0)
    W_NK, x_RK = torch.randn(n, k, generator=generator), torch.randn(max(1, r), k, generator=generator)
    tries = []
    for _ in range(2):  # the first warms up
        begun = clock()
        H_KK = moment(x_RK)
        seen = clock()
        round_compensated(W_NK, H_KK, LowbitFormat(bits=_BITS), passes=passes)
        tries.append((seen - begun) * rows / max(1, r) + (clock() - seen) * N / n)
    return widths * (K / k) ** 2 * min(tries)
