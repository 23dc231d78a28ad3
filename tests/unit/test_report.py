"""The report: one file, whole, readable without a network, true to the profile, for any model."""

from __future__ import annotations

import base64
import dataclasses
import re
import xml.etree.ElementTree as ET
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from markupsafe import Markup
from matplotlib.axes import Axes
from profiles import budget_curve, comparison, make_profile

from buddymoe_ray.calibrate import report
from buddymoe_ray.calibrate.report import figures, hit_lines, lift_levels, render_report, write_report
from buddymoe_ray.errors import ProfileError
from buddymoe_ray.models.profile import Profile

SECTIONS = ["summary", "stand-ins", "budgets", "layers", "residency", "routing", "coactivation", "provenance"]
SHAPES = [(1, 1, 1), (1, 2, 1), (1, 8, 2), (4, 32, 4), (2, 300, 8), (48, 128, 8)]


@pytest.fixture
def words_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots are made but not drawn, which takes seconds."""
    said = {True: "Nothing was measured.", False: "a plot"}
    monkeypatch.setattr(report, "embedded", lambda figure, alt: Markup(f"<p>{said[figure is None]}</p>"))


@cache
def default_page() -> str:
    return render_report(make_profile())


def parsed(page: str) -> ET.Element:
    first, rest = page.split("\n", 1)
    assert first == "<!DOCTYPE html>"
    return ET.fromstring(rest)


def section(page: str, name: str) -> ET.Element:
    return next(found for found in parsed(page).iter("section") if found.get("id") == name)


def drawn(profile: Profile, name: str) -> Axes:
    """The axes of one plot."""
    figure = figures(profile, hit_lines(profile))[name]
    assert figure is not None
    return figure.axes[0]


def legend(plot: Axes) -> list[str]:
    return [text.get_text() for text in plot.get_figure(root=True).legends[0].get_texts()]


def words(found: ET.Element) -> str:
    return " ".join("".join(found.itertext()).split())


def cells(found: ET.Element, at: int = 0) -> list[list[str]]:
    """Rows of a table as text."""
    return [["".join(cell.itertext()) for cell in row] for row in list(found.iter("table"))[at].iter("tr")]


class Outside(HTMLParser):
    """Whatever a browser would fetch or run."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "link", "iframe", "object", "embed", "base", "form", "video", "audio"):
            self.found.append(tag)
        for name, value in attrs:
            loads = name in ("src", "href", "xlink:href", "srcset", "data", "action") or "url(" in (value or "")
            if name.startswith("on") or (loads and not (value or "").startswith(("#", "data:image/"))):
                self.found.append(f"{tag} {name}={value}")


@pytest.mark.parametrize(("layers", "experts", "top_k"), SHAPES)
def test_the_page_is_whole_and_alone_for_any_shape(layers: int, experts: int, top_k: int) -> None:
    page = render_report(make_profile(layers=layers, experts=experts, top_k=top_k, tokens=64))
    assert [found.get("id") for found in parsed(page).iter("section")] == SECTIONS
    outside = Outside()
    outside.feed(page)
    assert outside.found == [] and not re.search(r"https?://|//cdn|@import|url\(", page)
    assert "default-src 'none'" in page.replace("&#x27;", "'")
    assert len(page) < 1_000_000
    assert len(list(section(page, "coactivation").iter("img"))) == (layers if top_k > 1 else 0)
    assert "nan" not in words(parsed(page)).lower().split() and "inf" not in words(parsed(page)).lower().split()


def test_the_page_is_light() -> None:
    assert len(default_page()) < 250_000


def test_pages_are_the_same_each_time() -> None:
    assert default_page() == render_report(make_profile())


@pytest.mark.usefixtures("words_only")
@pytest.mark.parametrize(
    "name", ["<script>alert(1)</script>", "a & b", "\"quoted\" 'too'", "\0\x1b[31m", "ünïcödé ☃", "]]>"]
)
def test_names_are_text_and_nothing_else(name: str) -> None:
    profile = make_profile(model=name, reason=f"because {name}", created_by=name)
    page = render_report(profile)
    root = parsed(page)
    shown = re.sub(r"[\x00-\x08\x0b-\x1f]", "\ufffd", name)
    assert words(next(root.iter("h1"))) == f"Calibration of {shown}"
    assert "<script" not in page and f"because {shown}" in words(root)


@pytest.mark.usefixtures("words_only")
def test_the_summary_names_the_recommendation_and_why() -> None:
    found = section(render_report(make_profile()), "summary")
    verdict = next(p for p in found.iter("p") if "verdict" in (p.get("class") or ""))
    assert words(verdict) == "Recommended: lowbit3. rises perplexity by 1.10 % at 25 %, the least of all that fit."
    rows = cells(found)
    assert rows[0][:3] == ["memory", "least expected loss", "rise of perplexity, %"]
    assert rows[1][:3] == ["75 %", "lowbit4", "0.09 ± 0.03"] and rows[3][0] == "25 %"


@pytest.mark.usefixtures("words_only")
def test_the_summary_says_when_nothing_is_good_enough() -> None:
    page = render_report(make_profile(recommended=None, reason="no stand-in is within .3 %"))
    verdict = words(section(page, "summary"))
    assert "No stand-in is recommended; bounded requests are answered exactly. no stand-in is within .3 %." in verdict
    assert "tr.marked" in page and 'class="marked"' not in page


@pytest.mark.usefixtures("words_only")
def test_the_summary_says_when_harms_are_unknown() -> None:
    page = render_report(
        make_profile(sensitivity_L=np.full(4, np.nan), comparison=(), budget_curve=(), recommended=None)
    )
    assert "Sensitivities were not measured" in words(section(page, "summary"))
    for name in ("stand-ins", "budgets", "layers"):
        assert "Nothing was measured." in words(section(page, name))


@pytest.mark.usefixtures("words_only")
@pytest.mark.parametrize(
    ("changes", "command"),
    [
        ({}, "buddymoe serve 'my model' --memory 25% --mode bounded"),
        ({"worse": 0.3}, "buddymoe serve 'my model' --memory 50% --mode bounded"),
        ({"recommended": None}, "buddymoe serve 'my model' --mode exact"),
        ({"sensitivity_L": np.full(4, np.nan)}, "buddymoe profile --model 'my model' --corpus FILES"),
    ],
)
def test_verdict_and_next_command_come_first(changes: dict[str, Any], command: str) -> None:
    changes = dict(changes)
    more = changes.pop("worse", 0.0)
    rows = [dataclasses.replace(r, dppl_percent=r.dppl_percent + more * (r.memory_percent < 50)) for r in comparison()]
    page = render_report(make_profile(model="my model", comparison=tuple(rows), **changes))
    assert words(next(parsed(page).iter("pre"))) == command
    order = [page.index(f"<{what}") for what in ('p class="verdict', "pre>", "table", "nav")]
    assert order == sorted(order)


@pytest.mark.usefixtures("words_only")
def test_tables_and_plots_have_the_same_numbers() -> None:
    profile = make_profile()
    found, plot = cells(section(render_report(profile), "stand-ins")), drawn(profile, "standins")
    for row, bars in zip(found[1:], plot.collections, strict=True):
        spans = [sorted(float(y) for _, y in bar) for bar in reversed(bars.get_segments())]
        for cell, (low, high) in zip(row[1:], spans, strict=True):
            value, error = map(float, cell.split(" ± "))
            digits = 10 ** -(len(cell.split(" ± ")[0].partition(".")[2]))
            assert (low + high) / 2 == pytest.approx(value, abs=digits) and (high - low) / 2 == pytest.approx(
                error, abs=digits
            )
    best = cells(section(render_report(profile), "summary"))[1]
    assert best[1:3] == [found[1][0], found[1][1]]


def test_narrow_and_dark_screens_are_served() -> None:
    """No table is wider for a deeper model, labels keep their size on a phone, plots and page change colours."""
    page = render_report(make_profile(layers=48, tokens=64))
    assert max(len(row) for table in parsed(page).iter("table") for row in table.iter("tr")) <= 9
    drawings = [base64.b64decode(found) for found in re.findall(r"image/svg\+xml;base64,([^\"]+)", page)]
    widths = {float(re.findall(rb'<svg [^>]*width="([0-9.]+)pt"', drawing)[0]) for drawing in drawings}
    assert len(drawings) >= 6 and max(widths) <= 420, "a phone shows some 350 points"
    dark = page.split("prefers-color-scheme: dark")[1].split("body")[0]
    assert "--paper: #111" in dark and ".chart, .matrix" in dark


@pytest.mark.usefixtures("words_only")
def test_every_stand_in_is_in_table_and_plot() -> None:
    found = section(render_report(make_profile()), "stand-ins")
    rises = cells(found)
    assert rises[0] == ["stand-in", "75 % memory", "50 % memory", "25 % memory"]
    assert [row[0] for row in rises[1:]] == ["lowbit4", "lowbit3", "lowbit2", "lowrank", "buddy:output", "drop"]
    assert rises[1][1:] == ["0.09 ± 0.03", "0.14 ± 0.03", "0.19 ± 0.03"] and rises[6][3] == "893 ± 47"
    assert [row.get("class") for row in next(found.iter("table")).iter("tr")].index("marked") == 2
    assert cells(found, 1)[1][1] == "2 · 98.0 %"
    plot = drawn(make_profile(), "standins")
    assert legend(plot) == ["lowbit4", "lowbit3", "lowbit2", "lowrank", "buddy:output", "drop"]
    assert plot.lines[3].get_xydata().tolist() == [[25, 1.045], [50, 0.77], [75, 0.495]]
    assert np.allclose(plot.get_xticks(), [25, 50, 75]) and plot.get_yscale() == "symlog"
    assert "lowbit2 8,768" in words(found) and "16,384 tokens" in words(found)


@pytest.mark.usefixtures("words_only")
def test_a_stand_in_that_does_not_fit_shows_a_dash() -> None:
    rows = tuple(row for row in comparison() if (row.standin, row.memory_percent) != ("lowbit4", 25.0))
    table = cells(section(render_report(make_profile(comparison=rows)), "stand-ins"))
    assert next(row for row in table if row[0] == "lowbit4")[3] == "–"


@pytest.mark.usefixtures("words_only")
def test_unknown_errors_and_gains_are_shown() -> None:
    rows = tuple(dataclasses.replace(row, dppl_percent=-0.04, dppl_se=float("nan")) for row in comparison((50.0,)))
    found = section(render_report(make_profile(comparison=rows)), "stand-ins")
    assert cells(found)[1][1] == "-0.04 ± ?"
    bars = drawn(make_profile(comparison=rows), "standins").collections[0].get_segments()
    assert np.isnan(bars).all()


@pytest.mark.usefixtures("words_only")
def test_the_budget_curve_says_whether_it_held() -> None:
    points = list(budget_curve())
    points[0] = dataclasses.replace(points[0], dppl_percent=0.3, dppl_se=0.05)
    found = section(render_report(make_profile(budget_curve=tuple(points))), "budgets")
    rows = cells(found)
    assert len(rows) == 13 and [row[5] for row in rows[1:]] == ["NO"] + ["yes"] * 11
    assert rows[1][:5] == ["75 %", "0.1", "0.30 ± 0.05", "0.08", "16.7"]
    profile = make_profile(budget_curve=tuple(points))
    assert legend(drawn(profile, "rises")) == ["the budget", "75 % memory", "50 % memory", "25 % memory"]
    assert legend(drawn(profile, "fetches")) == ["75 % memory", "50 % memory", "25 % memory"]
    assert drawn(profile, "rises").get_xscale() == "log"


@pytest.mark.usefixtures("words_only")
def test_layers_show_sensitivity_and_harm() -> None:
    profile = make_profile()
    found = section(render_report(profile), "layers")
    wanted = (profile.counts_LE * profile.weight2_LE / profile.calibration_tokens * profile.loss_LE("lowbit3")).sum(
        axis=1
    )
    assert np.allclose([bar.get_height() for bar in drawn(profile, "losses").patches], wanted)
    assert np.allclose([bar.get_height() for bar in drawn(profile, "sensitivity").patches], profile.sensitivity_L)
    shares = {column[0]: column[1:] for column in zip(*cells(found), strict=True)}
    assert shares["drop"] == ("100",) * 4 and shares["lowbit3"] == ("5",) * 4


@pytest.mark.usefixtures("words_only")
@pytest.mark.parametrize("recommended", ["lowbit", "buddy:router", None])
def test_a_mix_shows_its_least_harmful_kind(recommended: str | None) -> None:
    assert "Expected loss by layer: lowbit4" in render_report(make_profile(recommended=recommended))


@pytest.mark.usefixtures("words_only")
def test_residency_shows_all_four_rules() -> None:
    found = section(render_report(make_profile(tokens=400)), "residency")
    rows = cells(found)
    assert [row[0] for row in rows[1:]] == ["null: any experts", "static frequency", "as served", "oracle"]
    assert rows[0][1:] == ["25 % kept", "50 % kept", "75 % kept"] and rows[1][1:] == ["25.0", "50.0", "75.0"]
    for column in (1, 2, 3):
        null, static, _, oracle = (float(row[column]) for row in rows[1:])
        assert null < static < oracle <= 100


@pytest.mark.usefixtures("words_only")
def test_residency_without_routes_says_so() -> None:
    empty = np.zeros((0, 4, 4))
    found = section(render_report(make_profile(routes_TLK=empty, route_weights_TLK=empty)), "residency")
    assert len(cells(found)) == 3 and "keeps no routes" in words(found)


@pytest.mark.usefixtures("words_only")
def test_routing_lists_every_layer() -> None:
    profile = make_profile()
    rows = cells(section(render_report(profile), "routing"))
    assert len(rows) == 5 and rows[4][0] == "3" and rows[4][3] == "–"
    assert rows[1][1] == f"{profile.entropy_L[0]:.2f}" and rows[1][2] == f"{profile.reuse_L[0]:.2f}"


def planted(experts: int = 16, tokens: int = 4000) -> Profile:
    """Two experts per token: with expert 2i always comes 2i + 1."""
    chosen = np.random.default_rng(0).integers(0, experts // 2, tokens)
    ids = np.stack([2 * chosen, 2 * chosen + 1], axis=1)[:, None, :]
    accesses = np.zeros((tokens, 1, experts), int)
    np.put_along_axis(accesses, ids, 1, axis=2)
    return dataclasses.replace(
        make_profile(layers=1, experts=experts, top_k=2, tokens=tokens),
        counts_LE=accesses.sum(axis=0),
        coactivation_LEE=np.einsum("tle,tlf->lef", accesses, accesses),
    )


def test_pairs_that_work_together_stand_out() -> None:
    profile = planted()
    levels = lift_levels(profile, 0)
    order = np.argsort(-profile.counts_LE[0].astype(int), kind="stable")
    together = order[:, None] // 2 == order[None] // 2
    alone = np.eye(16, dtype=bool)
    assert (levels[together & ~alone] == 14).all() and (levels[~together] == 0).all() and (levels[alone] == 7).all()


def test_independent_experts_are_near_white() -> None:
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((20_000, 1, 12)), axis=2)[:, :, :4]
    accesses = np.zeros((20_000, 1, 12), int)
    np.put_along_axis(accesses, ids, 1, axis=2)
    profile = dataclasses.replace(
        make_profile(layers=1, experts=12, top_k=4, tokens=20_000),
        counts_LE=accesses.sum(axis=0),
        coactivation_LEE=np.einsum("tle,tlf->lef", accesses, accesses),
    )
    assert (lift_levels(profile, 0) == 7).all()


@pytest.mark.parametrize(("experts", "pixels"), [(2, 2), (128, 128), (129, 65), (300, 100), (512, 128)])
def test_heat_maps_of_many_experts_are_pooled(experts: int, pixels: int) -> None:
    profile = make_profile(layers=1, experts=experts, top_k=2, tokens=32)
    assert lift_levels(profile, 0).shape == (pixels, pixels)


@pytest.mark.usefixtures("words_only")
def test_provenance_names_model_and_corpus() -> None:
    profile = make_profile()
    found = words(section(render_report(profile), "provenance"))
    assert profile.model_hash in found and profile.corpus_sha in found and "lowbit3 1.1" in found


@pytest.mark.usefixtures("words_only")
def test_the_file_is_written_whole(tmp_path: Path) -> None:
    write_report(make_profile(), tmp_path / "r.html")
    assert (tmp_path / "r.html").read_text(encoding="utf-8") == render_report(make_profile())
    assert list(tmp_path.iterdir()) == [tmp_path / "r.html"]


@pytest.mark.usefixtures("words_only")
def test_a_file_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"report .* cannot be written .* hint: "):
        write_report(make_profile(), tmp_path / "no" / "r.html")
