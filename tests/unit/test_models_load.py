"""Loading: what an engine needs is there, memory holds dense weights only, broken checkpoints are named by key."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import build_checkpoint, stock_logits, stock_model
from safetensors.torch import load_file, save_file, save_model
from slot_oracle import attach_oracle

from buddymoe_ray.errors import CheckpointError, UnsupportedModel
from buddymoe_ray.models import load as load_module
from buddymoe_ray.models.experts_hook import attach
from buddymoe_ray.models.load import auto_dtype, load_model
from buddymoe_ray.models.shape import describe

IDS = torch.arange(3, 30)[None]
Tensors = dict[str, torch.Tensor]


def edit_weights(folder: Path, change: Callable[[Tensors], None]) -> Path:
    """Rewrite model.safetensors after `change` edited its tensors in place."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata={"format": "pt"})
    return folder


def edit_config(folder: Path, **fields: object) -> Path:
    """Change fields of config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return folder


@pytest.fixture
def olmoe(tmp_path: Path) -> Path:
    return build_checkpoint("olmoe", tmp_path / "olmoe")


def test_loaded_model_holds_what_an_engine_needs(olmoe: Path) -> None:
    loaded = load_model(olmoe)
    assert loaded.family.model_type == "olmoe" and loaded.family.packed
    assert (loaded.hidden_size, loaded.vocab_size, loaded.max_positions) == (48, 160, 256)
    assert (loaded.experts_per_token, loaded.eos_token_ids) == (3, frozenset({2}))
    assert loaded.layout.layers == len(loaded.experts) == 3
    assert loaded.layout.experts_per_layer == (8, 8, 8)
    assert loaded.device == torch.device("cpu") and loaded.compute_dtype is torch.float32
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert [m is loaded.model.model.layers[i].mlp.experts for i, m in enumerate(loaded.experts)] == [True] * 3


def test_experts_stay_on_meta_and_all_else_is_real(olmoe: Path) -> None:
    loaded = load_model(olmoe)
    experts = {id(p) for module in loaded.experts for p in module.parameters()}
    assert len(experts) == 6
    for name, parameter in loaded.model.named_parameters():
        assert parameter.is_meta == (id(parameter) in experts), name
    real = {id(p): p for p in [*loaded.model.parameters(), *loaded.model.buffers()] if not p.is_meta}
    assert loaded.dense_bytes == sum(p.nbytes for p in real.values())


def test_dense_weights_are_private_copies(olmoe: Path) -> None:
    loaded = load_model(olmoe)
    before = loaded.model.lm_head.weight.clone()
    (olmoe / "model.safetensors").write_bytes(b"\xff" * (olmoe / "model.safetensors").stat().st_size)
    assert torch.equal(loaded.model.lm_head.weight, before)


def test_slots_are_aligned_and_pieces_fill_them(olmoe: Path) -> None:
    layout = load_model(olmoe).layout
    assert layout.slot_bytes % 64 == 0 and all(t.offset % 64 == 0 for t in layout.tensors)
    assert layout.expert_bytes == sum(t.nbytes for t in layout.tensors) <= layout.slot_bytes
    filled = sorted((t.offset, t.offset + t.nbytes) for t in layout.tensors)
    for pieces in layout.pieces.values():
        runs = sorted((p.slot_offset, p.slot_offset + p.nbytes) for p in pieces)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(runs)), "pieces overlap"
        assert all(any(lo <= a and b <= hi for lo, hi in filled) for a, b in runs)
        assert sum(b - a for a, b in runs) == layout.expert_bytes
    spans = sorted((p.path, p.offset, p.offset + p.nbytes) for pieces in layout.pieces.values() for p in pieces)
    assert all(a[0] != b[0] or a[2] <= b[1] for a, b in itertools.pairwise(spans)), "two experts share bytes"


def test_compute_dtype_can_differ_from_the_stored_one(tmp_path: Path) -> None:
    folder = build_checkpoint("qwen3_moe", tmp_path, dtype=torch.bfloat16)
    assert auto_dtype(folder) is torch.bfloat16
    loaded = load_model(folder, dtype=torch.float32)
    assert loaded.compute_dtype is torch.float32 and loaded.layout.tensors[0].dtype == "bfloat16"
    attach_oracle(loaded)
    with torch.inference_mode():
        got = loaded.model(input_ids=IDS, use_cache=False).logits
    assert got.dtype is torch.float32
    assert torch.equal(got, stock_logits(folder, IDS, dtype=torch.float32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_auto_dtype_is_the_checkpoints(dtype: torch.dtype, tmp_path: Path) -> None:
    assert auto_dtype(build_checkpoint("olmoe", tmp_path, dtype=dtype)) is dtype


def test_auto_dtype_goes_by_bytes_and_without_weights_by_config(tmp_path: Path) -> None:
    folder = build_checkpoint("olmoe", tmp_path, dtype=torch.bfloat16)
    edit_config(folder, dtype="float32")
    assert auto_dtype(folder) is torch.bfloat16
    (folder / "model.safetensors").unlink()
    assert auto_dtype(folder) is torch.float32
    edit_config(folder, dtype=None, torch_dtype="float16")
    assert auto_dtype(folder) is torch.float16


def test_generation_config_decides_the_end_tokens(olmoe: Path) -> None:
    (olmoe / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert load_model(olmoe).eos_token_ids == {7, 9}
    (olmoe / "generation_config.json").unlink()
    assert load_model(olmoe).eos_token_ids == {2}
    edit_config(olmoe, eos_token_id=None)
    assert load_model(olmoe).eos_token_ids == frozenset()


def test_a_block_may_be_replaced_and_is_not_part_of_the_state(olmoe: Path) -> None:
    loaded = load_model(olmoe)
    before = set(loaded.model.state_dict())
    attach(loaded.experts, lambda layer, module: torch.nn.Module())  # a Module must not be registered
    attach(loaded.experts, lambda layer, module: lambda hidden, ids, weights: torch.zeros_like(hidden))
    assert set(loaded.model.state_dict()) == before
    with torch.inference_mode():
        assert torch.isfinite(loaded.model(input_ids=IDS, use_cache=False).logits).all()


def test_forward_without_blocks_says_what_to_do(olmoe: Path) -> None:
    with pytest.raises(AssertionError, match=r"call experts_hook.attach before"):
        load_model(olmoe).model(input_ids=IDS, use_cache=False)


def test_two_models_do_not_share_blocks(olmoe: Path, tmp_path: Path) -> None:
    other = build_checkpoint("olmoe", tmp_path / "other", seed=9)
    first, second = load_model(olmoe), load_model(other)
    attach_oracle(first)
    attach_oracle(second)
    with torch.inference_mode():
        for folder, loaded in ((olmoe, first), (other, second)):
            assert torch.equal(loaded.model(input_ids=IDS, use_cache=False).logits, stock_logits(folder, IDS))


def test_tied_embeddings_are_one_tensor(tmp_path: Path) -> None:
    folder = build_checkpoint("olmoe", tmp_path, tie_word_embeddings=True)
    loaded = load_model(folder)
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
    attach_oracle(loaded)
    with torch.inference_mode():
        assert torch.equal(loaded.model(input_ids=IDS, use_cache=False).logits, stock_logits(folder, IDS))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_dense_weights_that_are_not_finite_are_named(value: float, olmoe: Path) -> None:
    key = "model.layers.1.self_attn.k_proj.weight"
    edit_weights(olmoe, lambda tensors: tensors[key].view(-1)[17].fill_(value))
    with pytest.raises(CheckpointError, match=rf"key '{key}' in .*model\.safetensors has NaN or infinite.*hint"):
        load_model(olmoe)


def test_missing_dense_key_is_named(olmoe: Path) -> None:
    edit_weights(olmoe, lambda tensors: tensors.pop("model.layers.0.mlp.gate.weight"))
    with pytest.raises(
        CheckpointError, match=r"key 'model\.layers\.0\.mlp\.gate\.weight' is missing .*\(1 are\).*hint"
    ):
        load_model(olmoe)


def test_missing_embedding_is_named_even_when_tied(tmp_path: Path) -> None:
    folder = build_checkpoint("olmoe", tmp_path, tie_word_embeddings=True)
    edit_weights(folder, lambda tensors: tensors.pop("model.embed_tokens.weight"))
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight' is missing"):
        load_model(folder)


def test_keys_without_a_parameter_are_left_out_and_named_once(olmoe: Path, caplog: pytest.LogCaptureFixture) -> None:
    more = {f"model.layers.{layer}.mystery.weight": torch.ones(2) for layer in range(12)}
    edit_weights(olmoe, lambda tensors: tensors.update(more))
    loaded = load_model(olmoe)
    [said] = [r.getMessage() for r in caplog.records if r.name.startswith("buddymoe_ray")]
    assert "12 keys are no parameters of OlmoeForCausalLM" in said and "model.layers.0.mystery.weight, " in said
    attach_oracle(loaded)
    with torch.inference_mode():
        assert torch.equal(loaded.model(input_ids=IDS, use_cache=False).logits, stock_logits(olmoe, IDS))


@pytest.mark.parametrize("model_type", ["deepseek_v3", "glm4_moe", "olmoe", "qwen3_next"])
def test_layers_beyond_the_configs_are_left_out(model_type: str, tmp_path: Path) -> None:
    folder = build_checkpoint(model_type, tmp_path)
    layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    last, beyond = f".layers.{layers - 1}.", f".layers.{layers}."

    def predict(tensors: Tensors) -> None:  # a layer that predicts one token more, as releases store it
        tensors |= {key.replace(last, beyond): t.clone() for key, t in tensors.items() if last in key}
        tensors[f"model{beyond}eh_proj.weight"] = torch.zeros(48, 96)

    loaded = load_model(edit_weights(folder, predict))
    attach_oracle(loaded)
    with torch.inference_mode():
        assert torch.equal(loaded.model(input_ids=IDS, use_cache=False).logits, stock_logits(folder, IDS))


@pytest.mark.parametrize("stored", ["lm_head.weight", "model.embed_tokens.weight"])
@pytest.mark.parametrize("model_type", ["olmoe", "ernie4_5_moe", "lfm2_moe"])
def test_either_of_two_tied_tensors_is_enough(stored: str, model_type: str, tmp_path: Path) -> None:
    folder = build_checkpoint(model_type, tmp_path, tie_word_embeddings=True)

    def rename(tensors: Tensors) -> None:
        [held] = [key for key in tensors if key in ("lm_head.weight", "model.embed_tokens.weight")]
        tensors[stored] = tensors.pop(held)

    loaded = load_model(edit_weights(folder, rename))
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
    assert loaded.dense_bytes == describe(folder).dense_bytes
    attach_oracle(loaded)
    with torch.inference_mode():
        assert torch.equal(loaded.model(input_ids=IDS, use_cache=False).logits, stock_logits(folder, IDS))


@pytest.mark.parametrize("tied", [True, False])
def test_save_model_of_safetensors_loads(tied: bool, tmp_path: Path) -> None:
    folder = build_checkpoint("mixtral", tmp_path, tie_word_embeddings=tied)
    save_model(stock_model("mixtral", tie_word_embeddings=tied), str(folder / "model.safetensors"))
    keys = load_file(folder / "model.safetensors").keys()
    assert any(key.endswith("experts.gate_up_proj") for key in keys)
    assert ("model.embed_tokens.weight" in keys) is not tied, "it keeps the first of two names"
    loaded = load_model(folder)
    attach_oracle(loaded)
    with torch.inference_mode():
        got = loaded.model(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(got, stock_logits(folder, IDS), atol=1e-5, rtol=1e-5)  # its tensors lie unaligned


NONSENSE = {
    "olmoe": [
        *(("num_experts_per_tok", value) for value in (0, -1, 9, "2", True, [2])),
        *(("num_experts", value) for value in (0, -3)),
        *(("num_hidden_layers", value) for value in (0, -2)),
        *(("hidden_size", value) for value in (0, -48)),
        *(("vocab_size", value) for value in (0, -1)),
        *(("eos_token_id", value) for value in ([[2]], "2", ["2"], 2.5, {"a": 1}, True)),
        *(("num_attention_heads", 0), ("num_key_value_heads", -2), ("max_position_embeddings", 0)),
        *(("sliding_window", value) for value in (0, 1, "4")),
        *(("hidden_act", "nope"), ("rope_parameters", {"rope_type": "nope"})),
        *(("rope_parameters", {"rope_type": "linear", "factor": "2"}), ("rope_parameters", {"rope_theta": 0})),
    ],
    "deepseek_v3": [("n_group", 0), ("n_group", 3), ("topk_group", 9), ("num_experts_per_tok", None)],
    "ernie4_5_moe": [("moe_k", 0), ("moe_num_experts", 0)],
    "hunyuan_v1_moe": [("moe_topk", [2, 0, 2]), ("moe_topk", 7)],
}


@pytest.mark.parametrize("model_type", NONSENSE)
def test_nonsense_in_a_config_is_named(model_type: str, tmp_path: Path) -> None:
    folder = build_checkpoint(model_type, tmp_path)
    good, generation = (folder / "config.json").read_text(), folder / "generation_config.json"
    generation.unlink()
    for field, value in NONSENSE[model_type]:
        (folder / "config.json").write_text(good)
        name = next((key for key in value if key != "rope_type"), "rope_type") if field == "rope_parameters" else field
        with pytest.raises(CheckpointError, match=name):
            load_model(edit_config(folder, **{field: value}))
        if field == "eos_token_id":
            (folder / "config.json").write_text(good)
            generation.write_text(json.dumps({field: value}))
            with pytest.raises(CheckpointError, match=r"eos_token_id in .*generation_config"):
                load_model(folder)
            generation.unlink()


def test_dense_weight_of_another_shape_is_named(olmoe: Path) -> None:
    edit_weights(olmoe, lambda tensors: tensors.update({"model.norm.weight": torch.ones(49)}))
    with pytest.raises(CheckpointError, match=r"'model\.norm\.weight' .* shape \(49,\), must be \(48,\)"):
        load_model(olmoe)


def test_config_of_another_model_is_refused(olmoe: Path) -> None:
    with pytest.raises(CheckpointError, match=r"must be .* as config.json says"):
        load_model(edit_config(olmoe, intermediate_size=32))


@pytest.mark.parametrize("part", ["gate_proj", "up_proj", "down_proj"])
def test_missing_part_of_an_expert_is_named(part: str, olmoe: Path) -> None:
    edit_weights(olmoe, lambda tensors: tensors.pop(f"model.layers.2.mlp.experts.5.{part}.weight"))
    with pytest.raises(CheckpointError, match=r"part \d of expert 5 of model\.layers\.2\.mlp\.experts"):
        load_model(olmoe)


def test_layer_without_experts_is_named(olmoe: Path) -> None:
    def drop(tensors: Tensors) -> None:
        for key in [k for k in tensors if k.startswith("model.layers.1.mlp.experts.")]:
            del tensors[key]

    with pytest.raises(
        CheckpointError, match=r"no key of the checkpoint fills model\.layers\.1\.mlp\.experts\.gate_up_proj"
    ):
        load_model(edit_weights(olmoe, drop))


def test_expert_that_the_config_lacks_is_named(olmoe: Path) -> None:
    key = "model.layers.0.mlp.experts.8.up_proj.weight"
    edit_weights(olmoe, lambda tensors: tensors.update({key: torch.ones(24, 48)}))
    with pytest.raises(CheckpointError, match=rf"{key}' is of an expert that config\.json lacks"):
        load_model(olmoe)


def test_expert_of_another_shape_is_named(olmoe: Path) -> None:
    key = "model.layers.0.mlp.experts.3.up_proj.weight"
    edit_weights(olmoe, lambda tensors: tensors.update({key: torch.ones(24, 47)}))
    with pytest.raises(CheckpointError, match=rf"{key}' .* shape \(24, 47\), must be \(24, 48\)"):
        load_model(olmoe)
    edit_weights(olmoe, lambda tensors: tensors.update({key: torch.ones(23, 48)}))
    with pytest.raises(CheckpointError, match="have 47 rows, must be 48"):
        load_model(olmoe)


def test_experts_in_two_dtypes_are_refused(olmoe: Path) -> None:
    key = "model.layers.1.mlp.experts.0.up_proj.weight"
    edit_weights(olmoe, lambda tensors: tensors.update({key: tensors[key].bfloat16()}))
    with pytest.raises(UnsupportedModel, match=rf"{key}' .* is bfloat16, must be float32"):
        load_model(olmoe)


def test_quantised_experts_are_refused_even_without_a_quantization_config(olmoe: Path) -> None:
    key = "model.layers.0.mlp.experts.0.gate_proj.weight"
    edit_weights(olmoe, lambda tensors: tensors.update({key: tensors[key].to(torch.float8_e4m3fn)}))
    with pytest.raises(UnsupportedModel, match=rf"{key}' .* stored as float8_e4m3fn, must be one of bfloat16"):
        load_model(olmoe)


def test_fused_stack_and_single_expert_for_the_same_bytes_are_refused(olmoe: Path) -> None:
    key = "model.layers.0.mlp.experts.gate_up_proj"
    edit_weights(olmoe, lambda tensors: tensors.update({key: torch.ones(8, 48, 48)}))
    with pytest.raises(CheckpointError, match=r"both fill model\.layers\.0\.mlp\.experts\.gate_up_proj"):
        load_model(olmoe)


def test_fused_stack_of_another_shape_is_named(tmp_path: Path) -> None:
    folder = build_checkpoint("gpt_oss", tmp_path)
    key = "model.layers.0.mlp.experts.down_proj_bias"
    edit_weights(folder, lambda tensors: tensors.update({key: torch.ones(5, 48)}))
    with pytest.raises(CheckpointError, match=rf"{key}' .* shape \(5, 48\), must be \(6, 48\)"):
        load_model(folder)


def test_truncated_file_is_refused_before_anything_loads(olmoe: Path) -> None:
    path = olmoe / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="it is truncated"):
        load_model(olmoe)


def test_a_checkpoint_that_is_written_while_it_loads_is_refused(olmoe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dense(*args: object, **options: object) -> None:
        load(*args, **options)
        path = olmoe / "model.safetensors"
        path.write_bytes(path.read_bytes())

    load = load_module.load_dense
    monkeypatch.setattr(load_module, "load_dense", load_dense)
    with pytest.raises(CheckpointError, match="was written while it was loaded"):
        load_model(olmoe)


def test_unsupported_family_and_broken_config_are_refused(olmoe: Path) -> None:
    with pytest.raises(UnsupportedModel, match="llama"):
        load_model(edit_config(olmoe, model_type="llama"))
    edit_config(olmoe, model_type="olmoe", num_experts_per_tok="three")
    with pytest.raises(CheckpointError, match=r"config\.json is refused by transformers"):
        load_model(olmoe)
    (olmoe / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        load_model(olmoe)


def test_config_that_asks_for_its_own_code_runs_none_of_it(olmoe: Path) -> None:
    edit_config(olmoe, auto_map={"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.Evil"})
    (olmoe / "evil.py").write_text("raise SystemExit('ran')")
    loaded = load_model(olmoe)
    assert type(loaded.model).__module__.startswith("transformers.models.olmoe")
