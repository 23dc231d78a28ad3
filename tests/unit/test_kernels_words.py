"""The second look at slots' words: what it finds, and that machine code looks after the bytes were read."""

from __future__ import annotations

import llvmlite.binding as llvm
import numpy as np
import pytest

from buddymoe_ray.kernels import unchanged
from buddymoe_ray.kernels.machine_code import optimised
from buddymoe_ray.kernels.slot_words import WORDS_TEXT


@pytest.mark.parametrize("seed", range(20))
def test_a_word_that_moved_on_is_found_where_its_expert_is_asked_for(seed: int) -> None:
    rng = np.random.default_rng(seed)
    E, ids = 16, rng.integers(0, 16, (3, 4))
    words_E, seen_E = (rng.integers(0, 2**62, E) for _ in range(2))
    stayed_E, checked_E = rng.random(E) < 0.9, rng.random(E) < 0.8
    seen_E[stayed_E] = words_E[stayed_E]
    places_E = np.where(checked_E, words_E.ctypes.data + 8 * np.arange(E), 0)
    expected = bool((~checked_E[ids] | (words_E[ids] == seen_E[ids])).all())
    assert unchanged(ids, np.stack([places_E, seen_E])) == expected


def first_instruction(text: str, triple: str) -> str:
    """Of the function, as machine code has it."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    target = llvm.Target.from_triple(triple).create_target_machine(opt=3)
    lines = target.emit_assembly(optimised(text, target)).partition("\nunchanged:")[2].splitlines()
    return next(line.strip().split("//")[0] for line in lines if line.startswith("\t") and "\t." not in line)


@pytest.mark.parametrize(
    ("triple", "fence"),
    [("x86_64-unknown-linux-gnu", "#MEMBARRIER"), ("aarch64-unknown-linux-gnu", "dmb\tishld")],
    ids=["x86", "arm"],
)
def test_nothing_is_looked_at_before_the_fence(triple: str, fence: str) -> None:
    """On x86 it only binds the compiler. Without it the first instruction is a load of the call."""
    assert first_instruction(WORDS_TEXT, triple) == fence
    weaker = WORDS_TEXT.replace("fence acquire", "")
    assert first_instruction(weaker, triple) != fence
