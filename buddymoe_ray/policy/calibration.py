"""When to trust stand-ins that an engine calibrated by itself, and how much: a state machine over measured divergences.

Samples are texts run twice over the same tokens: what stand-ins cost (`kl`) beside what the calibration said that they
would. Their ratio has an upper confidence bound, clustered by text (linearised ratio of sums, Student's t), and each
look at it spends a part of `alpha`: 6 alpha / (pi i)^2 at the i-th, alpha in all. Charges are multiplied by that bound,
so that a budget is kept though the calibration erred. Pure: no clock, no model. Neighbours: `engine.calibration` feeds
it, `policy.guard` goes on watching once it trusts.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from statistics import NormalDist

from buddymoe_ray.types import CalibrationState

__all__ = ["LossRatio", "Measured", "Trust", "loss_ratio", "may_replay", "upper_ratio"]

_ALPHA, _LEAST, _GROWTH, _WINDOW = 0.05, 8, 1.5, 512
_LEAST_RATIO, _MOST_RATIO = 1.0, 2.0
"""Today's requests may be easier than tomorrow's; and a calibration that may be further off than this is not used."""
_UNCONFIRMED = 2.0
"""What a model writes by itself is not what it is asked: until requests confirm it, it counts for half the budget."""
_REPLAYED_SHARE = 0.02


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One text: its tokens that stand-ins had a part in, their summed divergence, and what was expected (nats)."""

    tokens: int
    kl: float
    predicted: float


@dataclass(frozen=True, kw_only=True)
class LossRatio:
    """Divergence by expectation, over all texts."""

    value: float
    standard_error: float


def loss_ratio(samples: Collection[Measured]) -> LossRatio | None:
    """Of these texts; None where nothing is known: fewer than 8, or nothing expected, or none of it finite."""
    count, predicted = len(samples), math.fsum(sample.predicted for sample in samples)
    if count < _LEAST or not predicted > 0:
        return None
    ratio = math.fsum(sample.kl for sample in samples) / predicted
    spread = math.fsum((sample.kl - ratio * sample.predicted) ** 2 for sample in samples)
    found = LossRatio(value=ratio, standard_error=math.sqrt(spread * count / (count - 1)) / predicted)
    return found if math.isfinite(found.value + found.standard_error) else None


def upper_ratio(samples: Sequence[Measured], alpha: float) -> float:
    """The bound that the ratio of divergence to expectation exceeds with probability `alpha`; inf where nothing is
    known."""
    found = loss_ratio(samples)
    return math.inf if found is None else found.value + _t_quantile(1 - alpha, len(samples) - 1) * found.standard_error


def may_replay(spent: float, elapsed: float, *, idle: bool) -> bool:
    """Whether the next replay may begin, after `spent` seconds of them in `elapsed`: 2 % of the time, or when idle."""
    return idle or spent <= _REPLAYED_SHARE * elapsed


class Trust:
    """What the samples so far allow. `own` are texts that the model wrote itself, in one look."""

    def __init__(self, own: Sequence[Measured] = ()) -> None:
        self._tokens = sum(sample.tokens for sample in own)
        self._own = upper_ratio(own, _ALPHA / 2)
        self._requests = list[Measured]()
        self._bound = math.inf
        self._looks, self._next, self._seen = 0, float(_LEAST), 0

    @property
    def state(self) -> CalibrationState:
        """`ready` while the bound is good enough, else `collecting`."""
        return "ready" if math.isfinite(self.factor) else "collecting"

    @property
    def confirmed(self) -> bool:
        """Whether requests have said what they cost."""
        return math.isfinite(self._bound)

    @property
    def factor(self) -> float:
        """What expected losses are multiplied with before they are charged; inf: no stand-in may answer."""
        bound, safety = (self._bound, 1.0) if self.confirmed else (self._own, _UNCONFIRMED)
        return max(bound, _LEAST_RATIO) * safety if bound <= _MOST_RATIO else math.inf

    @property
    def tokens(self) -> int:
        """Measured ones."""
        return self._tokens

    @property
    def reason(self) -> str:
        """For the log."""
        what, bound = (f"{self._seen} requests", self._bound) if self.confirmed else ("its own text", self._own)
        return f"stand-ins cost at most {bound:.2f} times what is expected of them on {what} ({self._tokens} tokens)"

    def observe(self, sample: Measured) -> bool:
        """Take a request's measurement. True when it led to a look."""
        if sample.tokens == 0 or not sample.predicted > 0:
            return False
        self._requests = [*self._requests[1 - _WINDOW :], sample]
        self._seen, self._tokens = self._seen + 1, self._tokens + sample.tokens
        if self._seen < self._next:
            return False
        self._next, self._looks = max(self._seen + 1.0, self._seen * _GROWTH), self._looks + 1
        self._bound = upper_ratio(self._requests, 6 * _ALPHA / 2 / (math.pi * self._looks) ** 2)
        return True


def _t_quantile(p: float, freedom: int) -> float:
    """Student's t from the normal quantile: Abramowitz and Stegun 26.7.5; within 3 % from 7 degrees of freedom on."""
    z: float = NormalDist().inv_cdf(p)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + math.fsum(term / freedom**power for power, term in enumerate(terms, 1))
