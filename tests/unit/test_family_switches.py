"""Every switch in a family's config that changes attention or positions, against transformers' own `generate`.

Texts are longer than every window and cross every threshold. One engine serves a short and a long prompt side by side
(prompts in chunks where the family is packed) and then resumes the short one in its middle; float32 tokens must be
equal and logits close.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import build_checkpoint
from torch import Tensor

from buddymoe_ray.config import EngineConfig
from buddymoe_ray.engine.build import build_parts
from buddymoe_ray.engine.engine import Engine
from buddymoe_ray.engine.sampler import Sampled
from buddymoe_ray.engine.sequence import Sequence
from buddymoe_ray.errors import CheckpointError
from buddymoe_ray.models.families import FAMILIES
from buddymoe_ray.models.reference import reference_model
from buddymoe_ray.types import GenerationRequest, SamplingParams

NEW = 14
SHORT, LONG = [tuple((7 * k + 3) % 150 + 5 for k in range(n)) for n in (22, 37)]
ORIGINAL = 30  # crossed by the short prompt while it decodes, by the long one in its prompt
WINDOW = 8
KEPT = NEW - 3  # output tokens that the resumed request brings


def scaled(kind: str, dim: int, **more: Any) -> dict[str, Any]:
    """`rope_parameters` of a kind, for rotary heads of `dim`."""
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 10000.0, **more}
    if kind in ("linear", "dynamic", "yarn", "llama3"):
        rope["factor"] = 4.0
    if kind in ("yarn", "llama3", "longrope"):
        rope["original_max_position_embeddings"] = ORIGINAL
    if kind == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * (dim // 2), "long_factor": [2.0 + k for k in range(dim // 2)]}
    return {"rope_parameters": rope}


class Recorder:
    """Greedy choices, and each sequence's logits in order."""

    def __init__(self) -> None:
        self.logits: dict[str, list[Tensor]] = {}

    def choose(self, logits_BV: Tensor, sequences: list[Sequence]) -> list[Sampled]:
        for row, seq in enumerate(sequences):
            self.logits.setdefault(seq.request_id, []).append(logits_BV[row].clone())
        return [Sampled(token_id=int(row.argmax())) for row in logits_BV]


def reference(folder: Path, prompt: tuple[int, ...]) -> tuple[list[int], Tensor]:
    """Tokens and logits `[NEW, V]` of transformers' generate on a fresh model."""
    out = reference_model(folder).generate(  # type: ignore[operator]
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        do_sample=False,
        max_new_tokens=NEW,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences[0, len(prompt) :].tolist(), torch.cat(out.logits)


def served(folder: Path, *, batching: str, memory: str) -> dict[str, tuple[list[int], Tensor]]:
    """Tokens and logits of both prompts side by side, of the short one resumed late, and of its recomputation."""
    recorder = Recorder()
    limit = len(LONG) + NEW  # also what bounds a solo runner's prompt tokens of a step
    config = EngineConfig(model=str(folder), memory=memory, batching=batching, prefill_chunk=9, max_model_len=limit)
    parts = build_parts(config, text=False)
    engine = Engine(parts, recorder)
    tokens: dict[str, list[int]] = {"short": [], "long": [], "again": [], "other": []}

    def run(*requests: tuple[str, tuple[int, ...], list[int]]) -> None:
        for name, prompt, have in requests:
            sampling = SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True)
            engine.add(
                GenerationRequest(
                    request_id=name, prompt_token_ids=prompt, sampling=sampling, resumed_token_ids=tuple(have)
                )
            )
        for event in engine.drain():
            assert event.error is None, event.error
            tokens[event.request_id] += event.token_ids

    try:
        run(("long", LONG, []), ("short", SHORT, []))
        run(("again", SHORT, tokens["short"][:KEPT]), ("other", LONG[:5], []))
        whole = [*SHORT, *tokens["short"]]
        scored = list(parts.runner.score(whole, parts.scheduler.borrow(len(whole)) or [], prompt=len(SHORT)))
    finally:
        engine.close()
    got = {name: (tokens[name], torch.stack(recorder.logits[name])) for name in ("short", "long", "again")}
    return got | {"scored": (tokens["short"], torch.cat([part for _, part in scored])[len(SHORT) - 1 : -1])}


def check(folder: Path, *, batching: str = "auto", memories: tuple[str, ...] = ("100%",)) -> None:
    tokens, logits = reference(folder, SHORT)
    wanted = {
        "short": (tokens, logits),
        "long": reference(folder, LONG),
        "again": (tokens[KEPT:], logits[KEPT:]),
        "scored": (tokens, logits),
    }
    for memory in memories:
        got = served(folder, batching=batching, memory=memory)
        for name, (ids, rows) in wanted.items():
            assert got[name][0] == ids, f"{name}, {batching}, {memory}"
            torch.testing.assert_close(got[name][1], rows, atol=2e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def window(**fields: Any) -> dict[str, Any]:
    return {"sliding_window": WINDOW, **fields}


SLIDING, FULL = "sliding_attention", "full_attention"
PHI = {"short_mscale": 1.1, "long_mscale": 1.3, "original_max_position_embeddings": ORIGINAL}
DYNAMIC = {**scaled("dynamic", 12), "max_position_embeddings": ORIGINAL}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in FAMILIES},
    "mixtral, no window": ("mixtral", {"sliding_window": None}),
    "mixtral, all outputs": (
        "mixtral",
        {"output_router_logits": True, "output_hidden_states": True, "use_cache": False},
    ),
    "phimoe, window in the mask alone": ("phimoe", window()),
    "qwen2_moe, window": ("qwen2_moe", window(use_sliding_window=True)),
    "qwen2_moe, window in one layer": ("qwen2_moe", window(use_sliding_window=True, max_window_layers=1)),
    "qwen2_moe, window off": ("qwen2_moe", window(use_sliding_window=False)),
    "qwen2_moe, layer types": (
        "qwen2_moe",
        window(use_sliding_window=True, layer_types=[FULL, SLIDING, SLIDING]),
    ),
    "qwen3_moe, window": ("qwen3_moe", window(use_sliding_window=True)),
    "qwen3_moe, window off": ("qwen3_moe", window(use_sliding_window=False)),
    "dots1, window above a layer": ("dots1", window(max_window_layers=1)),
    "dots1, layer types": ("dots1", window(layer_types=[SLIDING, FULL, SLIDING])),
    "gpt_oss, sinks without window": ("gpt_oss", {"layer_types": [FULL] * 3}),
    "minimax, window that decode steps forget": ("minimax", window()),
    "olmoe, window that prompts forget": ("olmoe", window()),
    "olmoe, clipped": ("olmoe", {"clip_qkv": 0.5, "norm_topk_prob": True, "tie_word_embeddings": True}),
    "deepseek_v2, greedy, no q rank": ("deepseek_v2", {"topk_method": "greedy", "q_lora_rank": None}),
    "deepseek_v3, not interleaved": ("deepseek_v3", {"rope_interleave": False, "q_lora_rank": None}),
    "glm4_moe, groups": ("glm4_moe", {"n_group": 2, "topk_group": 1, "partial_rotary_factor": 1.0}),
    "dots1, groups": ("dots1", {"n_group": 4, "topk_group": 2}),
    "minimax_m2, partial rotary": ("minimax_m2", {"rotary_dim": 4}),
    "hunyuan_v1_moe, alpha": (
        "hunyuan_v1_moe",
        scaled("dynamic", 12, alpha=100.0) | {"moe_topk": [2, 2, 2]},
    ),
    "ernie4_5_moe, untied": ("ernie4_5_moe", {"tie_word_embeddings": False, "moe_layer_interval": 2}),
    "lfm2_moe, untied": ("lfm2_moe", {"tie_embedding": False}),
    "qwen3_moe, linear": ("qwen3_moe", scaled("linear", 16)),
    "deepseek_v3, yarn": ("deepseek_v3", scaled("yarn", 8, mscale=1.0, mscale_all_dim=0.7)),
    "glm4_moe, llama3": ("glm4_moe", scaled("llama3", 6)),
    "flex_olmo, proportional": ("flex_olmo", scaled("proportional", 12, partial_rotary_factor=0.5)),
    "minimax, dynamic": ("minimax", DYNAMIC),
    "olmoe, dynamic": ("olmoe", DYNAMIC),
    "granitemoe, longrope": ("granitemoe", scaled("longrope", 12)),
    "qwen3_next, longrope": ("qwen3_next", scaled("longrope", 4)),
    "phimoe, longrope": ("phimoe", scaled("longrope", 12, **PHI)),
    "phimoe, linear with mscale": ("phimoe", scaled("linear", 12, **PHI)),
}


@pytest.mark.parametrize("case", CASES)
def test_tokens_and_logits_are_those_of_generate(case: str, tmp_path: Path) -> None:
    family, fields = CASES[case]
    folder = build_checkpoint(family, tmp_path, seed=4, **fields)
    check(folder, memories=("50%", "25%") if case in FAMILIES else ("100%",))


@pytest.mark.parametrize(
    "case", ["mixtral", "qwen2_moe, window", "gpt_oss", "deepseek_v2, greedy, no q rank", "glm4_moe, groups"]
)
def test_solo_twin_of_packed_families(case: str, tmp_path: Path) -> None:
    family, fields = CASES[case]
    check(build_checkpoint(family, tmp_path, seed=4, **fields), batching="solo")


@pytest.mark.parametrize(
    ("family", "fields", "named"),
    [
        ("qwen2_moe", window(use_sliding_window=False, layer_types=[SLIDING, FULL, FULL]), "sliding_window is 0"),
        ("olmoe", {"is_causal": False}, "is_causal false"),
        ("dots1", {"layer_types": ["chunked_attention", FULL, FULL]}, "chunked_attention"),
        ("phimoe", scaled("linear", 12, short_mscale=1.1, long_mscale=1.3), "original_max_position_embeddings"),
    ],
)
def test_a_switch_that_cannot_be_honoured_is_refused_by_name(
    family: str, fields: dict[str, Any], named: str, tmp_path: Path
) -> None:
    folder = build_checkpoint(family, tmp_path, **fields)
    with pytest.raises(CheckpointError, match=named):
        build_parts(EngineConfig(model=str(folder), memory="100%"), text=False)
