"""`buddymoe plan`: what would live where, with predicted bytes and speed, before anything loads."""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.table import Table

from buddymoe_ray.commands.common import add_engine_arguments, add_json_argument, emit, engine_config

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `plan`."""
    add_engine_arguments(parser)
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Print the plan; exit status 0, or 1 with a hint when it cannot fit."""
    from buddymoe_ray.models.resolve import resolve_model
    from buddymoe_ray.residency.devices import list_gpus
    from buddymoe_ray.residency.plan import make_plan

    plan = make_plan(engine_config(args), resolve_model(args.model, progress=not args.json), gpus=list_gpus())
    record = plan.as_record()
    if args.json:
        emit(record, as_json=True)
        return 0
    devices = record.pop("devices")
    emit({k: v for k, v in record.items() if k != "assumed"}, as_json=False)
    table = Table(title="device tier")
    columns = [
        "device",
        "name",
        "available_bytes",
        "dense_bytes",
        "expert_budget_bytes",
        "slots",
        "resident_percent",
        "link",
    ]
    for column in columns:
        table.add_column(column)
    for device in devices:
        table.add_row(*(_shown(device[column]) for column in columns))
    Console().print(table)
    print(f"predictions assume {record['assumed']} and uniform routing")
    return 0


def _shown(value: object) -> str:
    if isinstance(value, int) and value > 1 << 20:
        return f"{value / 2**30:.2f} GiB"
    return f"{value:.1f}" if isinstance(value, float) else str(value)
