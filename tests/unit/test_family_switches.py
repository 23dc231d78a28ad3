"""Every switch in a family's config that changes attention or positions, against transformers' own `generate`.

Texts are longer than every window and cross every threshold. One engine serves a short and a long prompt side by side
(prompts in chunks where the family is packed) and then resumes the short one in its middle; float32 tokens must be
equal and logits close.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build_checkpoint
from family_cases import CASES, REFUSED
from torch import Tensor
from whole_models import WHOLE, build_whole

from buddymoe_ray.config import EngineConfig
from buddymoe_ray.engine.build import build_parts
from buddymoe_ray.engine.engine import Engine
from buddymoe_ray.engine.sampler import Sampled
from buddymoe_ray.engine.sequence import Sequence
from buddymoe_ray.errors import CheckpointError
from buddymoe_ray.models.families import FAMILIES
from buddymoe_ray.models.reference import reference_model
from buddymoe_ray.models.shape import describe
from buddymoe_ray.types import GenerationRequest, SamplingParams

NEW = 14
SHORT, LONG = [tuple((7 * k + 3) % 150 + 5 for k in range(n)) for n in (22, 37)]
KEPT = NEW - 3  # output tokens that the resumed request brings


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


@pytest.mark.parametrize("case", CASES)
def test_tokens_and_logits_are_those_of_generate(case: str, tmp_path: Path) -> None:
    family, fields = CASES[case]
    folder = build_checkpoint(family, tmp_path, seed=4, **fields)
    check(folder, memories=("25%",) if case in FAMILIES else ("100%",))


def test_fields_that_the_family_does_not_read_change_nothing(tmp_path: Path) -> None:
    """As the release of Hunyuan-A13B has them."""
    fields = {"n_group": False, "topk_group": False, "moe_intermediate_size": [40] * 3, "moe_k": 0, "is_causal": True}
    folder = build_checkpoint("hunyuan_v1_moe", tmp_path, seed=4, **fields)
    assert describe(folder).experts_per_token == 2
    check(folder)


@pytest.mark.parametrize("model_type", WHOLE)
def test_the_text_part_of_a_model_of_more_is_served(model_type: str, tmp_path: Path) -> None:
    folder = build_whole(model_type, tmp_path)
    family, _ = WHOLE[model_type]
    shape = describe(folder)
    assert shape.model_type == family
    check(folder, memories=("50%",))
    for path in folder.glob("*.safetensors"):
        path.unlink()
    assert describe(folder) == replace(shape, has_weights=False)


@pytest.mark.parametrize(
    "case", ["mixtral", "qwen2_moe, window", "gpt_oss", "deepseek_v2, greedy, no q rank", "jamba", "qwen3_next"]
)
def test_solo_twin_of_packed_families(case: str, tmp_path: Path) -> None:
    family, fields = CASES[case]
    check(build_checkpoint(family, tmp_path, seed=4, **fields), batching="solo")


@pytest.mark.parametrize(("family", "fields", "named"), REFUSED)
def test_a_switch_that_cannot_be_honoured_is_refused_by_name(
    family: str, fields: dict[str, Any], named: str, tmp_path: Path
) -> None:
    folder = build_checkpoint(family, tmp_path, **fields)
    with pytest.raises(CheckpointError, match=named):
        build_parts(EngineConfig(model=str(folder), memory="100%"), text=False)


def test_a_precision_that_a_family_does_not_run_in_is_named(tmp_path: Path) -> None:
    """deepseek_v4 keeps its compressor in float32, to which rows in float16 are not widened."""
    folder = build_checkpoint("deepseek_v4", tmp_path)
    with pytest.raises(CheckpointError, match=r"runs in float16.*--dtype bfloat16"):
        build_parts(EngineConfig(model=str(folder), memory="100%", dtype="float16"), text=False)
