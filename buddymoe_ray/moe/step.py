"""What the MoE blocks of one forward pass share: the phase, what each row may spend, and what became of its accesses.

Written by the runner before a pass, read after it. Knows neither requests nor the model.

Legend: T rows of the pass, K slots of a token, E experts, D hidden, N recorded accesses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

import numpy as np
import numpy.typing as npt
from torch import Tensor

from buddymoe_ray.kernels import Tallies
from buddymoe_ray.moe.outcome import StepOutcome
from buddymoe_ray.policy import RowBudgets

__all__ = ["Observer", "Overlay", "Phase", "StepState", "StepTerms"]

Observer = Callable[[int, Tensor, Tensor, Tensor], None]
"""`observe(layer, hidden_TD, ids_TK, weight_TK)`: the calibrator's view of a pass."""


class Phase(Enum):
    """What a pass computes. PROBE learns the KV shapes: experts answer zero and nothing is loaded."""

    PROBE = "probe"
    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True, kw_only=True)
class Overlay:
    """Recorded substitutions of one layer that a replayed pass must repeat; N of them."""

    row_N: npt.NDArray[np.int64]
    slot_N: npt.NDArray[np.int64]
    action_N: npt.NDArray[np.int8]
    expert_N: npt.NDArray[np.int64]
    weight_N: npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class StepTerms:
    """The terms on which a decode pass is computed.

    `budgets` is what each row may spend (None: exact for all), `record` the rows whose substitutions are kept,
    `overlays` per layer the substitutions to repeat.
    """

    budgets: RowBudgets | None = None
    record: frozenset[int] = frozenset()
    overlays: Mapping[int, Overlay] = field(default_factory=dict)


class StepState:
    """Mutable state of the pass in progress; one per engine, shared by all its MoE blocks.

    `scores` holds the router's scores `[T, E]` of a layer while its experts run, where a stand-in asks for them.
    `failed` says by row why its output is worth nothing: an expert it needed could not be had. None: the pass raises.
    `tokens` are those of the rows, where they are known.
    `suspend` answers for the experts of a pass that can be set aside: `suspend(block, hidden_TD, ids_TK, weight_TK)`.
    So does `answer`, for those of all passes until it is taken away: whoever scores what stand-ins would cost sets it.
    """

    def __init__(self) -> None:
        self.observer: Observer | None = None
        self.scores: dict[int, Tensor] = {}
        self.suspend: Callable[..., Tensor] | None = None
        self.answer: Callable[..., Tensor] | None = None
        self.begin(Phase.PROBE, 0)

    def begin(
        self,
        phase: Phase,
        rows: int,
        terms: StepTerms | None = None,
        *,
        isolate: bool = False,
        tokens: Sequence[int] = (),
    ) -> None:
        """Start a pass of `rows` rows. With `isolate` an expert that cannot be had costs only the rows that need it."""
        terms = terms or StepTerms()
        self.phase, self.suspend, self.tokens = phase, None, tokens
        self.failed: dict[int, str] | None = {} if isolate else None
        self.budgets, self.overlays = terms.budgets, terms.overlays
        self.outcome = StepOutcome.empty(rows, terms.record)

    def charge(self, loss_T: npt.NDArray[np.float32]) -> None:
        """Take a layer's expected loss (nats) off what the rows may spend in the layers to come."""
        if self.budgets is not None:
            with np.errstate(invalid="ignore"):  # a fast row's endless allowance less an endless expected loss
                self.budgets = replace(self.budgets, allowance_T=self.budgets.allowance_T - loss_T)

    def tallies(self, layers: int) -> Tallies:
        """For a call over so many layers: what was counted before it, and what its rows may spend on stand-ins. That is
        nothing where each answer is to be recorded."""
        outcome, budgets = self.outcome, self.budgets
        rows, columns = outcome.accesses_TA.shape
        accesses = np.empty((layers + 1, rows, columns), np.int64)
        losses, allowances = np.empty((2, layers + 1, rows), np.float32)
        accesses[0] = outcome.accesses_TA
        if budgets is None or outcome.record:
            return Tallies(accesses, losses, allowances, None, None)
        losses[0], allowances[0] = outcome.loss_T, budgets.allowance_T
        return Tallies(accesses, losses, allowances, budgets.mode_T, budgets.price_T)

    def take(self, tallies: Tallies, layers: int) -> None:
        """So many layers of the call count."""
        self.outcome.accesses_TA = tallies.accesses[layers]
        if tallies.mode_T is not None and tallies.price_T is not None:
            self.outcome.loss_T = tallies.losses[layers]
            self.budgets = RowBudgets(
                mode_T=tallies.mode_T, allowance_T=tallies.allowances[layers], price_T=tallies.price_T
            )
