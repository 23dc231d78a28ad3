"""Puts our MoE blocks in place of transformers' expert modules.

transformers calls an experts module with the router's choice; the implementation registered here forwards that call to
the block attached to the module. Does not know what a block does.

Legend: T tokens, K experts per token, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

__all__ = ["NAME", "ExpertsBlock", "attach", "register"]

NAME = "buddymoe"

ExpertsBlock = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`block(hidden[T, D], top_k_index[T, K], top_k_weights[T, K]) -> [T, D]`."""


def register() -> None:
    """Make `experts_implementation="buddymoe"` known to transformers; safe to call again."""
    ALL_EXPERTS_FUNCTIONS.register(NAME, _forward)


def attach(experts: Sequence[nn.Module], factory: Callable[[int, nn.Module], ExpertsBlock]) -> None:
    """Give MoE layer `i`'s experts module the block `factory(i, module)`; replaces an earlier one."""
    for layer, module in enumerate(experts):
        # past nn.Module's own setattr: a block that is a Module must not become part of the model's state
        object.__setattr__(module, "buddymoe_block", factory(layer, module))


def _forward(module: nn.Module, hidden_TD: Tensor, ids_TK: Tensor, weight_TK: Tensor) -> Tensor:
    block: ExpertsBlock | None = module.__dict__.get("buddymoe_block")
    assert block is not None, f"{type(module).__name__} has no block: call experts_hook.attach before a forward"
    return block(hidden_TD, ids_TK, weight_TK)
