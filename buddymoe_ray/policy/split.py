"""Cuts a byte budget between full experts and stand-ins: which kind each expert of each layer gets.

A multiple-choice knapsack: every expert takes one option (full, or a record of some kind) of certain bytes and
expected harm. Solved by marginal harm per byte along each expert's convex hull, then a fill with what is left; within
one step of the optimum of the relaxation (a test holds it against an exact solver). MoEpic's configurator moves
memory from the layer that loses least to the one that gains most until nothing improves; the greedy order reaches that
fixed point in one pass. Pure numpy.

Legend: L layers, E experts, O options.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["Split", "choose"]


@dataclass(frozen=True, kw_only=True)
class Split:
    """`kind_LE` is the option of each expert (-1 beyond a layer's experts), `nbytes` and `harm` the totals."""

    kind_LE: npt.NDArray[np.int64]
    nbytes: int
    harm: float


def choose(
    *,
    bytes_of: npt.NDArray[np.int64],
    harm_of: npt.NDArray[np.floating],
    budget_bytes: int,
    experts_per_layer: Sequence[int],
) -> Split:
    """Options of least total harm within the budget.

    Args:
        bytes_of: `[O]` bytes of each option.
        harm_of: `[O, L, E]` expected harm (nats per token) of each option for each expert.
        budget_bytes: the hard limit; at least the cheapest option for every expert.
        experts_per_layer: E of each layer; entries beyond are ignored.
    """
    experts = [(la, e) for la, count in enumerate(experts_per_layer) for e in range(count)]
    least = int(bytes_of.min()) * len(experts)
    assert least <= budget_bytes, f"budget is {budget_bytes} bytes, must be at least {least}"
    harms = np.asarray(harm_of, dtype=np.float64)
    assert np.isfinite(harms).all(), "harms must be finite"
    kind_LE = np.full(harms.shape[1:], -1, dtype=np.int64)
    hulls = {key: _hull(bytes_of, harms[:, key[0], key[1]]) for key in experts}
    for key, hull in hulls.items():
        kind_LE[key] = hull[0]
    left = budget_bytes - int(sum(bytes_of[kind_LE[key]] for key in experts))
    steps = [_step(bytes_of, harms, key, hull, 0) for key, hull in hulls.items() if len(hull) > 1]
    heapq.heapify(steps)
    while steps:
        _, key, at = heapq.heappop(steps)
        hull = hulls[key]
        cost = int(bytes_of[hull[at + 1]] - bytes_of[hull[at]])
        if cost > left:
            continue  # a cheaper step of another expert may still fit
        kind_LE[key], left = hull[at + 1], left - cost
        if at + 2 < len(hull):
            heapq.heappush(steps, _step(bytes_of, harms, key, hull, at + 1))
    _fill(bytes_of, harms, experts, kind_LE, left)
    return Split(
        kind_LE=kind_LE,
        nbytes=int(sum(bytes_of[kind_LE[key]] for key in experts)),
        harm=float(sum(harms[kind_LE[key]][key] for key in experts)),
    )


_Key = tuple[int, int]


def _step(
    bytes_of: npt.NDArray[np.int64], harms: npt.NDArray[np.float64], key: _Key, hull: list[int], at: int
) -> tuple[float, _Key, int]:
    """The next step of an expert along its hull, keyed so that a heap pops the largest harm saved per byte."""
    now, then = hull[at], hull[at + 1]
    saved = harms[now][key] - harms[then][key]
    return -saved / float(bytes_of[then] - bytes_of[now]), key, at


def _hull(bytes_of: npt.NDArray[np.int64], harm_O: npt.NDArray[np.float64]) -> list[int]:
    """Options on the lower convex hull of harm over bytes, cheapest first, each less harmful than the one before."""
    hull: list[int] = []
    for option in sorted(range(len(bytes_of)), key=lambda o: (bytes_of[o], harm_O[o])):
        if hull and harm_O[option] >= harm_O[hull[-1]]:
            continue
        while len(hull) > 1 and _slope(bytes_of, harm_O, hull[-2], option) >= _slope(bytes_of, harm_O, *hull[-2:]):
            hull.pop()
        hull.append(option)
    return hull


def _slope(bytes_of: npt.NDArray[np.int64], harm_O: npt.NDArray[np.float64], a: int, b: int) -> float:
    """Harm saved per byte from option a to b."""
    return float((harm_O[a] - harm_O[b]) / max(1, bytes_of[b] - bytes_of[a]))


def _fill(
    bytes_of: npt.NDArray[np.int64],
    harms: npt.NDArray[np.float64],
    experts: list[_Key],
    kind_LE: npt.NDArray[np.int64],
    left: int,
) -> None:
    """Spend what is left on single upgrades off the hull, the most harm saved first."""
    while True:
        best: tuple[float, _Key, int] | None = None
        for key in experts:
            now = kind_LE[key]
            for option in np.flatnonzero(bytes_of - bytes_of[now] <= left):
                saved = harms[now][key] - harms[option][key]
                if saved > 0 and (best is None or saved > best[0]):
                    best = (saved, key, int(option))
        if best is None:
            return
        _, key, chosen = best
        left -= int(bytes_of[chosen] - bytes_of[kind_LE[key]])
        kind_LE[key] = chosen
