"""`buddymoe plan`: what would live where, with predicted bytes and speed, before anything loads."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from buddymoe_ray.commands.common import (
    add_engine_arguments,
    add_json_argument,
    emit,
    engine_config,
    print_facts,
    print_table,
)

if TYPE_CHECKING:
    from buddymoe_ray.residency.plan import Plan

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `plan`."""
    add_engine_arguments(parser)
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Print the plan; exit status 0, or 1 with a hint when it cannot fit."""
    from buddymoe_ray.models.resolve import resolve_model

    config = engine_config(args)
    folder = resolve_model(args.model, progress=not args.json)
    from buddymoe_ray.residency.devices import list_gpus  # late: what comes now imports torch
    from buddymoe_ray.residency.plan import make_plan

    plan = make_plan(config, folder, gpus=list_gpus())
    if args.json:
        emit(plan.as_record())
    else:
        _print(plan)
    return 0


def _dense(plan: Plan) -> str:
    return plan.compute_dtype if plan.dense_dtype == "native" else f"{plan.dense_dtype}, the rest {plan.compute_dtype}"


def _print(plan: Plan) -> None:
    from rich.filesize import decimal

    first = plan.devices[0]
    without = plan.moe_layers * plan.experts_per_layer - first.resident_experts - sum(plan.standins.values())
    held = [f"{first.resident_experts} in full"]
    held += [f"{count} as {kind}" for kind, count in sorted(plan.standins.items())]
    held += [f"{without} on disk only"] * bool(without)
    rise = plan.expected_rise_fast
    facts = {
        "model": f"{plan.path} ({plan.model_type})" + ("" if plan.has_weights else ", config alone"),
        "layers": f"{plan.layers}, of them {plan.moe_layers} with {plan.experts_per_layer} experts, "
        f"{plan.experts_per_token} a token",
        "experts": f"{decimal(plan.total_expert_bytes)} in {plan.expert_dtype}, {decimal(plan.expert_bytes)} each",
        "dense weights": f"{decimal(plan.dense_bytes)} in {_dense(plan)}",
        "mode": plan.mode,
        "of the experts": ", ".join(held),
        "stand-ins": f"{decimal(plan.standin_bytes)}; {100 * rise:.2f} % of perplexity if nothing is fetched"
        if rise is not None
        else "none",
        "KV cache": f"{first.kv_tokens:,} tokens at {decimal(plan.kv_bytes_per_token)}; {plan.max_running} sequences "
        f"side by side, each up to {plan.max_model_len:,}",
        "prompts": f"{decimal(plan.activation_bytes)} of activations, up to {plan.prefill_tokens:,} tokens in a pass",
        "host memory": f"{decimal(plan.host_tier_bytes)} of experts between device and disk",
        "predicted": f"{plan.predicted_hit_percent:.0f} % hits, {plan.predicted_standin_percent:.0f} % stand-ins, "
        f"{decimal(round(plan.predicted_miss_bytes_per_token))} read a token, {plan.predicted_decode_tok_s:,.1f} tok/s",
    }
    print_facts(facts)
    print_table(
        [device.__dict__ for device in plan.devices],
        {
            "device": "{device}",
            "name": "{name}",
            "free": "{available_bytes:bytes}",
            "dense": "{dense_bytes:bytes}",
            "experts": "{expert_budget_bytes:bytes}",
            "KV cache": "{kv_cache_bytes:bytes}",
            "slots": "{slots}",
            "resident": "{resident_percent:.0f}%",
            "link": "{link}",
        },
        title="device tier",
    )
    speeds = ", ".join(f"{name.split('_')[0]} {decimal(round(speed))}/s" for name, speed in plan.assumed.items())
    print(f"predicted for uniform routing and batch 1, with {speeds}")
