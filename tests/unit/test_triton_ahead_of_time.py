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

RINGS = {"3 bit": 2, "2 bit": 1}
"""Loads of 8 bytes by which a lane reads the ring that its windows lie in: a lane beside it reads the same."""
SCRIPT = Path(__file__).parents[1] / "ahead_of_time.py"
REGISTERS = {"8 bit": 48, "4 bit": 64, "3 bit": 40, "2 bit": 40, "transposed": 64}
REGISTERS |= {"fp8/128x128": 80, "int8/channel": 72, "int4/g128+zeros": 96, "mxfp4": 96}
REGISTERS |= {"gptq/g128+zeros": 56, "awq/g128+zeros": 168}
"""Most that a thread has, by what it reads, 48 of plain weights; set after seeing the figures, to hold a level: 64
leave a GPU's multiprocessor eight programs of 128 threads, 168 three: a lane of AWQ has 32 outputs."""


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = f"{SCRIPT.parents[1]}:{SCRIPT.parent}"
    env["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    done = subprocess.run([sys.executable, SCRIPT], env=env, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_nothing_spills_and_weights_come_16_bytes_at_a_time(figures: list[dict[str, Any]]) -> None:
    projections = [found for found in figures if found["kernel"] in ("first", "down")]
    assert Counter(found["capability"] for found in projections) == {90: 26, 80: 4, 100: 4, 120: 4}
    for found in projections:
        assert found["stack"] == 0 and found["registers"] <= REGISTERS.get(found["of"], 48), found
        if found["of"] in RINGS:
            assert found["wide"] == 0 and found["narrow"] == found["narrow_8"] == RINGS[found["of"]], found
        else:
            assert found["wide"] > 0 and found["narrow"] == 0, found
        most = 2 if found["of"] == "transposed" else 0  # Triton 3.6 has two there
        assert found["barriers_in_loops"] <= most, found
        assert found["flushed"] == 0 or "bit" in found["of"], f"{found}: codes are read as the smallest of numbers"


def test_the_other_kernels_are_small(figures: list[dict[str, Any]]) -> None:
    others = [found for found in figures if found["kernel"] in ("activate", "combine", "join")]
    assert len(others) == 28 and all(found["stack"] == 0 and found["registers"] <= 40 for found in others), others


def test_who_answers_is_one_program_for_all_rows(figures: list[dict[str, Any]]) -> None:
    """Of 64 rows."""
    found = [found for found in figures if found["kernel"] == "resolve"]
    assert Counter(each["capability"] for each in found) == dict.fromkeys((80, 90, 100, 120), 2)
    assert all(each["stack"] == 0 and each["registers"] <= 48 for each in found), found


def test_attention_copies_keys_and_values_16_bytes_at_a_time(figures: list[dict[str, Any]]) -> None:
    """To shared memory that every GPU has, while it computes with what came before."""
    found = [found for found in figures if found["kernel"] == "attend"]
    assert Counter(each["capability"] for each in found) == {90: 2, 80: 1, 100: 1, 120: 1}
    for each in found:
        assert each["stack"] == 0 and each["registers"] <= 96 and each["shared"] <= 99 << 10, each
        assert each["copied"] >= 8, each


def test_the_checks_see_a_kernel_that_knows_nothing_of_alignment(figures: list[dict[str, Any]]) -> None:
    """It reads weights 8 bytes at a time, and exchanges them between threads in its loop."""
    (found,) = [found for found in figures if found["kernel"] == "misplaced"]
    assert found["narrow"] > 0 and found["wide"] == 0 and found["barriers_in_loops"] > 0, found
