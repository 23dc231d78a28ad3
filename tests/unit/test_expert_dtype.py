"""Experts in another precision: the bytes are what the format says, and exact stays exact at every budget."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
import torch
from families import build_checkpoint

from buddymoe_ray import LLM
from buddymoe_ray.config import EngineConfig
from buddymoe_ray.engine.build import build_parts
from buddymoe_ray.errors import ConfigError
from buddymoe_ray.kernels import LowbitFormat
from buddymoe_ray.models.expert_dtype import format_of, recoded_layout
from buddymoe_ray.models.load import load_model
from buddymoe_ray.moe import OneByOne, OneCall, Phase

PROMPTS = ["def add(a, b):\n", "import os\n", "The following example"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """For experts alone: machine code that is made for a folder of this test's is made in vain."""
    monkeypatch.setattr("buddymoe_ray.models.expert_dtype.cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache"


def tokens(memory: str, expert_dtype: str, model: str = "builtin:tiny") -> list[tuple[int, ...]]:
    with LLM(model, memory=memory, expert_dtype=expert_dtype) as llm:
        return [r.token_ids for r in llm.generate(PROMPTS, max_tokens=16)]


@pytest.mark.parametrize("expert_dtype", ["int8", "int4"])
def test_tokens_are_the_same_at_every_budget(expert_dtype: str) -> None:
    expected = tokens("100%", expert_dtype)
    assert tokens("25%", expert_dtype) == tokens("40%", expert_dtype) == expected


def test_int8_hardly_differs_from_the_checkpoint_and_bf16_not_at_all() -> None:
    native = tokens("100%", "native")
    assert tokens("50%", "bf16") == native
    same = sum(a == b for a, b in zip(tokens("50%", "int8"), native, strict=True))
    assert same >= 2


def test_the_copy_is_made_once_and_half_as_large(own_cache: Path) -> None:
    from buddymoe_ray.models.resolve import resolve_model

    folder = resolve_model("builtin:tiny")
    layout = load_model(folder).layout
    seen: list[int] = []

    def watch(items, *, total, desc):  # type: ignore[no-untyped-def]
        seen.append(total)
        return items

    int8 = recoded_layout(layout, folder, "int8", transposed=False, progress=watch)
    again = recoded_layout(layout, folder, "int8", transposed=False, progress=watch)
    assert seen == [128] and again == int8
    assert 0.51 < int8.total_bytes / layout.total_bytes < 0.53
    assert all(str(own_cache) in p.path for pieces in int8.pieces.values() for p in pieces)
    assert recoded_layout(layout, folder, "native", transposed=False) is layout


def test_a_float32_checkpoint_can_be_served_in_bf16(tmp_path: Path) -> None:
    build_checkpoint("gpt_oss", tmp_path / "m")
    loaded = load_model(tmp_path / "m")
    layout = recoded_layout(loaded.layout, tmp_path / "m", "bf16", transposed=True)
    stored = {t.name: t.dtype for t in loaded.layout.tensors}
    assert {t.dtype for t in layout.tensors} == {"bfloat16"} and set(stored) == {t.name for t in layout.tensors}


@pytest.mark.parametrize("family", ["gpt_oss", "mixtral"])
def test_transposed_and_biased_experts(family: str, tmp_path: Path) -> None:
    """int8 against native logits, for matrices stored [in, out] with biases and for plain ones."""
    build_checkpoint(family, tmp_path / family)
    answers = {}
    for expert_dtype in ("native", "int8"):
        with LLM(str(tmp_path / family), memory="100%", expert_dtype=expert_dtype, dtype="float32") as llm:
            result = llm.generate([[5, 9, 30, 77, 12]], max_tokens=1, logprobs=5)[0]
            answers[expert_dtype] = dict(result.logprobs[0].top)
    shared = set(answers["native"]) & set(answers["int8"])
    assert len(shared) >= 4
    assert max(abs(answers["native"][t] - answers["int8"][t]) for t in shared) < 0.1


def test_formats_by_name() -> None:
    assert format_of("int8") == LowbitFormat(bits=8) and format_of("int4") == LowbitFormat(bits=4)
    assert format_of("native") is None and format_of("bf16") is None
    with pytest.raises(ConfigError, match="expert_dtype is 'fp8'"):
        LLM("builtin:tiny", expert_dtype="fp8")


def test_records_hold_what_was_rounded(tmp_path: Path) -> None:
    from buddymoe_ray.cache import DiskReader, slot_views
    from buddymoe_ray.kernels import dequantise, packed_parts
    from buddymoe_ray.models.resolve import resolve_model
    from buddymoe_ray.types import ExpertKey

    folder = resolve_model("builtin:tiny")
    native = load_model(folder).layout
    int8 = recoded_layout(native, folder, "int8", transposed=False)
    reader, key = DiskReader(), ExpertKey(2, 17)
    views = []
    for layout in (native, int8):
        slot = torch.empty(layout.slot_bytes, dtype=torch.uint8)
        reader.submit(layout.pieces[key], slot.numpy()).wait()
        views.append(slot_views(slot, layout))
    reader.close()
    for name in ("gate_up_proj", "down_proj"):
        wide = views[0][name].float()
        error = (dequantise(packed_parts(views[1], name), LowbitFormat(bits=8)) - wide).abs()
        assert 0 < float(error.max()) < 0.02 * float(wide.abs().max()), "clipping and half a step at most"
        assert float(error.mean()) < 0.01 * float(wide.abs().mean())


def test_a_wave_in_one_call_is_its_experts_one_by_one() -> None:
    """The same bits, in float32, whoever else is in the wave."""
    rng = torch.Generator().manual_seed(0)
    parts = build_parts(EngineConfig(memory="40%", expert_dtype="int4"), text=False)
    with closing(parts.experts) as tier:
        block = tier.blocks[1]
        assert isinstance(block._compute, OneCall)
        hidden = torch.randn(7, parts.loaded.hidden_size, generator=rng)
        ids = torch.stack([torch.randperm(32, generator=rng)[:4] for _ in hidden])
        weights = torch.rand(7, 4, generator=rng)
        parts.step.begin(Phase.PREFILL, 7)
        together = block(hidden, ids, weights)
        block._compute = OneByOne(tier.new_compute()[1])
        assert torch.equal(block(hidden, ids, weights), together)
