"""Measures what stand-ins cost on text that nothing was fitted on, and fits the expected loss model to it.

    expected loss of an access = squared slot weight × squared output error × sensitivity of the layer × scale of the
    kind   (nats)

Sensitivity: divergence with stand-ins in one layer only, over the summed weight² × error² of its accesses there.
Scales: those with which what the sensitivities predict comes nearest to all divergences measured. Divergence is
KL(exact || served) per token: the rise of the loss but for chance, with far less spread. bench.py scores.

Losses of layers do add up: on builtin:tiny at 25 % one layer at a time comes to 1.0 to 1.17 times all at once. They
differ by text: measured over expected is .65 on held-out code and manuals, .85 to 1.15 on other packages' code and
readmes, 1.7 to 2.3 on questions of tasks, which nobody ever has it write, .4 to .8 on their answers. So there is no
joint factor; nor one by how certain the model is, which is told only afterwards (1 - sum p^2 leaves 1.0 to 1.8 of the
same texts, and answers at 30 and more). `policy.guard` corrects by what a service really gets.

Scales of low-bit kinds move by up to a quarter, sensitivities of layers by up to a half, from one set of records to
another. One scale for all widths below 8 bits: KL at 15 % of memory -1.8 +- .5 %, with int4 experts at half -2.4 +- .4,
at 25 % -1 +- 1; with other records -3, -2 and +2, of rises nothing that can be told. Not kept.

Legend: L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from buddymoe_ray.calibrate.bench import Bench
from buddymoe_ray.engine.evaluate import EvalResult
from buddymoe_ray.errors import ConfigError
from buddymoe_ray.models.profile import BudgetPoint, ComparisonRow, Profile, save_profile

__all__ = ["LossOptions", "measure_budgets", "measure_losses", "within"]

_FEWER_WINDOWS, _DEEP = 4, 8
"""Sensitivities of models with more layers than this are measured on one of so many windows."""
_WITHIN_PERCENT = 0.3
_ROOMIER = (60.0, 70.0, 80.0, 90.0)
"""Memories (%) that a probe is tried at where none of those compared holds it: copies of 2 bits are half of 4."""
_PREDICTS_NOTHING = 1e-12
BUDGETS = (0.001, 0.003, 0.01, 0.03)
_STEPS = 200


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """What is measured: `memories` in per cent, `budgets` in nats per token (None: `BUDGETS`, where models are small;
    empty: none), at most `tokens` held-out tokens (None: as many as say enough, see pace.py), of stand-ins `standins`
    alone (None: all that the records allow)."""

    memories: tuple[float, ...] = (75.0, 50.0, 25.0)
    budgets: tuple[float, ...] | None = None
    tokens: int | None = None
    standins: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name, values, most in (("memories", self.memories, 100.0), ("budgets", self.budgets or BUDGETS, 1.0)):
            if not values or not all(0 < value <= most for value in values):
                raise ConfigError(
                    f"{name} are {list(values)}, must be some numbers above 0 and up to {most:g}. hint: leave them out"
                )
        if self.tokens is not None and self.tokens < 1:
            raise ConfigError(
                f"expected loss tokens are {self.tokens}, must be at least 1. hint: leave --loss-tokens out"
            )


def measure_losses(profile: Profile, bench: Bench, standins: tuple[str, ...], options: LossOptions) -> Profile:
    """A profile with sensitivities, scales, comparison and recommendation.

    The engines of `bench` read it from the disk, so it is written after each stage, the last one too.
    """
    profile = replace(profile, sensitivity_L=_sensitivity(bench, profile, standins[0], options.memories))
    save_profile(profile, bench.path)
    wanted = [(standin, memory) for memory in options.memories for standin in standins]
    rows = bench.run([{"standin": standin, "memory": f"{memory}%"} for standin, memory in wanted], "comparison")
    found = [(standin, memory, row) for (standin, memory), row in zip(wanted, rows, strict=True) if row is not None]
    scales, error = _scales(found)
    profile = replace(profile, kind_scale=scales)
    if options.standins is None and len(profile.record_bytes) > 1:
        save_profile(profile, bench.path)  # what is mixed goes by the scales
        rows = bench.run([{"standin": "auto", "memory": f"{memory}%"} for memory in options.memories], "the mix")
        mixed = zip(options.memories, rows, strict=True)
        found = [("auto", memory, row) for memory, row in mixed if row is not None] + found
    compared = tuple(_comparison(standin, memory, row) for standin, memory, row in found)
    profile = _recommend(replace(profile, comparison=compared))
    if found:
        profile = replace(profile, reason=f"{profile.reason}; expected losses are right to {100 * error:.0f} %")
    save_profile(profile, bench.path)
    return profile


def measure_budgets(profile: Profile, bench: Bench, options: LossOptions) -> Profile:
    """The same with the budget curve of its best stand-in. `bounded` fetches, so this goes step by step."""
    ranked = sorted(profile.comparison, key=lambda row: row.kl)
    best = "auto" if profile.record_bytes or not ranked else ranked[0].standin
    profile = replace(profile, budget_curve=_budget_curve(bench, best, options))
    save_profile(profile, bench.path)
    return profile


def _sensitivity(bench: Bench, profile: Profile, probe: str, memories: Sequence[float]) -> npt.NDArray[np.float32]:
    """Measured over predicted divergence with `probe` in one layer at a time, at the least memory that holds it, be it
    more than any that is asked for: what is not measured so would be compared with what is.

    Where there is no memory for the other layers' experts, one number for all layers, from `probe` in all of them. A
    layer that says nothing counts like the costliest. NaN when it cannot be run at all.
    """
    every = _FEWER_WINDOWS if profile.layers > _DEEP and len(bench.windows) > 2 * _FEWER_WINDOWS else 1
    changes = [{"standin_layers": str(layer)} for layer in range(profile.layers)] if bench.hosted else [{}]
    for memory in (*sorted(memories), *(more for more in _ROOMIER if more > max(memories))):
        rows = bench.run(
            [{"standin": probe, "memory": f"{memory}%", **change} for change in changes], "sensitivity", every=every
        )
        ratio = [r.kl / r.expected_rise if r and r.expected_rise > _PREDICTS_NOTHING else np.nan for r in rows]
        known_L = np.broadcast_to(np.array(ratio, dtype=np.float32), (profile.layers,))
        if np.isfinite(known_L).any():
            filled_L = np.where(np.isfinite(known_L), known_L, np.nanmax(known_L))
            return np.maximum(filled_L, _PREDICTS_NOTHING).astype(np.float32)
    return np.full(profile.layers, np.nan, dtype=np.float32)


def _budget_curve(bench: Bench, standin: str, options: LossOptions) -> tuple[BudgetPoint, ...]:
    """`bounded` with one stand-in at every memory and budget. Where the least budget already fetches nothing, larger
    ones change nothing and are not run.
    """

    def measured(points: Sequence[tuple[float, float]], what: str) -> dict[tuple[float, float], EvalResult | None]:
        variants = [{"mode": "bounded", "standin": standin, "memory": f"{m}%", "budget": b} for m, b in points]
        return dict(zip(points, bench.run(variants, what), strict=True))

    least, *larger = sorted(options.budgets or BUDGETS)
    rows = measured([(memory, least) for memory in options.memories], "least budget")
    unsettled = [memory for (memory, _), row in rows.items() if row is not None and row.fetched_fraction > 0]
    rows |= measured([(memory, budget) for memory in unsettled for budget in larger], "larger budgets")
    curve = [
        (memory, budget, rows.get((memory, budget), rows[memory, least]))
        for memory in options.memories
        for budget in options.budgets or BUDGETS
    ]
    return tuple(
        BudgetPoint(memory_percent=memory, budget=budget, **_measured(BudgetPoint, row))
        for memory, budget, row in curve
        if row is not None
    )


def _scales(found: Sequence[tuple[str, float, EvalResult]]) -> tuple[dict[str, float], float]:
    """Scales of kinds that bring predicted divergence nearest to the measured one in all rows at once, mixes included,
    and how near: the root mean square of what is left, as a share.

    Steps in the logarithm, each kind's by its share of every row's prediction. A row that does not say whose its losses
    are has one kind: its stand-in.
    """
    rows = [(standin, row) for standin, _, row in found if row.expected_rise > _PREDICTS_NOTHING and row.kl > 0]
    if not rows:
        return {}, 0.0
    parts = [_by_kind(standin, row) for standin, row in rows]
    kinds = sorted({kind for part in parts for kind in part})
    expected_RK = np.array([[part.get(kind, 0.0) for kind in kinds] for part in parts])
    measured_R = np.log([row.kl for _, row in rows])
    scale_K = np.ones(len(kinds))
    for _ in range(_STEPS):
        predicted_R = expected_RK @ scale_K
        share_RK = expected_RK * scale_K / predicted_R[:, None]
        scale_K *= np.exp(share_RK.T @ (measured_R - np.log(predicted_R)) / share_RK.sum(axis=0))
    left_R = measured_R - np.log(expected_RK @ scale_K)
    return dict(zip(kinds, scale_K.tolist(), strict=True)), float(np.sqrt(np.mean(left_R**2)))


def _by_kind(standin: str, row: EvalResult) -> dict[str, float]:
    """Expected loss of a row by whose answers it is: of records by their kinds, of all others by the stand-in."""
    return {kind or standin: loss for kind, loss in row.expected_by_kind.items()} or {standin: row.expected_rise}


def _comparison(standin: str, memory: float, row: EvalResult) -> ComparisonRow:
    return ComparisonRow(standin=standin, memory_percent=memory, **_measured(ComparisonRow, row))


def _measured(kind: type[ComparisonRow] | type[BudgetPoint], row: EvalResult) -> dict[str, Any]:
    """What a row of the profile takes over from a result, under the same names."""
    return {field.name: getattr(row, field.name) for field in fields(kind) if hasattr(row, field.name)}


def within(row: ComparisonRow) -> bool:
    """Whether its rise may be as little as a stand-in may cost that is recommended."""
    return row.dppl_percent - 2 * row.dppl_se <= _WITHIN_PERCENT


def _recommend(profile: Profile) -> Profile:
    """The stand-in of least divergence at the memory nearest to half, and whether it is within the default budget; if
    nothing is there, at the least memory above where something is."""
    rows_of = {m: [r for r in profile.comparison if r.memory_percent == m] for m in _memories(profile)}
    if not rows_of:
        return replace(profile, recommended=None, reason="no stand-in fits at any memory that was measured")
    bests = [min(rows, key=lambda row: (row.kl, row.standin)) for rows in rows_of.values()]
    best = next((row for row in bests if within(row)), bests[0])
    said = (
        f"{best.standin} raises perplexity by {best.dppl_percent:.2f} ± {best.dppl_se:.2f} % at "
        f"{best.memory_percent:g} % memory with nothing fetched (divergence {best.kl:.2g} nats), the least of "
        f"{len(rows_of[best.memory_percent])}"
    )
    if not within(best):
        return replace(profile, recommended=None, reason=f"{said}; more than {_WITHIN_PERCENT} %")
    if best is not bests[0]:
        said += f"; at {bests[0].memory_percent:g} % all cost more than {_WITHIN_PERCENT} %"
    return replace(profile, recommended=best.standin, reason=said)


def _memories(profile: Profile) -> list[float]:
    """Of the comparison: the one nearest to half, then those above it."""
    known = sorted({row.memory_percent for row in profile.comparison})
    first = min(known, key=lambda m: (abs(m - 50), m), default=0.0)
    return [m for m in known if m >= first]
