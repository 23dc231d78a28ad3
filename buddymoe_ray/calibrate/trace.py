"""One pass of a corpus through the exact engine: every MoE layer's inputs and routes, kept in files.

Memory-mapped, so that a large model's trace does not live in memory. The files have no names once they are mapped: they
go when the trace is closed or the process ends, however it ends. Knows no stand-ins.
Invariant: row t of every layer belongs to token t, windows lie end to end.

Legend: T traced tokens, K slots of a token, D hidden, S tokens of a window, V vocabulary.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from buddymoe_ray.engine.build import BLOCK_SIZE
from buddymoe_ray.engine.parts import EngineParts
from buddymoe_ray.errors import ProfileError
from buddymoe_ray.models.shard_writer import check_space

__all__ = ["Trace", "record_trace"]

Progress = Callable[..., Iterable[int]]


@dataclass(frozen=True, kw_only=True)
class _LayerTrace:
    hidden_TD: Tensor
    ids_TK: Tensor
    weight_TK: Tensor


class Trace:
    """Inputs and routes of `tokens` tokens in windows of `window` tokens. A context manager: its files go with it.

    Raises CheckpointError or ProfileError when `folder` cannot hold them.
    """

    def __init__(
        self, folder: Path, *, layers: int, tokens: int, window: int, hidden: int, top_k: int, dtype: torch.dtype
    ) -> None:
        row_bytes = hidden * dtype.itemsize + top_k * 6
        check_space(folder, layers * tokens * row_bytes)
        self.tokens, self.window, self.top_k = tokens, window, top_k
        self._layers = [
            _LayerTrace(
                hidden_TD=_mapped(folder, (tokens, hidden), dtype),
                ids_TK=_mapped(folder, (tokens, top_k), torch.int16),
                weight_TK=_mapped(folder, (tokens, top_k), torch.float32),
            )
            for _ in range(layers)
        ]
        self._cursor = [0] * layers

    def observe(self, layer: int, hidden_TD: Tensor, ids_TK: Tensor, weight_TK: Tensor) -> None:
        """Keep one layer's rows of a pass; the observer of `moe.StepState`."""
        at, to = self._cursor[layer], self._cursor[layer] + len(hidden_TD)
        kept = self._layers[layer]
        kept.hidden_TD[at:to].copy_(hidden_TD)
        kept.ids_TK[at:to].copy_(ids_TK)
        kept.weight_TK[at:to].copy_(weight_TK)
        self._cursor[layer] = to

    def hidden(self, layer: int) -> Tensor:
        """`[T, D]` inputs of the layer's experts, in the compute dtype."""
        return self._layers[layer].hidden_TD

    def ids(self, layer: int) -> Tensor:
        """`[T, K]` int64."""
        return self._layers[layer].ids_TK.long()

    def weights(self, layer: int) -> Tensor:
        """`[T, K]` float32 slot weights."""
        return self._layers[layer].weight_TK

    def __enter__(self) -> Trace:
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, at: TracebackType | None) -> None:
        self._layers = []


def _mapped(folder: Path, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """A tensor in a file without a name. Its blocks are taken at once, so a full disk is an error and no crash."""
    count = shape[0] * shape[1]
    try:
        with tempfile.NamedTemporaryFile(prefix="trace-", dir=folder) as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, count * dtype.itemsize)
            return torch.from_file(file.name, shared=True, size=count, dtype=dtype).view(shape)
    except OSError as error:
        raise ProfileError(
            f"{folder} cannot hold the trace ({error.strerror}), must take {count * dtype.itemsize} bytes more. "
            "hint: free some space or choose another --out"
        ) from error


def record_trace(parts: EngineParts, windows: Sequence[Sequence[int]], folder: Path, *, progress: Progress) -> Trace:
    """Run `windows` (all of one length) through the engine. Raises CheckpointError when the disk is too small."""
    window = len(windows[0])
    layers = len(parts.experts.cache.layout.experts_per_layer)
    blocks = range(-(-window // BLOCK_SIZE))
    trace = Trace(
        folder,
        layers=layers,
        tokens=window * len(windows),
        window=window,
        hidden=parts.loaded.hidden_size,
        top_k=parts.loaded.experts_per_token,
        dtype=parts.loaded.compute_dtype,
    )
    parts.step.observer = trace.observe
    try:
        for at in progress(range(len(windows)), total=len(windows), desc="trace"):
            for _ in parts.runner.score(windows[at], blocks, chunk=window):
                pass
    except BaseException:
        trace.__exit__(None, None, None)
        raise
    finally:
        parts.step.observer = None
    return trace
