"""All experts of one layer and step in one call, packed or as stored, or one of them over its rows.

At decode a step has a few rows for each of many experts: one call per expert would spend more on calling than on
arithmetic. Knows where things lie in a record, but not which accesses a policy gave to stand-ins, nor the router's
weights. Invariant: an output's bits depend on its row and its expert alone; of a packed one they are those of
`lowbit_forward`.

Legend: T tokens, K experts per token, N = T*K accesses, E experts, B bytes, D hidden, F ffn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

import torch
from torch import Tensor

from buddymoe_ray.kernels.coded_format import coded_shapes
from buddymoe_ray.kernels.cpu import (
    THREADED_WEIGHTS,
    activation_of,
    as_read,
    bias_bytes,
    coded_product,
    decodes,
    experts_kernel,
    in_threads,
    product_of,
)
from buddymoe_ray.kernels.expert_calls import ANYWHERE, NO_SUCH_EXPERT, NO_SUCH_RECORD, OK, Expert, Product, plan_of
from buddymoe_ray.kernels.lowbit_format import LowbitFormat, matrix_at
from buddymoe_ray.kernels.reference import ExpertMath
from buddymoe_ray.kernels.stored import stored_product, widens
from buddymoe_ray.types import CodedMatrix, SlotTensor

__all__ = ["ExpertLayer"]


class ExpertLayer:
    """Computes experts on a CPU from records laid out by `record_tensors`, or from slots.

    Args:
        layout, fmt, math: experts that `covers` says yes to; `fmt` is None for plain weights as stored, `coded` are
            the quantised ones of `layout`.
        dtype: of activations. All but float32 ones are multiplied with 16 bits, as by `CpuLinear` (error 4e-5).
        threads: share the records of a call; the bits do not depend on it.

    Machine code is made here (seconds at the first time on a machine, then .5 s), not in the first step. `plan_at` is
    what it reads, for as long as the layer lives; rows are of `hidden` numbers.
    Raises ValueError for records that are not packed as this version packs.
    """

    def __init__(
        self,
        *,
        layout: Sequence[SlotTensor],
        fmt: LowbitFormat | None,
        math: ExpertMath,
        dtype: torch.dtype = torch.float32,
        threads: int = 1,
        coded: Sequence[CodedMatrix] = (),
    ) -> None:
        assert threads >= 1, f"threads is {threads}, must be at least 1"
        known = {matrix.name: matrix for matrix in coded}
        first, down = (_product(layout, name, known.get(name, fmt), math, dtype) for name in (math.first, "down_proj"))
        activation = activation_of(math, down.K)
        assert activation is not None, "experts compute what the kernel does not, must be as `covers` says"
        self._nbytes = max(tensor.offset + tensor.nbytes for tensor in layout)
        self._plan, self._kernel = plan_of(Expert(activation, self._nbytes), first, down), experts_kernel()
        self.plan_at, self.hidden = self._plan.ctypes.data, first.K
        self._threads, self.dtype = threads, dtype
        self._begin = layout[0].name, layout[0].offset
        self._weights = first.N * first.K + down.N * down.K

    def expert(self, x_RD: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """One expert over its rows, as `lowbit_forward`; `tensors` are the views of its record.

        Where they lie is not asked one by one: they must be views of one record, as `cache.slot_views` makes them.
        """
        R, x = len(x_RD), as_read(x_RD).contiguous()
        assert x_RD.dtype == self.dtype, f"x is {x_RD.dtype}, must be {self.dtype}"
        name, offset = self._begin
        out, zeros = torch.empty_like(x), _zeros(max(6, R.bit_length())).data_ptr()
        record = tensors[name].data_ptr() - offset
        call = (x.data_ptr(), out.data_ptr(), record, self._nbytes, x.itemsize, zeros, zeros, R, 1, 1, 0, 1)
        fault = self._kernel(call, self.plan_at)
        assert fault == OK, f"fault is {fault}, must be {OK}"
        return out if out.dtype == x_RD.dtype else out.to(x_RD.dtype)

    @staticmethod
    def covers(
        layout: Sequence[SlotTensor], fmt: LowbitFormat | None, math: ExpertMath, coded: Sequence[CodedMatrix] = ()
    ) -> bool:
        """Whether a call can compute such experts. Raises ValueError for another version's packing."""
        if fmt is not None:
            return activation_of(math, matrix_at(layout, "down_proj", fmt).K) is not None
        stored, known = {tensor.name: tensor for tensor in layout}, {matrix.name: matrix for matrix in coded}
        biases = [stored[f"{name}_bias"].dtype for name in (math.first, "down_proj") if math.bias]
        names = (math.first, "down_proj")
        reads = all(decodes(known[name].format) if known else widens(stored[name].dtype) for name in names)
        F = known["down_proj"].K if known else stored["down_proj"].shape[1]
        return (
            reads
            and not math.transposed
            and all(bias_bytes(dtype) for dtype in biases)
            and activation_of(math, F) is not None
        )

    def __call__(self, x_TD: Tensor, records_B: Tensor | None, at_E: Tensor, expert_TK: Tensor, out_ND: Tensor) -> None:
        """Write `out_ND[n] = expert expert_TK.flat[n] over x_TD[n // K]` where the expert has a record.

        `records_B` uint8 holds records at any multiples of 4 bytes; that of expert e begins at byte `at_E[e]` (int64,
        negative: no record of this layout). None: `at_E` are addresses, of records that stay where they are meanwhile.
        `expert_TK` int64 is negative for accesses that others answer. Rows of `out_ND` (dtype of `x_TD`) that have no
        record are left alone.
        """
        (T, K), D, N = expert_TK.shape, self.hidden, expert_TK.numel()
        assert out_ND.shape == (N, D), f"out is {tuple(out_ND.shape)}, must be {(N, D)}"
        assert x_TD.shape == (T, D), f"x is {tuple(x_TD.shape)}, must be {(T, D)}"
        assert x_TD.dtype == out_ND.dtype == self.dtype, f"x is {x_TD.dtype}, out {out_ND.dtype}, not {self.dtype}"
        assert expert_TK.dtype == at_E.dtype == torch.int64, (
            f"experts are {expert_TK.dtype}, {at_E.dtype}, must be int64"
        )
        if T == 0:
            return
        x, out = as_read(x_TD), as_read(out_ND)
        x, expert_TK, at_E = x.contiguous(), expert_TK.contiguous(), at_E.contiguous()
        assert out.is_contiguous(), "outputs must be contiguous"
        begin, room = 0, ANYWHERE
        if records_B is not None:
            assert records_B.is_contiguous(), "records must be contiguous"
            begin, room = records_B.data_ptr(), records_B.numel()
        call = (
            *(x.data_ptr(), out.data_ptr(), begin, room, x.itemsize),
            *(expert_TK.data_ptr(), at_E.data_ptr(), N, K, at_E.numel()),
        )
        threads = 1 if self._weights * N < THREADED_WEIGHTS else self._threads
        if threads == 1:
            fault = self._kernel((*call, 0, 1), self.plan_at)
        else:
            shares = [((*call, share, threads), self.plan_at) for share in range(threads)]
            fault = in_threads(self._kernel, shares)
        assert fault != NO_SUCH_EXPERT, f"expert is {int(expert_TK.max())}, must be below {len(at_E)}"
        assert fault != NO_SUCH_RECORD, (
            f"the last record ends at byte {int(at_E.max()) + self._nbytes}, must be at most {room}"
        )
        if out is not out_ND:
            out_ND.copy_(out)  # rows of others go back as they came


def _product(
    layout: Sequence[SlotTensor],
    name: str,
    fmt: LowbitFormat | CodedMatrix | None,
    math: ExpertMath,
    dtype: torch.dtype,
) -> Product:
    """A matrix within a record, with its bias."""
    place, tensors = (0, 0), {tensor.name: tensor for tensor in layout}
    if math.bias:
        bias = tensors.get(f"{name}_bias")
        size = None if bias is None else bias_bytes(bias.dtype)
        if bias is None or size is None:
            raise ValueError(f"{name}_bias is {bias and bias.dtype}, must be bfloat16 or float32")
        place = (bias.offset, size)
    if isinstance(fmt, CodedMatrix):
        parts = {part: tensors[f"{name}.{part}"].offset for part in coded_shapes(fmt)}
        return coded_product(parts, fmt, dtype, place)
    if fmt is None:
        N, K = tensors[name].shape
        return stored_product(tensors[name].offset, (N, K), tensors[name].dtype, dtype, place)
    return product_of(matrix_at(layout, name, fmt), fmt.of(name), dtype, place)


@cache
def _zeros(power: int) -> Tensor:
    """`2 ** power` int64 zeros: every row is of expert 0, whose record begins at byte 0."""
    return torch.zeros(1 << power, dtype=torch.int64)
