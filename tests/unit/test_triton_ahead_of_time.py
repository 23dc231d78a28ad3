"""What the compiler makes of the kernels for four generations of GPUs, none of which is here.

    EVERYTHING=1 pytest -n0 -s tests/unit/test_triton_ahead_of_time.py

tries every kernel for each of them, and says what came of it: `tests/golden/ahead_of_time.log`.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from buddymoe_ray.kernels.triton import experts
from buddymoe_ray.kernels.triton.coded_forms import CodedForm

SCRIPT = Path(__file__).parents[1] / "ahead_of_time.py"
EVERYTHING, SAID = "EVERYTHING" in os.environ, ("capability", "of", "kernel", "registers", "wide", "barriers_in_loops")
KERNELS = Path(experts.__file__).parent
pytestmark = pytest.mark.timeout(2000 if EVERYTHING else 300)
REGISTERS = {"8 bit": 48, "4 bit": 64, "3 bit": 80, "2 bit": 80, "1 bit": 80, "transposed": 64}
REGISTERS |= {"fp8/128x128": 80, "int8/channel": 72, "int4/g128+zeros": 96, "mxfp4": 96, "nvfp4": 96}
REGISTERS |= {"gptq/g128+zeros": 56, "awq/g128+zeros": 168}
"""Most that a thread has, by what it reads, 48 of plain weights; set after seeing the figures, to hold a level: 64
leave a GPU's multiprocessor eight programs of 128 threads, 168 three: a lane of AWQ has 32 outputs."""


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = f"{SCRIPT.parents[1]}:{SCRIPT.parent}"
    env["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    command = [sys.executable, SCRIPT, *["all"] * EVERYTHING]
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=2000 if EVERYTHING else 250, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_nothing_spills_and_weights_come_16_bytes_at_a_time(figures: list[dict[str, Any]]) -> None:
    projections = [found for found in figures if found["kernel"] in ("first", "down")]
    asked = Counter(found["capability"] for found in projections)
    assert asked == (dict.fromkeys((80, 90, 100, 120), 30) if EVERYTHING else {90: 30, 80: 6, 100: 4, 120: 6})
    for found in projections:
        if EVERYTHING:
            print({name: found[name] for name in SAID})
        most = REGISTERS.get(found["of"], 48) + 8 * (found["capability"] == 100)  # ptxas takes more there
        assert found["stack"] == 0 and found["registers"] <= most, found
        assert found["wide"] > 0 and found["narrow"] == 0, found
        most = 2 if found["of"] == "transposed" else 0  # Triton 3.6 has two there
        assert found["barriers_in_loops"] <= most, found
        assert found["flushed"] == 0 or "bit" in found["of"], f"{found}: codes are read as the smallest of numbers"


def test_the_other_kernels_are_small(figures: list[dict[str, Any]]) -> None:
    others = [found for found in figures if found["kernel"] in ("activate", "combine", "join")]
    assert len(others) == (72 if EVERYTHING else 32), others
    assert all(found["stack"] == 0 and found["registers"] <= 40 for found in others), others


def test_who_answers_is_one_program_for_all_rows(figures: list[dict[str, Any]]) -> None:
    """Of 64 rows."""
    found = [found for found in figures if found["kernel"] == "resolve"]
    assert Counter(each["capability"] for each in found) == dict.fromkeys((80, 90, 100, 120), 2)
    assert all(each["stack"] == 0 and each["registers"] <= 48 for each in found), found


def test_attention_copies_keys_and_values_16_bytes_at_a_time(figures: list[dict[str, Any]]) -> None:
    """To shared memory that every GPU has, while it computes with what came before."""
    found = [found for found in figures if found["kernel"] == "attend"]
    asked = {90: 2, 80: 1, 100: 1, 120: 1}
    assert Counter(each["capability"] for each in found) == (dict.fromkeys(asked, 2) if EVERYTHING else asked)
    for each in found:
        assert each["stack"] == 0 and each["registers"] <= 96 and each["shared"] <= 99 << 10, each
        assert each["copied"] >= 8, each


def test_the_checks_see_a_kernel_that_knows_nothing_of_alignment(figures: list[dict[str, Any]]) -> None:
    """It reads weights 8 bytes at a time, and exchanges them between threads in its loop."""
    (found,) = [found for found in figures if found["kernel"] == "misplaced"]
    assert found["narrow"] > 0 and found["wide"] == 0 and found["barriers_in_loops"] > 0, found


def test_nothing_is_written_that_the_oldest_compiler_does_not_know() -> None:
    """Triton 3.6, which pyproject.toml allows, hands on no texts but what a constexpr is named, and takes apart no
    tuples of tuples: the interpreter, and later compilers, do."""
    texts = {field.name for field in dataclasses.fields(CodedForm) if field.type == "str"} | {"kind"}
    seen = 0
    for path in KERNELS.glob("*.py"):
        for function in ast.walk(ast.parse(path.read_text())):
            if not isinstance(function, ast.FunctionDef) or not any(map(_compiled, function.decorator_list)):
                continue
            seen += 1
            for node in ast.walk(function):
                at = f"{path.name}:{getattr(node, 'lineno', 0)}"
                if isinstance(node, ast.Call):
                    given = [arg.attr for arg in node.args if isinstance(arg, ast.Attribute)]
                    assert not texts & {*given}, f"{at} hands on {texts & {*given}}, must name a constexpr first"
                if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple):
                    nested = any(isinstance(part, ast.Tuple) for part in node.targets[0].elts)
                    assert not nested, f"{at} takes apart a tuple of tuples"
    assert seen > 20


def _compiled(decorator: ast.expr) -> bool:
    return isinstance(decorator, ast.Attribute) and decorator.attr == "jit"
