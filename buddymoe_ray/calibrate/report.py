"""The calibration as a page to read: one HTML file that needs no network, no script and no other file.

Numbers and plots for `templates/report.html`, which holds the words. Says nothing that is not in the profile; simulates
nothing itself (`hit_rates` does). Invariant: well-formed, whatever the model is called.

Legend: L layers, E experts, C cache sizes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from buddymoe_ray.calibrate.charts import Line, bar_chart, embedded, line_chart, matrix, ramp, rendered, write_page
from buddymoe_ray.calibrate.expected_loss import within
from buddymoe_ray.calibrate.hit_rates import hit_rates
from buddymoe_ray.errors import ProfileError
from buddymoe_ray.models.profile import ComparisonRow, Profile

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["next_command", "render_report", "write_report"]

_RISE = "rise of perplexity, % (± standard error)"
_MOST_PIXELS = 128
_HIT_SHARES = (25.0, 50.0, 75.0)


def render_report(profile: Profile) -> str:
    """The page as text."""
    hits = hit_lines(profile)
    kinds = [kind for kind in sorted(profile.errors) if profile.errors[kind].any()]
    values = {
        "profile": profile,
        "next_command": next_command(profile),
        "plus_minus": plus_minus,
        "embedded": embedded,
        "figures": figures(profile, hits),
        "shares": {kind: error_shares(profile, kind) for kind in kinds},
        "shown": shown_kind(profile),
        "hits": {line.name: np.interp(_HIT_SHARES, line.x, line.y) for line in hits},
        "busiest": busiest_quarter(profile),
        "maps": lift_maps(profile),
        "ramp": ramp(),
        **compared(profile.comparison),
    }
    return rendered("report.html", values)


def write_report(profile: Profile, path: Path) -> None:
    """Write the page atomically. Raises ProfileError when it cannot be written."""
    try:
        write_page(render_report(profile), path)
    except OSError as error:
        raise ProfileError(
            f"report {path} cannot be written ({error.strerror}), must be. "
            "hint: choose another --out or free some space"
        ) from error


def next_command(profile: Profile) -> str:
    """What to type now: serve with the least memory at which the best stand-in costs hardly anything, else exactly."""
    model = quote(profile.model)
    if not profile.measured:
        return f"buddymoe profile --model {model} --corpus FILES"
    enough = [row.memory_percent for row in compared(profile.comparison)["best"] if within(row)]
    if profile.recommended is None or not enough:
        return f"buddymoe serve {model} --mode exact"
    return f"buddymoe serve {model} --memory {min(enough):g}% --mode bounded"


def compared(rows: Sequence[ComparisonRow]) -> dict[str, Any]:
    """`names` of stand-ins from least to most divergence (by mean rank), which the recommendation goes by too,
    `memories` falling, `best` rows, `found` by both."""
    memories = sorted({row.memory_percent for row in rows}, reverse=True)
    best: list[ComparisonRow] = []
    ranks: dict[str, list[float]] = {}
    for memory in memories:
        here = sorted((row for row in rows if row.memory_percent == memory), key=lambda r: (r.kl, r.standin))
        best.append(here[0])
        for rank, row in enumerate(here):
            ranks.setdefault(row.standin, []).append(rank / len(here))
    names = sorted(ranks, key=lambda name: (sum(ranks[name]) / len(ranks[name]), name))
    return {
        "names": names,
        "memories": memories,
        "best": best,
        "found": {(row.standin, row.memory_percent): row for row in rows},
    }


def figures(profile: Profile, hits: Sequence[Line]) -> dict[str, Figure | None]:
    """All plots by name; None where nothing was measured."""
    rows, points = profile.comparison, profile.budget_curve
    budgets = sorted({100 * point.budget for point in points})
    budget = Line(name="the budget", x=budgets, y=budgets, reference=True)
    by_budget: dict[str, Any] = {"x": "budget, % of perplexity (100 × nats per token)", "xscale": "log"}
    layers = [str(layer) for layer in range(profile.layers)]
    shown, unit = shown_kind(profile), "nats per token" if profile.measured else "weighted squared error per token"
    ticks = sorted({round(at) for at in np.linspace(0, profile.layers - 1, min(profile.layers, 12))})
    return {
        "standins": line_chart(
            _standin_lines(profile),
            x="memory for experts, % of their bytes",
            y=_RISE,
            yscale="symlog",
            xticks=sorted({row.memory_percent for row in rows}),
        ),
        "rises": line_chart([*_budget_lines(profile, "dppl_percent"), budget], y=_RISE, yscale="symlog", **by_budget),
        "fetches": line_chart(
            _budget_lines(profile, "fetched_fraction"), y="misses answered by the real expert, %", **by_budget
        ),
        "sensitivity": bar_chart(profile.sensitivity_L, layers, x="MoE layer", y="nats per unit"),
        "losses": bar_chart(loss_of_layers(profile, shown) if shown else [], layers, x="MoE layer", y=unit),
        "hits": line_chart(hits, x="experts kept, % of each layer's", y="accesses found resident, %", ylim=(0, 100)),
        "entropy": line_chart(
            [Line(name="entropy", x=range(profile.layers), y=profile.entropy_L)],
            x="MoE layer",
            y="share of the most there can be",
            ylim=(0, 1),
            xticks=ticks,
        ),
        "routing": line_chart(_routing_lines(profile), x="MoE layer", y="share", ylim=(0, 1), xticks=ticks),
    }


def _standin_lines(profile: Profile) -> list[Line]:
    lines = []
    for name in compared(profile.comparison)["names"]:
        own = sorted((r for r in profile.comparison if r.standin == name), key=lambda row: row.memory_percent)
        rises, errors = [row.dppl_percent for row in own], [row.dppl_se for row in own]
        lines.append(Line(name=name, x=[row.memory_percent for row in own], y=rises, error=errors))
    return lines


def _budget_lines(profile: Profile, field: str) -> list[Line]:
    lines = []
    for memory in sorted({point.memory_percent for point in profile.budget_curve}, reverse=True):
        own = sorted((p for p in profile.budget_curve if p.memory_percent == memory), key=lambda point: point.budget)
        error = [point.dppl_se for point in own] if field == "dppl_percent" else None
        x, y = [100 * point.budget for point in own], [getattr(point, field) for point in own]
        lines.append(Line(name=f"{memory:g} % memory", x=x, y=y, error=error))
    return lines


def _routing_lines(profile: Profile) -> list[Line]:
    layers = range(profile.layers)
    named = {
        "reuse by next token": profile.reuse_L,
        "next layer foreseen": profile.next_layer_recall_L,
    }
    chance = [profile.top_k / profile.experts] * profile.layers
    lines = [Line(name=name, x=layers, y=values_L) for name, values_L in named.items()]
    return [*lines, Line(name="chance", x=layers, y=chance, reference=True)]


def hit_lines(profile: Profile) -> list[Line]:
    """Hit rate (%) of each rule by the share of experts kept (%), mean over layers."""
    rates = hit_rates(profile.counts_LE, profile.routes_TLK)
    named = {"null: any experts": rates.uniform_C, "static frequency": rates.static_LC.mean(axis=0)}
    if rates.served_LC is not None and rates.oracle_LC is not None:
        named |= {"as served": rates.served_LC.mean(axis=0), "oracle": rates.oracle_LC.mean(axis=0)}
    kept = [100 * size / rates.experts for size in rates.sizes]
    return [Line(name=name, x=kept, y=100 * y, reference=name.startswith("null")) for name, y in named.items()]


def shown_kind(profile: Profile) -> str | None:
    """The kind whose expected loss is shown by layer: the recommended one, or the cheapest where that is a mix."""
    kinds = [kind for kind in sorted(profile.errors) if profile.errors[kind].any()]
    if profile.recommended in kinds:
        return profile.recommended
    return min(kinds, key=lambda kind: sum(loss_of_layers(profile, kind)), default=None)


def loss_of_layers(profile: Profile, kind: str) -> list[float]:
    """Expected loss per token of answering every access in a layer by `kind`."""
    accesses_LE = profile.counts_LE * profile.weight2_LE / profile.calibration_tokens
    return [float(loss) for loss in (accesses_LE * profile.loss_LE(kind)).sum(axis=1)]


def error_shares(profile: Profile, kind: str) -> list[float]:
    """Output error by layer, % of the experts' output energy."""
    accesses_LE = profile.counts_LE * profile.weight2_LE
    energy_L, error_L = (accesses_LE * profile.energy_LE).sum(axis=1), (accesses_LE * profile.errors[kind]).sum(axis=1)
    pairs = zip(error_L, energy_L, strict=True)
    return [100 * float(error / energy) if energy > 0 else math.nan for error, energy in pairs]


def busiest_quarter(profile: Profile) -> npt.NDArray[np.float64]:
    """Share of a layer's accesses (%) that go to its busiest quarter of experts `[L]`."""
    busiest_LE = np.sort(profile.counts_LE, axis=1)[:, ::-1]
    share_L: npt.NDArray[np.float64] = 100 * busiest_LE[:, : math.ceil(profile.experts / 4)].sum(axis=1)
    return share_L / np.maximum(1, busiest_LE.sum(axis=1))


def plus_minus(value: float, error: float) -> str:
    """A measured number with its standard error."""
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:.{digits}f} ± {error:.{digits}f}" if math.isfinite(error) else f"{value:.{digits}f} ± ?"


def lift_maps(profile: Profile) -> list[Any]:
    """An image per layer; none where a token uses one expert."""
    layers = range(profile.layers if min(profile.top_k, profile.experts) > 1 else 0)
    return [matrix(lift_levels(profile, at), alt=f"co-activation of the experts of layer {at}") for at in layers]


def lift_levels(profile: Profile, layer: int) -> npt.NDArray[np.uint8]:
    """Levels 0 to 14 of log2(observed / expected) from -2 to 2, experts by falling frequency, at most 128 pixels wide.

    Expected: the product of the two experts' frequencies, less what choosing without replacement takes from pairs.
    """
    E, K = profile.experts, profile.top_k
    order = np.argsort(-profile.counts_LE[layer].astype(np.int64), kind="stable")
    together_EE = profile.coactivation_LEE[layer].astype(np.float64)[np.ix_(order, order)]
    counts_E = profile.counts_LE[layer].astype(np.float64)[order]
    expected_EE = np.outer(counts_E, counts_E) / profile.calibration_tokens * (K - 1) * E / (K * (E - 1))
    off_EE = 1.0 - np.eye(E)
    factor = math.ceil(E / _MOST_PIXELS)
    seen, chance = _pooled(together_EE * off_EE, factor), _pooled(expected_EE * off_EE, factor)
    lift = np.log2((seen + 0.5) / (chance + 0.5))  # half a count keeps pairs that are hardly expected near chance
    return (np.clip(lift, -2, 2) * 3.5 + 7).round().astype(np.uint8)


def _pooled(values_EE: npt.NDArray[np.float64], factor: int) -> npt.NDArray[np.float64]:
    """Sums over `factor` x `factor` squares; the last ones may be smaller."""
    starts = np.arange(0, len(values_EE), factor)
    summed: npt.NDArray[np.float64] = np.add.reduceat(np.add.reduceat(values_EE, starts, axis=0), starts, axis=1)
    return summed
