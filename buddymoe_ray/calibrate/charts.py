"""Plots and pages: lines, bars and matrices drawn by matplotlib, HTML by jinja2, everything within one file.

Knows numbers and labels, not what they mean. Matplotlib is imported here alone, and only where
something is drawn. Invariants: equal numbers give equal bytes; a page is well-formed and loads nothing, whatever text
is in it.
"""

from __future__ import annotations

import base64
import io
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Line", "bar_chart", "embedded", "line_chart", "matrix", "ramp", "rendered", "write_page"]

Numbers = Sequence[float] | npt.NDArray[Any]

BENT = 0.1
"""A symlog axis is linear within this of zero: rises span four orders of magnitude and may be below zero."""
_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # in XML
_LEVELS = 15
_INCHES = (5.8, 4.6)
"""Narrow, so that labels can be read where a page is as narrow as a phone."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Line:
    """Points joined by a line, with error bars of half-length `error` where it is given. A `reference` is dashed and
    grey, without markers. What is not finite is left out."""

    name: str
    x: Numbers
    y: Numbers
    error: Sequence[float] | None = None
    reference: bool = False


def line_chart(lines: Sequence[Line], *, x: str, y: str, **axes: Any) -> Figure | None:
    """Lines with a legend; `x` and `y` label the axes, `axes` goes to matplotlib. None where no point is finite."""
    lines = [line for line in lines if np.isfinite(line.y).any()]
    if not lines:
        return None
    figure, plot = _axes(x, y)
    for line in lines:
        if line.reference:
            plot.plot(line.x, line.y, color="#777777", linestyle="--", label=line.name)
        else:
            plot.errorbar(line.x, line.y, yerr=line.error, marker="o", markersize=4, capsize=3, label=line.name)
    for scale in ("xscale", "yscale"):
        if kind := axes.pop(scale, None):
            getattr(plot, f"set_{scale}")(kind, **({"linthresh": BENT} if kind == "symlog" else {}))
    plot.set(**axes)
    for axis in (plot.xaxis, plot.yaxis):
        axis.set_major_formatter("{x:g}")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def bar_chart(values: Numbers, labels: Sequence[str], *, x: str, y: str) -> Figure | None:
    """A bar per label with its value; of many labels some are written. None where no value is finite."""
    if not np.isfinite(values).any():
        return None
    figure, plot = _axes(x, y)
    bars = plot.bar(range(len(values)), values, width=0.72)
    if len(values) <= 16:
        plot.bar_label(bars, fmt="{:.3g}", fontsize=8)
    shown = range(0, len(values), -(-len(values) // 16))
    plot.set_xticks(shown, [labels[at] for at in shown])
    return figure


def _axes(x: str, y: str) -> tuple[Figure, Axes]:
    import matplotlib
    from cycler import cycler
    from matplotlib.figure import Figure

    figure = Figure(figsize=_INCHES, layout="constrained")
    plot = figure.add_subplot(xlabel=x, ylabel=y)
    plot.set_prop_cycle(cycler(linestyle=["-", ":"]) * cycler(color=matplotlib.color_sequences["petroff10"]))
    plot.grid(axis="y", color="#e4e4e4")
    plot.set_axisbelow(True)
    plot.spines[["top", "right"]].set_visible(False)
    return figure, plot


def embedded(figure: Figure | None, alt: str) -> Markup:
    """The figure as an image in the page, or words where there is none."""
    if figure is None:
        return Markup('<p class="none">Nothing was measured.</p>')
    import matplotlib

    drawn = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "buddymoe"}):
        figure.savefig(drawn, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return Markup('<img class="chart" src="data:image/svg+xml;base64,{}" alt="{}"/>').format(_base64(drawn), alt)


def ramp() -> list[tuple[int, int, int]]:
    """The colours of a matrix: blue over white to red, seven steps each way."""
    import matplotlib

    shades = matplotlib.colormaps["RdBu_r"](np.linspace(0, 1, _LEVELS))[:, :3]
    return [(int(r), int(g), int(b)) for r, g, b in (255 * shades).round()]


def matrix(levels: npt.NDArray[np.uint8], *, alt: str) -> Markup:
    """A matrix of levels 0 to 14 as an image, a pixel each."""
    from PIL import Image

    image, drawn = Image.fromarray(levels, mode="P"), io.BytesIO()
    image.putpalette([part for colour in ramp() for part in colour])
    image.save(drawn, format="png", optimize=True, bits=4)
    return Markup('<img class="matrix" src="data:image/png;base64,{}" alt="{}"/>').format(_base64(drawn), alt)


def _base64(drawn: io.BytesIO) -> str:
    return base64.b64encode(drawn.getvalue()).decode()


def rendered(template: str, values: Mapping[str, Any]) -> str:
    """A page from a template of this package; text is escaped, characters that XML forbids are replaced."""
    return _environment().get_template(template).render(values)


def write_page(page: str, path: Path) -> None:
    """Write it atomically. Raises OSError when that cannot be."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, path)


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("buddymoe_ray.calibrate", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: _FORBIDDEN.sub("\ufffd", value) if type(value) is str else value,
    )
