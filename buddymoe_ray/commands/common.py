"""What the commands share: engine options, JSON lines on stdout, progress for a person on stderr.

Invariant: with `--json`, stdout holds nothing but one compact JSON object per line; progress bars are drawn only when
stderr is a terminal.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, get_args

from tqdm import tqdm

from buddymoe_ray.config import BATCHING, DTYPES, EXPERT_DTYPES, POLICIES, STANDINS, EngineConfig
from buddymoe_ray.types import Mode

__all__ = ["add_engine_arguments", "add_json_argument", "emit", "engine_config", "progress"]

T = TypeVar("T")
_DEFAULTS = EngineConfig()


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    """`--json`."""
    parser.add_argument("--json", action="store_true", help="print compact JSON, one object per line")


def add_engine_arguments(
    parser: argparse.ArgumentParser, *, memory: str = _DEFAULTS.memory, many_modes: bool = False
) -> None:
    """Options of the engine that commands share; each default is EngineConfig's. `many_modes`: a list is allowed."""
    parser.add_argument("--model", default=_DEFAULTS.model, help="builtin:tiny, a checkpoint folder, or a hub id")
    parser.add_argument("--memory", default=memory, help="device budget for experts: 25%% or 6GiB")
    parser.add_argument("--host-memory", default=_DEFAULTS.host_memory, help="host-tier budget behind the device")
    modes = None if many_modes else get_args(Mode)
    parser.add_argument("--mode", default=_DEFAULTS.mode, choices=modes, help="exact, bounded or fast")
    parser.add_argument("--budget", type=float, default=_DEFAULTS.budget, help="nats per token that bounded may spend")
    parser.add_argument("--standin", default=_DEFAULTS.standin, help=f"what stands in: {', '.join(STANDINS)}")
    parser.add_argument("--standin-layers", default=None, help="MoE layers where stand-ins may answer, like 0,2")
    parser.add_argument("--policy", default=_DEFAULTS.policy, choices=POLICIES, help="who decides about a miss")
    parser.add_argument("--profile", default=None, help="calibration; default the one beside the checkpoint")
    parser.add_argument(
        "--expert-dtype", default=_DEFAULTS.expert_dtype, choices=EXPERT_DTYPES, help="precision experts are served in"
    )
    parser.add_argument("--dtype", default=_DEFAULTS.dtype, choices=DTYPES, help="compute dtype")
    parser.add_argument("--device", default=_DEFAULTS.device, help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=int, default=_DEFAULTS.threads, help="CPU threads of the kernels")
    parser.add_argument("--batching", default=_DEFAULTS.batching, choices=BATCHING, help="packed, solo or by family")
    parser.add_argument("--max-model-len", type=int, default=None, help="most tokens of prompt and output")


def engine_config(args: argparse.Namespace, **changes: Any) -> EngineConfig:
    """EngineConfig from parsed options; `changes` win."""
    options = {name: getattr(args, name) for name in EngineConfig.names() if hasattr(args, name)}
    return EngineConfig.from_options(**{**options, **changes})


def emit(record: Mapping[str, Any], *, as_json: bool) -> None:
    """Print one record: compact JSON, or `key  value` lines for a person."""
    if as_json:
        print(json.dumps(record, separators=(",", ":")), flush=True)
        return
    width = max(len(key) for key in record)
    for key, value in record.items():
        print(f"{key:<{width}}  {_shown(value)}")
    print(flush=True)


def progress(items: Iterable[T], *, total: int | None, desc: str) -> Iterable[T]:
    """A bar on stderr when a person watches, nothing in a pipe."""
    return tqdm(items, total=total, desc=desc, disable=not sys.stderr.isatty(), file=sys.stderr)


def _shown(value: object) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)
