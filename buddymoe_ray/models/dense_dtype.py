"""Dense weights in another precision than the checkpoint's: linear layers that compute from packed codes.

`int8` and `int4` are the packed low-bit format by nearest rounding, made anew at every load. Attention, dense
feed-forwards, shared experts and the output head are packed; embeddings, norms, routers and what has fewer than 16
inputs or outputs stay as they are. Knows no budgets. Invariant: a model on meta and a loaded one are
packed alike, so a plan counts the bytes that will be there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from buddymoe_ray.kernels import BLOCK, LowbitFormat, LowbitLinear, pack, packed_shapes, round_plain
from buddymoe_ray.models.hf_loading import experts_modules
from buddymoe_ray.models.router_hook import find_routers

__all__ = ["PackedLinear", "pack_dense"]

_BITS = {"int8": 8, "int4": 4}


def pack_dense(
    model: PreTrainedModel,
    dense_dtype: str,
    *,
    threads: int = 1,
    progress: Callable[..., Iterable[Any]] = lambda items, **_: items,
) -> None:
    """Replace the model's linear layers by packed ones that compute with `threads`, in place; `native` leaves it alone.
    One layer at a time is there in both forms."""
    if dense_dtype == "native":
        return
    fmt, chosen = LowbitFormat(bits=_BITS[dense_dtype]), _linears(model)
    for name in progress(list(chosen), total=len(chosen), desc=f"dense weights to {dense_dtype}"):
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, PackedLinear(chosen.pop(name), fmt, threads))


def _linears(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """The layers to pack by full name."""
    experts = experts_modules(model)
    counts = [next(module.parameters()).shape[0] for module in experts.values()]
    apart = (*experts.values(), *find_routers(model, tuple(experts.values()), counts))
    left = {id(part) for module in apart if module is not None for part in module.modules()}
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and id(module) not in left and min(module.weight.shape) >= BLOCK
    }


class PackedLinear(nn.Module):
    """`y = x W^T + b` from packed codes; rows do not see each other. On meta it has the shapes alone."""

    def __init__(self, linear: nn.Linear, fmt: LowbitFormat, threads: int) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._compute: LowbitLinear | None = None
        weight, bias = linear.weight.detach(), None if linear.bias is None else linear.bias.detach().float()
        parts: dict[str, Tensor]
        if weight.is_meta:
            sized = packed_shapes(self.out_features, self.in_features, fmt)
            parts = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in sized.items()}
        else:
            packed = pack(*round_plain(weight, fmt), fmt)
            parts = vars(packed)
            self._compute = LowbitLinear(packed, fmt, weight.dtype, bias, threads=threads)
        for name, part in {**parts, "bias": bias}.items():  # so that whoever counts the model's bytes finds them
            self.register_buffer(name, part, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., K] -> [..., N]` in the dtype of `x`, which is the weight's."""
        if self._compute is None:
            return x.new_empty(*x.shape[:-1], self.out_features)
        return self._compute(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)
