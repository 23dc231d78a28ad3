"""Measures what stand-ins cost on text that nothing was fitted on, and fits the harm model to it.

    harm of a use = squared slot weight × squared output error × sensitivity of the layer × scale of the kind   (nats)

Sensitivity: divergence with stand-ins in one layer only, over the summed weight² × error² of its uses there. Scale:
divergence with the kind in all layers, over what the sensitivities predict. Divergence is KL(exact || served) per
token: an upper estimate of the rise of the loss, with far less spread. Everything is scored step by step through the
engine that serves.

Legend: L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from buddymoe_ray.config import EngineConfig
from buddymoe_ray.engine.evaluate import EvalResult, cut_windows, evaluate_many
from buddymoe_ray.errors import BudgetError
from buddymoe_ray.models.profile import BudgetPoint, ComparisonRow, Profile, save_profile

__all__ = ["HarmOptions", "measure_harms"]

_ENGINES_AT_ONCE = 8
_WITHIN_PERCENT = 0.3
_PREDICTS_NOTHING = 1e-12


@dataclass(frozen=True, kw_only=True)
class HarmOptions:
    """What is measured: `memories` in per cent, `budgets` in nats per token, at most `tokens` held-out tokens."""

    memories: tuple[float, ...] = (75.0, 50.0, 25.0)
    budgets: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03)
    tokens: int = 6144


def measure_harms(
    profile: Profile,
    config: EngineConfig,
    path: Path,
    held: Sequence[int],
    standins: tuple[str, ...],
    options: HarmOptions,
    progress: Callable[..., Iterable[Any]],
) -> Profile:
    """A profile with sensitivities, scales, comparison, budget curve and recommendation.

    `path` is where the profile is: engines read it from there, so it is written after each stage.
    """
    windows = cut_windows(held, tokens=options.tokens)
    lowest = f"{min(options.memories)}%"
    bench = _Bench(config, path, windows, progress)
    probe = standins[0]
    alone = bench.run(
        [{"standin": probe, "memory": lowest, "standin_layers": str(layer)} for layer in range(profile.layers)],
        "sensitivity",
    )
    ratio = [row.kl / row.expected_rise if row and row.expected_rise > _PREDICTS_NOTHING else np.nan for row in alone]
    known = np.array(ratio, dtype=np.float32)
    sensitivity_L = np.where(np.isfinite(known), known, np.nanmean(known) if np.isfinite(known).any() else np.nan)
    profile = replace(profile, sensitivity_L=np.maximum(sensitivity_L, 1e-12).astype(np.float32))
    save_profile(profile, path)
    wanted = [(standin, memory) for memory in options.memories for standin in standins]
    rows = bench.run([{"standin": s, "memory": f"{m}%"} for s, m in wanted], "comparison")
    found = [(standin, memory, row) for (standin, memory), row in zip(wanted, rows, strict=True) if row is not None]
    profile = replace(
        profile,
        kind_scale=_scales(found),
        comparison=tuple(_comparison(standin, memory, row) for standin, memory, row in found),
    )
    profile = _recommend(profile)
    save_profile(profile, path)
    points = [(memory, budget) for memory in options.memories for budget in options.budgets]
    curve = bench.run(
        [{"mode": "bounded", "memory": f"{memory}%", "budget": budget} for memory, budget in points], "budgets"
    )
    profile = replace(
        profile,
        budget_curve=tuple(_point(m, b, row) for (m, b), row in zip(points, curve, strict=True) if row is not None),
    )
    save_profile(profile, path)
    return profile


class _Bench:
    """Runs variants of one engine over the held-out windows, a few engines at a time beside one exact engine."""

    def __init__(
        self,
        config: EngineConfig,
        path: Path,
        windows: Sequence[tuple[int, ...]],
        progress: Callable[..., Iterable[Any]],
    ) -> None:
        # fetched experts come from the host tier here: what is measured is quality, and the disk would only slow it
        self._config = replace(
            config,
            mode="fast",
            profile=str(path),
            host_memory="100%",
            max_running=min(64, len(windows)),
            guard_share=0.0,
        )
        self._windows, self._progress = windows, progress

    def run(self, variants: Sequence[dict[str, Any]], what: str) -> list[EvalResult | None]:
        """A result per variant; None where the memory cannot hold it."""
        results: list[EvalResult | None] = []
        groups = [variants[at : at + _ENGINES_AT_ONCE] for at in range(0, len(variants), _ENGINES_AT_ONCE)]
        for group in self._progress(groups, total=len(groups), desc=what):
            results += self._together([replace(self._config, **variant) for variant in group])
        return results

    def _together(self, configs: list[EngineConfig]) -> list[EvalResult | None]:
        try:
            return list(evaluate_many(configs, self._windows, batch=self._config.max_running))
        except BudgetError:
            if len(configs) == 1:
                return [None]
            return [result for config in configs for result in self._together([config])]


def _scales(found: Sequence[tuple[str, float, EvalResult]]) -> dict[str, float]:
    """Measured over predicted divergence of each stand-in, at the least memory it was run at.

    `lowbit` is a mix: its kinds get their own scale from the rows that use them alone, else the mix's.
    """
    scales: dict[str, float] = {}
    for standin, _, row in sorted(found, key=lambda item: -item[1]):  # the least memory comes last and stays
        if row.expected_rise > _PREDICTS_NOTHING:
            scales[standin] = row.kl / row.expected_rise
    return scales


def _comparison(standin: str, memory: float, row: EvalResult) -> ComparisonRow:
    return ComparisonRow(
        standin=standin,
        memory_percent=memory,
        dppl_percent=row.dppl_percent,
        dppl_se=row.dppl_se,
        kl=row.kl,
        top1_agreement=row.top1_agreement,
        miss_rate=row.miss_rate,
        tokens=row.tokens,
    )


def _point(memory: float, budget: float, row: EvalResult) -> BudgetPoint:
    return BudgetPoint(
        memory_percent=memory,
        budget=budget,
        dppl_percent=row.dppl_percent,
        dppl_se=row.dppl_se,
        fetched_fraction=row.fetched_fraction,
        expected_rise=row.expected_rise,
        tokens=row.tokens,
    )


def _recommend(profile: Profile) -> Profile:
    """The stand-in of least divergence at the memory nearest to half, and whether it is within the default budget."""
    memories = sorted({row.memory_percent for row in profile.comparison}, key=lambda m: (abs(m - 50), m))
    rows = [row for row in profile.comparison if memories and row.memory_percent == memories[0]]
    if not rows:
        return replace(profile, recommended=None, reason="no stand-in fits at any memory that was measured")
    best = min(rows, key=lambda row: (row.kl, row.standin))
    said = (
        f"{best.standin} raises perplexity by {best.dppl_percent:.2f} ± {best.dppl_se:.2f} % at "
        f"{best.memory_percent:g} % memory with nothing fetched (divergence {best.kl:.2g} nats), the least of "
        f"{len(rows)}"
    )
    if best.dppl_percent - 2 * best.dppl_se > _WITHIN_PERCENT:
        return replace(profile, recommended=None, reason=f"{said}; more than {_WITHIN_PERCENT} %")
    return replace(profile, recommended=best.standin, reason=said)
