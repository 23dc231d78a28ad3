"""Who answers a layer's accesses, decided on the device from the layer's table: nobody asks the host.

What it decides is what `policy.Ladder` would, or else it leaves the layer to the host: an expert that is there runs;
where all others have records that all rows can pay for, these answer. Where one must be brought, or rows must choose,
the layer stalls, and it and those behind it are the host's, which brings the expert.

Legend: L layers, T rows, K slots, E experts.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

from torch import Tensor

from buddymoe_ray.kernels.triton import launching
from buddymoe_ray.kernels.triton.forms import power_of_two

__all__ = ["RowTerms", "resolve_on_device"]

_MARGIN = 1 + 1e-5
"""On what a row spends, for sums of another order: what is nearer to its allowance is the host's to weigh."""


@dataclass(frozen=True, kw_only=True)
class RowTerms:
    """Of the rows of a step, on the device, before its first layer and behind each of the L: `stalled_L` int64 [L + 1]
    the first layer that stalled, L for none; `left_LT` float32 [L + 1, T] what rows may spend; `lengths_LT` int64
    [L + 1, T] how many tokens they attend to, none behind a stall: what is not wanted reads no keys and values. `count`
    int64 [1] rows that are no padding; `mode_T` int64 and `price_T` float32 as `policy.RowBudgets`."""

    stalled_L: Tensor
    count: Tensor
    mode_T: Tensor
    price_T: Tensor
    left_LT: Tensor
    lengths_LT: Tensor


@dataclass(frozen=True, kw_only=True)
class _Sizes:
    T: int
    K: int
    E: int
    PT: int
    PK: int
    margin: float

    def __repr__(self) -> str:
        """As Triton has it in the name of a function."""
        return "_".join(str(part).replace(".", "p") for part in astuple(self))


def resolve_on_device(
    layer: int,
    ids_TK: Tensor,
    weight_TK: Tensor,
    at_E: Tensor,
    records: tuple[Tensor, Tensor] | None,
    rows: RowTerms,
    told_3TK: Tensor,
) -> None:
    """Write the accesses (int64), those that experts of the table answer, those that records do, both -1 elsewhere.

    A layer that stalls has hits and no records' answers, those behind it, and rows of padding, have neither.

    Args:
        ids_TK: int64. weight_TK: float32.
        at_E: int64, where each expert is, negative where it is not.
        records: uint8 `[E]` whether an expert has one, float32 `[E]` its expected loss per squared weight; None where
            no record may answer.
    """
    from buddymoe_ray.kernels.triton import programs

    (T, K), E = ids_TK.shape, len(at_E)
    assert told_3TK.shape == (3, T, K) and told_3TK.is_contiguous(), f"told is {tuple(told_3TK.shape)}"
    sizes = _Sizes(T=T, K=K, E=E, PT=power_of_two(T), PK=power_of_two(K), margin=_MARGIN)
    terms = (rows.stalled_L, rows.count, rows.mode_T, rows.price_T, rows.left_LT, rows.lengths_LT)
    ids, weight = ids_TK.contiguous(), weight_TK.contiguous()
    tables = (at_E, *(records or (None, None)))
    launching.launch(programs.resolve, (1,), ids, weight, tables, terms, told_3TK, layer, sizes)
