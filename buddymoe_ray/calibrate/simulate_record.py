"""Records a model's routes on a corpus through the exact engine, for `workloads.replayed`.

One pass, the calibrator's own; its inputs are thrown away. Knows no placement. Neighbour: `trace`.

Legend: T tokens, L MoE layers, K experts per token.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from buddymoe_ray.calibrate.trace import record_trace
from buddymoe_ray.calibrate.workloads import Routes
from buddymoe_ray.config import EngineConfig
from buddymoe_ray.engine.build import build_parts
from buddymoe_ray.errors import ConfigError

__all__ = ["record_routes"]

Progress = Callable[..., Iterable[int]]

_WINDOW = 256


def record_routes(config: EngineConfig, ids: Sequence[int], *, tokens: int, progress: Progress) -> Routes:
    """Routes of the first `tokens` ids, in whole windows of 256 (or of the model's limit).

    Raises ConfigError when the corpus is shorter than a window.
    """
    parts = build_parts(config.exactly(guard_share=0.0), text=False)
    try:
        window = min(_WINDOW, parts.limits.max_model_len - 1)
        count = min(len(ids), tokens) // window
        if count < 1:
            raise ConfigError(
                f"corpus is {len(ids)} tokens and --tokens {tokens}, must be at least {window}. hint: give more text"
            )
        windows = [tuple(ids[at * window : (at + 1) * window]) for at in range(count)]
        per_layer = parts.experts.cache.layout.experts_per_layer
        with (
            tempfile.TemporaryDirectory() as folder,
            record_trace(parts, windows, Path(folder), progress=progress) as trace,
        ):
            routes_TLK = np.stack([trace.ids(layer).numpy() for layer in range(len(per_layer))], axis=1)
    finally:
        parts.experts.cache.close()
    return Routes(routes_TLK=routes_TLK.astype(np.int16), experts_per_layer=tuple(per_layer))
