"""Writes random-weight checkpoints of real shapes, shard by shard, at the speed of the disk.

Nothing is trained: use them for bytes, speed and routing skew, never for text. Knows config and keys; `synth_weights`
knows the numbers, `shard_writer` the files.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from transformers import AutoConfig, PreTrainedConfig

from buddymoe_ray.errors import ConfigError
from buddymoe_ray.models.hf_loading import architecture, stored_shapes
from buddymoe_ray.models.shard_writer import Progress, StoredTensor, check_space, write_shards
from buddymoe_ray.models.synth_shapes import SHAPES
from buddymoe_ray.models.synth_weights import SynthWeights, popularity_ranks

__all__ = ["SHAPES", "popularity_ranks", "synth_checkpoint"]


def synth_checkpoint(
    shape: str,
    out: Path,
    layers: int | None = None,
    skew: float = 0.0,
    seed: int = 0,
    progress: Progress | None = None,
    *,
    hot_sets: int = 1,
) -> Path:
    """Write a bfloat16 checkpoint of `shape` (a name in SHAPES) into the folder `out`, which must be new or empty.

    Args:
        layers: keep only the first layers; None keeps all.
        skew: the expert of popularity rank r gets a router logit shift of -skew * ln(r); 0 is uniform.
        hot_sets: 2 lets tokens of the upper half of the vocabulary prefer the experts that the others avoid.
        progress: called with (bytes written, bytes in all).

    Raises:
        ConfigError: unknown shape, unusable `layers`, `skew` or `hot_sets`, or `out` is not empty.
        CheckpointError: the disk is too small.
    """
    config = _config(shape, layers)
    if not (math.isfinite(skew) and skew >= 0):
        raise ConfigError(f"skew is {skew}, must be 0 or more. hint: 1.0 is Zipf's law")
    if hot_sets not in (1, 2):
        raise ConfigError(f"hot_sets is {hot_sets}, must be 1 or 2. hint: leave it at 1")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is not empty, must be a new folder. hint: remove it or choose another")
    tensors = [
        StoredTensor(key=key, shape=dims, nbytes=2 * math.prod(dims)) for key, dims in stored_shapes(config).items()
    ]
    total = sum(tensor.nbytes for tensor in tensors)
    check_space(out, total)
    out.mkdir(parents=True, exist_ok=True)
    weights = SynthWeights(
        hidden=config.hidden_size,
        layers=config.num_hidden_layers,
        skew=skew,
        seed=seed,
        tiny=total < 1 << 28,
        hot_sets=hot_sets,
    )
    write_shards(out, tensors, weights, progress=progress)
    config.save_pretrained(out)
    return out


def _config(shape: str, layers: int | None) -> PreTrainedConfig:
    if shape not in SHAPES:
        raise ConfigError(f"shape is {shape!r}, must be one of {', '.join(SHAPES)}. hint: check spelling")
    config = AutoConfig.for_model(**SHAPES[shape])
    least, most = getattr(config, "first_k_dense_replace", 0) + 1, config.num_hidden_layers
    if layers is not None:
        if not least <= layers <= most:
            raise ConfigError(f"layers is {layers}, must be {least} to {most} for {shape}. hint: leave it out for all")
        config = AutoConfig.for_model(**{**SHAPES[shape], "num_hidden_layers": layers})
    config.dtype = torch.bfloat16
    config.architectures = [architecture(config)]
    return config
