"""transformers' own answers, from the checkpoint as shipped: the oracle of the exactness checks.

Loads everything, knows nothing of this package's cache, kernels or batching. Where arithmetic differs in the last bits
answers may part at a near tie: `greedy_difference` tells that from an error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from buddymoe_ray.types import EngineResult

__all__ = ["greedy_difference", "reference_generate", "reference_model"]


def reference_model(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The stock model, eager experts, on the CPU."""
    config = AutoConfig.from_pretrained(folder)
    whole = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING  # a model of more than text, asked for text alone
    auto = AutoModelForImageTextToText if whole else AutoModelForCausalLM
    model: PreTrainedModel = auto.from_pretrained(folder, dtype=dtype, experts_implementation="eager")
    return model.eval()


def reference_generate(
    folder: Path,
    prompts: Sequence[str | Sequence[int]],
    *,
    new_tokens: int,
    model: PreTrainedModel | None = None,
) -> list[list[int]]:
    """Greedy continuation of each prompt alone, `generate`'s own way; the prompt is not in the result."""
    model = model or reference_model(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder) if any(isinstance(p, str) for p in prompts) else None
    answers = []
    for prompt in prompts:
        ids = list(tokenizer.encode(prompt)) if tokenizer is not None and isinstance(prompt, str) else list(prompt)
        with torch.no_grad():
            out = model.generate(  # type: ignore[operator]
                torch.tensor([ids]), max_new_tokens=new_tokens, do_sample=False, pad_token_id=0
            )
        answers.append(out[0, len(ids) :].tolist())
    return answers


def greedy_difference(one: EngineResult, other: EngineResult, *, tolerance: float) -> float:
    """By how many nats log probabilities differ at most, up to the first token that is another one; inf where that one
    was not within twice the `tolerance` of the best, or answers end elsewhere. Both have `logprobs` of 2."""
    most = 0.0
    for ours, theirs in zip(one.logprobs, other.logprobs, strict=False):
        known, best = dict(theirs.top), dict(ours.top)
        most = max([most, *(abs(best[token] - known[token]) for token in best.keys() & known.keys())])
        if ours.token_id != theirs.token_id:
            return most if ours.logprob - best.get(theirs.token_id, -math.inf) <= 2 * tolerance else math.inf
    return most if len(one.token_ids) == len(other.token_ids) else math.inf
