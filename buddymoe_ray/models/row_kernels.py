"""What a model computes beside its linear layers, so that rows do not see each other. On CPUs; a model elsewhere is
left alone.

Norms and routers' own linears go to our kernels; a norm is told by what it answers to a probe, not by its class.
Elementwise functions stay torch's, which computes what is left over after whole vectors in another way: rows whose
width is no multiple of 64 are padded, so that nothing is left over. Knows neither experts nor the cache.

Legend: T tokens, E experts, n items of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers.activations import ACT2CLS

from buddymoe_ray.kernels import CpuLinear, CpuNorm, linear_rows, widens

__all__ = ["RowNorm", "WholeVectors", "rows_apart"]

_VECTORS = 64
"""Items that torch takes at once, at most: two vectors of 512 bits of bfloat16."""
_ACTIVATIONS = {kind[0] if isinstance(kind, tuple) else kind for kind in ACT2CLS.values()}
_SIGMOIDS = {torch.sigmoid, Tensor.sigmoid}


def rows_apart(model: nn.Module, routers: Iterable[nn.Module | None]) -> None:
    """Replace the model's root-mean-square norms and activations, and have its routers' linears computed row by row."""
    if model.device.type != "cpu":
        return
    for name, module in list(model.named_modules()):
        made: nn.Module | None = None
        if type(module).__name__.endswith("RMSNorm"):
            made = _row_norm(module)
        elif type(module) in _ACTIVATIONS and not any(module.parameters()):
            made = WholeVectors(module)
        elif hasattr(module, "shared_expert_gate"):
            module.forward = _by_rows(module)  # type: ignore[method-assign]  # the sigmoid of one number a row
        if made is not None:
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, made)
    for router in routers:
        if router is not None:
            router.forward = _by_rows(router)  # type: ignore[method-assign]


class WholeVectors(nn.Module):
    """An elementwise function of rows that are padded to whole vectors."""

    def __init__(self, function: nn.Module) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """Of any shape, in the dtype of `x`."""
        return _padded(self.function, x)


def _padded(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    width = x.shape[-1]
    return function(x) if width % _VECTORS == 0 else function(functional.pad(x, (0, -width % _VECTORS)))[..., :width]


class RowNorm(nn.Module):
    """In the place of a root-mean-square norm, with its weight."""

    def __init__(self, weight: nn.Parameter, compute: CpuNorm, otherwise: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = weight
        self._compute, self._otherwise = compute, otherwise

    def forward(self, x: Tensor) -> Tensor:
        """`[..., n] -> [..., n]`."""
        return self._compute(x) if CpuNorm.covers(x) else self._otherwise(x)


def _row_norm(module: nn.Module) -> RowNorm | None:
    """None for what is no norm that the kernel knows."""
    weights = dict(module.named_parameters())
    weight, eps = weights.get("weight"), getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if len(weights) != 1 or weight is None or weight.ndim != 1 or not isinstance(eps, float):
        return None
    probe = torch.randn(3, len(weight), generator=torch.Generator().manual_seed(0)).to(weight.dtype)
    if not CpuNorm.covers(weight.detach()):
        return None
    tolerance = 1e-5 if weight.dtype is torch.float32 else 2e-2
    with torch.inference_mode():
        answer = module(probe)
        for scale in (weight.detach().float(), 1.0 + weight.detach().float()):  # the second is Gemma's
            made = CpuNorm(scale, eps)
            if torch.allclose(made(probe), answer, rtol=tolerance, atol=tolerance):
                return RowNorm(weight, made, module.forward)  # type: ignore[arg-type]
    return None


class _LinearsByRows(TorchFunctionMode):
    """While it is on, linears are computed by the kernels: by `made` for weights in it (by id), else anew each time.
    Sigmoids see whole vectors."""

    def __init__(self, made: Mapping[int, CpuLinear]) -> None:
        super().__init__()
        self._made = made

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _SIGMOIDS and not kwargs:
            return _padded(func, args[0])
        if func is not functional.linear or kwargs:
            return func(*args, **(kwargs or {}))
        made = self._made.get(id(args[1])) if len(args) == 2 else None
        if made is not None:
            return made(args[0])
        return (linear_rows if widens(args[1].dtype) else func)(*args)


def _by_rows(module: nn.Module) -> Callable[..., Any]:
    """The forward of a router, or of what has more of the kind, with linears and sigmoids computed row by row."""
    own = module.parameters(recurse=False)
    weights = [weight for weight in own if weight.ndim == 2 and widens(weight.dtype)]
    made = {id(weight): CpuLinear(weight.detach(), None, weight.dtype, None) for weight in weights}
    forward, mode = module.forward, _LinearsByRows(made)

    def by_rows(*args: Any, **kwargs: Any) -> Any:
        with mode:
            return forward(*args, **kwargs)

    return by_rows
