"""How much of a calibration is worth its time: on how many tokens, and whether to round with error compensation.

Tokens follow from the model's shape alone, so that a calibration can be repeated; the time of compensated rounding from
a small try here. Knows shapes, not weights. Neighbour: run.py asks.

Legend: N outputs, K inputs of a matrix, R rows (tokens).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from math import prod

import torch

from buddymoe_ray.calibrate.rounding import Metric, moment, round_in
from buddymoe_ray.engine.parts import EngineParts
from buddymoe_ray.kernels import LowbitFormat

__all__ = ["compensated_seconds", "scored_tokens", "traced_tokens"]

_TRIED_ROWS, _TRIED_OUTPUTS, _TRIED_INPUTS = 512, 256, 2048
_BITS = 3
_TRACE_FLOPS, _SCORED_FLOPS = 1e13, 1e12
"""Of tracing, and of one pass over the scored text: minutes, and seconds, of a CPU core."""
_MOST_TRACED, _LEAST_ROWS = 65_536, 256
_MOST_SCORED, _LEAST_SCORED = 6144, 768


def traced_tokens(parts: EngineParts) -> int:
    """As many as a few minutes allow, and at least so many that the usual expert has 256 rows; 65,536 at most."""
    experts = max(parts.experts.cache.layout.experts_per_layer)
    least = _LEAST_ROWS * experts // parts.loaded.experts_per_token
    return min(_MOST_TRACED, max(least, int(_TRACE_FLOPS / _flops(parts))))


def scored_tokens(parts: EngineParts) -> int:
    """Of held-out text, on which every stand-in is scored: 768 to 6,144."""
    return min(_MOST_SCORED, max(_LEAST_SCORED, int(_SCORED_FLOPS / _flops(parts))))


def _flops(parts: EngineParts) -> float:
    """Of a token, about: twice the weights that it meets."""
    layout = parts.experts.cache.layout
    dense = sum(p.numel() for p in parts.loaded.model.parameters() if not p.is_meta)
    expert = sum(prod(shape) for shape in layout.shapes.values())
    return 2.0 * (dense + len(layout.experts_per_layer) * parts.loaded.experts_per_token * expert)


def compensated_seconds(
    shapes: Mapping[str, tuple[int, ...]],
    *,
    experts: int,
    widths: int,
    rows: int,
    passes: int,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Seconds of one core to round `experts` experts to each of `widths` widths, with `rows` calibration rows each.

    Every matrix of an expert (`shapes`, `[out, in]`) is tried cut to at most 256 x 2048, and the time taken for
    proportional to N K^2 (the error feedback), that of moments to R K^2 and of their factors to K^3. Rough: within a
    factor of two or so.
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
        metric = Metric.of(H_KK)
        known = clock()
        round_in(W_NK, metric, LowbitFormat(bits=_BITS), passes=passes)
        once = (seen - begun) * rows / max(1, r) * (K / k) ** 2 + (known - seen) * (K / k) ** 3
        tries.append(once + widths * (clock() - known) * N / n * (K / k) ** 2)
    return min(tries)
