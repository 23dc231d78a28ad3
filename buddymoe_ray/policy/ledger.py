"""The quality budget of one request, and the price of an access that keeps it.

A bounded request earns `budget` nats per generated token and pays the calibrated expected loss of every stand-in use.
Pure.
Invariant: what was spent never exceeds budget × tokens.

The price is a threshold on the expected loss of one access: taking the first accesses that fit would spend the
allowance in the first layers; taking all accesses below one price, the same in every layer, spends it where it buys
most.

Legend: T tokens, N accesses of a token.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["Ledger", "Pricer"]

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

    def charge(self, loss: float) -> None:
        """Pay for stand-in uses (nats)."""
        self.spent += loss
        limit = self.budget * self.tokens
        assert self.spent <= limit * (1 + 1e-6), f"spent {self.spent} nats, must be at most {limit}"


class Pricer:
    """Prices from the expected losses of calibration tokens: sorted once, so that each request's price is one search.

    Args:
        loss_TN: expected losses (nats) of the accesses of calibration tokens; 0 where the expert is resident.
    """

    def __init__(self, loss_TN: npt.NDArray[np.floating]) -> None:
        losses = np.asarray(loss_TN).ravel()
        assert not (losses < 0).any(), f"expected loss is {losses.min()}, must not be negative"
        self._known = len(losses) > 0
        self._losses = np.sort(losses[losses != 0])
        self._spend = np.cumsum(self._losses, dtype=np.float64) / max(1, len(loss_TN))

    def __call__(self, budget: float) -> float:
        """The largest expected loss of one access such that taking all accesses up to it costs a token `budget` nats on
        average (less a tenth, for the spread between texts); inf when all do, 0 when no access is known."""
        within = int(np.searchsorted(self._spend, _SAFETY * budget, side="right"))
        if within == len(self._losses):
            return float("inf") if self._known else 0.0
        # equal expected losses are taken together or not at all
        first = int(np.searchsorted(self._losses, self._losses[within], side="left"))
        return float(self._losses[first - 1]) if first else 0.0
