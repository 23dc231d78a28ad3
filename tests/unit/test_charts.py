"""Plots and pictures: numbers land where they belong, labels never overlap, markup holds whatever text comes in."""

from __future__ import annotations

import base64
import math
import re
import struct
import xml.etree.ElementTree as ET
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from buddymoe_ray.calibrate.charts import Axis, Point, Series, bar_chart, line_chart
from buddymoe_ray.calibrate.markup import Markup, element, escape, picture, table
from buddymoe_ray.calibrate.scales import scale_of

NAN = math.nan
X, Y = Axis(label="x"), Axis(label="y")


def line(name: str, *points: tuple[float, ...], reference: bool = False) -> Series:
    return Series(
        name=name,
        colour="#123456",
        reference=reference,
        points=[Point(x=p[0], y=p[1], error=p[2] if p[2:] else NAN) for p in points],
    )


def chart(*series: Series, x: Axis = X, y: Axis = Y) -> ET.Element:
    return ET.fromstring(line_chart(series, x, y, title="t"))


def unpacked(markup: str) -> np.ndarray:
    """The levels in an inline PNG, read as the format says."""
    data = base64.b64decode(re.findall(r"base64,([^\"]+)", markup)[0])
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    at, chunks = 8, {}
    while at < len(data):
        length, tag = struct.unpack(">I4s", data[at : at + 8])
        body = data[at + 8 : at + 8 + length]
        assert struct.unpack(">I", data[at + 8 + length : at + 12 + length])[0] == zlib.crc32(tag + body)
        chunks[tag], at = body, at + 12 + length
    columns, rows, depth, kind = struct.unpack(">IIBB", chunks[b"IHDR"][:10])
    assert (depth, kind) == (4, 3) and len(chunks[b"PLTE"]) % 3 == 0
    raw = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(rows, -1)
    assert not raw[:, 0].any()
    return np.stack([raw[:, 1:] >> 4, raw[:, 1:] & 15], axis=2).reshape(rows, -1)[:, :columns]


def test_text_is_escaped_and_markup_is_not() -> None:
    assert element("p", "a < b & 'c'", title='"x"') == '<p title="&quot;x&quot;">a &lt; b &amp; &#x27;c&#x27;</p>'
    assert element("p", element("b", "x"), "<") == "<p><b>x</b>&lt;</p>"
    assert element("path", stroke_width=2, class_="k", d="M0") == '<path stroke-width="2" class="k" d="M0"/>'
    assert element("span", "") == "<span></span>"
    assert isinstance(element("p"), Markup)


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_any_text_makes_well_formed_markup(text: str) -> None:
    found = ET.fromstring(element("p", text, title=text))
    shown = "".join(ch if ch.isprintable() else "" for ch in text.replace("\r", ""))
    kept = "".join(ch if ch.isprintable() else "" for ch in (found.text or "").replace("\ufffd", ""))
    assert kept == shown.replace("\ufffd", "")
    assert "\0" not in escape(text)


def test_tables_mark_a_row() -> None:
    found = ET.fromstring(table(["n", "v"], [["a", "1"], ["b<", "2"]], marked=1))
    assert [row.get("class") for row in found.iter("tr")] == [None, None, "marked"]
    assert [cell.text for cell in found.iter("td")] == ["1", "2"]
    assert [cell.text for cell in found.iter("th")] == ["n", "v", "a", "b<"]


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (7, 7), (128, 128), (3, 10)])
def test_pictures_hold_their_levels(shape: tuple[int, int]) -> None:
    levels = np.random.default_rng(0).integers(0, 15, shape).astype(np.uint8)
    found = picture(levels, [(i, i, i) for i in range(15)], alt="a & b", size=150)
    assert (unpacked(found) == levels).all()
    assert ET.fromstring(found).get("alt") == "a & b"


@pytest.mark.parametrize("kind", ["linear", "log", "asinh"])
@pytest.mark.parametrize(
    "values", [[3.0], [0.0, 1.0], [0.001, 5000.0], [-0.2, 0.1, 900.0], [-5.0, -1.0], [7.0, 7.0], [0.0]]
)
def test_scales_keep_order_and_stay_within(kind: str, values: list[float]) -> None:
    scale = scale_of(Axis(label="v", kind=kind), values, 100.0, 10.0)
    pixels = [scale(value) for value in sorted(values)]
    assert all(10 <= px <= 100 for px in pixels) and pixels == sorted(pixels, reverse=True)
    positive = [value for value in values if value > 0 or kind != "log"]
    assert all(10 < scale(value) < 100 or value == 0 for value in positive)
    ticks = scale.ticks
    assert list(ticks) == sorted(set(ticks)) and len(ticks) <= 10
    assert all(scale.low - 1e-9 <= tick <= scale.high + 1e-9 for tick in ticks)
    assert ticks or kind == "log"


@settings(max_examples=200, deadline=None)
@given(values=st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=5), kind=st.sampled_from(["linear", "log", "asinh"]))
def test_any_numbers_have_a_scale(values: list[float], kind: str) -> None:
    scale = scale_of(Axis(label="v", kind=kind), values, 0.0, 100.0)
    assert all(0 <= scale(value) <= 100 for value in values) and len(scale.ticks) <= 10


def test_scales_hold_what_they_must_include() -> None:
    scale = scale_of(Axis(label="v", include=(0.0, 100.0)), [40.0], 0.0, 200.0)
    assert (scale.low, scale.high) == (0.0, 100.0) and scale(50.0) == 100.0
    assert scale.ticks == (0, 20, 40, 60, 80, 100)
    assert scale_of(Axis(label="v", ticks=[25, 50, 75]), [50.0], 0, 1).ticks == (25, 50, 75)
    assert scale_of(Axis(label="v", kind="asinh"), [1000.0], 0, 1).ticks == (0, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)


def test_points_land_where_they_belong() -> None:
    found = chart(
        line("a", (0, 0), (10, 5), (20, 10)), x=Axis(label="x", include=(0, 20)), y=Axis(label="y", include=(0, 10))
    )
    at = [(float(c.get("cx", "")), float(c.get("cy", ""))) for c in found.iter("circle")]
    assert at[1][0] == pytest.approx((at[0][0] + at[2][0]) / 2, abs=0.11)
    assert at[1][1] == pytest.approx((at[0][1] + at[2][1]) / 2, abs=0.11)
    assert at[0][1] > at[2][1], "larger values are higher up"
    titles = [title.text for title in found.iter("title")]
    assert titles == ["t", "a at 0: 0", "a at 10: 5", "a at 20: 10"]


def test_error_bars_span_the_error() -> None:
    found = chart(line("a", (0, 5, 2), (1, 5, NAN), (2, 8, 0)), y=Axis(label="y", include=(0, 10)))
    bars = [path.get("d", "") for path in found.iter("path") if "V" in path.get("d", "")]
    assert len(bars) == 2
    top, bottom = (float(v) for v in re.match(r"M\S+ (\S+?)V([\d.]+)M", bars[0]).groups())  # type: ignore[union-attr]
    scale = abs(top - bottom) / 4
    circles = [float(c.get("cy", "")) for c in found.iter("circle")]
    assert (top + bottom) / 2 == pytest.approx(circles[0], abs=0.11)
    assert circles[1] - circles[2] == pytest.approx(3 * scale, abs=0.2)
    assert "a at 0: 5 ± 2" in [title.text for title in found.iter("title")]


def test_line_names_never_cover_each_other() -> None:
    names = [f"line {at}" for at in range(12)]
    found = chart(*(line(name, (0, 1), (1, 1 + at * 1e-3)) for at, name in enumerate(names)))
    at_y = sorted(float(t.get("y", "")) for t in found.iter("text") if t.text in names)
    assert len(at_y) == 12 and min(np.diff(at_y)) >= 13.8 and at_y[0] > 0 and at_y[-1] <= 380


def test_references_are_dashed_and_bare() -> None:
    found = chart(line("r", (0, 0), (1, 1), reference=True))
    assert [p.get("stroke-dasharray") for p in found.iter("polyline")] == ["5 4"] and not list(found.iter("circle"))


def test_what_is_not_finite_is_left_out() -> None:
    found = chart(line("a", (0, 1), (1, NAN), (2, math.inf)), line("none", (NAN, 1)))
    assert len(list(found.iter("circle"))) == 1 and "none" not in [t.text for t in found.iter("text")]
    for empty in (
        line_chart([], X, Y, title="t"),
        line_chart([line("a", (0, NAN))], X, Y, title="t"),
        bar_chart([NAN], ["0"], "x", Y, title="t"),
        bar_chart([], [], "x", Y, title="t"),
    ):
        assert ET.fromstring(empty).text == "Nothing was measured."


def test_bars_stand_on_zero() -> None:
    found = ET.fromstring(bar_chart([1.0, NAN, 2.0, -1.0], list("abcd"), "x", Y, title="t"))
    bars = [(float(r.get("y", "")), float(r.get("height", ""))) for r in found.iter("rect")]
    assert len(bars) == 3
    (one, one_high), (two, two_high), (below, _) = bars
    assert two_high == pytest.approx(2 * one_high, abs=0.2) and one + one_high == pytest.approx(two + two_high, abs=0.2)
    assert below == pytest.approx(one + one_high, abs=0.2)


def test_many_bars_label_a_few() -> None:
    found = ET.fromstring(bar_chart([1.0] * 61, [f"L{at}" for at in range(61)], "x", Y, title="t"))
    assert len(list(found.iter("rect"))) == 61
    assert len([t for t in found.iter("text") if (t.text or "").startswith("L")]) == 16
