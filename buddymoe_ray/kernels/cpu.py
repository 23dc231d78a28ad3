"""Torch's side of the CPU's machine code: makes it, hands it raw addresses, runs one matrix or one expert at a time.

numba (about a second to import) is loaded at the first use, so machine code is made, or read from the user's folder,
when `prepare` or an engine asks for it. Does not know where records lie.

Legend: R rows of one expert or matrix, D hidden, F ffn, N outputs and K inputs of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache, partial
from itertools import pairwise
from math import lcm, prod
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from buddymoe_ray.kernels.coded_format import COLUMNS, CodedWeight, coded_shapes
from buddymoe_ray.kernels.expert_calls import ANYWHERE, ITEM_BYTES, OK, Call, CombineCall, Expert, Product, plan_of
from buddymoe_ray.kernels.lowbit_format import BLOCK, LowbitFormat, Matrix, PackedMatrix, packed_parts
from buddymoe_ray.kernels.reference import ExpertMath
from buddymoe_ray.kernels.reference import combine as combine_reference
from buddymoe_ray.kernels.rowwise import rowwise
from buddymoe_ray.kernels.stored import stored_product, widens
from buddymoe_ray.types import CodedMatrix, CodeFormat

__all__ = [
    "FORMULAS",
    "CpuLinear",
    "THREADED_WEIGHTS",
    "activation_of",
    "bias_bytes",
    "as_read",
    "coded_product",
    "combine",
    "combine_kernel",
    "decodes",
    "experts_kernel",
    "forward",
    "in_threads",
    "linear_rows",
    "linear_kernel",
    "prepare",
    "product_of",
]

T = TypeVar("T")
Kernel = partial[int]
"""`kernel(call, plan_at) -> status`, without the GIL; the first of its `args` is its address."""
THREADED_WEIGHTS = 1 << 20
"""Fewer weights times rows than this (about .1 ms) are not worth waking a thread for."""
FIRST_AT = 8 * len(Expert._fields)
DOWN_AT = FIRST_AT + 8 * len(Product._fields)
"""Where a plan has its products, in bytes."""


def _gated(activate: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def formula(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return activate(gate) * up

    return formula


def _clamped(x: Tensor) -> Tensor:
    gate, up = x[..., ::2].clamp(max=7.0), x[..., 1::2].clamp(min=-7.0, max=7.0)
    return (up + 1) * (gate * torch.sigmoid(gate * 1.702))


FORMULAS: tuple[tuple[bool, Callable[[Tensor], Tensor]], ...] = (
    (True, _gated(functional.silu)),
    (True, _gated(lambda gate: functional.gelu(gate, approximate="tanh"))),
    (True, _clamped),  # gpt-oss: gates and ups interleaved
    (False, lambda x: functional.relu(x).square()),
)
"""What the kernel computes between an expert's products, with whether it is gated."""

_known: WeakKeyDictionary[ExpertMath, int | None] = WeakKeyDictionary()


def activation_of(math: ExpertMath, F: int) -> int | None:
    """The index in FORMULAS of what these experts compute, None when a layer's kernel cannot.

    `activate` is a callable, so it is asked: its answer to a probe must be that of a formula.
    """
    if math not in _known:
        rng = torch.Generator().manual_seed(0)
        sizes = torch.tensor([1.0, 20.0, 1e4]).repeat(4)[:, None]  # the last for limits that few rows reach
        probe = torch.randn(12, 2 * F if math.gated else F, generator=rng) * sizes
        answer = None if math.post_norm is not None else math.activate(probe)
        _known[math] = next(
            (
                i
                for i, (gated, formula) in enumerate(FORMULAS)
                if answer is not None
                and gated == math.gated
                and torch.allclose(answer, formula(probe), rtol=1e-5, atol=1e-5)
            ),
            None,
        )
    return _known[math]


def product_of(matrix: Matrix, fmt: LowbitFormat, dtype: torch.dtype, bias: tuple[int, int] = (0, 0)) -> Product:
    """A matrix and its machine code for activations of `dtype`; `bias` is a place and the bytes of an item."""
    native = _tiles(fmt, dtype != torch.float32)
    codes, scales, base, N, K = matrix
    return Product(codes, scales, base, *bias, N, K, native["project"], native.get("quantise", 0))


def coded_product(
    places: Mapping[str, int], matrix: CodedMatrix, dtype: torch.dtype, bias: tuple[int, int] = (0, 0)
) -> Product:
    """A quantised matrix as it is stored, whose parts, by name, are at `places`; see `product_of`."""
    native, sized = _coded_functions(matrix.format, dtype != torch.float32), coded_shapes(matrix)
    nbytes = {name: prod(shape) * getattr(torch, kind).itemsize for name, (shape, kind) in sized.items()}
    parts = (*sized, "")[:3]
    codes, scales, base = (places.get(name, 0) for name in parts)
    steps = (nbytes.get(name, 0) // matrix.parts for name in parts)
    made = native["project"], native.get("row", 0)
    return Product(codes, scales, base, *bias, matrix.N, matrix.K, *made, 1, matrix.parts, *steps)


def bias_bytes(dtype: str) -> int | None:
    """Of an item of a bias that the machine code reads, None for one that it does not."""
    return None if dtype == "float16" else ITEM_BYTES.get(dtype)


def decodes(fmt: CodeFormat) -> bool:
    """Whether this CPU multiplies quantised weights as stored in machine code."""
    return widens("float16") and fmt.scale in (*ITEM_BYTES, "e8m0", "float8_e4m3fn")


def as_read(x: Tensor) -> Tensor:
    """In a dtype that the machine code reads and writes: float32 or bfloat16."""
    return x if x.dtype in (torch.float32, torch.bfloat16) else x.float()


def forward(x_RD: Tensor, tensors: Mapping[str, Tensor], fmt: LowbitFormat, math: ExpertMath) -> Tensor:
    """`lowbit.lowbit_forward` on this CPU."""
    R, x = len(x_RD), as_read(x_RD).contiguous()
    first, down = (_product(tensors, name, fmt, x_RD.dtype, math.bias) for name in (math.first, "down_proj"))
    activation = activation_of(math, down.K)
    plan = plan_of(Expert(activation or 0, 0), first, down)
    plan_at = plan.ctypes.data
    if activation is not None:
        out = torch.empty_like(x)
        expert_R = torch.zeros(R + 1, dtype=torch.int64)  # one more zero, for where the one record begins
        places = (expert_R.data_ptr(), expert_R[R:].data_ptr())
        call = Call(x.data_ptr(), out.data_ptr(), 0, ANYWHERE, x.itemsize, *places, N=R, E=1)
        fault = experts_kernel()(tuple(call), plan_at)
        assert fault == OK, f"fault is {fault}, must be {OK}"
        return out.to(x_RD.dtype)
    linear, x = linear_kernel(), x.float()
    both, y = x.new_empty(R, first.N), x.new_empty(R, down.N)
    linear(tuple(Call(x.data_ptr(), both.data_ptr(), 0, ANYWHERE, 4, N=R)), plan_at + FIRST_AT)
    hidden = rowwise(math.activate, both).contiguous()
    linear(tuple(Call(hidden.data_ptr(), y.data_ptr(), 0, ANYWHERE, 4, N=R)), plan_at + DOWN_AT)
    y_RD = y.to(x_RD.dtype)
    return y_RD if math.post_norm is None else rowwise(math.post_norm, y_RD)


class CpuLinear:
    """`y = x W^T + bias` for rows of `dtype`, from a packed matrix or one as stored, plain or quantised. Rows do not
    see each other.

    Rows are multiplied in float32, or as they are where they and the weights are bfloat16; those of another dtype, with
    packed weights and most quantised ones (coded.py), with 16 bits (error 4e-5). `threads` share the outputs, but for
    those of GPTQ and AWQ, which lie side by side; the bits do not depend on it. The bias is bfloat16 or float32.
    Machine code is made here (seconds at the first time on a machine), not in the first call. `plan_at` is what it
    reads, with all outputs in one thread, for as long as the layer lives.
    """

    def __init__(
        self,
        weight: PackedMatrix | CodedWeight | Tensor,
        fmt: LowbitFormat | None,
        dtype: torch.dtype,
        bias_N: Tensor | None,
        *,
        threads: int = 1,
    ) -> None:
        self._held, self._dtype, self._kernel = (weight, bias_N), dtype, linear_kernel()
        block = BLOCK
        if isinstance(weight, CodedWeight):
            N, self._K, fmt_coded = weight.matrix.N, weight.matrix.K, weight.matrix.format
            block = N if fmt_coded.codes in COLUMNS else lcm(BLOCK, fmt_coded.block[0] or 1)
        else:
            N, self._K = (weight if isinstance(weight, Tensor) else weight.sizes).shape[:2]
        self._weights, A = N * self._K, -(-N // block)

        def part(first: int, last: int) -> tuple[npt.NDArray[np.int64], int]:
            """The plan of some blocks of outputs, and how many outputs they are."""
            begin, count, bias = first * block, min(N, last * block) - first * block, (0, 0)
            if bias_N is not None:
                bias = (bias_N[begin:].data_ptr(), bias_N.itemsize)
            if isinstance(weight, Tensor):
                product = stored_product(weight[begin:].data_ptr(), (count, self._K), weight.dtype, dtype, bias)
            elif isinstance(weight, CodedWeight):
                product = coded_product(weight.places(begin), replace(weight.matrix, N=count), dtype, bias)
            else:
                assert fmt is not None, "packed weights have a format"
                places = (weight.codes[first].data_ptr(), weight.scales[first].data_ptr(), weight.base.data_ptr())
                product = product_of(Matrix(*places, N=count, K=self._K), fmt, dtype, bias)
            return plan_of(Expert(0, 0), product, product), count

        assert not isinstance(weight, Tensor) or weight.is_contiguous(), "weights must be contiguous"
        cuts = sorted({A * at // threads for at in range(threads + 1)})
        self._all, self._N = part(0, A)[0], N
        self.plan_at = self._all.ctypes.data + FIRST_AT
        self._parts = [part(*ends) for ends in pairwise(cuts)] if threads > 1 else []

    def __call__(self, x: Tensor) -> Tensor:
        """`[..., K] -> [..., N]` in the dtype of the rows."""
        assert x.dtype is self._dtype and x.shape[-1] == self._K, f"x is {x.dtype} {tuple(x.shape)}"
        rows = x.numel() // self._K
        x = as_read(x).contiguous()
        if not self._parts or self._weights * rows < THREADED_WEIGHTS:
            out = x.new_empty((*x.shape[:-1], self._N))
            call = (x.data_ptr(), out.data_ptr(), 0, ANYWHERE, x.itemsize, 0, 0, rows, 1, 0, 0, 1)
            self._kernel(call, self.plan_at)
        else:
            out = self._shared(x, rows)
        return out if out.dtype is self._dtype else out.to(self._dtype)

    def _shared(self, x: Tensor, rows: int) -> Tensor:
        """By several threads, each with outputs of its own."""
        outs = [x.new_empty((*x.shape[:-1], count)) for _, count in self._parts]

        def run(plan: npt.NDArray[np.int64], out: Tensor) -> None:
            call = (x.data_ptr(), out.data_ptr(), 0, ANYWHERE, x.itemsize, 0, 0, rows, 1, 0, 0, 1)
            self._kernel(call, plan.ctypes.data + FIRST_AT)

        in_threads(run, [(plan, out) for (plan, _), out in zip(self._parts, outs, strict=True)])
        return torch.cat(outs, dim=-1)


def linear_rows(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear` from weights as stored, whose rows do not see each other; what `widens` says yes
    to, on this CPU, with any weights."""
    bias = None if bias_N is None else bias_N.float()
    return CpuLinear(weight_NK.detach().contiguous(), None, x.dtype, bias)(x)


def combine(y_TKD: Tensor, weight_TK: Tensor) -> Tensor:
    """`reference.combine`; on a CPU in slot order, so that the bits of a token are the same whatever tokens are beside
    it."""
    if y_TKD.device.type != "cpu":
        return combine_reference(y_TKD, weight_TK)
    (T, K, D), y, weight = y_TKD.shape, as_read(y_TKD).contiguous(), as_read(weight_TK).contiguous()
    out = y.new_empty(T, D)
    call = (y.data_ptr(), weight.data_ptr(), out.data_ptr(), T, K, D, y.itemsize, weight.itemsize)
    combine_kernel()(call, 0)
    return out if out.dtype is y_TKD.dtype else out.to(y_TKD.dtype)


def in_threads(run: Callable[..., T], shares: Sequence[tuple[Any, ...]]) -> T:
    """Call `run` with each share, the first in this thread, and wait for all; returns what the first came to."""
    helping = [_helpers(len(shares) - 1).submit(run, *share) for share in shares[1:]]
    try:
        return run(*shares[0])
    finally:
        for helper in helping:
            helper.result()


@cache
def _helpers(threads: int) -> ThreadPoolExecutor:
    """Made once."""
    return ThreadPoolExecutor(threads, thread_name_prefix="kernels")


def _product(tensors: Mapping[str, Tensor], name: str, fmt: LowbitFormat, dtype: torch.dtype, biased: bool) -> Product:
    packed = packed_parts(tensors, name)
    for part in (packed.codes, packed.scales):
        assert part.is_contiguous(), f"{name} must be contiguous"
    bias = tensors[f"{name}_bias"] if biased else None
    assert bias is None or bias.dtype in (torch.bfloat16, torch.float32), f"{name}_bias is {bias.dtype}, must be bf16"
    N, K = packed.sizes.shape[:2]
    matrix = Matrix(packed.codes.data_ptr(), packed.scales.data_ptr(), packed.base.data_ptr(), N=N, K=K)
    return product_of(matrix, fmt.of(name), dtype, (0, 0) if bias is None else (bias.data_ptr(), bias.itemsize))


def prepare(fmt: LowbitFormat, dtype: torch.dtype) -> None:
    """Make what `forward` needs, so that no step does (seconds at the first time on a machine, then .5 s)."""
    for part in {fmt.of(""), fmt.of("down_proj")}:
        _tiles(part, dtype != torch.float32)
    experts_kernel()
    linear_kernel()


@cache
def _coded_functions(fmt: CodeFormat, wide: bool) -> Mapping[str, int]:
    """`project`, and as `row` what makes it a row, 0 where that is float32 as it is."""
    from buddymoe_ray.kernels.coded_columns import columns_module_text
    from buddymoe_ray.kernels.coded_columns_wide import has_wide_columns, wide_columns_module_text
    from buddymoe_ray.kernels.coded_pairs import has_pairs, pairs_module_text
    from buddymoe_ray.kernels.coded_tiles import coded_module_text, has_permutes
    from buddymoe_ray.kernels.coded_wide import has_wide, wide_module_text
    from buddymoe_ray.kernels.lowbit_tiles import host_level
    from buddymoe_ray.kernels.machine_code import native_functions

    faster = (
        (has_pairs, pairs_module_text),
        (has_wide_columns, wide_columns_module_text),
        (has_wide, wide_module_text),
    )
    if wide and host_level().startswith("avx512"):
        for covers, text in faster:
            if covers(fmt):
                made = native_functions(text(fmt), ("project", "quantise"))
                return {"project": made["project"], "row": made["quantise"]}
    if fmt.codes in COLUMNS:
        return native_functions(columns_module_text(fmt), ("project",))
    made = native_functions(coded_module_text(fmt, permutes=has_permutes()), ("project", "spread"))
    return {"project": made["project"]} | ({"row": made["spread"]} if made["spread"] else {})


@cache
def _tiles(fmt: LowbitFormat, wide: bool) -> Mapping[str, int]:
    from buddymoe_ray.kernels.lowbit_tiles import host_level, module_text
    from buddymoe_ray.kernels.machine_code import native_functions

    names = ("project", "quantise") if wide else ("project",)
    return native_functions(module_text(fmt, wide=wide, level=host_level()), names)


@cache
def combine_kernel() -> Kernel:
    """The weighted sum of a token's experts."""
    from buddymoe_ray.kernels.expert_numba import compile_combine
    from buddymoe_ray.kernels.numba_calls import kernel

    return kernel(compile_combine, len(CombineCall._fields))


@cache
def experts_kernel() -> Kernel:
    """Many rows of many experts; made, or loaded, by the first call."""
    from buddymoe_ray.kernels.expert_numba import compile_experts
    from buddymoe_ray.kernels.numba_calls import kernel

    return kernel(compile_experts, len(Call._fields))


@cache
def linear_kernel() -> Kernel:
    """One matrix."""
    from buddymoe_ray.kernels.expert_numba import compile_linear
    from buddymoe_ray.kernels.numba_calls import kernel

    return kernel(compile_linear, len(Call._fields))
