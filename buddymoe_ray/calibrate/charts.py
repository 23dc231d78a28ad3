"""Plots as inline SVG: lines with error bars, and bars. Static, a few kilobytes each, values shown on hovering.

Drawn here and not by a plotting library: plotly would put 4.5 MB of script into every report, matplotlib 40 MB of
packages on every serving machine. Knows numbers and labels, not what they mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from buddymoe_ray.calibrate.markup import Markup, element
from buddymoe_ray.calibrate.scales import Axis, Scale, scale_of

__all__ = ["PALETTE", "Axis", "Point", "Series", "bar_chart", "line_chart"]

PALETTE = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#8c564b", "#5e3c99", "#6b8e23", "#17a2a2",
    "#a50f15", "#444444",
)  # fmt: skip
GREY = "#777777"
_WIDTH, _HEIGHT = 760.0, 380.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 90.0, 170.0, 14.0, 50.0
_LINE = 14.0
_FLOOR = _HEIGHT - _BOTTOM


@dataclass(frozen=True, kw_only=True)
class Point:
    """A measured point; `error` is the half-length of its error bar, NaN for none."""

    x: float
    y: float
    error: float = math.nan


@dataclass(frozen=True, kw_only=True)
class Series:
    """Points joined by a line. A `reference` is dashed, without markers."""

    name: str
    points: Sequence[Point]
    colour: str
    reference: bool = False


def line_chart(series: Sequence[Series], x: Axis, y: Axis, *, title: str) -> Markup:
    """Lines named at their right ends. Points that are not finite are left out."""
    lines = [(line, [p for p in line.points if math.isfinite(p.x) and math.isfinite(p.y)]) for line in series]
    lines = [(line, points) for line, points in lines if points]
    if not lines:
        return element("p", "Nothing was measured.", class_="none")
    every = [point for _, points in lines for point in points]
    x_at = scale_of(x, [p.x for p in every], _LEFT, _WIDTH - _RIGHT)
    y_at = scale_of(y, [end for p in every for end in _ends(p)], _FLOOR, _TOP)
    drawn = [_grid(y_at, x_at.end), _names(x.label, y.label, x_at.end)]
    drawn += [_text(f"{tick:g}", x_at(tick), _FLOOR + 18, "middle") for tick in x_at.ticks]
    rights: list[_Right] = []
    for line, points in lines:
        places = sorted((x_at(p.x), y_at(p.y)) for p in points)
        drawn.append(_path(line, places))
        if not line.reference:
            drawn += [_marker(line, point, x_at, y_at) for point in points]
        rights.append(_Right(*places[-1], sum(py for _, py in places) / len(places), line))
    return _svg([*drawn, *_line_names(rights)], title)


def bar_chart(values: Sequence[float], labels: Sequence[str], x_label: str, y: Axis, *, title: str) -> Markup:
    """A bar per label; of many labels some are written."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return element("p", "Nothing was measured.", class_="none")
    right = _WIDTH - 20
    y_at = scale_of(Axis(label=y.label, kind=y.kind, include=(0.0, *y.include)), finite, _FLOOR, _TOP)
    drawn = [_grid(y_at, right), _names(x_label, y.label, right)]
    step, every = (right - _LEFT) / len(values), math.ceil(len(values) / 16)
    for at, (value, label) in enumerate(zip(values, labels, strict=True)):
        left = _LEFT + step * at
        if math.isfinite(value):
            top, zero = y_at(value), y_at(0.0)
            place = {"x": _px(left + 0.14 * step), "y": _px(min(top, zero)), "width": _px(0.72 * step)}
            tip = element("title", f"{label}: {value:.4g}")
            drawn.append(element("rect", tip, **place, height=_px(abs(zero - top)), fill=PALETTE[0]))
        if at % every == 0:
            drawn.append(_text(label, left + step / 2, _FLOOR + 18, "middle"))
    return _svg(drawn, title)


def _path(line: Series, places: Sequence[tuple[float, float]]) -> Markup:
    points = " ".join(f"{_px(px)},{_px(py)}" for px, py in places)
    dash = {"stroke_dasharray": "5 4"} if line.reference else {}
    return element("polyline", points=points, fill="none", stroke=line.colour, stroke_width=1.8, **dash)


def _marker(line: Series, point: Point, x_at: Scale, y_at: Scale) -> Markup:
    """A dot with its error bar, and both in words on hovering."""
    px, parts = x_at(point.x), []
    spread = ""
    if math.isfinite(point.error):
        low, high = (_px(y_at(end)) for end in _ends(point))
        left = _px(px - 4)
        bar = f"M{_px(px)} {low}V{high}M{left} {low}h8M{left} {high}h8"
        parts.append(element("path", d=bar, stroke=line.colour, stroke_width=1.2, fill="none"))
        spread = f" ± {point.error:.2g}"
    parts.append(element("circle", cx=_px(px), cy=_px(y_at(point.y)), r="3.6", fill=line.colour))
    return element("g", element("title", f"{line.name} at {point.x:g}: {point.y:.4g}{spread}"), *parts)


def _ends(point: Point) -> tuple[float, float]:
    spread = point.error if math.isfinite(point.error) else 0.0
    return point.y - spread, point.y + spread


class _Right(NamedTuple):
    """Where a line ends, and its mean height, which orders lines that end together."""

    x: float
    y: float
    mean: float
    line: Series


def _line_names(rights: Sequence[_Right]) -> list[Markup]:
    """Names to the right of lines' ends, moved apart so that none covers another."""
    order = sorted(rights, key=lambda right: (right.y, right.mean, right.line.name))
    at_y: list[float] = []
    for right in order:
        at_y.append(max(right.y, at_y[-1] + _LINE) if at_y else right.y)
    lowest = _HEIGHT - 4
    for at in range(len(at_y) - 1, -1, -1):
        at_y[at] = min(at_y[at], lowest)
        lowest = at_y[at] - _LINE
    parts, left = [], _WIDTH - _RIGHT + 20
    for (px, py, _, line), y in zip(order, at_y, strict=True):
        lead = f"M{_px(px + 5)} {_px(py)}L{_px(left - 3)} {_px(y)}"
        parts.append(element("path", d=lead, stroke=line.colour, stroke_width=0.6, fill="none"))
        parts.append(_text(line.name, left, y + 4, "start", line.colour))
    return parts


def _grid(y_at: Scale, right: float) -> Markup:
    parts = []
    for tick in y_at.ticks:
        py = y_at(tick)
        stroke = "#999" if tick == 0 else "#e4e4e4"
        parts.append(element("path", d=f"M{_px(_LEFT)} {_px(py)}H{_px(right)}", stroke=stroke))
        parts.append(_text(f"{tick:g}", _LEFT - 8, py + 4, "end"))
    return element("g", *parts)


def _names(x_label: str, y_label: str, right: float) -> Markup:
    middle = (_TOP + _FLOOR) / 2
    turned = element("text", y_label, transform=f"translate(15 {_px(middle)}) rotate(-90)", text_anchor="middle")
    return element("g", _text(x_label, (_LEFT + right) / 2, _HEIGHT - 10, "middle"), turned)


def _text(text: str, x: float, y: float, anchor: str, colour: str = "#333333") -> Markup:
    return element("text", text, x=_px(x), y=_px(y), text_anchor=anchor, fill=colour)


def _svg(parts: Sequence[Markup], title: str) -> Markup:
    return element("svg", element("title", title), *parts, viewBox=f"0 0 {_WIDTH:g} {_HEIGHT:g}", role="img")


def _px(value: float) -> str:
    return f"{value:.1f}"
