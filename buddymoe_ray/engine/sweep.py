"""Scores what stand-ins would cost in mode `fast`, a whole window in one pass beside an open exact engine.

In `fast` nothing is fetched, so what is resident never changes, and a token's answers do not depend on the steps it is
decoded in: the rows of a window can be computed at once, with those experts left out that an engine of that memory
would not hold. Ten times as fast as step by step, which evaluate.py does for modes that fetch. Slots that lend experts
to prompts count as empty; an engine finds in them now and then what it misses: one or two points of its misses.

Legend: T tokens of a window, V vocabulary, B scored tokens, K slots, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from buddymoe_ray.config import EngineConfig
from buddymoe_ray.engine.build import BLOCK_SIZE
from buddymoe_ray.engine.evaluate import PREFILLED, WINDOW, EvalResult, Totals
from buddymoe_ray.engine.parts import EngineParts
from buddymoe_ray.errors import BudgetError
from buddymoe_ray.models.expert_math import expert_math
from buddymoe_ray.moe import MoEBlock, Standins, StepOutcome
from buddymoe_ray.policy import RowBudgets
from buddymoe_ray.residency.standin_policy import wants_scores
from buddymoe_ray.residency.tier import PlannedStandins, plan_standins
from buddymoe_ray.types import FAST

__all__ = ["Sweep"]

_ROWS = WINDOW - 1 - PREFILLED  # that decode computes: the prompt is exact, nothing follows the last token


@dataclass(kw_only=True)
class _Variant:
    standins: Standins
    resident: list[npt.NDArray[np.bool_]]
    totals: Totals = field(default_factory=Totals)


class Sweep:
    """Scores variants of an exact engine through its own parts; `room` bytes are for records."""

    def __init__(self, parts: EngineParts, room: int) -> None:
        self._parts, self._room = parts, room
        self._maths = [expert_math(module, parts.loaded.layout) for module in parts.loaded.experts]

    @staticmethod
    def covers(config: EngineConfig) -> bool:
        """Whether such an engine can be scored in a sweep: nothing is fetched, and nobody asks the router again."""
        return config.mode == "fast" and not wants_scores(config)

    def run(
        self,
        configs: Sequence[EngineConfig],
        windows: Sequence[tuple[int, ...]],
        *,
        progress: Callable[..., Iterable[Any]],
        what: str,
    ) -> list[EvalResult | BudgetError]:
        """A result per variant, of this engine's model and dtypes, that `covers` says yes to; BudgetError where its
        memory cannot hold its stand-ins."""
        planned = [self._planned(config) for config in configs]
        groups = self._groups(planned)
        found = dict[int, EvalResult | BudgetError](
            (at, plan) for at, plan in enumerate(planned) if isinstance(plan, BudgetError)
        )
        work = [(group, window) for group in groups for window in windows]
        bar = iter(progress(work, total=len(work), desc=what))
        for group in groups:
            variants = {at: self._opened(plan) for at, plan in group.items()}
            for window in windows:
                next(bar, None)
                exact = self._said(window)
                for variant in variants.values():
                    variant.totals.compare(exact, self._said(window, variant))
            found |= {at: variant.totals.result() for at, variant in variants.items()}
        next(bar, None)
        return [found[at] for at in range(len(configs))]

    def _planned(self, config: EngineConfig) -> PlannedStandins | BudgetError:
        assert self.covers(config), f"mode is {config.mode}, must be fast without router scores"
        try:
            return plan_standins(config, self._parts.loaded, self._maths)
        except BudgetError as error:
            return error

    def _groups(self, planned: Sequence[PlannedStandins | BudgetError]) -> list[dict[int, PlannedStandins]]:
        """Whose records are in memory together; each has at least one variant."""
        groups, held = list[dict[int, PlannedStandins]](), 0
        for at, plan in enumerate(planned):
            if isinstance(plan, BudgetError):
                continue
            if not groups or held + plan.nbytes > self._room:
                groups.append({})
                held = 0
            groups[-1][at] = plan
            held += plan.nbytes
        return groups

    def _opened(self, planned: PlannedStandins) -> _Variant:
        parts, plan = self._parts, planned.setup.plan
        resident = [np.full(count, plan.fully_resident) for count in parts.loaded.layout.experts_per_layer]
        for layer, named in enumerate(plan.pinned):
            resident[layer][list(named)] = True
        return _Variant(standins=planned.open(parts.loaded), resident=resident)

    def _said(self, window: tuple[int, ...], variant: _Variant | None = None) -> list[tuple[list[str], Tensor, Tensor]]:
        """What the engine says about the window's scored tokens, as a step of `Totals.compare`."""
        step, blocks = self._parts.step, range(-(-WINDOW // BLOCK_SIZE))
        outcome, logits = StepOutcome.empty(_ROWS), list[Tensor]()
        if variant is not None:
            step.answer = lambda *given: self._answer(variant, outcome, *given)
        try:
            for _, logits_nV in self._parts.runner.score(window[:-1], blocks, chunk=WINDOW):
                logits.append(logits_nV)
        finally:
            step.answer = None
        if variant is not None:
            totals = variant.totals
            totals.hits += int(outcome.hits_T.sum())
            totals.fetched += int(outcome.fetched_T.sum())
            totals.stood_in += int(outcome.standins_TS.sum())
            totals.expected_rise += float(outcome.loss_T.sum())
        scored_BV = torch.cat(logits)[PREFILLED - 1 :].log_softmax(dim=-1).cpu()
        return [([str(hash(window))] * len(scored_BV), scored_BV, torch.tensor(window[PREFILLED:]))]

    def _answer(
        self,
        variant: _Variant,
        outcome: StepOutcome,
        block: MoEBlock,
        hidden_TD: Tensor,
        ids_TK: Tensor,
        weight_TK: Tensor,
    ) -> Tensor:
        """A layer's output: the prompt's rows by the experts, the others as `fast` has it."""
        step, layer = self._parts.step, block.layer
        at = max(0, len(hidden_TD) - _ROWS)
        if not variant.standins.covers(layer):
            hit_TK = variant.resident[layer][ids_TK[at:].cpu().numpy()]
            outcome.count_exact(hit_TK)
            return block.exact(hidden_TD, ids_TK, weight_TK)
        endless = np.full(_ROWS, np.inf, np.float32)
        step.outcome = outcome
        step.budgets = RowBudgets(mode_T=np.full(_ROWS, FAST, np.int8), allowance_T=endless, price_T=endless)
        rows = hidden_TD, ids_TK, weight_TK
        out_TD, resolution = block.stood_in(variant.standins, variant.resident[layer], at, *rows)
        for kind, loss in variant.standins.loss_by_kind(layer, resolution).items():
            variant.totals.expected_by_kind[kind] = variant.totals.expected_by_kind.get(kind, 0.0) + loss
        return out_TD
