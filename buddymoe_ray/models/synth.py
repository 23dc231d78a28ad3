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
from buddymoe_ray.models.synth_formats import QUANTISATION, CodedWeights, stored_as
from buddymoe_ray.models.synth_shapes import SHAPES
from buddymoe_ray.models.synth_weights import UNIFORM, Popularity, SynthWeights, popularity_ranks

__all__ = ["QUANTISATION", "SHAPES", "Popularity", "popularity_ranks", "synth_checkpoint"]


def synth_checkpoint(
    shape: str,
    out: Path,
    layers: int | None = None,
    popularity: Popularity = UNIFORM,
    seed: int = 0,
    fmt: str = "bf16",
    progress: Progress | None = None,
) -> Path:
    """Write a checkpoint of `shape` (a name in SHAPES) into the folder `out`, which must be new or empty.

    Args:
        layers: keep only the first layers; None keeps all.
        fmt: how experts and, but for mxfp4, other linear layers are stored: a name in QUANTISATION.
        progress: called with (bytes written, bytes in all).

    Raises:
        ConfigError: unknown shape or format, unusable `layers`, or `out` is not empty.
        CheckpointError: the disk is too small.
    """
    config = _config(shape, layers)
    if fmt not in QUANTISATION:
        raise ConfigError(f"format is {fmt!r}, must be one of {', '.join(QUANTISATION)}. hint: check spelling")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is not empty, must be a new folder. hint: remove it or choose another")
    plain = (StoredTensor(key=key, shape=n, nbytes=2 * math.prod(n)) for key, n in stored_shapes(config).items())
    tensors = stored_as(plain, fmt)
    total = sum(tensor.nbytes for tensor in tensors)
    check_space(out, total)
    out.mkdir(parents=True, exist_ok=True)
    weights = SynthWeights(
        popularity, hidden=config.hidden_size, layers=config.num_hidden_layers, seed=seed, tiny=total < 1 << 28
    )
    write_shards(out, tensors, CodedWeights(weights, fmt), progress=progress)
    if QUANTISATION[fmt]:
        config.quantization_config = dict(QUANTISATION[fmt])
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
