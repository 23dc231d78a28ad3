"""Norms and routers of a model by kernels whose rows do not see each other. On CPUs; a model elsewhere is left alone.

A norm is told by what it answers to a probe, not by its class. Knows neither experts nor the cache.

Legend: T tokens, E experts, n items of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from buddymoe_ray.kernels import CpuLinear, CpuNorm, linear_rows, widens

__all__ = ["RowNorm", "rows_apart"]


def rows_apart(model: nn.Module, routers: Iterable[nn.Module | None]) -> None:
    """Replace the model's root-mean-square norms, and have its routers' linears computed row by row."""
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm") and (made := _row_norm(module)) is not None:
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, made)
    for router in routers:
        if router is not None and next(router.parameters()).device.type == "cpu":
            router.forward = _by_rows(router)  # type: ignore[method-assign]


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
    """While it is on, linears are computed by the kernels: by `made` for weights in it (by id), else anew each time."""

    def __init__(self, made: Mapping[int, CpuLinear]) -> None:
        super().__init__()
        self._made = made

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is not functional.linear or kwargs:
            return func(*args, **(kwargs or {}))
        made = self._made.get(id(args[1])) if len(args) == 2 else None
        if made is not None:
            return made(args[0])
        return (linear_rows if _widens(args[1]) else func)(*args)


def _widens(weight: Tensor) -> bool:
    return widens(str(weight.dtype).removeprefix("torch."))


def _by_rows(router: nn.Module) -> Callable[..., Any]:
    """A router's forward with its linears computed row by row."""
    weights = [weight for weight in router.parameters() if weight.ndim == 2 and _widens(weight)]
    made = {id(weight): CpuLinear(weight.detach(), None, weight.dtype, None) for weight in weights}
    forward, mode = router.forward, _LinearsByRows(made)

    def by_rows(*args: Any, **kwargs: Any) -> Any:
        with mode:
            return forward(*args, **kwargs)

    return by_rows
