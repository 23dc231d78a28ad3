"""What stand-ins cost, in words, tables and plots: the sections of the report about measured harm.

Each takes a profile and yields markup. Measures nothing.

Legend: L layers, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np

from buddymoe_ray.calibrate.charts import PALETTE, Axis, Point, Series, bar_chart, line_chart
from buddymoe_ray.calibrate.markup import Markup, element, table
from buddymoe_ray.models.profile import BudgetPoint, ComparisonRow, Profile

__all__ = ["budgets", "layers", "provenance", "standins", "summary"]

_RISE = "rise of perplexity, % (± 2 standard errors)"


def summary(profile: Profile) -> Iterator[Markup]:
    """The verdict and the best few numbers."""
    reason = profile.reason.rstrip(".") or "no reason was recorded"
    if profile.recommended is None:
        text = element("strong", "No stand-in is recommended; bounded requests are answered exactly. ")
        yield element("p", text, reason + ".", class_="verdict refused")
    else:
        text = element("strong", f"Recommended: {profile.recommended}. ")
        yield element("p", text, reason + ".", class_="verdict")
    if not profile.measured:
        yield _note("Sensitivities were not measured: harms rank stand-ins but are not in nats, so no budget holds.")
    if profile.comparison:
        best = [min(rows, key=lambda r: (r.dppl_percent, r.standin)) for _, rows in _by_memory(profile)]
        rows = [
            [f"{r.memory_percent:g} %", r.standin, _rise(r), f"{r.top1_agreement:.1f} %", f"{r.miss_rate:.0f} %"]
            for r in best
        ]
        yield table(["memory", "least harm", "rise of perplexity, %", "same top token", "expert not resident"], rows)


def standins(profile: Profile) -> Iterator[Markup]:
    """Every stand-in at every memory."""
    rows = profile.comparison
    yield _note(
        "Nothing is fetched in decode. Memory is the share of all routed experts' bytes; what a stand-in keeps counts "
        "in it, the rest holds the most useful experts in full. Measured on text that the calibration did not fit to."
    )
    names = _ordered(rows)
    memories = sorted({row.memory_percent for row in rows}, reverse=True)
    series = [
        Series(
            name=name,
            colour=PALETTE[at % len(PALETTE)],
            points=[
                Point(x=r.memory_percent, y=r.dppl_percent, error=2 * r.dppl_se) for r in rows if r.standin == name
            ],
        )
        for at, name in enumerate(names)
    ]
    x = Axis(label="memory for experts, % of their bytes", ticks=sorted(memories))
    yield line_chart(series, x, Axis(label=_RISE, kind="asinh"), title="Harm against memory")
    found = {(row.standin, row.memory_percent): row for row in rows}
    marked = names.index(profile.recommended) if profile.recommended in names else None
    yield element("h3", "Rise of perplexity, % ± standard error")
    yield _pivot(names, memories, found, _rise, marked)
    yield element("h3", "Divergence KL(exact ‖ served), thousandths of a nat per token · same top token")
    yield _pivot(names, memories, found, lambda r: f"{1000 * r.kl:.3g} · {r.top1_agreement:.1f} %", marked)
    if rows:
        tokens = sorted({row.tokens for row in rows})
        mixed = " Plain lowbit mixes the widths, chosen by expert." if "lowbit" in names else ""
        yield _note(f"{' or '.join(f'{n:,}' for n in tokens)} tokens scored per cell.{mixed}")
    if profile.record_bytes:
        kept = sorted(profile.record_bytes.items(), key=lambda item: item[1])
        yield _note("Bytes of one expert's record: " + ", ".join(f"{kind} {size:,}" for kind, size in kept) + ".")


def budgets(profile: Profile) -> Iterator[Markup]:
    """Measured rise and fetches of `bounded` as the budget grows."""
    points = profile.budget_curve
    yield _note(
        "Mode bounded: a miss is answered by a stand-in while the request's allowance covers its calibrated harm, and "
        "by the real expert otherwise. The measured rise must stay under the dashed line, which is the budget itself."
    )
    limits = sorted({p.budget for p in points})
    curves = [
        (f"{memory:g} % memory", PALETTE[at % len(PALETTE)], [p for p in points if p.memory_percent == memory])
        for at, memory in enumerate(sorted({p.memory_percent for p in points}, reverse=True))
    ]

    def chart(y: Callable[[BudgetPoint], tuple[float, float]], axis: Axis, extra: list[Series], title: str) -> Markup:
        series = [
            Series(name=name, colour=colour, points=[Point(x=100 * p.budget, y=y(p)[0], error=y(p)[1]) for p in held])
            for name, colour, held in curves
        ]
        x = Axis(label="budget, % of perplexity (100 × nats per token)", kind="log")
        return line_chart([*series, *extra], x, axis, title=title)

    line = [Point(x=100 * limit, y=100 * limit) for limit in limits]
    budget = [Series(name="the budget", colour="#777777", reference=True, points=line)] if limits else []
    rises = Axis(label=_RISE, kind="asinh")
    yield chart(lambda p: (p.dppl_percent, 2 * p.dppl_se), rises, budget, "Measured rise against the budget")
    fetches = Axis(label="misses answered by the real expert, %", include=(0.0,))
    yield chart(lambda p: (p.fetched_fraction, math.nan), fetches, [], "Misses fetched against the budget")
    if points:
        head = ["memory", "budget, %", "measured rise, %", "charged, %", "misses fetched, %", "within the budget"]
        cells = [
            [
                f"{p.memory_percent:g} %",
                f"{100 * p.budget:g}",
                _plus_minus(p.dppl_percent, p.dppl_se),
                f"{100 * p.expected_rise:.3g}",
                f"{p.fetched_fraction:.1f}",
                "yes"
                if p.dppl_percent <= 100 * p.budget + 2 * (p.dppl_se if math.isfinite(p.dppl_se) else 0)
                else "NO",
            ]
            for p in sorted(points, key=lambda p: (-p.memory_percent, p.budget))
        ]
        yield table(head, cells)
        yield _note("Within: the measured rise is at most the budget plus two standard errors.")


def layers(profile: Profile) -> Iterator[Markup]:
    """Sensitivity, and what a stand-in in one layer alone would cost."""
    yield _note(
        "Sensitivity: nats of divergence per unit of squared slot weight × squared output error. Below it, the harm "
        "per token if every use in that layer were answered by the stand-in."
    )
    numbers = [str(layer) for layer in range(profile.layers)]
    axis = Axis(label="nats per unit", kind="linear")
    sensitivity = [float(value) for value in profile.sensitivity_L]
    yield bar_chart(sensitivity, numbers, "MoE layer", axis, title="Sensitivity by layer")
    kinds = [kind for kind in sorted(profile.errors) if profile.errors[kind].any()]
    if not kinds:
        return
    least = min(kinds, key=lambda kind: sum(_harm_of_layer(profile, kind)))
    shown = profile.recommended if profile.recommended in kinds else least  # a mix such as `lowbit` has no table
    harm_L = _harm_of_layer(profile, shown)
    unit = "nats per token" if profile.measured else "weighted squared error per token"
    yield element("h3", f"Expected harm by layer: {shown} everywhere in it")
    yield bar_chart(list(harm_L), numbers, "MoE layer", Axis(label=unit), title=f"Expected harm of {shown} by layer")
    share = [
        [kind, *(f"{100 * _error_share(profile, kind, layer):.3g}" for layer in range(profile.layers))]
        for kind in kinds
    ]
    yield element("h3", "Output error of stand-ins, % of the experts' output energy")
    yield table(["stand-in", *(f"layer {number}" for number in numbers)], share)


def provenance(profile: Profile) -> Iterator[Markup]:
    """What the numbers are of and from."""
    scales = ", ".join(f"{kind} {scale:.3g}" for kind, scale in sorted(profile.kind_scale.items())) or "none"
    rows = [
        ["model", profile.model],
        ["model hash", profile.model_hash],
        ["corpus hash", profile.corpus_sha or "unknown"],
        ["made by", profile.created_by],
        ["tokens traced", f"{profile.calibration_tokens:,}"],
        ["routes kept", f"{len(profile.routes_TLK):,} tokens"],
        ["survivors renormalised (norm_topk_prob)", "yes" if profile.norm_topk else "no"],
        ["measured ÷ predicted divergence", scales],
    ]
    cells = [
        element("tr", element("th", name, scope="row"), element("td", element("code", text))) for name, text in rows
    ]
    yield element("div", element("table", element("tbody", *cells)), class_="wide")
    yield _note(
        "Harm of one use = squared slot weight × squared output error × the layer's sensitivity × the kind's scale. "
        "Sensitivity is KL(exact ‖ served) with stand-ins in that layer alone; KL is an upper estimate of the rise of "
        "the loss with far less spread. Standard errors are of paired differences, clustered by window."
    )


def _pivot(
    names: list[str],
    memories: list[float],
    found: dict[tuple[str, float], ComparisonRow],
    cell: Callable[[ComparisonRow], str],
    marked: int | None,
) -> Markup:
    """A row per stand-in, a column per memory; a dash where the stand-in does not fit."""
    if not names:
        return element("p", "Nothing was measured.", class_="none")
    rows = [
        [name, *(cell(found[name, memory]) if (name, memory) in found else "–" for memory in memories)]
        for name in names
    ]
    return table(["stand-in", *(f"{memory:g} % memory" for memory in memories)], rows, marked=marked)


def _ordered(rows: tuple[ComparisonRow, ...]) -> list[str]:
    """Stand-ins from least to most harm, by their mean rank over the memories they were measured at."""
    ranks: dict[str, list[float]] = {}
    for memory in {row.memory_percent for row in rows}:
        here = sorted((r for r in rows if r.memory_percent == memory), key=lambda r: r.dppl_percent)
        for rank, row in enumerate(here):
            ranks.setdefault(row.standin, []).append(rank / len(here))
    return sorted(ranks, key=lambda name: (sum(ranks[name]) / len(ranks[name]), name))


def _by_memory(profile: Profile) -> list[tuple[float, list[ComparisonRow]]]:
    memories = sorted({row.memory_percent for row in profile.comparison}, reverse=True)
    return [(memory, [row for row in profile.comparison if row.memory_percent == memory]) for memory in memories]


def _harm_of_layer(profile: Profile, kind: str) -> list[float]:
    """Expected harm per token of answering every use in a layer by `kind`."""
    uses_LE = profile.counts_LE * profile.weight2_LE / profile.calibration_tokens
    return [float(harm) for harm in (uses_LE * profile.harm_LE(kind)).sum(axis=1)]


def _error_share(profile: Profile, kind: str, layer: int) -> float:
    uses_E = profile.counts_LE[layer] * profile.weight2_LE[layer]
    energy = float((uses_E * profile.energy_LE[layer]).sum())
    return float(np.sum(uses_E * profile.errors[kind][layer])) / energy if energy > 0 else math.nan


def _rise(row: ComparisonRow) -> str:
    return _plus_minus(row.dppl_percent, row.dppl_se)


def _plus_minus(value: float, error: float) -> str:
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:.{digits}f} ± {error:.{digits}f}" if math.isfinite(error) else f"{value:.{digits}f} ± ?"


def _note(text: str) -> Markup:
    return element("p", text, class_="sub")
