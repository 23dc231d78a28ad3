"""Exactness is sacred: greedy tokens equal transformers' own at every budget and batch; bfloat16 bits do not see
residency.

The oracle is `generate` of the stock model, one prompt at a time. 20 prompts of different lengths, 64 new tokens; batch
1 takes the first 5 of them, which keeps the suite quick.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from families import build_checkpoint

from buddymoe_ray import LLM
from buddymoe_ray.models.reference import reference_generate, reference_model
from buddymoe_ray.models.resolve import resolve_model

FAMILIES = ["builtin:tiny", "mixtral", "olmoe", "deepseek_v2", "deepseek_v3", "gpt_oss"]
NEW = 64


def token_prompts(vocab: int, count: int = 20) -> list[list[int]]:
    """Ragged prompts of 3 to 41 tokens, none of them the checkpoints' special ids."""
    rng = torch.Generator().manual_seed(11)
    return [torch.randint(5, vocab, (3 + 2 * i,), generator=rng).tolist() for i in range(count)]


Case = tuple[Path, list[list[int]], list[list[int]]]  # folder, prompts, the oracle's answers


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """A family's, made once."""

    @cache
    def made(name: str) -> Case:
        if name == "builtin:tiny":
            folder = resolve_model(name)
            prompts = held_out_prompts(folder)
        else:
            folder = tmp_path_factory.mktemp(name)
            build_checkpoint(name, folder)
            prompts = token_prompts(160)
        return folder, prompts, reference_generate(folder, prompts, new_tokens=NEW)

    return made


def held_out_prompts(folder: Path) -> list[list[int]]:
    from buddymoe_ray.models.tokenizer import load_tokenizer

    text = (folder / "heldout" / "python.txt").read_text()[:20000]
    ids = load_tokenizer(folder).encode(text, add_special_tokens=False)  # type: ignore[union-attr]
    return [ids[100 * i : 100 * i + 3 + 3 * i] for i in range(20)]


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("memory", ["100%", "50%", "25%"])
@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_tokens_are_those_of_generate(case: Callable[[str], Case], name: str, memory: str, batch: int) -> None:
    folder, prompts, expected = case(name)
    if batch == 1:
        prompts, expected = prompts[:5], expected[:5]
    with LLM(str(folder), memory=memory, dtype="float32", max_running=batch, prefill_chunk=24) as llm:
        results = llm.generate(prompts, max_tokens=NEW)
        llm.engine.cache.check_integrity()
        missed = llm.engine.snapshot().misses
    assert (missed == 0) == (memory == "100%"), f"{missed} misses at {memory}"
    assert [list(r.token_ids) for r in results] == expected


@pytest.mark.parametrize("name", ["olmoe", "qwen3_next"])
def test_the_solo_runner_is_the_twin_of_the_packed_one(tmp_path: Path, name: str) -> None:
    """Same tokens from transformers' own cache; families with recurrent state are served by it alone."""
    build_checkpoint(name, tmp_path)
    prompts = token_prompts(160, count=5)
    expected = reference_generate(tmp_path, prompts, new_tokens=16)
    for batching in ("solo", "auto"):
        with LLM(str(tmp_path), memory="50%", dtype="float32", batching=batching, max_running=3) as llm:
            assert [list(r.token_ids) for r in llm.generate(prompts, max_tokens=16)] == expected


@pytest.mark.parametrize("name", ["olmoe", "gpt_oss", "deepseek_v3"])
def test_bfloat16_bits_do_not_depend_on_the_budget(tmp_path: Path, name: str) -> None:
    """At equal batch composition the log probabilities are equal to the last bit at every budget."""
    build_checkpoint(name, tmp_path)
    prompts = token_prompts(160, count=6)
    seen = []
    for memory in ("100%", "50%", "30%"):
        with LLM(str(tmp_path), memory=memory, dtype="bfloat16", max_running=4) as llm:
            results = llm.generate(prompts, max_tokens=24, logprobs=0)
            seen.append([[(p.token_id, p.logprob) for p in r.logprobs] for r in results])
    assert seen[0] == seen[1] == seen[2]


def test_bfloat16_leaves_generate_only_at_near_ties(tmp_path: Path) -> None:
    """Where the tokens first differ, the reference's gap is within twice its own bfloat16 noise at that very token.

    The noise is the distance of its logits from float32's there, over the whole text. Measured: .03 at the median, .12
    where bfloat16 flips a route; transformers' eager and grouped_mm differ from each other at the same tokens.
    """
    build_checkpoint("olmoe", tmp_path)
    model = reference_model(tmp_path, torch.bfloat16)
    wide = reference_model(tmp_path, torch.float32)
    prompts = token_prompts(160, count=8)
    expected = reference_generate(tmp_path, prompts, new_tokens=32, model=model)
    with LLM(str(tmp_path), memory="50%", dtype="bfloat16", max_running=4) as llm:
        got = [list(r.token_ids) for r in llm.generate(prompts, max_tokens=32)]
    texts = [torch.tensor([prompt + answer]) for prompt, answer in zip(prompts, expected, strict=True)]
    with torch.no_grad():
        logits = [model(text).logits[0].float() for text in texts]
        noise = [(own - wide(text).logits[0]).abs().amax(dim=-1) for own, text in zip(logits, texts, strict=True)]
    for prompt, ours, theirs, own, noise_T in zip(prompts, got, expected, logits, noise, strict=True):
        at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)
        if at is not None:
            row = len(prompt) + at - 1
            gap, limit = float(own[row][theirs[at]] - own[row][ours[at]]), 2 * float(noise_T[row])
            assert gap <= limit, f"differs at {at} where the reference's gap is {gap}, must be at most {limit}"
    assert sum(ours == theirs for ours, theirs in zip(got, expected, strict=True)) >= 4
