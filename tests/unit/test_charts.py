"""Plots and pages: numbers are where they belong, what is not finite is left out, pages hold whatever text comes in."""

from __future__ import annotations

import base64
import io
import math
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from buddymoe_ray.calibrate.charts import Line, bar_chart, embedded, line_chart, matrix, ramp, rendered

NAN = math.nan


def image_of(markup: str) -> bytes:
    """The bytes of an embedded image."""
    return base64.b64decode(re.findall(r"base64,([^\"]+)", markup)[0])


@settings(max_examples=100)
@given(text=st.text())
def test_any_text_makes_a_well_formed_page(text: str) -> None:
    page = rendered("simulation.html", {"title": text, "embedded": embedded, "hits": None, "speeds": None})
    (heading,) = ET.fromstring(page.split("\n", 1)[1]).iter("h1")
    shown = "".join(ch if ch.isprintable() else "" for ch in text)
    kept = "".join(ch if ch.isprintable() else "" for ch in (heading.text or "").replace("\ufffd", ""))
    assert kept == shown.replace("\ufffd", "") and "\0" not in page


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (7, 7), (128, 128), (3, 10)])
def test_matrices_hold_their_levels_in_the_ramps_colours(shape: tuple[int, int]) -> None:
    levels = np.random.default_rng(0).integers(0, 15, shape).astype(np.uint8)
    found = matrix(levels, alt="a & b")
    shown = np.asarray(Image.open(io.BytesIO(image_of(found))).convert("RGB"))
    assert (shown == np.array(ramp(), dtype=np.uint8)[levels]).all()
    assert ET.fromstring(found).get("alt") == "a & b"
    middle, first, last = ramp()[7], ramp()[0], ramp()[14]
    assert min(middle) > 240 and first[2] > first[0] and last[0] > last[2], "blue over white to red"


def test_points_and_error_bars_are_where_they_belong() -> None:
    line = Line(name="a", x=[0, 10, 20], y=[5.0, NAN, 8.0], error=[2.0, 1.0, NAN])
    figure = line_chart([line], x="x", y="y")
    assert figure is not None
    (plot,) = figure.axes
    assert np.array_equal(plot.lines[0].get_xydata(), [[0, 5], [10, NAN], [20, 8]], equal_nan=True)
    bars = np.array(plot.collections[0].get_segments()[0])
    assert bars.tolist() == [[0, 3], [0, 7]]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a"]
    assert (plot.get_xlabel(), plot.get_ylabel()) == ("x", "y")


def test_references_are_dashed_and_bare() -> None:
    figure = line_chart([Line(name="r", x=[0, 1], y=[0, 1], reference=True)], x="x", y="y")
    assert figure is not None
    (line,) = figure.axes[0].lines
    assert (line.get_linestyle(), line.get_marker()) == ("--", "None")


def test_more_lines_than_colours_differ() -> None:
    lines = [Line(name=str(at), x=[0, 1], y=[at, at]) for at in range(20)]
    figure = line_chart(lines, x="x", y="y")
    assert figure is not None
    drawn = [line for line in figure.axes[0].lines if len(line.get_xdata()) == 2 and line.get_linestyle() != "None"]
    assert len({(line.get_color(), line.get_linestyle()) for line in drawn}) == 20


def test_a_bent_axis_shows_both_sides_of_zero() -> None:
    figure = line_chart([Line(name="a", x=[1, 2, 3], y=[-0.2, 0.1, 900.0])], x="x", y="y", yscale="symlog")
    assert figure is not None and figure.axes[0].get_yscale() == "symlog"
    low, high = figure.axes[0].get_ylim()
    assert low < -0.2 and high > 900


def test_what_is_not_finite_is_left_out() -> None:
    figure = line_chart([Line(name="a", x=[1], y=[2]), Line(name="none", x=[1], y=[NAN])], x="x", y="y")
    assert figure is not None and [t.get_text() for t in figure.legends[0].get_texts()] == ["a"]
    for empty in (
        line_chart([], x="x", y="y"),
        line_chart([Line(name="a", x=[0], y=[NAN])], x="x", y="y"),
        bar_chart([NAN], ["0"], x="x", y="y"),
        bar_chart([], [], x="x", y="y"),
    ):
        assert ET.fromstring(embedded(empty, "a")).text == "Nothing was measured."


def test_bars_stand_on_zero_and_say_their_value() -> None:
    figure = bar_chart([1.0, NAN, 2.0, -1.0], list("abcd"), x="x", y="y")
    assert figure is not None
    (plot,) = figure.axes
    assert [(bar.get_y(), bar.get_height()) for bar in plot.patches if bar.get_height() == bar.get_height()] == [
        *((0, 1.0), (0, 2.0), (0, -1.0)),
    ]
    assert {"1", "2", "-1"} <= {text.get_text() for text in plot.texts}


def test_many_bars_label_a_few() -> None:
    figure = bar_chart([1.0] * 61, [f"L{at}" for at in range(61)], x="x", y="y")
    assert figure is not None and len(figure.axes[0].patches) == 61
    assert len([t for t in figure.axes[0].get_xticklabels() if t.get_text().startswith("L")]) == 16


def test_equal_figures_are_equal_bytes_and_load_nothing() -> None:
    def drawn() -> str:
        return embedded(line_chart([Line(name="a<b", x=[1, 2], y=[3, 4])], x="x & y", y="y"), 'al"t')

    assert drawn() == drawn() and ET.fromstring(drawn()).get("alt") == 'al"t'
    image = ET.fromstring(image_of(drawn()))
    texts = {node.text for node in image.iter("{http://www.w3.org/2000/svg}text")}
    assert {"a<b", "x & y"} <= texts, "text stays text"
    for node in image.iter():
        loads = [value for name, value in node.attrib.items() if "href" in name or "url(" in value]
        assert not node.tag.endswith("script") and all("#" in value for value in loads)
