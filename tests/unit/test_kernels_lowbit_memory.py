"""The kernel's scratch lives as long as it is used: a block in pages of its own cannot be touched once it is freed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HELPERS = Path(__file__).parents[1]
PAGES_OF_ITS_OWN = {"MALLOC_MMAP_THRESHOLD_": "1024", "MALLOC_TOP_PAD_": "0"}  # glibc: for every block from 1 KiB on
PROGRAM = """
import torch
from lowbit_records import random_records, silu_gate
from torch.nn import functional

from buddymoe_ray.kernels import ExpertMath, LowbitFormat, lowbit_forward

for activate in (silu_gate, lambda x: functional.gelu(x.chunk(2, -1)[0])):  # one call for an expert, and one per matrix
    for D, F in ((1024, 2048), (1160, 1032)):  # the second are no multiples of 16: rows are padded copies
        fmt, math = LowbitFormat(bits=3), ExpertMath(activate=activate)
        _, views = random_records({"gate_up_proj": (2 * F, D), "down_proj": (D, F)}, fmt, 1, 1)
        for rows in (1, 70):
            assert lowbit_forward(torch.randn(rows, D), views[0], fmt, math).isfinite().all()
print("whole")
"""


def test_scratch_is_not_freed_while_it_is_used() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=HELPERS,
        env=os.environ | PAGES_OF_ITS_OWN,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"ended with {done.returncode}\n{done.stderr}"
    assert done.stdout.strip() == "whole"
