"""Scores what stand-ins would cost in mode `fast`, whole windows in one pass beside an open exact engine.

In `fast` nothing is fetched, so what is resident never changes, and a token's answers do not depend on the steps it is
decoded in: the rows of a window can be computed at once, with those experts left out that an engine of that memory
would not hold. Ten times as fast as step by step, which evaluate.py does for modes that fetch. Slots that lend experts
to prompts count as empty; an engine finds in them now and then what it misses: one or two points of its misses.

Legend: T tokens of a window, V vocabulary, B scored tokens, K slots, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from buddymoe_ray.cache import StandinPool
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

_BLOCKS = -(-WINDOW // BLOCK_SIZE)
_SIDE_BY_SIDE = 4  # windows of a pass: logits of a large vocabulary take 50 MB each
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
        # a pass over more windows reads the experts no more often
        fitting = self._parts.limits.kv_tokens // (_BLOCKS * BLOCK_SIZE)
        most = max(1, min(_SIDE_BY_SIDE, fitting)) if self._parts.runner.packed else 1
        batched = [windows[at : at + most] for at in range(0, len(windows), most)]
        work = [(group, some) for group in groups for some in batched]
        bar = iter(progress(work, total=len(work), desc=what))
        for group in groups:
            variants = self._opened(group)
            for side_by_side in batched:
                next(bar, None)
                exact = self._said(side_by_side)
                for variant in variants.values():
                    variant.totals.compare(exact, self._said(side_by_side, variant))
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
        """Whose records are in memory together; each has at least one variant. Variants of equal records share them."""
        groups, held = list[dict[int, PlannedStandins]](), dict[str, int]()
        for at, plan in enumerate(planned):
            if isinstance(plan, BudgetError):
                continue
            more = 0 if plan.setup.binding in held else plan.nbytes
            if not groups or (more and sum(held.values()) + more > self._room):
                groups.append({})
                held.clear()
            groups[-1][at] = plan
            held[plan.setup.binding] = plan.nbytes
        return groups

    def _opened(self, group: Mapping[int, PlannedStandins]) -> dict[int, _Variant]:
        loaded, pools, variants = self._parts.loaded, dict[str, StandinPool](), dict[int, _Variant]()
        for at, planned in group.items():
            setup = planned.setup
            pool = pools.setdefault(setup.binding, pools.get(setup.binding) or planned.load(loaded))
            resident = [np.full(count, setup.plan.fully_resident) for count in loaded.layout.experts_per_layer]
            for layer, named in enumerate(setup.plan.pinned):
                resident[layer][list(named)] = True
            variants[at] = _Variant(standins=planned.open(loaded, pool), resident=resident)
        return variants

    def _said(
        self, windows: Sequence[tuple[int, ...]], variant: _Variant | None = None
    ) -> list[tuple[list[str], Tensor, Tensor]]:
        """What the engine says about the windows' scored tokens, each a step of `Totals.compare`."""
        step, runner = self._parts.step, self._parts.runner
        outcome = StepOutcome.empty(_ROWS * len(windows))
        blocks = [range(at * _BLOCKS, (at + 1) * _BLOCKS) for at in range(len(windows))]
        if variant is not None:
            step.answer = lambda *given: self._answer(variant, outcome, *given)
        try:
            logits = runner.score_side_by_side([window[:-1] for window in windows], blocks)
        finally:
            step.answer = None
        if variant is not None:
            totals = variant.totals
            totals.hits += int(outcome.hits_T.sum())
            totals.fetched += int(outcome.fetched_T.sum())
            totals.stood_in += int(outcome.standins_TS.sum())
            totals.expected_rise += float(outcome.loss_T.sum())
        scored = [logits_nV[PREFILLED - 1 :].log_softmax(dim=-1).cpu() for logits_nV in logits]
        return [
            ([str(hash(window))] * len(scored_BV), scored_BV, torch.tensor(window[PREFILLED:]))
            for window, scored_BV in zip(windows, scored, strict=True)
        ]

    def _answer(
        self,
        variant: _Variant,
        outcome: StepOutcome,
        block: MoEBlock,
        hidden_TD: Tensor,
        ids_TK: Tensor,
        weight_TK: Tensor,
    ) -> Tensor:
        """A layer's output: the prompts' rows by the experts, the others as `fast` has it."""
        step, layer = self._parts.step, block.layer
        late_T = torch.arange(len(hidden_TD)) % (WINDOW - 1) >= WINDOW - 1 - _ROWS
        order_T = late_T.to(torch.int8).argsort(stable=True)  # all prompts' rows first
        rows, at = [part[order_T] for part in (hidden_TD, ids_TK, weight_TK)], int((~late_T).sum())
        if not variant.standins.covers(layer):
            hit_TK = variant.resident[layer][ids_TK[late_T].cpu().numpy()]
            outcome.count_exact(hit_TK)
            return block.exact(hidden_TD, ids_TK, weight_TK)
        count = len(hidden_TD) - at
        endless = np.full(count, np.inf, np.float32)
        step.outcome = outcome
        step.budgets = RowBudgets(mode_T=np.full(count, FAST, np.int8), allowance_T=endless, price_T=endless)
        out_TD, resolution = block.stood_in(variant.standins, variant.resident[layer], at, *rows)
        for kind, loss in variant.standins.loss_by_kind(layer, resolution).items():
            variant.totals.expected_by_kind[kind] = variant.totals.expected_by_kind.get(kind, 0.0) + loss
        return out_TD[order_T.argsort()]
