"""Dense linear layers whose weights stay the codes and scales of a quantised checkpoint.

Knows one layer at a time; `dense_dtype` says when it gets a kernel. Invariant: a model on meta and a loaded one have
the same buffers, so a plan counts the bytes that will be there.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from buddymoe_ray.kernels import CodedWeight, CpuLinear, coded_shapes, decoded
from buddymoe_ray.models.quantised import CodedTensor

__all__ = ["BARE", "CodedLinear", "keep_coded", "read_bias", "replace_module"]

BARE = ".dt_proj"
"""What linear layers are called whose weight is multiplied by without them (jamba): it must be plain."""


def keep_coded(model: PreTrainedModel, linears: Mapping[str, CodedTensor], *, on_meta: bool = False) -> None:
    """Replace linear layers, by name, by ones with the quantised weights of the checkpoint. Raises CheckpointError."""
    for name, coded in linears.items():
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear), f"{name} is a {type(linear).__name__}, must be a linear layer"
        replace_module(model, name, CodedLinear(linear, coded, on_meta=on_meta))


class CodedLinear(nn.Module):
    """`y = x W^T + b` from a quantised weight as the checkpoint stores it; rows do not see each other. On meta it has
    the shapes alone; until `prepare`, and where it is never called, the weight is decoded for every call."""

    def __init__(self, linear: nn.Linear, coded: CodedTensor, *, on_meta: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias, self._dtype = linear.bias, linear.weight.dtype
        self.compute: CpuLinear | None = None
        matrix = coded.fit("weight", self.out_features, self.in_features)
        if on_meta:
            sized = coded_shapes(matrix)
            parts = {part: torch.empty(n, dtype=getattr(torch, d), device="meta") for part, (n, d) in sized.items()}
            self.coded = CodedWeight(matrix=matrix, **parts)
        else:
            self.coded = coded.read(self.out_features, self.in_features)
        for name in coded_shapes(matrix):  # so that whoever counts the model's bytes finds them
            self.register_buffer(name, getattr(self.coded, name), persistent=False)

    @property
    def weight(self) -> Tensor:
        """Nothing but a dtype, which is what some classes ask of it."""
        return torch.empty(0, dtype=self._dtype)

    def prepare(self, threads: int) -> None:
        """From now on compute with a kernel."""
        self.compute = CpuLinear(self.coded, None, self._dtype, read_bias(self.bias), threads=threads)

    def plain(self) -> nn.Linear:
        """The layer with its weight in float32."""
        linear = nn.Linear(self.in_features, self.out_features, device="meta", dtype=self._dtype)
        if not self.coded.codes.is_meta:
            linear.weight = nn.Parameter(decoded(self.coded.named(), self.coded.matrix).to(self._dtype), False)
        linear.bias = self.bias
        return linear

    def forward(self, x: Tensor) -> Tensor:
        """`[..., K] -> [..., N]` in the dtype of `x`."""
        if self.coded.codes.is_meta:
            return x.new_empty(*x.shape[:-1], self.out_features)
        if self.compute is not None:
            return self.compute(x)
        bias = None if self.bias is None else self.bias.float()
        return functional.linear(x.float(), decoded(self.coded.named(), self.coded.matrix), bias).to(x.dtype)


def read_bias(bias: Tensor | None) -> Tensor | None:
    """In a dtype that kernels read: bfloat16 or float32."""
    if bias is None:
        return None
    return bias.detach().float() if bias.dtype == torch.float16 else bias.detach()


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where the model has another, by its full name."""
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, module)
