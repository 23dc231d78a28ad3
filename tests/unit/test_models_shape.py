"""`describe`: sizes from config and headers, and from a config alone, agree with what a load finds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import build_checkpoint, tiny_config
from tiny_configs import TINY_CONFIGS

from buddymoe_ray.config import EngineConfig
from buddymoe_ray.engine.build import _sampling_defaults
from buddymoe_ray.errors import CheckpointError, UnsupportedModel
from buddymoe_ray.models.load import load_model
from buddymoe_ray.models.shape import ModelShape, describe, experts_per_token, meta_model

TOP_K = {
    "granitemoe": 2,
    "granitemoe_swa": 2,
    "granitemoehybrid": 2,
    "granitemoeshared": 2,
    "gpt_oss": 2,
    "hunyuan_v1_moe": 2,
    "jamba": 2,
    "minimax": 2,
    "minimax_m2": 2,
    "minimax_m3_vl_text": 2,
    "mixtral": 2,
    "phimoe": 2,
    "zaya": 1,
}


@pytest.mark.parametrize("model_type", sorted(TINY_CONFIGS))
def test_headers_config_and_load_agree(model_type: str, tmp_path: Path) -> None:
    folder = build_checkpoint(model_type, tmp_path, dtype=torch.bfloat16)
    shape = describe(folder)
    loaded = load_model(folder)
    assert shape.dense_bytes == loaded.dense_bytes
    assert shape.total_expert_bytes == loaded.layout.total_bytes
    assert shape.slot_bytes == loaded.layout.slot_bytes and shape.slot_tensors == loaded.layout.tensors
    assert (shape.moe_layers, shape.experts_per_layer) == (loaded.layout.layers, loaded.layout.experts_per_layer)
    assert shape.experts_per_token == loaded.experts_per_token == TOP_K.get(model_type, 3)
    assert (shape.expert_dtype, shape.compute_dtype) == ("bfloat16", "bfloat16")
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    assert describe(folder) == replace(shape, has_weights=False)


def test_all_stored_bytes_are_dense_or_expert(tmp_path: Path) -> None:
    folder = build_checkpoint("qwen2_moe", tmp_path)
    meta = meta_model(folder)
    stored = sum(place.nbytes for place in meta.dense.values()) + meta.layout.total_bytes
    header = 8 + int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little")
    assert stored == (folder / "model.safetensors").stat().st_size - header


def test_meta_model_holds_no_weights(tmp_path: Path) -> None:
    meta = meta_model(build_checkpoint("deepseek_v3", tmp_path))
    assert all(p.is_meta for p in meta.model.parameters())


def test_compute_dtype_changes_dense_bytes_alone(tmp_path: Path) -> None:
    folder = build_checkpoint("mixtral", tmp_path, dtype=torch.bfloat16)
    half, full = describe(folder), describe(folder, dtype=torch.float32)
    assert half.total_expert_bytes == full.total_expert_bytes
    assert half.dense_bytes < full.dense_bytes <= 2 * half.dense_bytes


def test_real_shape_from_a_config_alone(tmp_path: Path) -> None:
    config = tiny_config(
        "mixtral", hidden_size=4096, intermediate_size=14336, num_local_experts=8, num_hidden_layers=32
    )
    config.vocab_size, config.num_attention_heads, config.num_key_value_heads = 32000, 32, 8
    config.dtype = torch.bfloat16
    config.save_pretrained(tmp_path)
    shape: ModelShape = describe(tmp_path)
    assert shape.total_expert_bytes == 2 * 32 * 8 * 3 * 4096 * 14336
    assert not shape.has_weights and shape.moe_layers == 32


def test_broken_weights_are_not_mistaken_for_none(tmp_path: Path) -> None:
    folder = build_checkpoint("olmoe", tmp_path)
    (folder / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(CheckpointError, match="whole safetensors file"):
        describe(folder)


def test_dense_and_foreign_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config.json is missing"):
        describe(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    with pytest.raises(UnsupportedModel, match="qwen3"):
        describe(tmp_path)


def test_moe_family_configured_without_experts_is_refused(tmp_path: Path) -> None:
    tiny_config("qwen3_moe", mlp_only_layers=[0, 1, 2]).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match="has no routed experts"):
        describe(tmp_path)


def test_experts_per_token_takes_the_largest_of_a_list() -> None:
    config = tiny_config("hunyuan_v1_moe")
    config.moe_topk = [1, 4, 2]
    assert experts_per_token(config) == 4


def test_sampling_defaults_are_generation_configs(tmp_path: Path) -> None:
    def found(text: str | None, option: str = "auto") -> dict[str, object]:
        if text is not None:
            (tmp_path / "generation_config.json").write_text(text)
        return _sampling_defaults(EngineConfig(generation_config=option), tmp_path)

    assert found(None) == found("{}") == {}
    said = """{"do_sample": true, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0,
              "repetition_penalty": 1.05, "max_new_tokens": 2048, "eos_token_id": [1, 2], "typical_p": null}"""
    assert found(said) == {
        "temperature": 0.6,
        "top_p": 0.95,
        "top_k": 20,
        "min_p": 0.0,
        "repetition_penalty": 1.05,
        "max_tokens": 2048,
    }
    assert found(said, "none") == {}
    assert found('{"top_k": -1}') == {"top_k": 0}
    with pytest.raises(CheckpointError, match=r"generation_config.json cannot be used: top_p is 2.*to none"):
        found('{"top_p": 2}')
    assert found('{"top_p": 2}', "none") == {}
