"""What was seen of the router, in plots: residency, decidedness and predictability, experts used together.

Each section takes a profile and yields markup. Simulates nothing itself (`hit_rates` does).

Legend: L layers, E experts, C cache sizes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from buddymoe_ray.calibrate.charts import PALETTE, Axis, Point, Series, line_chart
from buddymoe_ray.calibrate.hit_rates import HitRates, hit_rates
from buddymoe_ray.calibrate.markup import Markup, element, picture, table
from buddymoe_ray.models.profile import Profile

__all__ = ["coactivation", "lift_levels", "residency", "routing"]

_RAMP = tuple(
    tuple(round(255 + (end - 255) * abs(at - 7) / 7) for end in ((33, 102, 172) if at < 7 else (178, 24, 43)))
    for at in range(15)
)
"""Blue (rarer together than chance) over white to red (more often), seven steps each way."""

_MOST_PIXELS = 128
_SHARES = (0.25, 0.5, 0.75)


def residency(profile: Profile) -> Iterator[Markup]:
    """Hit rates of the rules by the share of experts kept."""
    rates = hit_rates(profile.counts_LE, profile.routes_TLK)
    yield element(
        "p",
        "Share of uses whose expert is found resident, mean over layers, when so many experts of each layer are kept. "
        "Static: the most frequent ones. Null: any. LRU: those used last. Oracle: the best choice of one who knows the "
        "future (Belady). What is not hit is what stand-ins or fetches must answer.",
        class_="sub",
    )
    share = [100 * size / rates.experts for size in rates.sizes]
    named = _rules(rates)
    series = [
        Series(
            name=name,
            colour=PALETTE[at] if at else "#777777",
            reference=at == 0,
            points=[Point(x=x, y=100 * float(y)) for x, y in zip(share, values_C, strict=True)],
        )
        for at, (name, values_C) in enumerate(named)
    ]
    x, y = Axis(label="experts kept, % of each layer's"), Axis(label="uses found resident, %", include=(0.0, 100.0))
    yield line_chart(series, x, y, title="Hit rate against experts kept")
    rows = [[name, *(f"{100 * np.interp(100 * s, share, values_C):.1f}" for s in _SHARES)] for name, values_C in named]
    yield table(["hit rate, %", *(f"{100 * s:g} % kept" for s in _SHARES)], rows)
    if rates.lru_LC is None:
        yield element("p", "The profile keeps no routes, so LRU and oracle were not simulated.", class_="sub")


def routing(profile: Profile) -> Iterator[Markup]:
    """Entropy, reuse and predictability by layer."""
    yield element(
        "p",
        "Entropy of the router over its maximum (1 is undecided). Reuse: share of a token's experts that the next "
        "token uses too. Predictability: share of the next layer's experts that its router names on this layer's "
        "input. Dashed: reuse and predictability by chance.",
        class_="sub",
    )
    lines = (
        ("entropy", profile.entropy_L),
        ("reuse by next token", profile.reuse_L),
        ("next layer foreseen", profile.next_layer_recall_L),
    )
    series = [
        Series(name=name, colour=PALETTE[at], points=[Point(x=layer, y=float(v)) for layer, v in enumerate(values_L)])
        for at, (name, values_L) in enumerate(lines)
    ]
    chance = profile.top_k / profile.experts
    ends = [Point(x=0, y=chance), Point(x=profile.layers - 1, y=chance)]
    series.append(Series(name="chance", colour="#777777", reference=True, points=ends))
    ticks = sorted({round(at) for at in np.linspace(0, profile.layers - 1, min(profile.layers, 12))})
    x, y = Axis(label="MoE layer", ticks=ticks), Axis(label="share", include=(0.0, 1.0))
    yield line_chart(series, x, y, title="Entropy, reuse and predictability by layer")
    busiest_L = np.sort(profile.counts_LE, axis=1)[:, ::-1]
    quarter = math.ceil(profile.experts / 4)
    rows = [
        [
            str(layer),
            _number(profile.entropy_L[layer]),
            _number(profile.reuse_L[layer]),
            _number(profile.next_layer_recall_L[layer]),
            _number(profile.tae_LP[layer, 50]),
            _number(profile.margin_LP[layer, 50]),
            f"{100 * busiest_L[layer, :quarter].sum() / max(1, busiest_L[layer].sum()):.0f} %",
            str(int((profile.counts_LE[layer] == 0).sum())),
        ]
        for layer in range(profile.layers)
    ]
    head = ["layer", "entropy", "reuse", "foreseen", "median top-k entropy", "median margin", "uses of busiest quarter"]
    yield table([*head, "never used"], rows)


def coactivation(profile: Profile) -> Iterator[Markup]:
    """A picture per layer of how much more often than chance two experts are used by the same token."""
    if profile.top_k < 2 or profile.experts < 2:
        yield element("p", "A token uses one expert: none are used together.", class_="none")
        return
    yield element(
        "p",
        "Each pixel is a pair of experts of a layer, the most frequent at top left: how often both are used by one "
        "token against what their frequencies alone would give. Blocks of red are experts that work together; a layer "
        "without structure is white.",
        class_="sub",
    )
    swatches = [element("span", "", style=f"background:rgb({r},{g},{b})") for r, g, b in _RAMP]
    yield element("div", "a quarter of chance", element("div", *swatches), "four times chance", class_="ramp")
    maps = []
    for layer in range(profile.layers):
        levels = lift_levels(profile, layer)
        image = picture(levels, _RAMP, alt=f"co-activation of the experts of layer {layer}", size=150)
        maps.append(element("figure", image, element("figcaption", f"layer {layer}")))
    yield element("div", *maps, class_="maps")


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


def _rules(rates: HitRates) -> list[tuple[str, npt.NDArray[np.float64]]]:
    named = [("null: any experts", rates.uniform_C), ("static frequency", rates.static_LC.mean(axis=0))]
    if rates.lru_LC is not None and rates.oracle_LC is not None:
        named += [("LRU", rates.lru_LC.mean(axis=0)), ("oracle", rates.oracle_LC.mean(axis=0))]
    return named


def _number(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else "–"
