"""A checkpoint folder -> `LoadedModel`: dense weights on the device, experts on meta with the map to their bytes.

Does not know how experts are served: attach blocks with `experts_hook.attach(loaded.experts, factory)` first.
Neighbours: `shape.meta_model` finds the weights, `hf_loading` loads them, `dense_dtype` has our kernels compute them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from buddymoe_ray.models.coded_linear import keep_coded
from buddymoe_ray.models.dense_dtype import keep_dense, pack_dense
from buddymoe_ray.models.expert_layout import check_unchanged
from buddymoe_ray.models.families import Family
from buddymoe_ray.models.hf_loading import experts_modules, load_dense
from buddymoe_ray.models.quantised import check_values
from buddymoe_ray.models.router_hook import find_routers
from buddymoe_ray.models.row_kernels import rows_apart
from buddymoe_ray.models.shape import (
    auto_dtype,
    dense_bytes,
    eos_token_ids,
    experts_per_token,
    max_positions,
    meta_model,
)
from buddymoe_ray.types import ExpertLayout

__all__ = ["LoadedModel", "auto_dtype", "load_model", "on_kernels"]


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model ready to run once its experts have blocks.

    `experts[i]` is the experts module of MoE layer i, `layout` the map of its bytes; `experts_per_token` is the
    router's K; `dense_bytes` what the dense weights and buffers take on `device`. `eos_token_ids` are those that
    `generate` stops at. `family.packed` is already narrowed to what this config allows.
    """

    model: PreTrainedModel
    config: PreTrainedConfig
    folder: Path
    family: Family
    layout: ExpertLayout
    experts: tuple[nn.Module, ...]
    experts_per_token: int
    eos_token_ids: frozenset[int]
    max_positions: int
    hidden_size: int
    vocab_size: int
    compute_dtype: torch.dtype
    device: torch.device
    dense_bytes: int


def load_model(
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    attn: str | None = None,
) -> LoadedModel:
    """Load the dense weights of the checkpoint in `folder`.

    Args:
        dtype, device: of compute, None is `auto_dtype(folder)`; where dense weights go, None is the CPU.
        attn: name in transformers' AttentionInterface; None is transformers' default.

    Raises:
        CheckpointError: the checkpoint is incomplete, damaged, written just now or does not fit its config.
        UnsupportedModel: family or storage has no path here.
    """
    device = device or torch.device("cpu")
    folder = folder.resolve()
    meta = meta_model(folder, dtype=dtype, attn=attn, on_cpu=device.type == "cpu")
    check_values(meta.coded)
    load_dense(meta.model, meta.dense, device=device, elsewhere={f"{name}.weight" for name in meta.linears})
    keep_coded(meta.model, meta.linears)
    check_unchanged(meta.layout)
    return LoadedModel(
        model=meta.model,
        config=meta.config,
        folder=folder,
        family=meta.family,
        layout=meta.layout,
        experts=tuple(experts_modules(meta.model).values()),
        experts_per_token=experts_per_token(meta.config),
        eos_token_ids=eos_token_ids(folder, meta.config),
        max_positions=max_positions(meta.config),
        hidden_size=meta.config.hidden_size,
        vocab_size=meta.config.vocab_size,
        compute_dtype=meta.compute_dtype,
        device=device,
        dense_bytes=dense_bytes(meta.model),
    )


def on_kernels(
    loaded: LoadedModel,
    dense_dtype: str,
    *,
    threads: int = 1,
    progress: Callable[..., Iterable[Any]] = lambda items, **_: items,
) -> LoadedModel:
    """The loaded model, in place, with its dense linear layers in `dense_dtype` (see `models.dense_dtype`) and computed
    by our kernels with `threads`, as its norms and routers, where this CPU has them. `progress` shows how far packing
    is."""
    pack_dense(loaded.model, dense_dtype, threads=threads, progress=progress)
    keep_dense(loaded.model, threads=threads)
    counts = loaded.layout.experts_per_layer
    rows_apart(loaded.model, find_routers(loaded.model, loaded.experts, counts))
    return replace(loaded, dense_bytes=dense_bytes(loaded.model))
