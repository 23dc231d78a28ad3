"""Tries stand-ins that an engine calibrated by itself: runs texts with them, and says when they are trusted.

The pass over a request's tokens is teacher-forced: its prompt exactly, the others as decode would have them, a chunk at
a time. Decides nothing: `policy.calibration` does. Neighbours: `guard` samples requests and compares.

Legend: T rows of a pass, n those that stand-ins have a part in, K slots, D hidden.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from torch import Tensor

from buddymoe_ray.config import EngineConfig
from buddymoe_ray.moe import MoEBlock, StepOutcome, StepState
from buddymoe_ray.policy import Measured, RowBudgets, Trust
from buddymoe_ray.residency.standin_setup import StandinSetup
from buddymoe_ray.types import BOUNDED, FAST, Mode

__all__ = ["Trial"]

log = logging.getLogger(__name__)


class Trial:
    """Of one engine. `replays` says whether its runner can compute exact requests again with stand-ins."""

    def __init__(self, config: EngineConfig, setup: StandinSetup, step: StepState, *, replays: bool) -> None:
        assert setup.own is not None, "the profile is nobody's own calibration"
        self.trust = Trust(setup.own)
        self._step, self._replays = step, replays
        self._mode = FAST if config.mode == "fast" else BOUNDED
        self._budget, self._price = config.budget, setup.price_of(config.budget)
        self._said = ""
        self._tell()

    def wants(self, mode: Mode) -> bool:
        """Whether a request that is served in this mode would say something that is not known yet."""
        if mode == "exact":
            return self._replays and self.trust.state != "ready"
        return not self.trust.confirmed

    @contextmanager
    def standing_in(self, prompt: int, start: int, losses: dict[int, float]) -> Iterator[None]:
        """For a pass over consecutive tokens from `start` on: from position `prompt` on stand-ins answer what they are
        to answer. `losses` gets what each token was expected to lose by them (nats), by position."""
        outcomes = list[StepOutcome]()
        early = max(0, prompt - start)

        def answer(block: MoEBlock, *rows: Tensor) -> Tensor:
            standins, count = block.standins, len(rows[0])
            if standins is None or not standins.covers(block.layer) or early >= count:
                return block.exact(*rows)
            if not outcomes:  # the pass has begun
                outcomes.append(StepOutcome.empty(count - early))
                self._step.outcome, self._step.budgets = outcomes[0], self._budgets(count - early)
            return block.stood_in(standins, block.resident_mask.copy(), early, *rows)[0]

        self._step.answer = answer
        try:
            yield
        finally:
            self._step.answer = None
        for outcome in outcomes:
            losses |= {start + early + at: float(loss) for at, loss in enumerate(outcome.loss_T)}

    def observe(self, kl: Sequence[float], predicted: Sequence[float]) -> None:
        """A request was measured: divergence and expectation (nats) of some of its tokens."""
        if self.trust.observe(Measured(tokens=len(kl), kl=math.fsum(kl), predicted=math.fsum(predicted))):
            self._tell()

    def _budgets(self, rows: int) -> RowBudgets:
        endless = self._mode == FAST
        return RowBudgets(
            mode_T=np.full(rows, self._mode, np.int8),
            allowance_T=np.full(rows, np.inf if endless else self._budget, np.float32),
            price_T=np.full(rows, np.inf if endless else self._price, np.float32),
        )

    def _tell(self) -> None:
        if self.trust.state != self._said:
            self._said = self.trust.state
            serves = "they serve from now on" if self._said == "ready" else "exact serves"
            log.warning("calibration is %s: %s; %s", self._said, self.trust.reason, serves)
