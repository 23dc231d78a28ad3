"""What goes into a call of the experts' machine code: tuples of int64, which cost a kernel nothing.

What stays the same from call to call lies in an array (`plan_of`) that is handed over by its address, and `Call` goes
as a plain tuple: named ones are ten times as long on their way into numba. Knows neither torch nor numba: both sides of
the call import it.

Legend: N outputs and K inputs of a matrix; in `Call` N accesses (rows), K experts per token, E experts.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = [
    "ANYWHERE",
    "ITEM_BYTES",
    "LINE",
    "NO_SUCH_EXPERT",
    "NO_SUCH_RECORD",
    "OK",
    "PANEL",
    "Call",
    "CombineCall",
    "Expert",
    "Product",
    "plan_of",
]

OK, NO_SUCH_EXPERT, NO_SUCH_RECORD = 1, 2, 3
"""What a call answers: when it is not OK, nothing was computed. 0 is no answer, see numba_calls.py."""
ANYWHERE = 1 << 62
"""Bytes of the records of a call that gives addresses."""
LINE, PANEL = 64, 4
"""Bytes of a row that lie together in a panel, and its rows: one stream from the second-level cache instead of four."""
ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
"""Dtypes of weights that can be read as stored, by torch's names."""


class Product(NamedTuple):
    """A matrix in a record, bytes from the record's begin, and the native functions that multiply with it.

    Plain ones have neither scales nor base; a quantised one as stored has its zero points or global scale at `base`.
    `quantise` turns a row into what `project` reads, 0 where that is float32 as it is: lines of 64 bytes, each beside
    those of the other rows of its `panel`. `bias_bytes` are those of an item of the bias, 0 for none. Of `parts` equal
    ones, one below the other, each is multiplied by itself, `code_step`, `scale_step` and `base_step` bytes behind the
    one before.
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
    panel: int = 1
    parts: int = 1
    code_step: int = 0
    scale_step: int = 0
    base_step: int = 0


class Expert(NamedTuple):
    """What an expert does between its products (an index of `FORMULAS`), and the bytes of its record."""

    activation: int
    nbytes: int


class Call(NamedTuple):
    """Addresses of rows, outputs and records, of which expert each access is of, and of where its record begins.

    Rows and outputs are float32 (`item_bytes` 4) or bfloat16 (2).
    Of every `shares` experts in turn the kernel computes the `share`-th.
    """

    x: int
    out: int
    records: int
    records_bytes: int
    item_bytes: int
    expert_N: int = 0
    at_E: int = 0
    N: int = 0
    K: int = 1
    E: int = 0
    share: int = 0
    shares: int = 1


class CombineCall(NamedTuple):
    """Addresses of T times K rows of D items, of their weights, and of T rows to write; the bytes of an item of rows
    and of weights."""

    y: int
    weight: int
    out: int
    T: int
    K: int
    D: int
    item_bytes: int
    weight_bytes: int


def plan_of(expert: Expert, first: Product, down: Product) -> npt.NDArray[np.int64]:
    """What is the same in all calls. Its owner must outlive a call that has its address."""
    return np.array((*expert, *first, *down), dtype=np.int64)
