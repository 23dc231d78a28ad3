"""The kernels touch their own memory only: scratch as long as it lives, inputs up to their last byte.

Both are told by the processor: in a process of its own, freed scratch and what follows an input are pages that are not
there.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HELPERS = Path(__file__).parents[1]
PAGES_OF_ITS_OWN = {"MALLOC_MMAP_THRESHOLD_": "1024", "MALLOC_TOP_PAD_": "0"}  # glibc: for every block from 1 KiB on
BEGIN = """
import ctypes, mmap

import torch
from lowbit_records import random_records, silu_gate
from torch.nn import functional

from buddymoe_ray.kernels import CpuLinear, ExpertMath, LowbitFormat, lowbit_forward

ONE_CALL, TWO_CALLS = silu_gate, lambda x: functional.gelu(x.chunk(2, -1)[0])  # for an expert, or one per matrix
"""
SCRATCH = """
for activate in (ONE_CALL, TWO_CALLS):
    for D, F in ((1024, 2048), (1160, 1033)):  # the second are no whole tiles
        fmt, math = LowbitFormat(bits=3), ExpertMath(activate=activate)
        _, views = random_records({"gate_up_proj": (2 * F, D), "down_proj": (D, F)}, fmt, 1, 1)
        for rows in (1, 70):
            for dtype in (torch.float32, torch.bfloat16):
                assert lowbit_forward(torch.randn(rows, D).to(dtype), views[0], fmt, math).isfinite().all()
print("whole")
"""
PLACED = """
PAGE, kept = mmap.PAGESIZE, []

def at_the_end(tensor):
    pages = -(-tensor.nbytes // PAGE) * PAGE
    kept.append(mmap.mmap(-1, pages + PAGE))
    address = ctypes.addressof(ctypes.c_char.from_buffer(kept[-1]))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + pages), PAGE, 0) == 0
    moved = torch.frombuffer(kept[-1], dtype=tensor.dtype, count=tensor.numel(), offset=pages - tensor.nbytes)
    return moved.view(tensor.shape).copy_(tensor)
"""
INPUTS = (
    PLACED
    + """
for bits in (2, 3, 4, 8):
    for D, F in ((64, 96), (41, 71)):
        for activate in (ONE_CALL, TWO_CALLS):
            fmt, math = LowbitFormat(bits=bits), ExpertMath(activate=activate)
            _, views = random_records({"gate_up_proj": (2 * F, D), "down_proj": (D, F)}, fmt, 1, 1)
            record = {name: at_the_end(tensor) if tensor.nbytes else tensor for name, tensor in views[0].items()}
            for rows in (1, 5, 70):
                for dtype in (torch.float32, torch.bfloat16):
                    x_RD = torch.randn(rows, D).to(dtype)
                    expected = lowbit_forward(x_RD, views[0], fmt, math)
                    assert torch.equal(lowbit_forward(at_the_end(x_RD), record, fmt, math), expected)
print("whole")
"""
)
STORED = """
for dtype in (torch.bfloat16, torch.float16, torch.float32):
    for N, K in ((64, 96), (1, 32), (7, 33), (30, 31), (5, 1), (3, 65)):
        weight, bias = torch.randn(N, K).to(dtype), torch.randn(N)
        for rows in (1, 2, 5, 70):
            x = torch.randn(rows, K).to(torch.bfloat16)
            expected = CpuLinear(weight, None, torch.bfloat16, bias)(x)
            assert expected.isfinite().all()
            assert torch.equal(CpuLinear(at_the_end(weight), None, x.dtype, at_the_end(bias))(at_the_end(x)), expected)
print("whole")
"""


def run(program: str, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + program],
        cwd=HELPERS,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"ended with {done.returncode}\n{done.stderr}"
    assert set(done.stdout.split()) == {"whole"}


def test_scratch_is_not_freed_while_it_is_used() -> None:
    run(SCRATCH, **PAGES_OF_ITS_OWN)


def test_nothing_behind_inputs_and_stored_weights_is_read() -> None:
    run(INPUTS + STORED)
