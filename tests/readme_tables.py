"""Renders the tables of README and deployments/README from code and `tests/golden/measured/*.jsonl`; run it to write
them."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from buddymoe_ray.config import EngineConfig

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
OPTIONS = ROOT / "deployments" / "README.md"
MEASURED = Path(__file__).parent / "golden" / "measured"

COLUMNS = {
    "model": ("model", str),
    "mode": ("mode", str),
    "batch": ("batch", str),
    "decode_tok_s": ("decode tok/s", "{:.1f}"),
    "p99_itl_ms": ("p99 ITL ms", "{:.0f}"),
    "hit_rate": ("hits %", "{:.1f}"),
    "standin_rate": ("stand-ins %", "{:.1f}"),
    "bytes_read_per_token": ("MB read / token", lambda value: f"{value / 1e6:.2f}"),
    "peak_rss_bytes": ("peak RSS MB", lambda value: f"{value / 1e6:.0f}"),
}


def config_table() -> str:
    """Every EngineConfig field, its default, and the first sentence of its documentation."""
    notes = dict(re.findall(r"^        (\w+): (.+?)(?=^        \w+: |\Z)", _args_section(), re.M | re.S))
    rows = ["| option | default | meaning |", "|---|---|---|"]
    for field in dataclasses.fields(EngineConfig):
        note = " ".join(notes[field.name].split()).rstrip(".")
        rows.append(f"| `{field.name}` | `{field.default}` | {note} |")
    return "\n".join(rows)


def records(name: str) -> list[dict[str, Any]]:
    """JSON lines of a command, as it printed them."""
    return [json.loads(line) for line in (MEASURED / f"{name}.jsonl").read_text().splitlines()]


def speed_table() -> str:
    """Rows of `buddymoe bench --json`."""
    rows = ["| " + " | ".join(title for title, _ in COLUMNS.values()) + " |", "|" + "---|" * len(COLUMNS)]
    for name in ("tiny", "olmoe"):
        for record in records(name):
            shown = record | {"model": "builtin:tiny" if name == "tiny" else "OLMoE"}
            rows.append("| " + " | ".join(_cell(shown[key], form) for key, (_, form) in COLUMNS.items()) + " |")
    return "\n".join(rows)


def standins_table() -> str:
    """Rows of `buddymoe eval --mode fast --json`: a line per stand-in, a column per memory."""
    found = {(r.get("policy"), r["standin"], r["memory"]): r for r in records("standins")}
    memories = sorted({memory for _, _, memory in found}, key=lambda text: -float(text.rstrip("%")))
    names = list(dict.fromkeys((policy, standin) for policy, standin, _ in found))
    rows = [
        "| stand-in | " + " | ".join(memories) + " | KL×1000 at 50% | top-1 at 50% |",
        "|---|" + "---|" * (len(memories) + 2),
    ]
    for policy, standin in names:
        cells = [_rise(found.get((policy, standin, memory))) for memory in memories]
        half = found.get((policy, standin, "50%"), {})
        name = "BuddyMoE whole" if policy == "buddymoe" else f"`{standin}`"
        cells += [f"{1000 * half['kl']:.3g}", f"{half['top1_agreement']:.1f}"] if "kl" in half else ["–", "–"]
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def bounded_table() -> str:
    """Rows of `buddymoe eval --mode bounded --json`, and of int8 experts in `fast`."""
    found = {(r["budget"], r["memory"]): r for r in records("bounded")}
    memories = sorted({memory for _, memory in found}, key=lambda text: float(text.rstrip("%")))
    budgets = sorted({budget for budget, _ in found})
    rows = ["| memory | " + " | ".join(f"budget {budget:g}" for budget in budgets) + " | int8 experts |"]
    rows.append("|---|" + "---|" * (len(budgets) + 1))
    int8 = {r["memory"]: r for r in records("int8")}
    for memory in memories:
        cells = [f"{_rise(found[b, memory])} ({found[b, memory]['fetched_fraction']:.0f}%)" for b in budgets]
        rows.append(f"| {memory} | " + " | ".join([*cells, _rise(int8.get(memory))]) + " |")
    return "\n".join(rows)


def rendered(text: str) -> str:
    """README with every marked table made anew."""
    tables = {"standins": standins_table(), "bounded": bounded_table(), "speed": speed_table()}
    return _filled(text, tables)


def options_page(text: str) -> str:
    """`deployments/README.md` with its table made anew."""
    return _filled(text, {"config": config_table()})


def _filled(text: str, tables: dict[str, str]) -> str:
    for name, table in tables.items():
        text, found = re.subn(
            rf"(<!-- table:{name} -->\n).*?(<!-- end -->)", lambda m, t=table: f"{m[1]}{t}\n{m[2]}", text, flags=re.S
        )
        assert found == 1, f"there are {found} places for table {name}, must be one"
    return text


def _rise(record: dict[str, Any] | None) -> str:
    if record is None or "error" in record:
        return "–"
    rise, error = record["dppl_percent"], record["dppl_se"]
    shown = f"{rise:.0f} ± {error:.0f}" if rise >= 10 else f"{rise:.2f} ± {error:.2f}"
    fetched = record.get("policy") == "buddymoe"
    return f"{shown} ({record['fetched_fraction']:.0f}% fetched)" if fetched else shown


def _args_section() -> str:
    doc = EngineConfig.__doc__ or ""
    return doc.split("Args:\n", 1)[1].rstrip() + "\n"


def _cell(value: Any, form: Any) -> str:
    return form.format(value) if isinstance(form, str) else form(value)


if __name__ == "__main__":
    README.write_text(rendered(README.read_text()))
    OPTIONS.write_text(options_page(OPTIONS.read_text()))
