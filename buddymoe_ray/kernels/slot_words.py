"""Whether slots that others may write stayed as they were while their bytes were read: the second check of a seqlock.

A reader notes each slot's word, reads bytes, and looks at the words again: what it computed counts only if none moved
on (Lameter, "Effective synchronization on Linux/NUMA systems", 2005; Boehm, "Can seqlocks get along with programming
language memory models?", 2012). Between the bytes and that look must be an acquire fence, and the look must be atomic
loads, or a compiler may use the words of before: a second acquire load orders only what comes after it. So this is LLVM
IR, on x86 and ARM alike, and its assembly is tested. Knows addresses, neither tables nor experts.

Legend: E experts, N accesses.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt

from buddymoe_ray.kernels.cpu import Kernel
from buddymoe_ray.kernels.expert_calls import OK

__all__ = ["WORDS_TEXT", "unchanged", "words_kernel"]

Ints = npt.NDArray[np.int64]

WORDS_TEXT = f"""
define i64 @unchanged(i64 %call, i64 %plan) {{
  fence acquire
  %fields = inttoptr i64 %call to ptr
  %ids_at = load ptr, ptr %fields
  %N_at = getelementptr i64, ptr %fields, i64 1
  %N = load i64, ptr %N_at
  %words_at = getelementptr i64, ptr %fields, i64 2
  %words = load ptr, ptr %words_at
  %E_at = getelementptr i64, ptr %fields, i64 3
  %E = load i64, ptr %E_at
  br label %head
head:
  %n = phi i64 [0, %0], [%next, %same]
  %more = icmp slt i64 %n, %N
  br i1 %more, label %body, label %unchanged
body:
  %next = add i64 %n, 1
  %id_at = getelementptr i64, ptr %ids_at, i64 %n
  %id = load i64, ptr %id_at
  %place_at = getelementptr i64, ptr %words, i64 %id
  %place = load ptr, ptr %place_at
  %checked = icmp ne ptr %place, null
  br i1 %checked, label %check, label %same
check:
  %word = load atomic i64, ptr %place monotonic, align 8
  %seen_at = getelementptr i64, ptr %place_at, i64 %E
  %seen = load i64, ptr %seen_at
  %equal = icmp eq i64 %word, %seen
  br i1 %equal, label %same, label %changed
same:
  br label %head
unchanged:
  ret i64 {OK}
changed:
  ret i64 {OK + 1}
}}
"""
"""Of a call: the addresses of N int64 experts and of [2, E] words, as for `unchanged`."""


def unchanged(ids: Ints, words_2E: Ints) -> bool:
    """Whether the slots of these experts (int64, of any shape) have the words that they had.

    `words_2E` int64 are the address of each expert's word, 0 where there is nothing to look at, and what it was.
    """
    ids, E = np.ascontiguousarray(ids), words_2E.shape[1]
    assert words_2E.flags.c_contiguous and ids.dtype == words_2E.dtype == np.int64, f"{ids.dtype}, {words_2E.dtype}"
    return words_kernel()((ids.ctypes.data, ids.size, words_2E.ctypes.data, E), 0) == OK


@cache
def words_kernel() -> Kernel:
    """`unchanged` for kernels, and by its address."""
    from buddymoe_ray.kernels.machine_code import native_functions
    from buddymoe_ray.kernels.numba_calls import kernel

    return kernel(lambda _: native_functions(WORDS_TEXT, ("unchanged",))["unchanged"], 4)
