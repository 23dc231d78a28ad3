"""A small random checkpoint, opened and traced as a calibration does, and what stock transformers says of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from families import build_checkpoint
from torch import Tensor

from buddymoe_ray.calibrate.trace import Trace, record_trace
from buddymoe_ray.config import EngineConfig
from buddymoe_ray.engine.build import build_parts
from buddymoe_ray.engine.parts import EngineParts
from buddymoe_ray.models.load import load_model
from buddymoe_ray.models.reference import reference_model

__all__ = ["Seen", "opened", "random_ids", "silent", "stock_trace", "traced", "write_checkpoint"]


def silent(items: Iterable[Any], **_: Any) -> Iterable[Any]:
    """No progress bar."""
    return items


def random_ids(count: int, *, vocab: int = 160, seed: int = 0) -> list[int]:
    """Token ids without special ones."""
    return torch.randint(3, vocab, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def write_checkpoint(family: str, folder: Path, **options: Any) -> Path:
    """The family's small checkpoint in `folder`."""
    return build_checkpoint(family, folder, **options)


@contextmanager
def opened(folder: Path, **options: Any) -> Iterator[EngineParts]:
    """The exact engine's parts, float32 unless said otherwise."""
    parts = build_parts(
        EngineConfig(model=str(folder), **{"memory": "100%", "dtype": "float32", **options}), text=False
    )
    try:
        yield parts
    finally:
        parts.experts.cache.close()


@contextmanager
def traced(parts: EngineParts, ids: list[int], window: int, folder: Path) -> Iterator[Trace]:
    """A trace of `ids` cut into whole windows."""
    windows = [ids[at : at + window] for at in range(0, len(ids) - window + 1, window)]
    with record_trace(parts, windows, folder, progress=silent) as trace:
        yield trace


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What one layer's experts were given."""

    hidden_TD: Tensor
    ids_TK: Tensor
    weight_TK: Tensor


def stock_trace(folder: Path, ids: list[int], window: int) -> list[Seen]:
    """The same by stock transformers, its own experts in place, in the order of MoE layers."""
    model = reference_model(folder)
    wanted = len(load_model(folder, dtype=torch.float32).experts)
    rows: list[list[tuple[Tensor, Tensor, Tensor]]] = []

    def keep(at: int):  # type: ignore[no-untyped-def]
        return lambda _module, args: rows[at].append(tuple(args[:3]))

    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "experts" and hasattr(module, "down_proj"):
            module.register_forward_pre_hook(keep(len(rows)))
            rows.append([])
    assert len(rows) == wanted, f"hooked {len(rows)} layers, must be {wanted}"
    with torch.no_grad():
        for at in range(0, len(ids) - window + 1, window):
            model(input_ids=torch.tensor([ids[at : at + window]]), use_cache=False)
    joined = [[torch.cat(parts) for parts in zip(*layer, strict=True)] for layer in rows]
    return [Seen(hidden_TD=h.flatten(0, -2), ids_TK=i, weight_TK=w) for h, i, w in joined]
