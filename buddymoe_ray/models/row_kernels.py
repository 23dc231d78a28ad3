"""What a model computes beside its linear layers, so that rows do not see each other. On CPUs; a model elsewhere is
left alone.

Norms and routers' own linears go to our kernels; norms, and routers of a softmax, are told by what they answer to a
probe, not by their class.
Elementwise functions stay torch's, which computes what is left over after whole vectors in another way: rows whose
width is no multiple of 64 are padded, so that nothing is left over. Knows neither experts nor the cache.

Legend: T tokens, E experts, n items of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from functools import wraps
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers.activations import ACT2CLS

from buddymoe_ray.kernels import CpuLinear, CpuNorm, CpuRouter, linear_rows, widens
from buddymoe_ray.models.recurrent import carrying_layers

__all__ = ["RowNorm", "SoftmaxRouter", "WholeVectors", "rows_apart"]

_VECTORS = 64
"""Items that torch takes at once, at most: two vectors of 512 bits of bfloat16."""
_ACTIVATIONS = {kind[0] if isinstance(kind, tuple) else kind for kind in ACT2CLS.values()}
_ELEMENTWISE = {torch.sigmoid, Tensor.sigmoid, functional.softplus, torch.log}
_OF_STATES = {*_ELEMENTWISE, functional.silu, torch.exp, Tensor.exp}
_BATCH = 4096
"""Rows, at most: what has more along its first dimension is a weight."""
_PRODUCTS = {torch.matmul, Tensor.matmul}


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
        elif hasattr(module, "shared_expert_gate") or _scales(module):
            module.forward = _by_rows(module)  # type: ignore[method-assign]  # the sigmoid of one number a row
        if made is not None:
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, made)
    for _, layer in carrying_layers(model):
        layer.forward = _by_rows(layer, batched=True)  # type: ignore[method-assign]
    for router in routers:
        if router is not None:
            router.forward = _softmax_router(router) or _by_rows(router)  # type: ignore[method-assign]


def _scales(module: nn.Module) -> bool:
    """Whether an attention has a gate for what it answers, or scales queries by the logarithm of their positions."""
    rope = getattr(getattr(module, "config", None), "rope_parameters", None) or {}
    gated = hasattr(module, "gate_proj") or hasattr(module, "g_proj") or "llama_4_scaling_beta" in rope
    return hasattr(module, "o_proj") and gated


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
        self.compute, self._otherwise = compute, otherwise

    def forward(self, x: Tensor) -> Tensor:
        """`[..., n] -> [..., n]`."""
        return self.compute(x) if CpuNorm.covers(x) else self._otherwise(x)


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


class SoftmaxRouter:
    """In the place of a router's `forward`, whose logits were of `logits_dtype`: any rows, `[T, E], [T, K], [T, K]`."""

    def __init__(self, compute: CpuRouter, logits_dtype: torch.dtype) -> None:
        self.compute, self._logits_dtype = compute, logits_dtype

    def __call__(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits_TE, weight_TK, ids_TK = self.compute(hidden_states.reshape(-1, hidden_states.shape[-1]))
        return logits_TE.to(self._logits_dtype), weight_TK, ids_TK


def _softmax_router(module: nn.Module) -> SoftmaxRouter | None:
    """None for what is no softmax's top-k by one matrix: a router is told by its answers, not by its class."""
    state, takes = {**dict(module.named_parameters()), **dict(module.named_buffers())}, signature(module.forward)
    weight = state.get("weight")
    if len(state) != 1 or weight is None or weight.ndim != 2 or len(takes.parameters) != 1:
        return None
    if not CpuNorm.covers(weight.detach()) or not widens(weight.dtype):
        return None
    random, telling = torch.randn(64, weight.shape[1], generator=torch.Generator().manual_seed(0)), _telling(weight)
    if telling is None:
        return None
    rows = torch.cat([random, telling])
    with torch.inference_mode():
        answer, sharp = module(rows.to(weight.dtype)), deepcopy(module).float()(rows)  # bfloat16 would hide a per cent
        for parts in (answer, sharp):
            if not isinstance(parts, tuple) or [getattr(part, "ndim", 0) for part in parts] != [2, 2, 2]:
                return None
        if answer[2].dtype is not torch.int64 or answer[1].dtype not in (torch.float32, torch.bfloat16):
            return None
        for normalised in (True, False):
            K = answer[2].shape[1]
            exact = CpuRouter(weight.detach().float(), K, normalised=normalised, weight_dtype=torch.float32)
            if _chooses_as(exact(rows), sharp):
                made = CpuRouter(weight.detach(), K, normalised=normalised, weight_dtype=answer[1].dtype)
                return SoftmaxRouter(made, answer[0].dtype)
    return None


def _telling(weight_ED: Tensor) -> Tensor | None:
    """Rows that tell a choice among groups of experts from one among all, whatever a group is worth: an expert that is
    first by little, in a group whose others are far behind. Of 64 random rows none may tell: of Mistral 4's routers
    with all but one group, a token in a hundred. None where no rows have such logits."""
    weight, E = weight_ED.detach().float(), len(weight_ED)
    wanted = []
    for size in (size for size in range(2, E // 2 + 1) if E % size == 0):
        for first in range(0, E, max(size, E // 4)):
            logits = torch.full((E,), 0.99)
            logits[first // size * size :][:size] = -9.0
            logits[first] = 1.0
            wanted.append(logits)
    if not wanted:
        return weight[:0]
    gram, logits = (weight @ weight.T).double(), torch.stack(wanted)
    ridge = 1e-9 * gram.diagonal().mean() * torch.eye(E, dtype=torch.float64)
    rows = (weight.T @ torch.linalg.solve(gram + ridge, logits.T.double()).float()).T.contiguous()
    return rows if torch.allclose(rows @ weight.T, logits, rtol=0, atol=2e-3) else None


def _chooses_as(mine: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    """Whether two choices, `[T, E], [T, K], [T, K]`, are alike; of near ties either may come first."""
    first, second = (mine[0].gather(1, choice[2]) for choice in (mine, other))
    return torch.allclose(mine[1], other[1].float(), rtol=1e-4, atol=0) and torch.allclose(first, second, atol=1e-5)


class _LinearsByRows(TorchFunctionMode):
    """While it is on, linears are computed by the kernels: by `made` for weights in it (by id), else anew each time.
    Elementwise functions see whole vectors. `batched`: rows are what lies along the first dimension."""

    def __init__(self, made: Mapping[int, CpuLinear], *, batched: bool) -> None:
        super().__init__()
        self._made, self._batched = made, batched

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if (
            self._batched
            and func in _OF_STATES
            and args[0].ndim
            and len(args) == 1
            and not any((kwargs or {}).values())
        ):
            shape = args[0].shape
            return func(*args) if shape[0] > _BATCH else _padded(func, args[0].reshape(shape[0], -1)).view(shape)
        if self._batched and func in _PRODUCTS and args[1].ndim == 3:
            return self._product(*args)
        if func in _ELEMENTWISE and not kwargs:
            return _padded(func, args[0])
        if func is not functional.linear or kwargs:
            return func(*args, **(kwargs or {}))
        return self._linear(*args) if widens(args[1].dtype) else func(*args)

    def _product(self, a: Tensor, b: Tensor) -> Tensor:
        """A matrix, or one for each row of a batch, with a batch `[B, K, N]`."""
        if a.ndim == 2 and widens(a.dtype):
            return self._linear(b.transpose(1, 2), a).transpose(1, 2)
        return torch.cat(
            [torch.matmul(a if a.ndim == 2 else a[row : row + 1], b[row : row + 1]) for row in range(len(b))]
        )

    def _linear(self, x: Tensor, weight: Tensor, *bias: Tensor) -> Tensor:
        made = None if bias else self._made.get(id(weight))
        return linear_rows(x, weight, *bias) if made is None else made(x)


def _by_rows(module: nn.Module, *, batched: bool = False) -> Callable[..., Any]:
    """The forward of a router, or of what has more of the kind, its linears and elementwise functions row by row."""
    own = module.parameters(recurse=False)
    weights = [weight for weight in own if weight.ndim == 2 and widens(weight.dtype)]
    made = {id(weight): CpuLinear(weight.detach(), None, weight.dtype, None) for weight in weights}
    forward, mode = module.forward, _LinearsByRows(made, batched=batched)

    @wraps(forward)
    def by_rows(*args: Any, **kwargs: Any) -> Any:
        with mode:
            return forward(*args, **kwargs)

    return by_rows
