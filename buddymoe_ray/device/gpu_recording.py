"""Work of a GPU as CUDA graphs of one memory pool, one for each piece.

Unproven: no GPU was there when it was written; `device_check` runs it on one. What a piece hands to those behind it is
kept for as long as the recording, or a piece further on would have its memory: then one may be replayed again after all
of them ran.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["GpuRecording"]


class GpuRecording:
    """What `compute` launches, cut where it says so. It is called twice: kernels are compiled, and libraries take the
    memory they work with, before a capture."""

    def __init__(self, device: torch.device, compute: Callable[[Callable[[], None]], None]) -> None:
        self._graphs, self._handed = list[torch.cuda.CUDAGraph](), list[Tensor]()
        self._pool = torch.cuda.graph_pool_handle()
        before, apart = torch.cuda.current_stream(device), _recordings(device)
        apart.wait_stream(before)
        with torch.cuda.device(device), torch.cuda.stream(apart):
            compute(lambda: None)
            apart.synchronize()
            free = torch.cuda.mem_get_info(device)[0]
            with _Made() as made:
                self._begin()
                try:
                    compute(lambda: self._cut(made))
                except BaseException:
                    with suppress(RuntimeError):  # it is void
                        self._graphs[-1].capture_end()
                    raise
                self._graphs[-1].capture_end()
            self.nbytes = max(0, free - torch.cuda.mem_get_info(device)[0])  # what the driver keeps of graphs, too
        before.wait_stream(apart)

    def replay(self, first: int, end: int) -> None:
        """See Recording."""
        for graph in self._graphs[first:end]:
            graph.replay()

    def _begin(self) -> None:
        graph = torch.cuda.CUDAGraph()
        self._graphs.append(graph)
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")  # others copy meanwhile

    def _cut(self, made: _Made) -> None:
        self._graphs[-1].capture_end()
        self._handed += made.alive()
        self._begin()


@cache
def _recordings(device: torch.device) -> torch.cuda.Stream:
    """One for all: libraries keep memory to work with for every stream that they ever ran on."""
    return torch.cuda.Stream(device)


class _Made(TorchDispatchMode):
    """Every tensor that is made, as long as anybody has it."""

    def __init__(self) -> None:
        super().__init__()
        self._made = list[weakref.ref[Tensor]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self._made += [weakref.ref(leaf) for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        return out

    def alive(self) -> list[Tensor]:
        """Those that are still somebody's, once."""
        found = [tensor for ref in self._made if (tensor := ref()) is not None]
        self._made.clear()
        return found
