"""From numbers to pixels along an axis, and the round numbers to write beside it.

Knows no drawing. Scales: linear, log, and asinh, which is logarithmic on both sides of a linear zero: measured rises
span four orders of magnitude and may be slightly below zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["BENT", "Axis", "Scale", "scale_of"]

BENT = 0.1
"""An asinh axis is linear within about this of zero."""

_MOST_TICKS = 8
_LEAST = 1e-30


@dataclass(frozen=True, kw_only=True)
class Axis:
    """What an axis shows. `kind` is linear, log or asinh; `include` are values that must be on it."""

    label: str
    kind: str = "linear"
    include: Sequence[float] = ()
    ticks: Sequence[float] | None = None

    def bend(self, value: float) -> float:
        """The value on a straight axis."""
        if self.kind == "log":
            return math.log10(max(value, _LEAST))
        return math.asinh(value / BENT) if self.kind == "asinh" else value


@dataclass(frozen=True, kw_only=True)
class Scale:
    """An axis from pixel `start` (value `low`) to pixel `end` (value `high`)."""

    axis: Axis
    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]

    def __call__(self, value: float) -> float:
        """The pixel of a value, which is held within the axis."""
        bend = self.axis.bend
        share = (bend(value) - bend(self.low)) / (bend(self.high) - bend(self.low))
        return self.start + min(1.0, max(0.0, share)) * (self.end - self.start)


def scale_of(axis: Axis, values: Sequence[float], start: float, end: float) -> Scale:
    """A scale that shows `values` (finite, at least one) with a little room."""
    shown = [*values, *axis.include, *(axis.ticks or ())]
    if axis.kind == "log":
        shown = [value for value in shown if value > _LEAST] or [1.0]
        low, high = min(shown) / 1.15, max(shown) * 1.15
    elif axis.kind == "asinh":
        low, high = min(0.0, min(shown) * 1.3), max(BENT, max(shown) * 1.3)
    else:
        room = 0.04 * (max(shown) - min(shown)) or max(abs(max(shown)), 1e-12) * 0.5
        held = set(axis.include)
        low = min(shown) - (0 if min(shown) in held else room)
        high = max(shown) + (0 if max(shown) in held else room)
    ticks = axis.ticks if axis.ticks is not None else _ticks(axis.kind, low, high)
    return Scale(axis=axis, low=low, high=high, start=start, end=end, ticks=tuple(ticks))


def _ticks(kind: str, low: float, high: float) -> list[float]:
    if kind == "linear":
        return _round_steps(low, high)
    top = max(abs(low), abs(high))
    first = math.floor(math.log10(BENT if kind == "asinh" else max(low, _LEAST)))
    powers = range(first, math.ceil(math.log10(max(top, _LEAST))) + 1)
    fine = [float(f"{digit}e{power}") for power in powers for digit in (1, 3)]
    coarse = [float(f"1e{power}") for power in powers]
    for sizes in (fine, coarse, coarse[::2], coarse[::4]):
        both = [-s for s in reversed(sizes)] + [0.0] + sizes if kind == "asinh" else sizes
        inside = [tick for tick in both if low <= tick <= high]
        if len(inside) <= _MOST_TICKS + 2:
            return inside
    return []


def _round_steps(low: float, high: float) -> list[float]:
    power = math.floor(math.log10((high - low) / _MOST_TICKS))
    step = next(m * 10.0**power for m in (1, 2, 2.5, 5, 10, 20) if (high - low) / (m * 10.0**power) <= _MOST_TICKS)
    first = math.ceil(low / step - 1e-9)
    count = math.floor(high / step + 1e-9) - first + 1
    return [round((first + at) * step, 12 - power) for at in range(count)]
