"""Cuts a byte budget between full experts and stand-ins: which kind each expert of each layer gets.

A multiple-choice knapsack: every expert takes one option (full, or a record of some kind) of certain bytes and
expected loss. Solved by marginal expected loss per byte along each expert's convex hull, then a fill with what is left;
within one step of the optimum of the relaxation (a test holds it against an exact solver). MoEpic's configurator moves
memory from the layer that loses least to the one that gains most until nothing improves; the greedy order reaches that
fixed point in one pass. Pure numpy.

Legend: L layers, E experts, O options, N experts of all layers, S steps along all hulls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["Split", "choose", "split_movable"]

FULL = 0
"""The option that is no stand-in."""

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Split:
    """`kind_LE` is the option of each expert (-1 beyond a layer's experts), `nbytes` and `loss` the totals.

    `full_LE` says who is full beside having the option of `kind_LE`, where that is another question.
    """

    kind_LE: Ints
    nbytes: int
    loss: float
    full_LE: Bools | None = None


def choose(
    *,
    bytes_of: Ints,
    loss_of: npt.NDArray[np.floating],
    budget_bytes: int,
    experts_per_layer: Sequence[int],
) -> Split:
    """Options of least total expected loss within the budget.

    Args:
        bytes_of: `[O]` bytes of each option, or `[O, L, E]` where they differ by expert.
        loss_of: `[O, L, E]` expected loss (nats per token) of each option for each expert.
        budget_bytes: the hard limit; at least the cheapest option for every expert.
        experts_per_layer: E of each layer; entries beyond are ignored.
    """
    _, L, E = loss_of.shape
    real_LE = np.arange(E) < np.asarray(experts_per_layer)[:, None]
    bytes_OLE = np.broadcast_to(bytes_of if bytes_of.ndim == 3 else bytes_of[:, None, None], loss_of.shape)
    options = _Options(bytes_ON=bytes_OLE[:, real_LE].astype(np.int64), loss_ON=loss_of[:, real_LE].astype(np.float64))
    kind_N = options.solve(budget_bytes)
    kind_LE = np.full((L, E), -1, dtype=np.int64)
    kind_LE[real_LE] = kind_N
    nbytes, loss = options.of(kind_N)
    return Split(kind_LE=kind_LE, nbytes=int(nbytes.sum()), loss=float(loss.sum()))


def split_movable(
    *, bytes_of: Ints, loss_of: npt.NDArray[np.floating], budget_bytes: int, experts_per_layer: Sequence[int]
) -> Split:
    """A record for every expert and full slots (option 0) for those of largest expected loss, so that any may move out.

    Arguments as for `choose`. The share of the budget that goes to full slots is searched on a grid of its own
    sixteenths; expected loss is that of the experts outside.
    """
    _, L, E = loss_of.shape
    real_LE = np.arange(E) < np.asarray(experts_per_layer)[:, None]
    least = int(bytes_of[1:].min()) * int(real_LE.sum())
    best: Split | None = None
    for share in range(16):
        count = int((budget_bytes - least) * share // 16 // int(bytes_of[FULL]))
        records = choose(
            bytes_of=bytes_of[1:],
            loss_of=loss_of[1:],
            budget_bytes=budget_bytes - count * int(bytes_of[FULL]),
            experts_per_layer=experts_per_layer,
        )
        # what better records left over goes to full slots as well
        count = min((budget_bytes - records.nbytes) // int(bytes_of[FULL]), int(real_LE.sum()))
        kind_LE = np.where(real_LE, records.kind_LE + 1, -1)
        loss_LE = np.where(real_LE, np.take_along_axis(loss_of, np.maximum(kind_LE, 0)[None], axis=0)[0], -np.inf)
        full_LE = np.zeros((L, E), dtype=bool)
        full_LE.reshape(-1)[np.argsort(-loss_LE.reshape(-1), kind="stable")[:count]] = True
        loss = float(loss_LE[real_LE & ~full_LE].sum())
        if best is None or loss < best.loss:
            nbytes = records.nbytes + count * int(bytes_of[FULL])
            best = Split(kind_LE=kind_LE, nbytes=nbytes, loss=loss, full_LE=full_LE)
    assert best is not None, "no share of the budget was tried"
    return best


@dataclass(frozen=True, kw_only=True)
class _Options:
    """What each option costs each expert, in bytes and in expected loss."""

    bytes_ON: Ints
    loss_ON: Floats

    def __post_init__(self) -> None:
        assert np.isfinite(self.loss_ON).all(), "expected losses must be finite"
        assert (self.bytes_ON >= 0).all(), "bytes must not be negative"

    def of(self, kind_N: Ints) -> tuple[Ints, Floats]:
        """Bytes and expected loss `[N]` of a choice."""
        each_N = np.arange(len(kind_N))
        return self.bytes_ON[kind_N, each_N], self.loss_ON[kind_N, each_N]

    def solve(self, budget: int) -> Ints:
        """The option of each expert."""
        kind_N = self._cheapest()
        least = int(self.of(kind_N)[0].sum())
        assert least <= budget, f"budget is {budget} bytes, must be at least {least}"
        left = budget - least
        expert_S, to_S, cost_S = self._steps(kind_N)
        closed: set[int] = set()
        for n, option, cost in zip(expert_S.tolist(), to_S.tolist(), cost_S.tolist(), strict=True):
            if n in closed:
                continue
            if cost > left:
                closed.add(n)  # the expert goes no further; a cheaper step of another may still fit
                continue
            kind_N[n], left = option, left - cost
        self._fill(kind_N, left)
        return kind_N

    def _cheapest(self) -> Ints:
        """The option of fewest bytes; of several the one of least expected loss."""
        first_ON = self.bytes_ON == self.bytes_ON.min(axis=0)
        kind_N: Ints = np.where(first_ON, self.loss_ON, np.inf).argmin(axis=0)
        return kind_N

    def _steps(self, kind_N: Ints) -> tuple[Ints, Ints, Ints]:
        """Steps along every expert's lower convex hull, the most expected loss saved per byte first: expert, option,
        bytes.

        Each round takes all experts one step further, to the option of steepest descent.
        """
        now_N, steepest_N = kind_N.copy(), np.full(len(kind_N), np.inf)
        rounds = []
        for _ in range(len(self.loss_ON) - 1):
            bytes_N, loss_N = self.of(now_N)
            cost_ON, saved_ON = self.bytes_ON - bytes_N, loss_N - self.loss_ON
            open_ON = (cost_ON > 0) & (saved_ON > 0)
            slope_ON = np.where(open_ON, saved_ON / np.maximum(cost_ON, 1), -np.inf)
            to_N = slope_ON.argmax(axis=0)
            n = np.flatnonzero(open_ON.any(axis=0))
            # rounding must not put a step before the one it builds on
            steepest_N[n] = np.minimum(steepest_N[n], slope_ON[to_N[n], n])
            rounds.append((n, to_N[n], cost_ON[to_N[n], n], steepest_N[n].copy()))
            now_N[n] = to_N[n]
        if not rounds:
            return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.int64)
        expert_S, to_S, cost_S, slope_S = (np.concatenate(part) for part in zip(*rounds, strict=True))
        order_S = np.argsort(-slope_S, kind="stable")  # of equal steps an earlier round's comes first
        return expert_S[order_S], to_S[order_S], cost_S[order_S]

    def _fill(self, kind_N: Ints, left: int) -> None:
        """Spend what is left on single upgrades, on the hull or off it, the most expected loss saved first."""
        while True:
            bytes_N, loss_N = self.of(kind_N)
            cost_ON, saved_ON = self.bytes_ON - bytes_N, loss_N - self.loss_ON
            saved_ON = np.where(cost_ON <= left, saved_ON, 0.0)
            option, n = np.unravel_index(int(saved_ON.argmax()), saved_ON.shape)
            if saved_ON[option, n] <= 0:
                return
            left -= int(cost_ON[option, n])
            kind_N[n] = option
