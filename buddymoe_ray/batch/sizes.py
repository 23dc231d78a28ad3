"""An engine's options for a batch: nobody waits for a first token, so rows are many and prompt passes large.

Reads the model's config and headers, loads nothing.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from buddymoe_ray.batch.rows import most_rows
from buddymoe_ray.config import EngineConfig
from buddymoe_ray.engine.parts import EngineLimits
from buddymoe_ray.models.resolve import resolve_model
from buddymoe_ray.models.shape import describe
from buddymoe_ray.policy import plan_prefill

__all__ = ["rows_of", "sized"]

_FEWEST_TOKENS = 32  # of KV cache for a row: two blocks


def sized(config: EngineConfig, *, choices: int, max_running: int | None) -> EngineConfig:
    """`config` with what it leaves open: `max_running` (None: chosen) for so many `choices`, and `prefill_chunk`.

    Families that run solo gain nothing from rows, each of which reads its experts alone: they keep the default.
    """
    shape = describe(resolve_model(config.model))
    dtype = getattr(torch, shape.compute_dtype if config.dtype == "auto" else config.dtype)
    sizes = {"hidden": shape.hidden_size, "experts_per_token": shape.experts_per_token, "item_bytes": dtype.itemsize}
    rows = max_running
    if rows is None:
        packed = shape.packed and config.batching != "solo"
        most = most_rows(choices=choices, vocab=shape.vocab_size, **sizes)
        rows = most if packed else min(choices, EngineConfig.max_running)
    chunk = plan_prefill(config.prefill_chunk, fully_resident=False, **sizes).alone
    return replace(config, max_running=max(1, rows), prefill_chunk=chunk)


def rows_of(limits: EngineLimits) -> int:
    """Sequences to keep in an engine: those it runs side by side, where its KV cache has room to begin them."""
    return max(1, min(limits.max_running, limits.kv_tokens // _FEWEST_TOKENS))
