"""Exactness is sacred: greedy tokens equal transformers' own at every budget and batch; bfloat16 bits do not see
residency.

The oracle is the stock model, one prompt at a time. 20 prompts of different lengths, 64 new tokens; batch 1 takes three
of them, the longest among them, which keeps the suite quick.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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


class Oracle:
    """A family's checkpoint, prompts, and what stock transformers answers to them.

    `generate` answers those of `GENERATED` and whatever is answered wrongly. To the others an answer is right when the
    stock model, which reads it whole after its prompt, chooses each of its tokens: what `generate` does in 64 passes.
    """

    GENERATED = (0, 4, 19)

    def __init__(self, folder: Path, prompts: list[list[int]]) -> None:
        self.folder, self.prompts = folder, prompts
        self._model = reference_model(folder)
        self._answers = {at: self._generated(at) for at in self.GENERATED}

    def answers(self, drafts: Mapping[int, list[int]]) -> dict[int, list[int]]:
        """To the prompts that there are drafts of."""
        for at, draft in drafts.items():
            if at not in self._answers:
                self._answers[at] = draft if self._chooses(at, draft) else self._generated(at)
        return {at: self._answers[at] for at in drafts}

    def _generated(self, at: int) -> list[int]:
        [answer] = reference_generate(self.folder, [self.prompts[at]], new_tokens=NEW, model=self._model)
        return answer

    def _chooses(self, at: int, draft: list[int]) -> bool:
        prompt, ends = self.prompts[at], self._model.generation_config.eos_token_id
        last = ends if isinstance(ends, list) else [ends]
        if not 0 < len(draft) <= NEW or set(last) & set(draft[:-1]) or (len(draft) < NEW and draft[-1] not in last):
            return False
        with torch.no_grad():
            logits_TV = self._model(torch.tensor([prompt + draft[:-1]]), use_cache=False).logits[0]
        return logits_TV[len(prompt) - 1 :].argmax(dim=-1).tolist() == draft


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Oracle]:
    """A family's, made once."""

    @cache
    def made(name: str) -> Oracle:
        if name == "builtin:tiny":
            folder = resolve_model(name)
            return Oracle(folder, held_out_prompts(folder))
        folder = tmp_path_factory.mktemp(name)
        build_checkpoint(name, folder)
        return Oracle(folder, token_prompts(160))

    return made


def held_out_prompts(folder: Path) -> list[list[int]]:
    from buddymoe_ray.models.tokenizer import load_tokenizer

    text = (folder / "heldout" / "python.txt").read_text()[:20000]
    ids = load_tokenizer(folder).encode(text, add_special_tokens=False)  # type: ignore[union-attr]
    return [ids[100 * i : 100 * i + 3 + 3 * i] for i in range(20)]


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("memory", ["100%", "50%", "25%"])
@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_tokens_are_those_of_generate(
    oracle: Callable[[str], Oracle], name: str, memory: str, batch: int
) -> None:
    stock = oracle(name)
    chosen = stock.GENERATED if batch == 1 else range(len(stock.prompts))
    with LLM(str(stock.folder), memory=memory, dtype="float32", max_running=batch, prefill_chunk=24) as llm:
        results = llm.generate([stock.prompts[at] for at in chosen], max_tokens=NEW)
        llm.engine.cache.check_integrity()
        missed = llm.engine.snapshot().misses
    assert (missed == 0) == (memory == "100%"), f"{missed} misses at {memory}"
    answers = {at: list(result.token_ids) for at, result in zip(chosen, results, strict=True)}
    assert answers == stock.answers(answers)


@pytest.mark.parametrize("name", ["olmoe", "qwen3_next"])
def test_the_solo_runner_is_the_twin_of_the_packed_one(tmp_path: Path, name: str) -> None:
    """Same tokens from transformers' own cache."""
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
