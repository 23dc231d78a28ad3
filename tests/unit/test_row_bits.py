"""A row's bits depend on that row alone: the same log-probabilities, bit for bit, however a text comes to be computed.

Alone or among others, its prompt in one chunk or in many, its experts resident or fetched, or continued from what was
generated before. Families whose experts the kernels do not read (gpt-oss's are stored `[in, out]`) are not promised it.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from families import build_checkpoint
from tiny_configs import THOROUGH

from buddymoe_ray import LLM
from buddymoe_ray.models.families import CARRYING, FAMILIES
from buddymoe_ray.types import EngineResult

FORMS = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "bfloat16", "expert_dtype": "int8", "dense_dtype": "int8"},
    "int4": {"dtype": "float32", "expert_dtype": "int4", "dense_dtype": "int4"},
}
CASES = [
    *(("builtin:tiny", form) for form in FORMS),
    *((name, "float32") for name in THOROUGH if FAMILIES[name].packed and name not in {"gpt_oss", *CARRYING}),
    *((name, "float32") for name in ("afmoe", "cohere2_moe", "laguna", "mimo_v2_flash", "mistral4")),
    *(("deepseek_v3", form) for form in ("bfloat16", "int4")),
]
NEW = 12

Bits = list[tuple[int, float]]


def bits(result: EngineResult) -> Bits:
    """Tokens with their log-probabilities; Python's floats hold a float32 exactly."""
    assert len(result.logprobs) == NEW or result.finish_reason == "stop"
    return [(item.token_id, item.logprob) for item in result.logprobs]


@pytest.mark.parametrize(("family", "form"), CASES)
def test_a_text_is_computed_to_the_same_bits_in_any_company(family: str, form: str, tmp_path: Path) -> None:
    model = family
    if family != "builtin:tiny":
        build_checkpoint(family, tmp_path, eos_token_id=None)
        model = str(tmp_path)
    prompts = [[5 + (7 * i + 3 * j) % 90 for j in range(n)] for i, n in enumerate((23, 3, 41, 1, 17, 30, 9))]

    def computed(wanted: list[list[int]], *, memory: str = "100%", chunk: int = 512, running: int = 7) -> list[Bits]:
        sizes = {"memory": memory, "prefill_chunk": chunk, "max_running": running, "max_model_len": 96}
        with LLM(model, **sizes, **FORMS[form]) as llm:
            return [bits(result) for result in llm.generate(wanted, max_tokens=NEW, logprobs=0)]

    alone = computed(prompts[:2], running=1)
    assert computed(prompts)[:2] == alone, "in a batch of 7"
    assert computed(prompts[:5], chunk=5, running=3)[:2] == alone, "in chunks of 5"
    assert computed(prompts[:4], memory="40%", chunk=16)[:2] == alone, "where experts are evicted"
    begun = [prompt + [token for token, _ in text[:6]] for prompt, text in zip(prompts, alone, strict=False)]
    assert [text[: NEW - 6] for text in computed(begun)] == [text[6:] for text in alone], "continued"
