"""What one request may spend on stand-ins, and what its expert accesses came to.

Wraps the ledger of a `bounded` request; knows nothing of tokens' text or of the model. Invariant: what a bounded
request is charged never exceeds budget × generated tokens, also when it was moved here: what its resumed tokens were
charged is unknown here, so they bring no allowance.
"""

from __future__ import annotations

import math

from buddymoe_ray.config import EngineConfig
from buddymoe_ray.engine.replay import Recorder, open_recorder
from buddymoe_ray.errors import RequestError
from buddymoe_ray.moe import STANDIN_KINDS, StepOutcome
from buddymoe_ray.observe import CalibrationSnapshot
from buddymoe_ray.policy import Ledger
from buddymoe_ray.residency.standin_setup import StandinSetup
from buddymoe_ray.types import CalibrationUsage, GenerationRequest, GuardState, Mode, StandinAccesses

__all__ = ["Account", "StepTotals", "open_account"]


_NO_CALIBRATION = CalibrationSnapshot()


class Account:
    """One request's terms and its accesses.

    Args:
        mode: what the request asked for.
        budget: nats per generated token, for `bounded`.
        price: largest expected loss (nats) of one access that is worth taking at this budget.
        factor: what expected losses are multiplied with before they are charged; inf where none may be.
        recorder: keeps every substitution; None where nobody asked.
        calibration: how far the engine's own was when the request came.
    """

    def __init__(
        self,
        *,
        mode: Mode,
        budget: float,
        price: float,
        factor: float = 1.0,
        recorder: Recorder | None = None,
        calibration: CalibrationUsage = _NO_CALIBRATION.usage,
    ) -> None:
        self.requested_mode: Mode = mode
        self.guard: GuardState = "off"
        self.recorder, self.calibration, self._factor = recorder, calibration, factor
        self.hits = self.peer = self.host = self.fetched = self.steps = 0
        self.stood_in = 0  # accesses of the latest decode step that stand-ins answered, until its token is taken
        self.expected_rise = 0.0
        self._price = price
        self._ledger = Ledger(budget) if mode == "bounded" else None
        self._standins = [0] * len(STANDIN_KINDS)

    @property
    def mode(self) -> Mode:
        """What the request gets: `exact` once the guard has tripped, or where stand-ins cannot keep a budget."""
        return "exact" if math.isinf(self._factor) or self.guard == "tripped" else self.requested_mode

    @property
    def budget(self) -> float | None:
        """Nats per generated token, for a bounded request."""
        return None if self._ledger is None else self._ledger.budget

    @property
    def standins(self) -> StandinAccesses:
        """Uses answered by stand-ins, by kind."""
        return StandinAccesses(**dict(zip(STANDIN_KINDS, self._standins, strict=True)))

    @property
    def allowance(self) -> float:
        """Nats that the next decode step may spend."""
        if self.mode == "bounded":
            assert self._ledger is not None, "a bounded request has no ledger"
            return self._ledger.allowance / self._factor
        return math.inf if self.mode == "fast" else 0.0

    @property
    def price(self) -> float:
        """Largest expected loss of one access that the next step may take."""
        if self.mode == "bounded":
            assert self._ledger is not None, "a bounded request has no ledger"
            return self._price * self._ledger.generosity
        return math.inf if self.mode == "fast" else 0.0

    def begin(self, guard: GuardState) -> None:
        """A token is about to be generated: its allowance comes in, and what the guard says now."""
        if self.requested_mode != "exact":  # which is none of the guard's business
            self.guard = guard
        if self._ledger is not None:
            self._ledger.accrue()

    def settle(self, outcome: StepOutcome, row: int) -> float:
        """Add what the expert accesses of one row of a decode step came to, and charge their expected loss; returns
        that (nats)."""
        self.hits += int(outcome.hits_T[row])
        self.peer += int(outcome.peer_T[row])
        self.host += int(outcome.host_T[row])
        self.fetched += int(outcome.fetched_T[row])
        standins = outcome.standins_TS[row].tolist()
        self._standins = [a + b for a, b in zip(self._standins, standins, strict=True)]
        self.stood_in = sum(standins)
        loss = float(outcome.loss_T[row])
        loss = loss * self._factor if loss else 0.0
        self.expected_rise += loss
        if self._ledger is not None and self.mode == "bounded":
            self._ledger.charge(loss)
        if self.recorder is not None:
            self.recorder.add(self.steps, outcome.substitutions.get(row, []))
        self.steps += 1
        return loss


class StepTotals:
    """Expert accesses of all requests since start; `expected_rise` is what they were charged (nats)."""

    def __init__(self) -> None:
        self.hits = self.peer = self.host = self.fetched = 0
        self.expected_rise = 0.0
        self._standins = [0] * len(STANDIN_KINDS)

    @property
    def standins(self) -> StandinAccesses:
        """Uses answered by stand-ins, by kind."""
        return StandinAccesses(**dict(zip(STANDIN_KINDS, self._standins, strict=True)))

    def add(self, outcome: StepOutcome) -> None:
        """Add one decode step."""
        self.hits += int(outcome.hits_T.sum())
        self.peer += int(outcome.peer_T.sum())
        self.host += int(outcome.host_T.sum())
        self.fetched += int(outcome.fetched_T.sum())
        self._standins = [a + b for a, b in zip(self._standins, outcome.standins_TS.sum(axis=0).tolist(), strict=True)]


def open_account(
    request: GenerationRequest,
    config: EngineConfig,
    setup: StandinSetup | None,
    max_model_len: int,
    calibration: CalibrationSnapshot = _NO_CALIBRATION,
) -> Account:
    """The account of a new request that `validate` let pass: its own mode and budget, else the engine's. Raises
    RequestError.

    A replay runs as `exact`: what its record does not name was the expert itself, whatever is resident now. Where
    stand-ins are not known, or not trusted yet, every budget is kept by being exact, and so is the engine's own mode.
    """
    mode: Mode = request.mode or config.mode if request.replay is None else "exact"
    ready = setup is not None and math.isfinite(calibration.factor)
    if mode != "exact" and not ready and (config.mode == "exact" or mode not in (config.mode, "bounded")):
        later = " or ask later" if calibration.state == "collecting" else ""
        raise RequestError(
            f"mode is {mode}, must be exact: {calibration.reason or 'no stand-ins are loaded'}. hint: "
            + (f"leave mode out{later}" if calibration.reason else "start the engine with mode: bounded"),
            param="buddymoe.mode",
        )
    if request.budget is not None and mode != "bounded":
        raise RequestError(
            f"budget is set for mode {mode}, must be left out. hint: a budget belongs to mode bounded",
            param="buddymoe.budget",
        )
    budget = config.budget if request.budget is None else request.budget
    refused = not ready or (mode == "bounded" and setup is not None and bool(setup.refusal))
    factor = math.inf if refused else calibration.factor
    price = setup.price_of(budget / factor) if mode == "bounded" and setup is not None and not refused else 0.0
    tokens = min(request.sampling.max_tokens, max_model_len - len(request.prompt_token_ids))
    return Account(
        mode=mode,
        budget=budget,
        price=price,
        factor=factor,
        recorder=open_recorder(request, setup, tokens),
        calibration=calibration.usage,
    )
