"""The quality budget of one request, and the price of a use that keeps it.

A bounded request earns `budget` nats per generated token and pays the calibrated harm of every stand-in use. Pure.
Invariant: what was spent never exceeds budget × tokens.

The price is a threshold on the harm of one use: taking the first uses that fit would spend the allowance in the first
layers; taking all uses below one price, the same in every layer, spends it where it buys most.

Legend: T tokens, N uses of a token.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["Ledger", "Pricer", "price_for"]

_SAFETY = 0.9
_PATIENCE = 2.0


class Ledger:
    """Allowance of one request. `budget` is in nats per generated token."""

    def __init__(self, budget: float) -> None:
        assert budget >= 0, f"budget is {budget}, must not be negative"
        self.budget, self.spent, self.tokens = budget, 0.0, 0

    @property
    def allowance(self) -> float:
        """Nats that may still be spent; a hair less than the balance, so that float32 sums cannot overdraw it."""
        return max(0.0, (self.budget * self.tokens - self.spent) * (1 - 1e-5))

    @property
    def generosity(self) -> float:
        """What to multiply a price with: above 1 when more than a few tokens' allowance lies unspent, as where other
        requests' fetches answered for free. Without it a budget of .003 spent .0019 and fetched a quarter more."""
        unspent = self.allowance / self.budget if self.budget else 0.0
        return max(1.0, unspent / _PATIENCE)

    def accrue(self) -> None:
        """One more token is being generated."""
        self.tokens += 1

    def charge(self, harm: float) -> None:
        """Pay for stand-in uses (nats)."""
        self.spent += harm
        limit = self.budget * self.tokens
        assert self.spent <= limit * (1 + 1e-6), f"spent {self.spent} nats, must be at most {limit}"


class Pricer:
    """Prices from the harms of calibration tokens: sorted once, so that each request's price is one search.

    Args:
        harm_TN: harms (nats) of the uses of calibration tokens; 0 where the expert is resident.
    """

    def __init__(self, harm_TN: npt.NDArray[np.floating]) -> None:
        harms = np.asarray(harm_TN).ravel()
        assert not (harms < 0).any(), f"harm is {harms.min()}, must not be negative"
        self._known = len(harms) > 0
        self._harms = np.sort(harms[harms != 0])
        self._spend = np.cumsum(self._harms, dtype=np.float64) / max(1, len(harm_TN))

    def __call__(self, budget: float) -> float:
        """The largest harm of one use such that taking all uses up to it costs a token `budget` nats on average (less
        a tenth, for the spread between texts); inf when all do, 0 when no use is known."""
        within = int(np.searchsorted(self._spend, _SAFETY * budget, side="right"))
        if within == len(self._harms):
            return float("inf") if self._known else 0.0
        # equal harms are taken together or not at all
        first = int(np.searchsorted(self._harms, self._harms[within], side="left"))
        return float(self._harms[first - 1]) if first else 0.0


def price_for(budget: float, harm_TN: npt.NDArray[np.floating]) -> float:
    """`Pricer(harm_TN)(budget)`, for a single price."""
    return Pricer(harm_TN)(budget)
