"""Shows each MoE layer's router scores to whoever asks, while that layer's experts run.

transformers hands the experts only the top-k; a stand-in that asks the router for its next choice needs all scores. A
forward hook on the router keeps them for the layer in progress. Attached only where a stand-in wants scores.

Legend: T tokens, E experts.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence

import torch
from torch import Tensor, nn

from buddymoe_ray.errors import UnsupportedModel

__all__ = ["SIGMOID_FAMILIES", "attach_router_scores", "find_routers"]

SIGMOID_FAMILIES = frozenset({"deepseek_v3", "dots1", "glm4_moe", "lfm2_moe", "minimax_m2"})
"""Families that score each expert by itself; all others share out a softmax."""


def attach_router_scores(
    model: nn.Module,
    experts: Sequence[nn.Module],
    experts_per_layer: Sequence[int],
    *,
    model_type: str,
    into: MutableMapping[int, Tensor],
) -> None:
    """After this, `into[i]` holds the scores `[T, E]` (float32) of MoE layer i's router once it has run.

    Raises UnsupportedModel for a layer without a router beside its experts.
    """
    for layer, router in enumerate(find_routers(model, experts, experts_per_layer)):
        if router is None:
            raise UnsupportedModel(
                f"MoE layer {layer} has no router beside its experts, must have one for live router scores. "
                "hint: choose another stand-in than buddy:router or the buddymoe policy"
            )
        router.register_forward_hook(_keeper(layer, experts_per_layer[layer], model_type in SIGMOID_FAMILIES, into))


def find_routers(
    model: nn.Module, experts: Sequence[nn.Module], experts_per_layer: Sequence[int]
) -> list[nn.Module | None]:
    """The router beside each experts module, None where there is none."""
    name_of = {module: name for name, module in model.named_modules()}
    routers = []
    for module, E in zip(experts, experts_per_layer, strict=True):
        parent = model.get_submodule(name_of[module].rpartition(".")[0])
        beside = (child for child in parent.children() if child is not module)
        routers.append(next((child for child in beside if _is_router(child, E)), None))
    return routers


def _is_router(module: nn.Module, E: int) -> bool:
    """A router maps hidden states to one logit per expert, by its own weight or by a linear inside it."""
    return any(p.ndim == 2 and p.shape[0] == E for p in module.parameters()) and not hasattr(module, "_apply_gate")


def _keeper(layer: int, E: int, sigmoid: bool, into: MutableMapping[int, Tensor]):  # type: ignore[no-untyped-def]
    def keep(_module: nn.Module, _inputs: object, output: object) -> None:
        parts = output if isinstance(output, tuple | list) else (output,)
        logits = next((t for t in parts if isinstance(t, Tensor) and t.is_floating_point() and t.shape[-1] == E), None)
        if logits is None:
            raise UnsupportedModel(f"the router of MoE layer {layer} shows no logits, must return [tokens, {E}]")
        logits_TE = logits.reshape(-1, E).float()
        into[layer] = torch.sigmoid(logits_TE) if sigmoid else torch.softmax(logits_TE, dim=-1)

    return keep
