"""Every option of the engine, with its one default: a frozen record that validates itself.

Knows neither torch nor ray. The command line, the YAML of `deployments/` and `LLM(...)` all end here, so a default is
written once. Environment variables are read in this file alone.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args

from buddymoe_ray.errors import ConfigError
from buddymoe_ray.types import Mode

__all__ = ["EngineConfig", "api_key_from_environment", "cache_folder"]

DTYPES = ("auto", "float32", "bfloat16", "float16")
BATCHING = ("auto", "packed", "solo")
GENERATION_CONFIGS = ("auto", "none")
INEXACT = ("budget", "standin", "standin_layers", "policy", "profile", "guard_share")  # without effect in `exact`
EXPERT_DTYPES = ("native", "bf16", "int8", "int4")
POLICIES = ("ladder", "buddymoe")
STANDINS = (
    *("auto", "lowbit", "lowbit2", "lowbit3", "lowbit4", "lowbit8", "lowrank"),
    *("buddy:coactivation", "buddy:router", "buddy:output", "mean", "drop", "random"),
)


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How one engine serves one model.

    Args:
        model: `builtin:tiny`, a checkpoint folder, or a hub id.
        memory: device budget for routed experts, staging and scratch included: `25%` of their stored bytes, or `6GiB`.
            On CPU the workers of a node put theirs together.
        host_memory: host-tier budget between device and disk, same forms; `0` is no host tier. Workers of a node put
            theirs together.
        mode: `exact` answers every miss with the expert itself; `bounded` lets stand-ins answer within `budget`; `fast`
            never waits in decode. A request may ask for another where stand-ins are loaded.
        budget: mean extra loss (nats) per generated token that `bounded` may spend; .003 is about .3 % of perplexity.
        standin: what answers for a missing expert: `auto` (the best mix by the profile), `lowbit`, `lowbit2`,
            `lowbit3`, `lowbit4`, `lowbit8`, `lowrank`, `buddy:coactivation`, `buddy:router`, `buddy:output`, `mean`,
            `drop`, `random`.
        standin_layers: MoE layers where stand-ins may answer, as `0,2,3`; None is all. Elsewhere misses are fetched.
        policy: `ladder` (cheapest rung within the budget) or `buddymoe` (the paper whole, its gates fetch).
        profile: calibration file; None is the one beside the checkpoint.
        expert_dtype: precision the experts are served in: `native`, `bf16`, `int8`, `int4`.
        guard_share: share of `bounded` and `fast` sequences recomputed exactly to check their cost; 0 is off.
        dtype: compute dtype; `auto` is float32 for `builtin:tiny` and float32 checkpoints, else the checkpoint's.
        device: `auto` (cuda when there is one, else cpu), `cpu`, `cuda`, `cuda:1`.
        threads: CPU threads of the compute kernels.
        max_model_len: most tokens of prompt and output; None is the model's own limit.
        max_running: most sequences that decode side by side.
        kv_memory: bytes of the KV cache: `512MiB`, or `auto`.
        prefill_chunk: most prompt tokens computed in one step.
        batching: `packed` (ragged rows over a paged KV cache), `solo` (transformers' own cache, a forward per sequence;
            for families with recurrent state), `auto` picks by family.
        seed: seeds the requests that bring none.
        generation_config: what requests of a service leave open is sampled as the checkpoint's generation_config.json
            says (`auto`), or as OpenAI's API does (`none`). `LLM.generate` is greedy where it is told nothing.
    """

    model: str = "builtin:tiny"
    memory: str = "25%"
    host_memory: str = "0"
    mode: Mode = "exact"
    budget: float = 0.003
    standin: str = "auto"
    standin_layers: str | None = None
    policy: str = "ladder"
    profile: str | None = None
    expert_dtype: str = "native"
    guard_share: float = 0.02
    dtype: str = "auto"
    device: str = "auto"
    threads: int = 1
    max_model_len: int | None = None
    max_running: int = 32
    kv_memory: str = "auto"
    prefill_chunk: int = 512
    batching: str = "auto"
    seed: int = 0
    generation_config: str = "auto"

    def __post_init__(self) -> None:
        _one_of("mode", self.mode, get_args(Mode))
        _one_of("standin", self.standin, STANDINS)
        _one_of("policy", self.policy, POLICIES)
        _one_of("expert_dtype", self.expert_dtype, EXPERT_DTYPES)
        self.chosen_layers()
        _between("budget", self.budget, 0.0, 1.0)
        _between("guard_share", self.guard_share, 0.0, 1.0)
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("batching", self.batching, BATCHING)
        _one_of("generation_config", self.generation_config, GENERATION_CONFIGS)
        for name in ("threads", "max_running", "prefill_chunk"):
            _at_least(name, getattr(self, name), 1)
        if self.max_model_len is not None:
            _at_least("max_model_len", self.max_model_len, 2)
        if self.device not in ("auto", "cpu", "cuda") and not self.device.startswith("cuda:"):
            raise ConfigError(f"device is {self.device!r}, must be auto, cpu, cuda or cuda:N. hint: leave it at auto")
        if self.mode == "exact":
            self._refuse_inexact()

    def _refuse_inexact(self) -> None:
        for name in INEXACT:
            value = getattr(self, name)
            if value != getattr(EngineConfig, name) and not (name == "guard_share" and value == 0):
                raise ConfigError(
                    f"{name} is {value!r}, must be left out in mode exact, where it has no effect. "
                    "hint: set mode to bounded or fast"
                )

    def exactly(self, **changes: Any) -> EngineConfig:
        """The same in mode `exact`, without what has no effect there."""
        unused = {name: getattr(EngineConfig, name) for name in INEXACT}
        return replace(self, **{"mode": "exact", **unused, **changes})

    def chosen_layers(self) -> frozenset[int] | None:
        """`standin_layers` as numbers, None for all. Raises ConfigError."""
        if self.standin_layers is None:
            return None
        parts = self.standin_layers.split(",")
        if not all(part.strip().isdecimal() for part in parts):
            raise ConfigError(
                f"standin_layers is {self.standin_layers!r}, must be layer numbers like 0,2,3. "
                "hint: leave it out for all layers"
            )
        return frozenset(int(part) for part in parts)

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Names of all options, in the order of the class."""
        return tuple(f.name for f in fields(cls))

    @classmethod
    def from_options(cls, **options: Any) -> EngineConfig:
        """Build from keywords and refuse unknown names with the list of known ones."""
        unknown = sorted(set(options) - set(cls.names()))
        if unknown:
            raise ConfigError(
                f"option is {unknown[0]!r}, must be one of {', '.join(cls.names())}. hint: check spelling"
            )
        return cls(**options)


def cache_folder() -> Path:
    """Where what can be made again is kept: `$XDG_CACHE_HOME/buddymoe_ray`, by default under `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "buddymoe_ray"


def api_key_from_environment(variable: str = "BUDDYMOE_API_KEY") -> str | None:
    """The API key clients must send, or None when the variable is unset or empty."""
    return os.environ.get(variable) or None


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name} is {value!r}, must be {' or '.join(allowed)}. hint: see EngineConfig")


def _between(name: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ConfigError(f"{name} is {value!r}, must be a number from {low:g} to {high:g}. hint: see EngineConfig")


def _at_least(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name} is {value!r}, must be an integer of at least {least}. hint: see EngineConfig")
