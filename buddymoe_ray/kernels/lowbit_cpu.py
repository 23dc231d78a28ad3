"""Torch's side of the numba kernel: hands it raw addresses, once per expert or once per layer and step.

numba (about a second to import) is loaded at the first use. Machine code is cached on disk when a folder for it can be
written, and made anew by every process when not. Does not know where records lie.

Legend: T tokens, K experts per token, N = T*K accesses, R rows of one expert, E experts, B bytes, D hidden, F ffn.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import cache
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from buddymoe_ray.kernels.lowbit_format import LowbitFormat, Matrix, Places, scale_table
from buddymoe_ray.kernels.reference import ExpertMath
from buddymoe_ray.kernels.rowwise import rowwise

__all__ = ["PARTS", "experts_kernel", "forward", "is_plain", "linear_kernel", "scale_steps"]

log = logging.getLogger(__name__)

PARTS = ("codes", "scales", "base")

_plain: WeakKeyDictionary[ExpertMath, bool] = WeakKeyDictionary()


def is_plain(math: ExpertMath, F: int) -> bool:
    """Whether experts are `down(silu(gate) * up)` without biases, which the kernel computes in one call.

    `activate` is a callable, so it is asked: its answer to a probe must be that of the formula.
    """
    if not math.gated or math.bias or math.post_norm is not None:
        return False
    known = _plain.get(math)
    if known is None:
        probe = torch.randn(3, 2 * F, generator=torch.Generator().manual_seed(0)) * 20
        gate, up = probe.chunk(2, dim=-1)
        known = bool(torch.allclose(math.activate(probe), functional.silu(gate) * up, rtol=1e-5, atol=1e-5))
        _plain[math] = known
    return known


def forward(x_RD: Tensor, tensors: Mapping[str, Tensor], fmt: LowbitFormat, math: ExpertMath) -> Tensor:
    """`lowbit.lowbit_forward` on this CPU."""
    x = x_RD.float().contiguous()
    R, out = len(x), torch.empty_like(x)
    first, down = (_matrix(tensors, name, fmt) for name in (math.first, "down_proj"))
    if is_plain(math, down.K):
        expert_R = np.zeros(R, dtype=np.int64)
        places = Places(x.data_ptr(), 0, out.data_ptr())
        experts_kernel()(places, expert_R, expert_R[:1], 1, first, down, scale_steps())
        return out.to(x_RD.dtype)
    linear, both = linear_kernel(), x.new_empty(R, first.N)
    linear(x.data_ptr(), R, first, both.data_ptr(), scale_steps())
    if math.bias:
        both += tensors[f"{math.first}_bias"]
    hidden = rowwise(math.activate, both)
    linear(hidden.data_ptr(), R, down, out.data_ptr(), scale_steps())
    if math.bias:
        out += tensors["down_proj_bias"]
    y_RD = out.to(x_RD.dtype)
    return y_RD if math.post_norm is None else rowwise(math.post_norm, y_RD)


def _matrix(tensors: Mapping[str, Tensor], name: str, fmt: LowbitFormat) -> Matrix:
    codes, scales, base = (tensors[f"{name}.{part}"] for part in PARTS)
    assert codes.is_contiguous() and scales.is_contiguous(), f"{name} must be contiguous"
    K = codes.shape[1] * 8 // fmt.bits
    return Matrix(
        codes.data_ptr(),
        scales.data_ptr(),
        base.data_ptr(),
        N=codes.shape[0],
        K=K,
        bits=fmt.bits,
        group=fmt.group_of(K),
    )


@cache
def scale_steps() -> np.ndarray:
    """What a stored scale means, for the kernels."""
    table: np.ndarray = scale_table(torch.device("cpu")).numpy().copy()
    table.flags.writeable = False
    return table


@cache
def experts_kernel() -> Callable[..., None]:
    """Machine code for many rows of many plain experts; made, or loaded, by the first call."""
    from buddymoe_ray.kernels.lowbit_numba import compile_experts

    return _compiled(compile_experts)


@cache
def linear_kernel() -> Callable[..., None]:
    """Machine code for one packed matrix."""
    from buddymoe_ray.kernels.lowbit_numba import compile_linear

    return _compiled(compile_linear)


def _compiled(compile: Callable[..., Callable[..., None]]) -> Callable[..., None]:
    """With the disk cache, or without it where it cannot be used (read-only install, no home, full or broken disk)."""
    try:
        return compile(cache=True)
    except Exception as error:  # whatever is wrong with the cache, the code can be made without it
        log.info("machine code of low-bit experts is not cached: %s", error)
        return compile(cache=False)
