"""What goes into a call of the low-bit machine code: named tuples of int64, which cost a kernel nothing.

Knows neither torch nor numba: both sides of the call import it.

Legend: N outputs and K inputs of a matrix; in `Call` N accesses (rows), K experts per token, E experts.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Call", "Expert", "Product"]


class Product(NamedTuple):
    """A matrix in a record, bytes from the record's begin, and the native functions that multiply with it.

    `quantise` is 0 where activations stay float32, `bias_bytes` those of an item of the bias, 0 for none.
    """

    codes: int
    scales: int
    base: int
    bias: int
    bias_bytes: int
    N: int
    K: int
    project: int
    quantise: int


class Expert(NamedTuple):
    """What an expert does between its products (an index of `FORMULAS`), and the bytes of its record."""

    activation: int
    nbytes: int


class Call(NamedTuple):
    """Addresses of rows, outputs and records, of which expert each access is of, and of where its record begins.

    Of every `shares` experts in turn the kernel computes the `share`-th.
    """

    x: int
    out: int
    records: int
    records_bytes: int
    expert_N: int = 0
    at_E: int = 0
    N: int = 0
    K: int = 1
    E: int = 0
    share: int = 0
    shares: int = 1
