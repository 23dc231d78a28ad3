"""The CPU's twin of a CUDA graph: what was called is written down once and called again, without the Python code.

What a capture fixes is fixed here too: numbers and branches that Python saw, shapes, the addresses of buffers. What
would bring a value to the host is refused, as a capture refuses it. Memory that is only allocated holds poison in every
replay, so that what a replay leaves out, or reads before it is written, is seen.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["HostRecording", "noted"]

_WAITS = {
    *("aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::equal", "aten::nonzero", "aten::bincount"),
    *("aten::masked_select", "aten::_unique2", "aten::unique_dim"),
}
_ALLOCATES = {"aten::empty", "aten::empty_strided", "aten::empty_like", "aten::new_empty", "aten::new_empty_strided"}
_INDEXED = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}

_making = threading.local()


def noted(run: Callable[[], None]) -> None:
    """Launch what torch does not know of, and write it down where this thread makes a recording."""
    recorder: _Recorder | None = getattr(_making, "recorder", None)
    if recorder is None:
        run()
    else:
        recorder.launch(run)


class HostRecording:
    """What `compute` calls, cut where it says so."""

    def __init__(self, compute: Callable[[Callable[[], None]], None]) -> None:
        recorder, asked = _Recorder(), torch.cuda.is_current_stream_capturing
        _making.recorder = recorder
        # so that transformers looks into no tensor; right for other threads, too
        torch.cuda.is_current_stream_capturing = lambda: hasattr(_making, "recorder") or asked()
        try:
            with recorder:
                compute(recorder.cut)
        finally:
            torch.cuda.is_current_stream_capturing = asked
            del _making.recorder
        self._pieces, self.nbytes = recorder.pieces, recorder.nbytes

    def replay(self, first: int, end: int) -> None:
        """See Recording."""
        for piece in self._pieces[first:end]:
            for call in piece:
                call()


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[list[Callable[[], None]]] = [[]]
        self.nbytes = 0  # of what was allocated
        self._launching = False

    def cut(self) -> None:
        """A piece ends."""
        self.pieces.append([])

    def launch(self, run: Callable[[], None]) -> None:
        """Now, and in every replay; what it calls of torch is its own."""
        self._launching = True
        try:
            run()
        finally:
            self._launching = False
        self.pieces[-1].append(run)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._launching:
            return func(*args, **kwargs)
        _refuse(func, args)
        out = func(*args, **kwargs)
        known = {tensor.untyped_storage().data_ptr() for tensor in _tensors((args, kwargs))}
        outs = _tensors(out)
        fresh = [tensor.untyped_storage().data_ptr() not in known for tensor in outs]
        self.nbytes += sum(out.untyped_storage().nbytes() for out, new in zip(outs, fresh, strict=True) if new)
        if func._schema.name in _ALLOCATES:
            self.pieces[-1].append(partial(_poison, outs))
        elif func._schema.is_mutable or any(fresh):  # else it is a view, which stays one
            self.pieces[-1].append(partial(_again, partial(func, *args, **kwargs), outs, fresh))
        return out


def _tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _refuse(func: Any, args: tuple[Any, ...]) -> None:
    """Raise RuntimeError, as a capture does, for what waits for the device."""
    name = func._schema.name
    if name in _WAITS or (name in _INDEXED and any(t.dtype is torch.bool for t in _tensors(args[1]))):
        raise RuntimeError(f"{name} cannot be recorded: the host waits for it")


def _again(call: Callable[[], Any], outs: Sequence[Tensor], fresh: Sequence[bool]) -> None:
    for old, new, moved in zip(outs, _tensors(call()), fresh, strict=True):
        if moved:
            old.copy_(new)


def _poison(tensors: Sequence[Tensor]) -> None:
    for tensor in tensors:
        tensor.fill_(float("nan") if tensor.is_floating_point() else -1)
