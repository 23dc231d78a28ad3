"""Quantised checkpoints served as stored: tokens of the model that the codes mean, bytes of the files, and what is
refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from coded_checkpoints import edit, quantised
from safetensors.torch import load_file, save_file
from torch import Tensor

from buddymoe_ray import LLM
from buddymoe_ray.cache import DiskReader, slot_views
from buddymoe_ray.cli import main
from buddymoe_ray.errors import CheckpointError, UnsupportedModel
from buddymoe_ray.kernels import plain_weights
from buddymoe_ray.models.coded_linear import CodedLinear
from buddymoe_ray.models.dense_dtype import PackedLinear
from buddymoe_ray.models.load import load_model, on_kernels
from buddymoe_ray.models.reference import reference_generate
from buddymoe_ray.models.schemes import check_method
from buddymoe_ray.models.shape import auto_dtype, describe
from buddymoe_ray.models.tensor_index import read_index
from buddymoe_ray.types import ExpertKey

PROMPTS = [torch.randint(5, 160, (3 + 7 * i,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(4)]
NEW = 20
UNREAD = ("weight_shape", "g_idx", "input_scale", "input_global_scale")
WIDER = {"n_routed_experts": 16}  # so that a quarter of the experts has room for two
MX = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32}
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("qwen3_moe", "fp8", {}),
    ("deepseek_v3", "fp8", {}),
    ("mixtral", "fp8-tensor", {}),
    ("olmoe", "ct-fp8", {}),
    ("deepseek_v3", "ct-int8", WIDER),
    ("qwen3_moe", "ct-int8", {}),
    ("mixtral", "ct-int4", {}),
    ("olmoe", "ct-int4", {}),
    ("olmoe", "ct-int4-zeros", {}),
    ("deepseek_v3", "ct-int4-zeros", WIDER),
    ("mixtral", "gptq", {}),
    ("qwen3_moe", "gptq", {}),
    ("qwen2_moe", "auto-round", {}),
    ("olmoe", "awq", {}),
    ("deepseek_v3", "awq", WIDER | {"v_head_dim": 16}),
    ("qwen3_moe", "modelopt-nvfp4", {}),
    ("deepseek_v3", "modelopt-nvfp4", WIDER),
    ("mixtral", "ct-nvfp4", {}),
    ("olmoe", "ct-nvfp4", {}),
    ("olmoe", "modelopt-fp8", {}),
    ("mixtral", "modelopt-fp8-channel", {}),
    ("qwen3_moe", "ct-mxfp4", MX),
    ("deepseek_v3", "ct-mxfp4", MX | {"q_lora_rank": 32, "kv_lora_rank": 32, "v_head_dim": 16}),
    ("mixtral", "ct-mxfp8", {}),
    ("olmoe", "modelopt-mxfp8", {}),
    ("qwen3_moe", "fp8-experts-fp4", MX),
    ("gpt_oss", "mxfp4", {"hidden_size": 64}),
    ("gpt_oss", "mxfp4", {"hidden_size": 96, "intermediate_size": 64, "num_local_experts": 8}),
]


CODED = [
    ("olmoe", "fp8"),
    ("mixtral", "ct-int4-zeros"),
    ("qwen3_moe", "gptq"),
    ("olmoe", "awq"),
    ("qwen3_moe", "modelopt-nvfp4"),
]
CODED += [("mixtral", "ct-nvfp4"), ("gpt_oss", "mxfp4"), ("mixtral", "ct-mxfp8"), ("qwen3_moe", "fp8-experts-fp4")]


def generated(folder: Path, memory: str = "50%", **options: Any) -> list[list[int]]:
    with LLM(str(folder), memory=memory, dtype="float32", max_running=4, **options) as llm:
        results = llm.generate(PROMPTS, max_tokens=NEW)
        llm.engine.cache.check_integrity()
        assert (llm.engine.snapshot().misses == 0) == (memory == "100%")
    return [list(result.token_ids) for result in results]


@pytest.mark.parametrize(("family", "scheme", "overrides"), CASES, ids=lambda value: str(value) if value else "")
def test_tokens_are_those_of_code_times_scale(
    tmp_path: Path, family: str, scheme: str, overrides: dict[str, Any]
) -> None:
    coded, plain = quantised(family, scheme, tmp_path, **overrides)
    expected = reference_generate(plain, PROMPTS, new_tokens=NEW)
    for memory in ("100%", "50%", "25%"):
        assert generated(coded, memory) == expected, memory


@pytest.mark.parametrize(
    ("family", "scheme"),
    [
        ("deepseek_v32", "fp8"),  # computes some of its linear layers in float32, whatever the rest does
        ("hy_v4", "ct-int4"),  # asks linear layers for their dtype
        ("jamba", "ct-fp8"),  # multiplies by a linear layer's weight without it
        ("kimi_k25", "ct-int4"),  # more than text
        ("qwen3_5_moe_text", "fp8"),
    ],
)
def test_tokens_of_other_kinds_of_model_are_those_too(tmp_path: Path, family: str, scheme: str) -> None:
    coded, plain = quantised(family, scheme, tmp_path)
    [prompt], new = PROMPTS[1:2], 8
    with LLM(str(coded), memory="90%", dtype="float32") as llm:
        [answer] = llm.generate([prompt], max_tokens=new)
    assert [list(answer.token_ids)] == reference_generate(plain, [prompt], new_tokens=new)


def test_deepseek_v4_says_beside_it_how_experts_are_stored(tmp_path: Path) -> None:
    """As released: FP4 experts, everything else fp8, scales that are powers of two, keys without `model.`."""
    sizes = {"hidden_size": 64, "moe_intermediate_size": 32, "n_routed_experts": 16}
    coded, plain = quantised("deepseek_v4", "fp8-experts-fp4", tmp_path, **sizes)
    config = json.loads((coded / "config.json").read_text())
    config["expert_dtype"] = config["quantization_config"].pop("expert_dtype")
    (coded / "config.json").write_text(json.dumps(config))
    released = {key.removeprefix("model."): tensor for key, tensor in load_file(coded / "model.safetensors").items()}
    assert {str(t.dtype) for k, t in released.items() if k.endswith(".scale")} == {"torch.float8_e8m0fnu"}
    save_file(released, coded / "model.safetensors", {"format": "pt"})
    [prompt], new = PROMPTS[1:2], 8
    with LLM(str(coded), memory="60%", dtype="float32") as llm:
        [answer] = llm.generate([prompt], max_tokens=new)
    assert [list(answer.token_ids)] == reference_generate(plain, [prompt], new_tokens=new)


def test_what_older_releases_say_in_a_file_of_its_own(tmp_path: Path) -> None:
    coded, plain = quantised("qwen3_moe", "modelopt-nvfp4", tmp_path)
    config = json.loads((coded / "config.json").read_text())
    said = {name: value for name, value in config.pop("quantization_config").items() if name != "quant_method"}
    (coded / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match=r"stored as (uint8|float8)"):
        load_model(coded)
    (coded / "hf_quant_config.json").write_text(json.dumps({"quantization": said}))
    assert generated(coded) == reference_generate(plain, PROMPTS, new_tokens=NEW)


@pytest.mark.parametrize("scheme", ["gptq", "ct-int4", "mxfp4"])
def test_codes_without_a_word_of_how_they_are_stored_are_refused(tmp_path: Path, scheme: str) -> None:
    family, sizes = ("gpt_oss", {"hidden_size": 64}) if scheme == "mxfp4" else ("olmoe", {})
    coded, plain = quantised(family, scheme, tmp_path, **sizes)
    config = json.loads((coded / "config.json").read_text())
    said = config.pop("quantization_config")
    (coded / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match=r"stored as (uint8|int32), must be .* what quantization_config names"):
        load_model(coded)
    if scheme == "gptq":  # AutoGPTQ's own file
        (coded / "quantize_config.json").write_text(json.dumps({k: v for k, v in said.items() if k != "quant_method"}))
        assert generated(coded) == reference_generate(plain, PROMPTS, new_tokens=NEW)


def test_what_older_releases_say_under_another_name(tmp_path: Path) -> None:
    coded, plain = quantised("qwen3_moe", "ct-int8", tmp_path)
    config = json.loads((coded / "config.json").read_text())
    said = config.pop("quantization_config")
    (coded / "config.json").write_text(json.dumps(config))
    edit(coded, lambda t: t.update({k: v for k, v in load_file(plain / "model.safetensors").items() if "experts" in k}))
    with pytest.raises(UnsupportedModel, match=r"self_attn.*stored as int8, must be .* what quantization_config names"):
        load_model(coded)
    (coded / "config.json").write_text(json.dumps({**config, "compression_config": said}))
    assert auto_dtype(coded) is torch.float32 and load_model(coded).layout.coded == ()


@pytest.mark.parametrize(("family", "scheme"), CODED)
def test_slots_hold_the_bytes_of_the_files(tmp_path: Path, family: str, scheme: str) -> None:
    coded, plain = quantised(family, scheme, tmp_path, **(MX if "fp4" in scheme else {}))
    stored = {key: place for key, place in read_index(coded).items() if ".experts." in key}
    unread = sum(place.nbytes for key, place in stored.items() if key.endswith(UNREAD))
    loaded = load_model(coded, dtype=torch.float32)
    layout = loaded.layout
    assert layout.total_bytes == sum(place.nbytes for place in stored.values()) - unread
    assert layout.total_bytes < 0.6 * load_model(plain).layout.total_bytes
    runs = sorted((p.path, p.offset, p.nbytes) for pieces in layout.pieces.values() for p in pieces)
    assert all(a[1] + a[2] <= b[1] for a, b in pairwise(runs)), "no byte is in two slots"
    wide, reader = load_model(plain, dtype=torch.float32), DiskReader()
    for key in (ExpertKey(0, 1), ExpertKey(2, 4)):
        views = []
        for each in (layout, wide.layout):
            slot = torch.empty(each.slot_bytes, dtype=torch.uint8)
            reader.submit(each.pieces[key], slot.numpy()).wait()
            views.append(plain_weights(slot_views(slot, each), each.coded))
        for name, tensor in views[1].items():
            same = tensor.T if loaded.experts[0].is_transposed and tensor.ndim == 2 else tensor
            assert torch.equal(views[0][name].float(), same)
    reader.close()


@pytest.mark.parametrize(
    ("scheme", "scale"), [("fp8", "scale_inv"), ("modelopt-nvfp4", "scale_2"), ("ct-nvfp4", "global_scale")]
)
def test_a_wrong_scale_changes_tokens(tmp_path: Path, scheme: str, scale: str) -> None:
    coded, plain = quantised("qwen3_moe", scheme, tmp_path)
    expected = reference_generate(plain, PROMPTS, new_tokens=NEW)
    for key in ("model.layers.1.mlp.experts.3.up_proj", "model.layers.1.self_attn.o_proj"):
        edit(coded, lambda tensors, key=key: tensors[f"{key}.weight_{scale}"].mul_(8))
        assert generated(coded) != expected
        edit(coded, lambda tensors, key=key: tensors[f"{key}.weight_{scale}"].div_(8))
    assert generated(coded) == expected


def test_dense_weights_stay_as_stored_and_plans_count_them(tmp_path: Path) -> None:
    coded, plain = quantised("deepseek_v3", "fp8", tmp_path)
    loaded = on_kernels(load_model(coded), "native")
    kept = {name: module for name, module in loaded.model.named_modules() if isinstance(module, CodedLinear)}
    assert {name.rsplit(".", 1)[1] for name in kept} >= {"q_a_proj", "kv_a_proj_with_mqa", "o_proj", "down_proj"}
    assert not any("lm_head" in name or ".gate" in name.removesuffix("gate_proj") for name in kept)
    shape = describe(coded)
    assert shape.dense_bytes == loaded.dense_bytes < 0.6 * load_model(plain).dense_bytes
    assert (shape.expert_dtype, shape.dense_format, shape.as_stored) == ("fp8/16x32", "fp8/16x32", True)
    assert shape.total_expert_bytes == loaded.layout.total_bytes
    elsewhere = describe(coded, on_cpu=False)
    assert elsewhere.dense_bytes == load_model(plain, dtype=loaded.compute_dtype).dense_bytes
    x = torch.randn(5, 48).to(loaded.compute_dtype)
    for name, linear in kept.items():
        if linear.in_features == 48:
            weight = load_model(plain).model.get_submodule(name).weight.float()
            torch.testing.assert_close(linear(x).float(), x.float() @ weight.T, rtol=2e-2, atol=2e-2)


def test_they_can_be_served_in_another_precision(tmp_path: Path) -> None:
    coded, plain = quantised("olmoe", "fp8", tmp_path)
    assert generated(coded, expert_dtype="bf16") == generated(plain, expert_dtype="bf16")
    options = {"expert_dtype": "int8", "dense_dtype": "int8"}
    assert generated(coded, **options) == generated(plain, **options)
    model = on_kernels(load_model(coded), "int4").model
    assert not any(isinstance(module, CodedLinear) for module in model.modules())
    assert any(isinstance(module, PackedLinear) for module in model.modules())
    assert describe(coded, dense_dtype="int4").dense_bytes == on_kernels(load_model(coded), "int4").dense_bytes


@pytest.mark.parametrize(("family", "scheme"), CODED[1:])
def test_without_kernels_the_same_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, scheme: str
) -> None:
    coded, plain = quantised(family, scheme, tmp_path, **(MX if "fp4" in scheme else {}))
    for where in ("kernels.expert_layer", "models.shape"):
        monkeypatch.setattr(f"buddymoe_ray.{where}.decodes", lambda *_: False)
    assert not describe(coded).as_stored
    assert generated(coded, "100%") == reference_generate(plain, PROMPTS, new_tokens=NEW)


def test_bfloat16_bits_do_not_depend_on_the_budget(tmp_path: Path) -> None:
    coded, _ = quantised("qwen3_moe", "fp8", tmp_path, dtype=torch.bfloat16)
    assert auto_dtype(coded) is torch.bfloat16
    seen = []
    for memory in ("100%", "30%"):
        with LLM(str(coded), memory=memory, max_running=4) as llm:
            results = llm.generate(PROMPTS, max_tokens=NEW, logprobs=0)
            seen.append([[(p.token_id, p.logprob) for p in r.logprobs] for r in results])
    assert seen[0] == seen[1]


def test_plan_and_bench_say_how_weights_are_stored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    coded, _ = quantised("olmoe", "fp8", tmp_path)
    bytes_ = load_model(coded).layout.total_bytes
    assert main(["plan", "--model", str(coded), "--memory", "50%"]) == 0
    assert "fp8/16x32" in capsys.readouterr().out
    assert main(["bench", "--model", str(coded), "--memory", "50%", "--new-tokens", "2", "--json"]) == 0
    row = json.loads(capsys.readouterr().out.splitlines()[0])
    assert row["expert_format"] == "fp8/16x32" and row["expert_bytes"] == bytes_


KEY = "model.layers.1.mlp.experts.2.up_proj.weight"
STEM = KEY.removesuffix("weight")
Change = Callable[[dict[str, Tensor]], object]


def _moved(tensors: dict[str, Tensor], key: str, tensor: Tensor) -> None:
    tensors[key] = tensor


@pytest.mark.parametrize(
    ("scheme", "change", "error", "said"),
    [
        ("fp8", lambda t: t[f"{KEY}_scale_inv"].fill_(float("nan")), CheckpointError, f"{KEY}_scale_inv.*NaN"),
        ("fp8", lambda t: t.pop(f"{KEY}_scale_inv"), CheckpointError, f"{KEY}_scale_inv' is missing beside"),
        (
            "fp8",
            lambda t: _moved(t, f"{KEY}_scale_inv", torch.ones(2, 1)),
            CheckpointError,
            rf"{KEY}_scale_inv.*\(2, 1\), must be .*\(2, 2\) for fp8/16x32 of a weight \(24, 48\)",
        ),
        ("fp8", lambda t: _moved(t, KEY, t[KEY][:, :40].clone()), CheckpointError, rf"{KEY}.*\(24, 40\), must be"),
        ("fp8", lambda t: _moved(t, KEY, t[KEY].float()), UnsupportedModel, f"{KEY}.*plain float32, must be quantised"),
        ("fp8", lambda t: _moved(t, KEY, t[KEY].to(torch.float8_e5m2)), UnsupportedModel, f"{KEY}.*float8_e5m2"),
        (
            "fp8",
            lambda t: _moved(t, f"{KEY}_scale_inv", t[f"{KEY}_scale_inv"].bfloat16()),
            UnsupportedModel,
            f"{KEY}.*must be fp8",
        ),
        ("ct-int4", lambda t: _moved(t, f"{KEY}_g_idx", torch.zeros(48)), UnsupportedModel, "g_idx' is beside int4"),
        (
            "gptq",
            lambda t: t[f"{STEM}g_idx"].copy_(t[f"{STEM}g_idx"].flip(0)),
            UnsupportedModel,
            "g_idx' orders inputs",
        ),
        ("gptq", lambda t: t.pop(f"{STEM}qzeros"), CheckpointError, f"{STEM}qzeros' is missing"),
        (
            "gptq",
            lambda t: t[f"{STEM}qzeros"][1, 2].fill_(0x77F77777),
            UnsupportedModel,
            f"{STEM}qzeros.* stored as 15",
        ),
        ("gptq", lambda t: _moved(t, KEY, torch.zeros(24, 48)), CheckpointError, f"{KEY}' and .*qweight' are both"),
        (
            "modelopt-nvfp4",
            lambda t: _moved(t, f"{STEM}pre_quant_scale", torch.ones(48)),
            UnsupportedModel,
            f"{STEM}pre_quant_scale' is beside",
        ),
        ("awq", lambda t: t[f"{STEM}scales"].fill_(float("nan")), CheckpointError, f"{STEM}scales.*NaN"),
        ("ct-int4", lambda t: t[f"{KEY}_scale"].fill_(float("inf")), CheckpointError, f"{KEY}_scale.*infinite"),
        (
            "ct-nvfp4",
            lambda t: t[f"{KEY}_global_scale"].zero_(),
            CheckpointError,
            rf"{KEY}_global_scale.*is \[0\.0\], must",
        ),
        ("modelopt-nvfp4", lambda t: t[f"{KEY}_scale_2"].fill_(1e36), CheckpointError, f"{KEY}_scale_2.*is 9.*, must"),
        ("ct-nvfp4", lambda t: t.pop(f"{KEY}_scale"), CheckpointError, f"{KEY}_scale' is missing beside"),
        (
            "modelopt-nvfp4",
            lambda t: t[f"{KEY}_scale"].view(torch.uint8).fill_(0x7F),
            CheckpointError,
            f"{KEY}_scale.*NaN",
        ),
        (
            "modelopt-nvfp4",
            lambda t: t[f"{KEY}_scale_2"].fill_(float("inf")),
            CheckpointError,
            f"{KEY}_scale_2.*infinite",
        ),
        ("modelopt-nvfp4", lambda t: t.pop(f"{KEY}_scale_2"), CheckpointError, f"{KEY}_scale_2' is missing beside"),
        (
            "modelopt-nvfp4",
            lambda t: _moved(t, f"{KEY}_scale", t[f"{KEY}_scale"][:, :2].clone()),
            CheckpointError,
            rf"{KEY}_scale' .*\(24, 2\), must be float8_e4m3fn \(24, 3\) for nvfp4 of a weight \(24, 48\)",
        ),
        (
            "modelopt-nvfp4",
            lambda t: _moved(t, f"{KEY}_scale", t[f"{KEY}_scale"].float()),
            UnsupportedModel,
            f"{KEY}_scale' is stored as float32, must be float8_e4m3fn",
        ),
        (
            "modelopt-nvfp4",
            lambda t: _moved(t, f"{KEY}_scale_2", t[f"{KEY}_scale_2"].bfloat16()),
            CheckpointError,
            f"{KEY}_scale_2' .*bfloat16",
        ),
    ],
)
def test_what_is_damaged_or_mixed_is_refused_by_name(
    tmp_path: Path, scheme: str, change: Change, error: type[Exception], said: str
) -> None:
    coded, _ = quantised("olmoe", scheme, tmp_path)
    edit(coded, change)
    with pytest.raises(error, match=said):
        load_model(coded)


def test_a_power_that_is_no_number_is_refused(tmp_path: Path) -> None:
    coded, _ = quantised("gpt_oss", "mxfp4", tmp_path, hidden_size=64)
    edit(coded, lambda t: t["model.layers.0.mlp.experts.down_proj_scales"][3].fill_(255))
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.experts\.down_proj_scales.*NaN"):
        load_model(coded)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    coded, _ = quantised("olmoe", "fp8", tmp_path)
    file = coded / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        load_model(coded)


GROUP = {"weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}}


AUTO_ROUND = {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "bits": 4, "group_size": 128}


@pytest.mark.parametrize(
    ("said", "match"),
    [
        ({"quant_method": "gguf"}, r"quantised \(gguf\), must be fp8.*hint: use a release"),
        ({"quant_method": "fp8", "weight_block_size": [128, 100]}, "blocks of .*100"),
        ({"quant_method": "fp8", "expert_dtype": "fp6"}, "expert_dtype 'fp6', must be 'fp8'"),
        ({"quant_method": "gptq", "bits": 8, "group_size": 128}, "bits 8, must be 4"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True}, "desc_act True"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemv"}, "version 'gemv', must be 'gemm'"),
        ({"quant_method": "gptq", "bits": 4, "group_size": -1}, r"blocks of \[1, -1\]"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "format": "gptq_v2"}, "format 'gptq_v2', must be"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "format": "llm-awq"}, "format 'llm-awq', must be"),
        ({"quant_method": "compressed-tensors", "config_groups": {"FP8": ["Linear"]}}, "None-bit None"),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, "0 schemes"),
        ({"quant_method": "compressed-tensors", "config_groups": ["W8A8"]}, "0 schemes"),
        ({"quant_method": "awq", "w_bit": 4, "group_size": 128}, "bits None, must be 4"),
        ({"quant_method": "auto-round", "packing_format": "auto_round:llm_compressor"}, "packing_format"),
        ({"quant_method": "auto-round", "packing_format": "auto_round:auto_awq", "bits": 8}, "bits 8, must be 4"),
        (AUTO_ROUND | {"extra_config": {"a.b": {"bits": 8}}}, "'a.b' in bits 8, must be 4 as elsewhere"),
        (AUTO_ROUND | {"dynamic": {"-:gate": {}, "+:up": {"group_size": 32}}}, "up' in group_size 32, must be 128"),
        ("gptq", r"quantised \(gptq\), must be"),
        ({"quant_method": ["fp8"]}, r"quantised \(\['fp8'\]\), must be"),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "config_groups": {"a": {"weights": {"num_bits": 8, "type": "int", "strategy": "channel"}}},
            },
            "packed 8-bit weights",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "transform_config": {"config_groups": {"R1": {}}},
                "config_groups": {"a": {"weights": {"num_bits": 8, "type": "int", "strategy": "channel"}}},
            },
            "transform_config",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"a": GROUP, "b": {"weights": {**GROUP["weights"], "num_bits": 8}}},
            },
            "2 schemes of weights, must be one",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"a": {"weights": {**GROUP["weights"], "group_size": 16}}},
            },
            r"blocks of \[1, 16\]",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"a": {"weights": {"num_bits": 4, "type": "float", "strategy": "tensor_group"}}},
            },
            "group_size None, must be 16",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"a": {"weights": {**GROUP["weights"], "type": "float", "group_size": 64}}},
            },
            "group_size 64, must be 32",
        ),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4_AWQ"}, "quant_algo 'NVFP4_AWQ', must be 'NVFP4'"),
    ],
)
def test_other_schemes_are_refused_by_name(said: Any, match: str) -> None:
    with pytest.raises(UnsupportedModel, match=match):
        check_method({"quantization_config": said}, "config.json")


def test_modules_left_in_their_own_precision_are_served() -> None:
    said = AUTO_ROUND | {"extra_config": {"gate": {"bits": 16, "group_size": 0}, "up": {"bits": 4, "sym": True}}}
    check_method({"quantization_config": said}, "config.json")


def test_groups_of_activations_alone_change_nothing() -> None:
    groups = {"a": GROUP, "kv": {"targets": ["re:.*self_attn$"], "weights": None, "input_activations": {"num_bits": 8}}}
    said = {"quant_method": "compressed-tensors", "config_groups": groups}
    check_method({"quantization_config": said}, "config.json")
