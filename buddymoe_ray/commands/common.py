"""What the commands share: engine options, JSON lines and tables on stdout.

Invariant: with `--json`, stdout holds nothing but one compact JSON object per line. Without it there are tables of at
most the terminal's width (80 columns in a pipe), in units a person reads.
"""

from __future__ import annotations

import argparse
import json
import string
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from buddymoe_ray.config import EngineConfig, option_notes

__all__ = [
    "NOT_MEASURED",
    "add_engine_arguments",
    "add_json_argument",
    "add_option",
    "emit",
    "engine_config",
    "measured_config",
    "print_facts",
    "print_table",
]

Record = Mapping[str, Any]


NOT_MEASURED = ("max_running", "guard_share", "seed", "generation_config", "calibrate", "cache_dir")
"""Options of a service that a measurement of what is there does without."""


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    """`--json`."""
    parser.add_argument("--json", action="store_true", help="print compact JSON, one object per line")


def add_engine_arguments(
    parser: argparse.ArgumentParser, *, memory: str | None = None, without: Sequence[str] = ()
) -> None:
    """A flag for every option of EngineConfig, with its default, but for those that a command decides itself."""
    defaults = {} if memory is None else {"memory": memory}
    for option in fields(EngineConfig):
        if option.name not in without:
            default = defaults.get(option.name, option.default)
            add_option(parser, option.name, default, option_notes(EngineConfig)[option.name], kind=str(option.type))


def add_option(parser: argparse.ArgumentParser, name: str, default: object, note: str, *, kind: str) -> None:
    """One flag of an option as EngineConfig has it; `kind` is the annotation."""
    number = next((make for make in (int, float) if kind.startswith(make.__name__)), str)
    has_default = default is not None and default is not argparse.SUPPRESS
    shown = (note + (f" (default {default})" if has_default else "")).replace("%", "%%")
    word = "NUMBER" if number is not str else name.upper()
    parser.add_argument(f"--{name.replace('_', '-')}", type=number, default=default, help=shown, metavar=word)


def engine_config(args: argparse.Namespace, **changes: Any) -> EngineConfig:
    """EngineConfig from parsed options; `changes` win."""
    options = {name: getattr(args, name) for name in EngineConfig.names() if hasattr(args, name)}
    return EngineConfig.from_options(**{**options, **changes})


def measured_config(args: argparse.Namespace, **changes: Any) -> EngineConfig:
    """The same of a measurement, beside which nothing is calibrated."""
    config = engine_config(args, **changes)
    return config if config.mode == "exact" else replace(config, calibrate="off")


def emit(record: Record) -> None:
    """Print one record as compact JSON, numbers that are none as null."""
    known = json.loads(json.dumps(record), parse_constant=lambda _: None)
    print(json.dumps(known, separators=(",", ":")), flush=True)


def print_facts(facts: Mapping[str, str]) -> None:
    """One fact a line, what it is beside what it says."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, fact in facts.items():
        table.add_row(name, fact)
    console = Console(highlight=False, markup=False)
    console.print(table)


def print_table(
    rows: Sequence[Record], columns: Mapping[str, str], *, title: str = "", conditions: Mapping[str, str] | None = None
) -> None:
    """A row per record, or a column where rows would be too wide.

    Columns are titles and format strings over the record's keys; `:bytes` is a unit of its own. Of `conditions`, the
    same, those that are equal in all rows stand once above the table.
    """
    from rich.console import Console

    form = _Form()
    given = {name: [form.format(text, **row) for row in rows] for name, text in (conditions or {}).items()}
    same = [f"{name} {said[0]}" for name, said in given.items() if len(set(said)) == 1 and said[0] != _NOTHING]
    cells = {name: said for name, said in given.items() if len(set(said)) > 1}
    cells |= {name: [form.format(text, **row) for row in rows] for name, text in columns.items()}
    console = Console(highlight=False, markup=False)
    heading = f"{title}: {', '.join(same)}" if title and same else title or ", ".join(same)
    if heading:
        console.print(heading)
    words = {name: max(map(len, name.split())) for name in cells}
    lines = [tuple(cells), *zip(*cells.values(), strict=True)]
    if sum(max(words[name], *map(len, said)) + 2 for name, said in cells.items()) <= console.width:
        _print_lines(console, lines)
        return
    each = max(len(cell) for said in cells.values() for cell in said) + 2  # too wide: a column per record instead
    some = max(1, (console.width - max(map(len, cells)) - 2) // each)
    for at in range(1, len(lines), some):
        _print_lines(console, list(zip(lines[0], *lines[at : at + some], strict=True)))


def _print_lines(console: Any, lines: Sequence[Sequence[str]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for at, name in enumerate(lines[0]):
        table.add_column(name, justify="left" if at == 0 else "right", overflow="fold", min_width=len(name) * (at == 0))
    for line in lines[1:]:
        table.add_row(*line)
    console.print(table)


_NOTHING = "–"


class _Form(string.Formatter):
    """`str.format` with bytes in their unit, and a dash where there is no value."""

    def format_field(self, value: Any, spec: str) -> str:
        from rich.filesize import decimal

        if value is None:
            return _NOTHING
        return decimal(round(value)) if spec == "bytes" else str(super().format_field(value, spec))
