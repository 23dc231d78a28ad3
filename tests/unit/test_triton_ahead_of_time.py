"""What the compiler makes of the kernels for four generations of GPUs, none of which is here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "ahead_of_time.py"
REGISTERS = {"8": 48, "4": 64, "3": 96, "2": 80, "bfloat16": 48, "float16": 48, "float32": 48, "transposed": 64}
"""Most that a thread has, by what it reads; set after seeing the figures, to hold a level: 64 leave a GPU's
multiprocessor eight programs of 128 threads."""


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env = kept | {"PYTHONPATH": str(SCRIPT.parents[1]), "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    done = subprocess.run([sys.executable, SCRIPT], env=env, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_nothing_spills_and_weights_come_16_bytes_at_a_time(figures: list[dict[str, Any]]) -> None:
    projections = [found for found in figures if found["kernel"].endswith("_proj")]
    counts = Counter(found["capability"] for found in projections)
    assert counts == {90: 16, 80: 6, 100: 6, 120: 6}
    for found in projections:
        kind = found["kernel"].split()[0]
        assert found["stack"] == 0 and found["registers"] <= REGISTERS[kind], found
        assert found["wide"] > 0 and found["narrow"] == 0, found
        assert found["barriers_in_loops"] <= (2 if kind == "transposed" else 0), found  # Triton 3.6 has two there


def test_the_other_kernels_are_small(figures: list[dict[str, Any]]) -> None:
    others = [found for found in figures if found["kernel"].split()[0] in ("activate", "combine")]
    assert len(others) == 8 and all(found["stack"] == 0 and found["registers"] <= 40 for found in others), others


def test_the_checks_see_a_kernel_that_knows_nothing_of_alignment(figures: list[dict[str, Any]]) -> None:
    """It reads weights 8 bytes at a time, and exchanges them between threads in its loop."""
    (found,) = [found for found in figures if found["kernel"] == "misplaced"]
    assert found["narrow"] > 0 and found["wide"] == 0 and found["barriers_in_loops"] > 0, found
