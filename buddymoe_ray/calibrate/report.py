"""The calibration as a page to read: one HTML file that needs no network, no script and no other file.

Arranges sections; says nothing that is not in the profile. Invariant: well-formed, whatever the model is called.
Neighbours: `report_sections` draws what was measured of stand-ins, `report_routing` what was seen of the router.
"""

from __future__ import annotations

import os
from pathlib import Path

from buddymoe_ray.calibrate.markup import Markup, element
from buddymoe_ray.calibrate.report_routing import coactivation, residency, routing
from buddymoe_ray.calibrate.report_sections import budgets, layers, provenance, standins, summary
from buddymoe_ray.errors import ProfileError
from buddymoe_ray.models.profile import Profile

__all__ = ["render_report", "write_report"]

_SECTIONS = (
    ("summary", "Summary", summary),
    ("stand-ins", "Harm against memory, for every stand-in", standins),
    ("budgets", "What a budget buys", budgets),
    ("layers", "Where it hurts: sensitivity by layer", layers),
    ("residency", "How often an expert is resident", residency),
    ("routing", "How decided and how predictable the router is", routing),
    ("coactivation", "Which experts are used together", coactivation),
    ("provenance", "How this was made", provenance),
)

# nothing may be loaded from anywhere, which the browser then holds us to
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 58rem; margin: 2rem auto;
  padding: 0 1.2rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.2rem; margin: 2.6rem 0 .4rem; }
p { margin: .5rem 0; } .sub, figcaption, .none { color: #666; font-size: .9rem; }
nav { margin: 1rem 0; font-size: .9rem; } nav a { margin-right: 1rem; color: #0072b2; white-space: nowrap; }
.verdict { border-left: 4px solid #009e73; background: #f2faf7; padding: .7rem 1rem; font-size: 1.05rem; }
.verdict.refused { border-color: #d55e00; background: #fdf4ee; }
.wide { overflow-x: auto; } svg { width: 100%; height: auto; font: 12px system-ui, sans-serif; }
table { border-collapse: collapse; font-size: .9rem; margin: .8rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid #e4e4e4; white-space: nowrap; }
th:first-child { text-align: left; } thead th { border-bottom: 2px solid #999; }
tr.marked { background: #f2faf7; } tr.marked th::after { content: " ◀"; color: #009e73; }
.maps { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 1rem; }
figure { margin: 0; } img { image-rendering: pixelated; border: 1px solid #ccc; width: 100%; height: auto; }
.ramp { display: flex; align-items: center; gap: .6rem; font-size: .85rem; color: #666; margin: .6rem 0; }
.ramp span { width: 14px; height: 14px; display: inline-block; margin: 0; } .ramp div { display: flex; }
code { font-size: .85em; overflow-wrap: anywhere; }
"""


def render_report(profile: Profile) -> str:
    """The page as text."""
    title = f"Calibration of {profile.model}"
    sub = (
        f"{profile.calibration_tokens:,} tokens, {profile.layers} MoE layers of {profile.experts} experts, "
        f"{profile.top_k} per token"
    )
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        element("style", Markup(_STYLE)),
    )
    links = element("nav", *(element("a", heading, href=f"#{name}") for name, heading, _ in _SECTIONS[1:]))
    body = [element("section", element("h2", heading), *draw(profile), id=name) for name, heading, draw in _SECTIONS]
    top = element("header", element("h1", title), element("p", sub, class_="sub"), links)
    return f"<!DOCTYPE html>\n{element('html', head, element('body', top, *body), lang='en')}\n"


def write_report(profile: Profile, path: Path) -> None:
    """Write the page atomically. Raises ProfileError when it cannot be written."""
    temporary = path.with_name(path.name + ".part")
    try:
        temporary.write_text(render_report(profile), encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise ProfileError(
            f"report {path} cannot be written ({error.strerror}), must be. "
            "hint: choose another --out or free some space"
        ) from error
