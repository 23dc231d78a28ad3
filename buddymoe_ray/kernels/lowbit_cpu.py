"""Torch's side of the numba kernel: hands it raw addresses, once per expert or once per layer and step.

numba (about a second to import) is loaded at the first use; where it is missing callers fall back to the torch
reference and one line is logged. Machine code is cached on disk when a folder for it can be written, and made anew by
every process when not. Does not know where records lie.

Legend: T tokens, K experts per token, N = T*K uses, R rows of one expert, E experts, B bytes, D hidden, F ffn.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from buddymoe_ray.kernels.lowbit_format import LowbitFormat, scale_table
from buddymoe_ray.kernels.reference import ExpertMath
from buddymoe_ray.kernels.rowwise import rowwise
from buddymoe_ray.types import SlotTensor

__all__ = ["PlainRecord", "available", "forward", "is_plain", "layer", "prepare"]

log = logging.getLogger(__name__)

PARTS = ("codes", "scales", "base")
THREADED_WEIGHTS = 1 << 20
"""Fewer weights than this (about .2 ms) are not worth waking a thread for."""

_plain: WeakKeyDictionary[ExpertMath, bool] = WeakKeyDictionary()


def available() -> bool:
    """Whether the kernel can run here. The first call imports numba."""
    return _numba() is not None


def prepare(plain: bool) -> None:
    """Make, or load, the machine code that experts of this sort need."""
    _experts() if plain else _linear()


def is_plain(math: ExpertMath, F: int) -> bool:
    """Whether experts are `down(silu(gate) * up)` without biases, which the kernel computes in one call.

    `activate` is a callable, so it is asked: its answer to a probe must be that of the formula.
    """
    if not math.gated or math.bias or math.post_norm is not None:
        return False
    if math not in _plain:
        probe = torch.randn(3, 2 * F, generator=torch.Generator().manual_seed(0)) * 20
        gate, up = probe.chunk(2, dim=-1)
        _plain[math] = bool(torch.allclose(math.activate(probe), functional.silu(gate) * up, rtol=1e-5, atol=1e-5))
    return _plain[math]


def forward(x_RD: Tensor, tensors: Mapping[str, Tensor], fmt: LowbitFormat, math: ExpertMath) -> Tensor:
    """`lowbit.lowbit_forward` on this CPU."""
    x = x_RD.float().contiguous()
    (R, D), F = x.shape, tensors["down_proj.codes"].shape[1] * 8 // fmt.bits
    first, down = (tuple(_address(tensors[f"{name}.{part}"]) for part in PARTS) for name in (math.first, "down_proj"))
    out = torch.empty_like(x)
    if is_plain(math, F):
        shape = (fmt.bits, D, F, 1, fmt.group_of(D), fmt.group_of(F))
        expert_R = np.zeros(R, dtype=np.int64)
        _experts()(x.data_ptr(), expert_R, expert_R[:1], shape, 0, (*first, *down, 0, 1), out.data_ptr(), _table())
        return out.to(x_RD.dtype)
    linear, N = _linear(), tensors[f"{math.first}.codes"].shape[0]
    both = x.new_empty(R, N)
    linear(x.data_ptr(), R, first, N, (D, fmt.bits, fmt.group_of(D)), both.data_ptr(), _table())
    if math.bias:
        both += tensors[f"{math.first}_bias"]
    hidden = rowwise(math.activate, both)
    linear(hidden.data_ptr(), R, down, D, (F, fmt.bits, fmt.group_of(F)), out.data_ptr(), _table())
    if math.bias:
        out += tensors["down_proj_bias"]
    y_RD = out.to(x_RD.dtype)
    return y_RD if math.post_norm is None else rowwise(math.post_norm, y_RD)


@dataclass(frozen=True, slots=True)
class PlainRecord:
    """Where the parts of a plain expert's record are: found once, for a step has no time to look. `groups` are of D and
    F."""

    bits: int
    F: int
    groups: tuple[int, int]
    offsets: tuple[int, ...]

    @classmethod
    def of(cls, layout: Sequence[SlotTensor], fmt: LowbitFormat) -> PlainRecord:
        """The record of a layout with `gate_up_proj` and `down_proj`."""
        named = {tensor.name: tensor for tensor in layout}
        D, F = (named[f"{name}.codes"].shape[1] * 8 // fmt.bits for name in ("gate_up_proj", "down_proj"))
        offsets = tuple(named[f"{name}.{part}"].offset for name in ("gate_up_proj", "down_proj") for part in PARTS)
        return cls(fmt.bits, F, (fmt.group_of(D), fmt.group_of(F)), offsets)


def layer(
    x_TD: Tensor,
    records_B: Tensor,
    at_E: Tensor,
    expert_N: Tensor,
    out_ND: Tensor,
    record: PlainRecord,
    threads: int,
) -> None:
    """`LowbitLayer.__call__` for plain experts (`is_plain`); float32 rows only."""
    assert x_TD.dtype == out_ND.dtype == torch.float32, f"rows are {x_TD.dtype}, {out_ND.dtype}, must be float32"
    assert out_ND.is_contiguous() and records_B.is_contiguous(), "outputs and records must be contiguous"
    (T, D), F = x_TD.shape, record.F
    x, experts_of, places = x_TD.contiguous(), expert_N.contiguous().numpy(), at_E.contiguous().numpy()
    shape = (record.bits, D, F, len(experts_of) // T, *record.groups)
    offsets, kernel, table = record.offsets, _experts(), _table()
    x_address, records, out = x.data_ptr(), records_B.data_ptr(), out_ND.data_ptr()

    def run(share: int, shares: int) -> None:
        kernel(x_address, experts_of, places, shape, records, (*offsets, share, shares), out, table)

    if threads == 1 or 3 * D * F * len(experts_of) < THREADED_WEIGHTS:
        run(0, 1)
        return
    helpers = [_pool(threads - 1).submit(run, share, threads) for share in range(1, threads)]
    run(0, threads)
    for helper in helpers:
        helper.result()


def _address(tensor: Tensor) -> int:
    assert tensor.is_contiguous(), f"packed tensor has strides {tensor.stride()}, must be contiguous"
    return tensor.data_ptr()


@cache
def _table() -> np.ndarray:
    table: np.ndarray = scale_table(torch.device("cpu")).numpy().copy()
    table.flags.writeable = False
    return table


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="lowbit")


@cache
def _numba() -> tuple[Callable[..., Callable[..., None]], Callable[..., Callable[..., None]]] | None:
    try:
        from buddymoe_ray.kernels.lowbit_numba import compile_experts, compile_linear
    except ImportError as error:
        log.warning("low-bit experts run on slow torch code: numba is not usable (%s). hint: pip install numba", error)
        return None
    return compile_experts, compile_linear


@cache
def _experts() -> Callable[..., None]:
    found = _numba()
    assert found is not None, "numba is missing: ask available() first"
    return _compiled(found[0])


@cache
def _linear() -> Callable[..., None]:
    found = _numba()
    assert found is not None, "numba is missing: ask available() first"
    return _compiled(found[1])


def _compiled(compile: Callable[..., Callable[..., None]]) -> Callable[..., None]:
    """With the disk cache, or without it where it cannot be used (read-only install, no home, full or broken disk)."""
    try:
        return compile(cache=True)
    except Exception as error:  # whatever is wrong with the cache, the code can be made without it
        log.info("machine code of low-bit experts is not cached: %s", error)
        return compile(cache=False)
