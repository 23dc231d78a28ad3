"""Shows each MoE layer's router scores to whoever asks, while that layer's experts run.

transformers hands the experts only the top-k; a stand-in that asks the router for its next choice needs all scores. A
forward hook on the router keeps them for the layer in progress. Attached only where a stand-in wants scores.

Legend: T tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from buddymoe_ray.errors import UnsupportedModel
from buddymoe_ray.models.row_kernels import SoftmaxRouter

__all__ = ["SIGMOID_FAMILIES", "attach_router_scores", "embedded", "find_routers", "router_choices"]

SIGMOID_FAMILIES = frozenset(
    {
        *("afmoe", "axk1", "cohere2_moe", "deepseek_v3", "dots1", "exaone_moe", "flint", "glm4_moe", "glm4_moe_lite"),
        *("axk2", "bailing_hybrid", "deepseek_v32", "deepseek_v4", "glm_moe_dsa", "hy_v4", "kimi_linear", "nemotron_h"),
        *("hy_v3", "kolibri1", "laguna", "lfm2_moe", "mimo_v2_flash", "minimax_m2", "minimax_m3_vl_text", "solar_open"),
    }
)
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
        beside = {name: child for name, child in parent.named_children() if child is not module}
        found = [name for name, child in beside.items() if _is_router(child, E)]
        named = [name for name in found if name in ("gate", "router")]  # before what is as wide by chance
        routers.append(beside[(named or found)[0]] if found else None)
    return routers


def router_choices(
    model: nn.Module, experts: Sequence[nn.Module], experts_per_layer: Sequence[int], *, experts_per_token: int
) -> list[Callable[[Tensor], Tensor]]:
    """Every layer's router as `[T, D] -> ids [T, K]`, its first choice first; none at all where a layer has none.

    They are guesses where a family chooses by more than its logits: groups, a correction of scores.
    """
    routers = find_routers(model, experts, experts_per_layer)
    if None in routers:
        return []
    return [
        _choice(router, E, experts_per_token)
        for router, E in zip(routers, experts_per_layer, strict=True)
        if router is not None
    ]


def embedded(model: nn.Module, experts: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """`tokens [T] -> [T, D]`: what the layer of these experts would read of each if it came first and had no attention;
    None where no norm is found before its feed-forward."""
    name = next(name for name, module in model.named_modules() if module is experts)
    layer = model.get_submodule(".".join(name.split(".")[:-2]))
    norm, table = getattr(layer, "post_attention_layernorm", None), model.get_input_embeddings()  # type: ignore[operator]
    return None if norm is None else lambda tokens_T: norm(table(tokens_T))


def _choice(router: nn.Module, E: int, K: int) -> Callable[[Tensor], Tensor]:
    forward: Any = router.forward  # without hooks: nobody else is to see it
    if isinstance(forward, SoftmaxRouter):
        return lambda hidden_TD: forward.compute(hidden_TD)[2]

    if len(signature(forward).parameters) > 1:  # corrections or tokens, which a guess does without
        forward = partial(functional.linear, weight=next(filter(partial(_of_experts, E), router.parameters())))

    def choose(hidden_TD: Tensor) -> Tensor:
        with torch.inference_mode():
            return _logits(forward(hidden_TD), E).topk(K, dim=-1).indices

    return choose


def _logits(output: object, E: int) -> Tensor:
    parts = output if isinstance(output, tuple | list) else (output,)
    found = (part for part in parts if isinstance(part, Tensor) and part.is_floating_point() and part.shape[-1] == E)
    logits = next(found, None)
    if logits is None:
        raise UnsupportedModel(f"a router of {E} experts shows no logits, must return [tokens, {E}]")
    return logits.reshape(-1, E).float()


def _is_router(module: nn.Module, E: int) -> bool:
    """A router maps hidden states to one logit per expert, by its own weight or by a linear inside it."""
    return any(_of_experts(E, p) for p in module.parameters()) and not hasattr(module, "_apply_gate")


def _of_experts(E: int, parameter: Tensor) -> bool:
    return parameter.ndim == 2 and parameter.shape[0] == E


def _keeper(layer: int, E: int, sigmoid: bool, into: MutableMapping[int, Tensor]):  # type: ignore[no-untyped-def]
    def keep(_module: nn.Module, _inputs: object, output: object) -> None:
        try:
            logits_TE = _logits(output, E)
        except UnsupportedModel as error:
            raise UnsupportedModel(f"MoE layer {layer}: {error}") from error
        into[layer] = torch.sigmoid(logits_TE) if sigmoid else torch.softmax(logits_TE, dim=-1)

    return keep
