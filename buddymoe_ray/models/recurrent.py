"""Layers that carry a state from token to token, run by transformers' own code on states that a caller keeps.

Linear attention, state spaces and short convolutions ask transformers' cache for what they left behind; here they ask
`RowStates`, which has it of as many sequences as the caller runs in one call. Who keeps states, and of whom rows are,
is the `StateKeeper`'s: the engine's pool, or `StateShapes`, which only learns how large they are.

Legend: B sequences, T rows, D hidden, C channels of a convolution.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from inspect import signature
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["RowStates", "RunRows", "StateKeeper", "StateShapes", "attach_states", "carrying_layers"]

_CARRYING = frozenset({"linear_attention", "conv", "hybrid", "hybrid_sliding"})
"""Types of layers that keep a state of fixed size."""
_CACHES = ("cache_params", "past_key_values")
_MASKS = ("attention_mask", "mask")
"""Of padding, of which there is none; transformers looks whether there is, but not where a device records."""
_FORGETFUL = frozenset({"jamba"})
"""Families whose scan over several tokens begins at zero, whatever state is there."""


@dataclass
class RowStates:
    """What one call of a layer reads, and what it leaves: `conv` `[B, C, width]`, the latest inputs of a convolution,
    and `recurrent` `[B, ...]`; None where there is none yet, or none at all. Layers may write into what they read."""

    conv: Tensor | None = None
    recurrent: Tensor | None = None

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """This and what follows are what layers call."""
        return self.conv

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """None where a text begins."""
        return self.recurrent

    def update_conv_state(
        self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, conv_kernel_size: int | None = None
    ) -> Tensor:
        """Take in inputs `[B, C, T]`; all that there are now, at least `conv_kernel_size` of them."""
        width = conv_kernel_size or conv_states.shape[-1]
        known = conv_states if self.conv is None else torch.cat([self.conv, conv_states], dim=-1)
        known = functional.pad(known, (max(0, width - known.shape[-1]), 0))
        self.conv = known[..., -width:].contiguous()  # as it will lie when the next call reads it, for its bits
        return known

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0) -> Tensor:
        """From now on the state is this."""
        self.recurrent = recurrent_states.contiguous()
        return recurrent_states

    def get_linear_cache(self, layer_idx: int) -> Tensor | None:
        """Minimax's name of a recurrent state."""
        return self.recurrent

    def set_linear_cache(self, layer_idx: int, linear_cache: Tensor) -> None:
        """From now on the state is this."""
        self.recurrent = linear_cache.contiguous()

    def is_recording_past(self, layer_idx: int) -> bool:
        """Nothing is ever taken back."""
        return False


RunRows = Callable[[Tensor, RowStates], tuple[Tensor, ...]]
"""A layer's own forward: rows `[B, T, D]` on their states; what it answers, whose first dimensions are B and T."""


class StateKeeper(Protocol):
    """Whose rows are whose."""

    def run(self, layer: int, rows_1TD: Tensor, compute: RunRows) -> tuple[Tensor, ...]:
        """Compute the rows of a pass, `[1, T, D]`, each on the state of its sequence."""


@dataclass
class StateShapes:
    """Learns what each layer keeps of a sequence: shapes without B, and dtypes, of `conv` and of `recurrent`."""

    of: dict[int, tuple[tuple[torch.Size, torch.dtype] | None, ...]] = field(default_factory=dict)

    def run(self, layer: int, rows_1TD: Tensor, compute: RunRows) -> tuple[Tensor, ...]:
        """The rows are a text from its beginning."""
        states = RowStates()
        out = compute(rows_1TD, states)
        kept = (states.conv, states.recurrent)
        self.of[layer] = tuple(None if part is None else (part.shape[1:], part.dtype) for part in kept)
        return out

    @property
    def nbytes(self) -> int:
        """Bytes of one sequence's states in all layers."""
        kept = (part for parts in self.of.values() for part in parts if part is not None)
        return sum(shape.numel() * dtype.itemsize for shape, dtype in kept)


class _Carrying:
    """In the place of a layer's `forward`."""

    def __init__(self, module: nn.Module, layer: int, keeper: StateKeeper, *, one_by_one: bool) -> None:
        self.keeper = keeper
        self._forward, self._layer, self._one_by_one = module.forward, layer, one_by_one
        _, *self._names = signature(module.forward).parameters
        self._cache = next(name for name in _CACHES if name in self._names)

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        given |= {name: None for name in _MASKS if name in self._names}
        plural = False

        def compute(rows_BTD: Tensor, states: RowStates) -> tuple[Tensor, ...]:
            nonlocal plural
            out = self._forward(rows_BTD, **{**given, self._cache: states})
            plural = isinstance(out, tuple)
            return out if plural else (out,)

        def each(rows_BTD: Tensor, states: RowStates) -> tuple[Tensor, ...]:
            if not self._one_by_one or states.recurrent is None or rows_BTD.shape[1] == 1:
                return compute(rows_BTD, states)
            answers = [compute(row_B1D, states) for row_B1D in rows_BTD.split(1, dim=1)]
            return tuple(torch.cat(parts, dim=1) for parts in zip(*answers, strict=True))

        out = self.keeper.run(self._layer, hidden_states, each)
        return out if plural else out[0]


def attach_states(model: nn.Module, keeper: StateKeeper) -> None:
    """Have the model's layers that carry a state run by `keeper` from now on."""
    forgetful = getattr(model.config, "model_type", "") in _FORGETFUL
    for layer, module in carrying_layers(model):
        if isinstance(forward := module.__dict__.get("forward"), _Carrying):
            forward.keeper = keeper
        else:
            module.forward = _Carrying(module, layer, keeper, one_by_one=forgetful)  # type: ignore[method-assign]


def carrying_layers(model: nn.Module) -> Iterator[tuple[int, nn.Module]]:
    """The modules of a model that carry a state, with the numbers of their layers."""
    types = getattr(getattr(model, "config", None), "layer_types", None) or ()
    for module in model.modules():
        layer: Any = getattr(module, "layer_idx", None)
        if isinstance(layer, int) and layer < len(types) and types[layer] in _CARRYING and _asks(module):
            yield layer, module


def _asks(module: nn.Module) -> bool:
    """Whether it is the module itself that asks a cache, and none of its parts."""
    own: Any = type(module)
    inside = (part for part in module.modules() if part is not module)
    return any(name in signature(own.forward).parameters for name in _CACHES) and not any(
        hasattr(part, "layer_idx") for part in inside
    )
