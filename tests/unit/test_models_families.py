"""Every family: experts served from shuffled slots give logits bit-equal to stock transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import build_checkpoint, stock_logits
from families_table import unserved
from slot_oracle import attach_oracle
from tiny_configs import THOROUGH, TINY_CONFIGS
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from buddymoe_ray.errors import ConfigError, UnsupportedModel
from buddymoe_ray.models.families import FAMILIES, family_of, text_part
from buddymoe_ray.models.load import load_model

IDS = torch.randint(3, 160, (2, 40), generator=torch.Generator().manual_seed(5))


def test_every_family_of_the_table_has_a_checkpoint_here() -> None:
    assert set(FAMILIES) == set(TINY_CONFIGS)


@pytest.mark.parametrize("model_type", THOROUGH)
def test_logits_are_bit_equal_to_stock(model_type: str, tmp_path: Path) -> None:
    folder = build_checkpoint(model_type, tmp_path)
    loaded = load_model(folder)
    attach_oracle(loaded, seed=1)
    with torch.inference_mode():
        got = loaded.model(input_ids=IDS, use_cache=False).logits
    want = stock_logits(folder, IDS)
    assert torch.isfinite(want).all()
    assert want.std() > 0.1, "a constant model would prove nothing"
    assert torch.equal(got, want)


@pytest.mark.parametrize("model_type", THOROUGH)
def test_bfloat16_in_many_shards_is_bit_equal_to_stock(model_type: str, tmp_path: Path) -> None:
    folder = build_checkpoint(model_type, tmp_path, dtype=torch.bfloat16, seed=2, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    loaded = load_model(folder)
    assert loaded.compute_dtype is torch.bfloat16
    attach_oracle(loaded, seed=2)
    with torch.inference_mode():
        got = loaded.model(input_ids=IDS, use_cache=False).logits
    assert got.dtype is torch.bfloat16
    assert torch.equal(got, stock_logits(folder, IDS, dtype=torch.bfloat16))


@pytest.mark.parametrize("model_type", THOROUGH)
def test_generate_on_the_models_own_cache_agrees(model_type: str, tmp_path: Path) -> None:
    folder = build_checkpoint(model_type, tmp_path, seed=3)
    loaded = load_model(folder)
    attach_oracle(loaded)
    stock = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager").eval()
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    mask = torch.ones_like(IDS[:1])
    got = loaded.model.generate(IDS[:1], attention_mask=mask, **options)
    assert torch.equal(got, stock.generate(IDS[:1], attention_mask=mask, **options))


@pytest.mark.parametrize("model_type", THOROUGH)
def test_a_registered_attention_is_called_without_a_mask(model_type: str, tmp_path: Path) -> None:
    seen: list[tuple[int, bool]] = []

    def spy(
        module: torch.nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: object, **rest: object
    ) -> object:
        seen.append((module.layer_idx, mask is None))
        return sdpa_attention_forward(module, q, k, v, mask, **rest)

    AttentionInterface.register("spy_attention", spy)
    loaded = load_model(build_checkpoint(model_type, tmp_path), attn="spy_attention")
    attach_oracle(loaded)
    with torch.inference_mode():
        loaded.model(input_ids=IDS[:1], use_cache=False, logits_to_keep=1)
    kinds = getattr(loaded.config, "layer_types", None) or []
    attending = {
        "jamba": [2],
        "lfm2_moe": [i for i, kind in enumerate(kinds) if kind == "full_attention"],
        "minimax": [1],
        "qwen3_next": [3],
    }.get(model_type, list(range(loaded.config.num_hidden_layers)))
    assert seen == [(layer, True) for layer in attending]


@pytest.mark.parametrize(
    ("model_type", "attn"), [("olmoe", None), ("olmoe", "eager"), ("olmoe", "sdpa"), ("gpt_oss", "eager")]
)
def test_attention_implementation_is_the_one_asked_for(model_type: str, attn: str | None, tmp_path: Path) -> None:
    folder = build_checkpoint(model_type, tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation=attn, experts_implementation="eager"
    ).eval()
    loaded = load_model(folder, attn=attn)
    assert loaded.config._attn_implementation == (attn or "sdpa")
    attach_oracle(loaded)
    with torch.inference_mode():
        got = loaded.model(input_ids=IDS, use_cache=False).logits
        want = stock(input_ids=IDS, use_cache=False).logits
    assert torch.equal(got, want)


def test_attention_that_a_family_cannot_use_is_refused(tmp_path: Path) -> None:
    folder = build_checkpoint("gpt_oss", tmp_path)
    for attn in ("sdpa", "no_such_attention"):
        with pytest.raises(ConfigError, match=f"attention is '{attn}', must be one that gpt_oss supports.*hint"):
            load_model(folder, attn=attn)


@pytest.mark.parametrize("scaling", ["dynamic", "longrope"])
def test_rope_that_follows_the_longest_row_is_not_packed(scaling: str, tmp_path: Path) -> None:
    rope = {"rope_type": scaling, "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 64}
    if scaling == "longrope":
        rope |= {"short_factor": [1.0] * 6, "long_factor": [2.0] * 6, "short_mscale": 1.0, "long_mscale": 1.1}
    model_type = "phimoe" if scaling == "longrope" else "olmoe"
    folder = build_checkpoint(model_type, tmp_path, rope_parameters=rope)
    loaded = load_model(folder)
    assert FAMILIES[model_type].packed and not loaded.family.packed
    attach_oracle(loaded)
    with torch.inference_mode():
        assert torch.equal(loaded.model(input_ids=IDS, use_cache=False).logits, stock_logits(folder, IDS))


def test_unknown_families_are_refused_with_the_list() -> None:
    with pytest.raises(UnsupportedModel, match=r"model_type 'llama', must be one of afmoe, .*olmoe.*hint"):
        family_of({"model_type": "llama"}, "config.json")
    with pytest.raises(UnsupportedModel, match="None"):
        family_of({}, "config.json")


def test_the_text_part_of_a_config_is_told_what_holds_for_all() -> None:
    plain = {"model_type": "olmoe", "text_config": {"model_type": "mixtral"}}
    assert text_part(plain) is plain
    text = {"model_type": "kimi_k2", "quantization_config": {"quant_method": "fp8"}}
    whole = {"model_type": "kimi_k25", "dtype": "bfloat16", "quantization_config": "outer", "text_config": text}
    assert text_part(whole) == {**text, "dtype": "bfloat16", "model_type": "deepseek_v3"}
    assert family_of(whole, "config.json") is FAMILIES["deepseek_v3"]
    with pytest.raises(UnsupportedModel, match="model_type 'mistral'"):
        family_of({"model_type": "mistral3", "text_config": {"model_type": "mistral"}}, "config.json")


def test_what_the_table_calls_refused_is_refused_by_name() -> None:
    names = unserved()
    assert {"inkling", "qwen3_vl_moe"} <= set(names)
    for name in names:
        with pytest.raises(UnsupportedModel, match=f"model_type '{name}'"):
            family_of({"model_type": name, "text_config": {"model_type": f"{name}_text"}}, "config.json")


def test_encoder_decoders_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="encoder-decoder"):
        family_of({"model_type": "switch_transformers", "is_encoder_decoder": True}, "config.json")
