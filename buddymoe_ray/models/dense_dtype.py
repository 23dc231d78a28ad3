"""Dense linear layers by the kernels of the experts: as stored, or in another precision than the checkpoint's.

`native` on a CPU multiplies with the weights where they are, every linear layer of the model: in the bits of a row no
other row counts, and bfloat16 is several times as fast as by torch where the CPU has no instructions for it. Quantised
weights stay the codes and scales of the checkpoint.
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

from buddymoe_ray.kernels import BLOCK, CpuLinear, LowbitFormat, pack_plain, packed_shapes, widens
from buddymoe_ray.models.coded_linear import BARE, CodedLinear, read_bias, replace_module
from buddymoe_ray.models.hf_loading import experts_modules, kept_in_float32
from buddymoe_ray.models.router_hook import find_routers

__all__ = ["PackedLinear", "StoredLinear", "keep_dense", "pack_dense"]

_BITS = {"int8": 8, "int4": 4}


Progress = Callable[..., Iterable[Any]]


def _silent(items: Iterable[Any], **_: Any) -> Iterable[Any]:
    return items


def keep_dense(model: PreTrainedModel, *, threads: int = 1) -> None:
    """Replace linear layers by ones that compute with `threads` from the same weights, where this CPU has a kernel."""
    for name, module in list(model.named_modules()):
        if isinstance(module, CodedLinear):
            module.prepare(threads)
        if type(module) is nn.Linear and StoredLinear.covers(module):
            replace_module(model, name, StoredLinear(module, threads))


def pack_dense(model: PreTrainedModel, dense_dtype: str, *, threads: int = 1, progress: Progress = _silent) -> None:
    """Replace the model's linear layers by packed ones that compute with `threads`, in place; `native` leaves it alone.
    One layer at a time is there in both forms."""
    if dense_dtype == "native":
        return
    fmt, chosen = LowbitFormat(bits=_BITS[dense_dtype]), _linears(model)
    for name in progress(list(chosen), total=len(chosen), desc=f"dense weights to {dense_dtype}"):
        linear = chosen.pop(name)
        replace_module(
            model, name, PackedLinear(linear.plain() if isinstance(linear, CodedLinear) else linear, fmt, threads)
        )


def _linears(model: PreTrainedModel) -> dict[str, nn.Linear | CodedLinear]:
    """The layers to pack by full name, but for those that compute in float32 whatever the rest does."""
    experts, wide = experts_modules(model), kept_in_float32(model)
    counts = [next(module.parameters()).shape[0] for module in experts.values()]
    apart = (*experts.values(), *find_routers(model, tuple(experts.values()), counts))
    left = {id(part) for module in apart if module is not None for part in module.modules()}
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) in (nn.Linear, CodedLinear)
        and id(module) not in left
        and f"{name}.weight" not in wide
        and not name.endswith(BARE)
        and min(module.in_features, module.out_features) >= BLOCK
    }


class StoredLinear(nn.Module):
    """`y = x W^T + b` from the weights of a linear layer where they are; rows do not see each other."""

    def __init__(self, linear: nn.Linear, threads: int) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.compute = CpuLinear(
            linear.weight.detach(), None, linear.weight.dtype, read_bias(linear.bias), threads=threads
        )

    @staticmethod
    def covers(linear: nn.Linear) -> bool:
        """Whether this CPU has a kernel for the layer's weights, of which there may be none."""
        weight = linear.weight
        return weight.device.type == "cpu" and weight.is_contiguous() and widens(weight.dtype) and weight.numel() > 0

    def forward(self, x: Tensor) -> Tensor:
        """`[..., K] -> [..., N]` in the dtype of `x`, which is the weight's."""
        return self.compute(x)


class PackedLinear(nn.Module):
    """`y = x W^T + b` from packed codes; rows do not see each other. On meta it has the shapes alone."""

    def __init__(self, linear: nn.Linear, fmt: LowbitFormat, threads: int) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.compute: CpuLinear | None = None
        self._dtype = linear.weight.dtype
        weight, bias = linear.weight.detach(), None if linear.bias is None else linear.bias.detach().float()
        parts: dict[str, Tensor]
        if weight.is_meta:
            sized = packed_shapes(self.out_features, self.in_features, fmt)
            parts = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in sized.items()}
        else:
            packed = pack_plain(weight, fmt)
            parts = vars(packed)
            self.compute = CpuLinear(packed, fmt, weight.dtype, bias, threads=threads)
        for name, part in {**parts, "bias": bias}.items():  # so that whoever counts the model's bytes finds them
            self.register_buffer(name, part, persistent=False)

    @property
    def weight(self) -> Tensor:
        """Nothing but a dtype, which is what some classes ask of it."""
        return torch.empty(0, dtype=self._dtype)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., K] -> [..., N]` in the dtype of `x`, which is the weight's."""
        if self.compute is None:
            return x.new_empty(*x.shape[:-1], self.out_features)
        return self.compute(x)
