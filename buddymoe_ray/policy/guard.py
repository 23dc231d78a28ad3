"""When to stop trusting stand-ins: a state machine over measured divergences. Pure: no clock, no model.

Measured tokens come from sampled requests (`engine.guard`). The guard trips when their mean divergence is above the
limit by over two standard errors, clustered by request, and re-arms after so many tokens, twice as many at each trip.

What is measured corrects what later requests are charged, too: expectations are calibrated on other text than a service
gets. Of those of builtin:tiny's profile .5 to .8 is measured when it goes on with code and manuals, .85 to .96 of what
is charged once 24 requests were measured. Between them the tail decides: of answers to tasks, few of whose tokens hold
most of the divergence, it stays uncertain by half.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from buddymoe_ray.policy.calibration import Measured, loss_ratio

__all__ = ["Guard", "GuardView"]

_LEAST_FACTOR = 0.5
"""Divergence has a heavy tail: what few requests have shown of it may be far too little."""


@dataclass(frozen=True, kw_only=True)
class GuardView:
    """What the guard knows: means per token (nats) over the window, why it is in its state, and how many tokens must
    be generated until it re-arms (0 while it watches)."""

    state: Literal["ok", "tripped"]
    measured: float
    standard_error: float
    predicted: float
    tokens: int
    reason: str
    rearms_in: int = 0


class Guard:
    """Watches the mean divergence of sampled tokens.

    Args:
        limit: nats per token that must not be exceeded.
        window: sampled tokens that the means are over; older requests fall out.
        least: sampled tokens needed before it may trip.
        requests: sampled requests needed before it may trip: one has no spread, the error of two says little.
        cooldown: generated tokens until it re-arms after the first trip.

    A divergence that is not finite is no matter of chance: it trips at once.
    """

    def __init__(
        self, *, limit: float, window: int = 2048, least: int = 128, requests: int = 3, cooldown: int = 4096
    ) -> None:
        assert limit >= 0, f"limit is {limit}, must not be negative"
        assert window >= least > 0 and cooldown > 0, "window, least and cooldown must be positive, window the larger"
        assert requests > 1, f"requests is {requests}, must be at least 2: one has no spread"
        self.limit, self._window, self._least, self._cooldown = limit, window, least, cooldown
        self._requests = requests
        self._samples: deque[Measured] = deque()
        self._resting = 0
        self._trips = 0
        self._reason = ""
        self.factor = 1.0
        """What expected losses are to be multiplied with: within a standard error of what was measured over what was
        predicted, and no further from what it was before than that takes. A trip does not forget it."""

    @property
    def state(self) -> Literal["ok", "tripped"]:
        """`tripped` while it rests."""
        return "tripped" if self._resting else "ok"

    def observe(self, kl: Sequence[float], predicted: Sequence[float]) -> None:
        """Take one request's measured divergences (nats per token) and the ledger's predictions for the same tokens."""
        assert len(kl) == len(predicted), f"{len(kl)} divergences, {len(predicted)} predictions, must be as many"
        if not kl or self._resting:
            return
        self._samples.append(Measured(tokens=len(kl), kl=math.fsum(kl), predicted=math.fsum(predicted)))
        while len(self._samples) > self._requests and self._tokens() - self._samples[0].tokens >= self._window:
            self._samples.popleft()
        ratio = loss_ratio(self._samples)
        if ratio is not None:
            nearest = max(self.factor, ratio.value - ratio.standard_error)
            self.factor = max(_LEAST_FACTOR, min(nearest, ratio.value + ratio.standard_error))
        view = self.snapshot()
        enough = view.tokens >= self._least and len(self._samples) >= self._requests
        if not math.isfinite(view.measured) or (enough and view.measured - 2 * view.standard_error > self.limit):
            self._trip(view)

    def generated(self, tokens: int) -> None:
        """Count generated tokens towards the end of the cooldown; what was measured before it is forgotten."""
        if self._resting:
            self._resting = max(0, self._resting - tokens)
            if not self._resting:
                self._samples.clear()
                self._reason = f"re-armed after trip {self._trips}"

    def snapshot(self) -> GuardView:
        """Means over the window. The standard error is of the mean over requests, each weighted by its tokens."""
        tokens = self._tokens()
        if not tokens:
            return GuardView(
                state=self.state,
                measured=0.0,
                standard_error=0.0,
                predicted=0.0,
                tokens=0,
                reason=self._reason,
                rearms_in=self._resting,
            )
        mean = math.fsum(sample.kl for sample in self._samples) / tokens
        clusters = len(self._samples)
        spread = math.fsum((sample.kl - mean * sample.tokens) ** 2 for sample in self._samples)
        error = math.sqrt(spread * clusters / (clusters - 1)) / tokens if clusters > 1 else 0.0
        return GuardView(
            state=self.state,
            measured=mean,
            standard_error=error,
            predicted=math.fsum(sample.predicted for sample in self._samples) / tokens,
            tokens=tokens,
            reason=self._reason,
            rearms_in=self._resting,
        )

    def _tokens(self) -> int:
        return sum(sample.tokens for sample in self._samples)

    def _trip(self, view: GuardView) -> None:
        self._resting = self._cooldown * 2**self._trips
        self._trips += 1
        self._reason = (
            f"measured {view.measured:.3g} ± {view.standard_error:.2g} nats per token over {view.tokens} tokens, "
            f"limit {self.limit:.3g}, predicted {view.predicted:.3g}; exact for {self._resting} tokens"
        )
