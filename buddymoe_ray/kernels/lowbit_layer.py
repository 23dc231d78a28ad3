"""All low-bit experts of one layer and step in one call.

At decode a step has a few rows for each of many experts: one call per expert would spend more on calling than on
arithmetic. Does not know which accesses a policy gave to stand-ins, nor the router's weights. Invariant: an output is
bit for bit that of `lowbit_forward` on its row alone.

Legend: T tokens, K experts per token, N = T*K accesses, E experts, B bytes, D hidden, F ffn.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch
from torch import Tensor

from buddymoe_ray.kernels.lowbit_calls import Call, Expert, Product
from buddymoe_ray.kernels.lowbit_cpu import activation_of, experts_kernel, product_of
from buddymoe_ray.kernels.lowbit_format import LowbitFormat, matrix_at
from buddymoe_ray.kernels.reference import ExpertMath
from buddymoe_ray.types import SlotTensor

__all__ = ["LowbitLayer"]

THREADED_WEIGHTS = 1 << 20
"""Fewer weights than this (about .1 ms) are not worth waking a thread for."""
BIAS_BYTES = {"bfloat16": 2, "float32": 4}


class LowbitLayer:
    """Computes experts on a CPU from records laid out by `record_tensors`.

    Args:
        math: the experts' arithmetic; one that `covers` says yes to.
        dtype: of activations. float32 ones are multiplied as they are, others as 16-bit integers (error 4e-5).
        threads: share the records of a call; the bits do not depend on it.

    Machine code is made here (seconds at the first time on a machine, then .5 s), not in the first step.
    Raises ValueError for records that are not packed as this version packs.
    """

    def __init__(
        self,
        *,
        layout: Sequence[SlotTensor],
        fmt: LowbitFormat,
        math: ExpertMath,
        dtype: torch.dtype = torch.float32,
        threads: int = 1,
    ) -> None:
        assert threads >= 1, f"threads is {threads}, must be at least 1"
        self._first, self._down = (_product(layout, name, fmt, math, dtype) for name in (math.first, "down_proj"))
        activation = activation_of(math, self._down.K)
        assert activation is not None, "experts compute what the kernel does not, must be as `covers` says"
        nbytes = max(tensor.offset + tensor.nbytes for tensor in layout)
        self._expert, self._kernel = Expert(activation, nbytes), experts_kernel()
        self._threads, self._dtype = threads, dtype
        self._weights = self._first.N * self._first.K + self._down.N * self._down.K

    @staticmethod
    def covers(math: ExpertMath, F: int) -> bool:
        """Whether a call can compute such experts."""
        return activation_of(math, F) is not None

    def __call__(self, x_TD: Tensor, records_B: Tensor, at_E: Tensor, expert_TK: Tensor, out_ND: Tensor) -> None:
        """Write `out_ND[n] = expert expert_TK.flat[n] over x_TD[n // K]` where the expert has a record.

        `records_B` uint8 holds records at any multiples of 4 bytes; that of expert e begins at byte `at_E[e]` (int64,
        negative: no record of this layout). `expert_TK` int64 is negative for accesses that others answer. Rows of
        `out_ND` (dtype of `x_TD`) that have no record are left alone.
        """
        (T, K), D = expert_TK.shape, x_TD.shape[1]
        assert out_ND.shape == (T * K, D), f"out is {tuple(out_ND.shape)}, must be {(T * K, D)}"
        assert x_TD.shape == (T, self._first.K), f"x is {tuple(x_TD.shape)}, must be {(T, self._first.K)}"
        assert x_TD.dtype == out_ND.dtype == self._dtype, f"x is {x_TD.dtype}, out {out_ND.dtype}, not {self._dtype}"
        if T == 0:
            return
        plain = self._dtype == torch.float32
        x, out = x_TD.float().contiguous(), out_ND if plain else out_ND.float()  # rows not ours go back as they came
        expert_TK, at_E = expert_TK.contiguous(), at_E.contiguous()
        assert out.is_contiguous() and records_B.is_contiguous(), "outputs and records must be contiguous"
        call = Call(
            *(x.data_ptr(), out.data_ptr(), records_B.data_ptr(), records_B.shape[0]),
            *(expert_TK.data_ptr(), at_E.data_ptr()),
            *(T * K, K, at_E.shape[0]),
        )
        threads = 1 if self._weights * T * K < THREADED_WEIGHTS else self._threads
        shares = [call._replace(share=share, shares=threads) for share in range(1, threads)]
        helping = [_helpers(threads - 1).submit(self._run, share) for share in shares]
        fault = self._run(call._replace(shares=threads) if shares else call)
        for helper in helping:
            helper.result()
        assert fault != 1, f"expert is {int(expert_TK.max())}, must be below {len(at_E)}"
        assert fault != 2, (
            f"the last record ends at byte {int(at_E.max()) + self._expert.nbytes}, must be at most {len(records_B)}"
        )
        if not plain:
            out_ND.copy_(out)

    def _run(self, call: Call) -> int:
        return self._kernel(call, self._expert, self._first, self._down)


def _product(
    layout: Sequence[SlotTensor], name: str, fmt: LowbitFormat, math: ExpertMath, dtype: torch.dtype
) -> Product:
    """A matrix within a record, with its bias."""
    bias = next((tensor for tensor in layout if tensor.name == f"{name}_bias"), None) if math.bias else None
    if math.bias and (bias is None or bias.dtype not in BIAS_BYTES):
        raise ValueError(f"{name}_bias is {bias and bias.dtype}, must be one of {', '.join(BIAS_BYTES)}")
    place = (0, 0) if bias is None else (bias.offset, BIAS_BYTES[bias.dtype])
    return product_of(matrix_at(layout, name, fmt), fmt, dtype, place)


@cache
def _helpers(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="lowbit")
