"""A model's forward pass: its class's own, or the plain chain that most classes come to.

transformers wraps the chain of embedding, decoder layers, norm and output head in what serves its other users (masks,
caches, recorded outputs): .25 ms a pass, a third of a step of a small model. Where all decoder layers run in calls of
the kernels, and rows through the chain alone have the bits of the model's own logits, the chain is what runs.

Legend: T rows, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from buddymoe_ray.engine.attention import PagedAttention
from buddymoe_ray.engine.one_call import OneCallLayer, trial_pass
from buddymoe_ray.models.load import LoadedModel
from buddymoe_ray.moe import StepState

__all__ = ["ForwardPass", "PlainForward", "choose_forward", "own_forward"]

_PARTS = {"embed_tokens", "layers", "norm", "rotary_emb"}


class ForwardPass(Protocol):
    """Logits `[rows, V]` of a pass whose context is set. `keep` counts from the end (0: all) or has row numbers."""

    def __call__(self, ids_1T: Tensor, positions_1T: Tensor, keep: int | Tensor) -> Tensor: ...


def own_forward(model: nn.Module) -> ForwardPass:
    """As the model's class has it."""

    def forward(ids_1T: Tensor, positions_1T: Tensor, keep: int | Tensor) -> Tensor:
        everyone = torch.ones_like(ids_1T, dtype=torch.bool)  # without one transformers asks the device for positions
        rows: dict[str, Any] = {"input_ids": ids_1T, "position_ids": positions_1T, "attention_mask": everyone}
        out = model(**rows, use_cache=False, logits_to_keep=keep)
        return cast(Tensor, out.logits[0])

    return forward


class PlainForward:
    """The chain. `layers` are all of the model's."""

    def __init__(self, body: Any, head: nn.Module, layers: Sequence[OneCallLayer]) -> None:
        self._embed, self._turn, self._norm, self._head = body.embed_tokens, body.rotary_emb, body.norm, head
        self._layers = tuple(layers)

    def __call__(self, ids_1T: Tensor, positions_1T: Tensor, keep: int | Tensor) -> Tensor:
        hidden = self._embed(ids_1T)
        turn = self._turn(hidden, positions_1T)
        for layer in self._layers:
            hidden = layer(hidden, position_embeddings=turn)
        return cast(Tensor, self._head(self._norm(hidden)[0, slice(-keep, None) if isinstance(keep, int) else keep]))


def choose_forward(loaded: LoadedModel, paged: PagedAttention, step: StepState) -> ForwardPass:
    """The chain where a trial shows that it may take the place of the class's own. `paged` is open."""
    own = own_forward(loaded.model)
    plain = _chain(loaded.model)
    if plain is None:
        return own
    with trial_pass(loaded, paged, step) as (ids, positions):
        same = all(torch.equal(own(ids, positions, keep), plain(ids, positions, keep)) for keep in (0, 1))
    return plain if same else own


def _chain(model: Any) -> PlainForward | None:
    """None where the model has other parts, something listens to them, or a layer is not in a call of the kernels."""
    if _names(model) != {"model", "lm_head"} or _names(model.model) != _PARTS:
        return None
    if isinstance(getattr(model.model.rotary_emb, "rope_type", None), dict):  # one for each type of layer
        return None
    body, layers = model.model, [layer.forward for layer in model.model.layers]
    hooked = any(module._forward_hooks or module._forward_pre_hooks for module in (model, body, *body.layers))
    if hooked or not all(isinstance(layer, OneCallLayer) for layer in layers):
        return None
    return PlainForward(body, model.lm_head, layers)


def _names(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}
