"""What an engine is made of: `build` fills it, `engine` runs it. Words only.

Neighbours on the token path: none; read `engine` first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from buddymoe_ray.config import EngineConfig
from buddymoe_ray.engine.calibration import Calibration
from buddymoe_ray.engine.runner import Runner
from buddymoe_ray.engine.scheduler import Scheduler
from buddymoe_ray.models.load import LoadedModel
from buddymoe_ray.moe import StepState
from buddymoe_ray.residency.sharing import Sharing
from buddymoe_ray.residency.tier import ExpertTier

__all__ = ["EngineLimits", "EngineParts"]


@dataclass(frozen=True, kw_only=True)
class EngineLimits:
    """What a request may ask for: tokens of prompt and output, sequences at once, tokens of KV cache in all."""

    max_model_len: int
    max_running: int
    kv_tokens: int


@dataclass(frozen=True, kw_only=True)
class EngineParts:
    """Everything `build` made."""

    config: EngineConfig
    experts: ExpertTier
    runner: Runner
    scheduler: Scheduler
    calibration: Calibration
    sharing: Sharing | None
    step: StepState
    limits: EngineLimits
    vocab_size: int
    loaded: LoadedModel
    eos_token_ids: frozenset[int]
    sampling_defaults: Mapping[str, Any]
    tokenizer: Any
