"""`buddymoe plan`: what would live where, with predicted bytes and speed, before anything loads."""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from buddymoe_ray.commands.common import (
    add_engine_arguments,
    add_json_argument,
    emit,
    engine_config,
    print_facts,
    print_table,
)
from buddymoe_ray.types import Mode

if TYPE_CHECKING:
    from buddymoe_ray.config import EngineConfig
    from buddymoe_ray.models.shape import ModelShape
    from buddymoe_ray.residency.plan import Plan
    from buddymoe_ray.residency.speed import MachineSpeed

__all__ = ["add_arguments", "measured_speed", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `plan`."""
    add_engine_arguments(parser)
    parser.add_argument("--gpus", metavar="GPUS", help="plan for GPUs that need not be here, like 24GiB or 2x24GiB")
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Print the plan; exit status 0, or 1 with a hint when it cannot fit."""
    from buddymoe_ray.models.profile import profile_path
    from buddymoe_ray.models.resolve import resolve_model
    from buddymoe_ray.residency.devices import list_gpus, supposed_gpus

    config = engine_config(args)
    if args.gpus is not None:
        config, gpus = _on_gpus(config), supposed_gpus(args.gpus)
    else:
        gpus = list_gpus()
    folder = resolve_model(args.model, progress=not args.json)
    from buddymoe_ray.residency.plan import make_plan, planned_shape  # late: it imports torch

    shape = planned_shape(config, folder)
    planned = partial(make_plan, folder=folder, gpus=gpus, shape=shape)
    plan = planned(config)  # what cannot be is told before anything is measured
    if plan.devices[0].device == "cpu" and plan.has_weights:
        planned = partial(planned, speed=measured_speed(config, folder, shape))
        plan = planned(config)
    if args.json:
        emit(plan.as_record())
    else:
        modes = get_args(Mode) if profile_path(config.profile, folder) else ()
        each = [config.exactly() if mode == "exact" else replace(config, mode=mode) for mode in modes]
        _print(plan, [planned(one) for one in each] or [plan])
    return 0


def _on_gpus(config: EngineConfig) -> EngineConfig:
    from buddymoe_ray.errors import ConfigError

    if not config.device.startswith(("auto", "cuda")):
        raise ConfigError(f"device is {config.device!r}, must be auto or cuda beside --gpus. hint: leave it out")
    return replace(config, device="cuda" if config.device == "auto" else config.device)


def measured_speed(config: EngineConfig, folder: Path, shape: ModelShape) -> MachineSpeed:
    """What this machine does with such weights."""
    from buddymoe_ray.engine.measure_machine import measure_machine
    from buddymoe_ray.models.tensor_index import read_index
    from buddymoe_ray.residency.speed import weight_dtypes

    shards = {Path(place.path) for place in read_index(folder).values()}
    dtypes = (*weight_dtypes(config, shape), "int4")
    return measure_machine(dtypes, shards, expert_bytes=shape.expert_bytes, threads=config.threads)


def _dense(plan: Plan) -> str:
    stored = plan.dense_format if plan.dense_format == plan.compute_dtype else f"{plan.dense_format}, the rest plain"
    return stored if plan.dense_dtype == "native" else f"{plan.dense_dtype}, the rest {plan.compute_dtype}"


def _print(plan: Plan, modes: list[Plan]) -> None:
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
        f"side by side, each up to {plan.max_model_len:,}"
        + (f", with states of {decimal(plan.state_bytes)} each" if plan.state_bytes else ""),
        "prompts": f"{decimal(plan.activation_bytes)} of activations, up to {plan.prefill_tokens:,} tokens in a pass",
        "host memory": f"{decimal(plan.host_tier_bytes)} of experts between device and disk",
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
            "recorded": "{recording_bytes:bytes}",
            "slots": "{slots}",
            "resident": "{resident_percent:.0f}%",
            "link": "{link}",
        },
        title="device tier",
    )
    _print_predicted(plan.speed, modes)


def _print_predicted(speed: MachineSpeed, modes: list[Plan]) -> None:
    from rich.filesize import decimal

    from buddymoe_ray.residency.plan import PROMPT

    apart = bool(speed.host_bytes_s)
    host = {"by host": "{predicted_host_percent:.0f}%", "all fetched tok/s": "{predicted_fetching_tok_s:.1f}"}
    print_table(
        [{**each.__dict__, "rise": _rise(each)} for each in modes],
        {
            "mode": "{mode}",
            "hits": "{predicted_hit_percent:.0f}%",
            "stand-ins": "{predicted_standin_percent:.0f}%",
            "read a token": "{predicted_miss_bytes_per_token:bytes}",
            "tok/s": "{predicted_decode_tok_s:.1f}",
            **(host if apart else {}),
            f"first token of {PROMPT}": "{predicted_ttft_seconds:.2f} s",
            "perplexity": "{rise}",
        },
        title="predicted",
    )
    known = modes[0].predicted_routing == "profile"
    print(f"for one sequence that routes {'as the profile found' if known else 'uniformly'}, with")
    rates = {f"{name} weights": found[1] for name, found in speed.weights_bytes_s.items()}
    rates["link" if apart else "disk"] = speed.disk_bytes_s
    if apart:
        rates["weights on the host"] = speed.host_bytes_s
    origin = "measured here" if speed.measured else "a guess"
    print_facts({name: f"{decimal(round(rate))}/s, {origin}" for name, rate in rates.items()})


def _rise(plan: Plan) -> str:
    """What the mode costs: nothing, at most its budget, all of what stand-ins lose."""
    if plan.mode == "exact":
        return "as it is"
    if plan.expected_rise_fast is None:
        return "no profile"
    rise = plan.expected_rise_fast if plan.mode == "fast" else min(plan.budget, plan.expected_rise_fast)
    return f"+{100 * rise:.2f} %"
