"""Renders README's tables from code and `tests/golden/measured/*.jsonl`; run it as a script to write them."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from buddymoe_ray.config import EngineConfig

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
MEASURED = Path(__file__).parent / "golden" / "measured"

COLUMNS = {
    "memory": ("memory", str),
    "batch": ("batch", str),
    "decode_tok_s": ("decode tok/s", "{:.1f}"),
    "prefill_tok_s": ("prefill tok/s", "{:.0f}"),
    "p99_itl_ms": ("p99 ITL ms", "{:.0f}"),
    "hit_rate": ("hit rate %", "{:.1f}"),
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


def bench_table(name: str) -> str:
    """Rows of `buddymoe bench --json`."""
    records = [json.loads(line) for line in (MEASURED / f"{name}.jsonl").read_text().splitlines()]
    rows = ["| " + " | ".join(title for title, _ in COLUMNS.values()) + " |", "|" + "---|" * len(COLUMNS)]
    rows += [
        "| " + " | ".join(_cell(record[key], form) for key, (_, form) in COLUMNS.items()) + " |" for record in records
    ]
    return "\n".join(rows)


def rendered(text: str) -> str:
    """README with every marked table made anew."""
    tables = {"config": config_table(), "tiny": bench_table("tiny"), "olmoe": bench_table("olmoe")}
    for name, table in tables.items():
        text, found = re.subn(
            rf"(<!-- table:{name} -->\n).*?(<!-- end -->)", lambda m, t=table: f"{m[1]}{t}\n{m[2]}", text, flags=re.S
        )
        assert found == 1, f"README has {found} places for table {name}, must have one"
    return text


def _args_section() -> str:
    doc = EngineConfig.__doc__ or ""
    return doc.split("Args:\n", 1)[1].rstrip() + "\n"


def _cell(value: Any, form: Any) -> str:
    return form.format(value) if isinstance(form, str) else form(value)


if __name__ == "__main__":
    README.write_text(rendered(README.read_text()))
