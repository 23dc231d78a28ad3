"""Tiny quantised checkpoints in the layouts of their writers, each beside the same model in float32: code × scale.

Codes and scales are made here, by formulas of their own; the package's decoders are tested against them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from families import build_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor
from whole_models import WHOLE, build_whole

__all__ = ["SCHEMES", "edit", "quantised", "store_coded"]

BLOCK = (16, 32)
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
Made = tuple[dict[str, Tensor], Tensor]


def _repeated(scale: Tensor, rows: int, columns: int, shape: torch.Size) -> Tensor:
    return torch.kron(scale, torch.ones(rows, columns))[: shape[0], : shape[1]]


def _largest(W: Tensor, rows: int, columns: int) -> Tensor:
    """Of each block."""
    N, K = W.shape
    padded = torch.nn.functional.pad(W.abs(), (0, -K % columns, 0, -N % rows))
    return padded.view(-(-N // rows), rows, -(-K // columns), columns).amax(dim=(1, 3)) + 1e-9


def fp8(W: Tensor, rows: int, columns: int, scale_dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales of blocks, and what they mean."""
    scale = (_largest(W, rows, columns) / 448).to(scale_dtype)
    spread = _repeated(scale.float(), rows, columns, W.shape)
    codes = (W / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes, scale, codes.float() * spread


def _fp8_blocks(key: str, W: Tensor) -> Made:
    codes, scale, plain = fp8(W, *BLOCK)
    return {key: codes, f"{key}_scale_inv": scale}, plain


def _fp8_tensor(key: str, W: Tensor) -> Made:
    codes, scale, plain = fp8(W, *W.shape)
    name = key.removesuffix("weight")
    return {key: codes, f"{key}_scale": scale.reshape(()), f"{name}input_scale": torch.ones(())}, plain


def _fp8_channel(key: str, W: Tensor, scale_dtype: torch.dtype = torch.bfloat16) -> Made:
    """modelopt's scales are float32 [N], those of compressed-tensors [N, 1]."""
    codes, scale, plain = fp8(W, 1, W.shape[1], scale_dtype)
    return {key: codes, f"{key}_scale": scale.flatten() if scale_dtype is torch.float32 else scale}, plain


def _int8_channel(key: str, W: Tensor) -> Made:
    scale = (_largest(W, 1, W.shape[1]) / 127).bfloat16()
    codes = (W / scale.float()).round().clamp(-128, 127)
    return {key: codes.to(torch.int8), f"{key}_scale": scale}, codes * scale.float()


def _pack(codes: Tensor) -> Tensor:
    """int32 [N, K / 8] of codes 0 to 15, the first in the lowest bits."""
    padded = torch.nn.functional.pad(codes.long(), (0, -codes.shape[1] % 8))
    words = (padded.view(len(codes), -1, 8) << torch.arange(0, 32, 4)).sum(dim=2)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def _int4(key: str, W: Tensor, zeros: bool) -> Made:
    N, K = W.shape
    scale = (_largest(W, 1, 32) / 7).bfloat16()
    spread = _repeated(scale.float(), 1, 32, W.shape)
    zero = torch.full(scale.shape, 8)
    if zeros:
        zero = torch.randint(6, 11, scale.shape, generator=torch.Generator().manual_seed(N + K))
    shift = _repeated(zero.float(), 1, 32, W.shape)
    codes = (W / spread + shift).round().clamp(0, 15)
    base = key.removesuffix("weight")
    made = {f"{key}_packed": _pack(codes), f"{key}_scale": scale, f"{base}weight_shape": torch.tensor([N, K])}
    if zeros:
        made[f"{key}_zero_point"] = _pack(zero.T).T.contiguous()
    return made, (codes - shift) * spread


def _columns(key: str, W: Tensor, method: str) -> Made:
    """GPTQ, with or without an order of inputs, or AWQ in groups of 32 inputs: everything lies `[in, out]`."""
    N, K = W.shape
    scale = (_largest(W, 1, 32) / 7).half()  # [N, groups]
    zero = torch.randint(6, 11, scale.shape, generator=torch.Generator().manual_seed(N + K))
    spread, shift = (_repeated(t.float(), 1, 32, W.shape) for t in (scale, zero))
    codes = (W / spread + shift).round().clamp(0, 15)
    stem, order = key.removesuffix("weight"), torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    made = {f"{stem}scales": scale.T.contiguous()}
    if method != "awq":
        made[f"{stem}qweight"] = _pack(codes).T.contiguous()
        made[f"{stem}qzeros"] = _pack((zero - 1).T)
        made |= {f"{stem}g_idx": (torch.arange(K) // 32).int()} if method == "gptq" else {}
    else:
        made[f"{stem}qweight"] = _pack(codes.T.reshape(K, -1, 8)[:, :, order].flatten(1))
        made[f"{stem}qzeros"] = _pack(zero.T.reshape(-1, N // 8, 8)[:, :, order].flatten(1))
    return made, (codes - shift) * spread


def _nvfp4(key: str, W: Tensor, divides: bool) -> Made:
    """In groups of 16 inputs: as compressed-tensors has it, whose scale of all `divides`, or as modelopt."""
    whole = W.abs().max() / (6 * 448)
    whole = 1 / whole if divides else whole
    largest = _largest(W, 1, 16) / 6
    scale = (largest * whole if divides else largest / whole).clamp(max=448).to(torch.float8_e4m3fn)
    spread = _repeated(scale.float() / whole if divides else scale.float() * whole, 1, 16, W.shape)
    codes = ((W / spread.clamp_min(1e-20))[..., None] - E2M1).abs().argmin(dim=-1)
    blocks, stem = (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8), key.removesuffix("weight")
    made = {f"{key}_packed" if divides else key: blocks, f"{key}_scale": scale}
    if divides:
        made |= {f"{key}_global_scale": whole.reshape(1), f"{stem}input_global_scale": torch.ones(1)}
    else:
        made |= {f"{key}_scale_2": whole, f"{stem}input_scale": torch.ones(())}
    return made, E2M1[codes] * spread


def _microscaled(W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Bytes of two codes `[..., groups, 16]`, biased powers `[..., groups]`, and what they mean."""
    groups = W.reshape(*W.shape[:-1], -1, 32)
    power = torch.floor(torch.log2(groups.abs().amax(dim=-1) + 1e-9)).clamp(-127, 127) - 2
    codes = ((groups / torch.exp2(power)[..., None])[..., None] - E2M1).abs().argmin(dim=-1)
    blocks = (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8)
    return blocks, (power + 127).to(torch.uint8), (E2M1[codes] * torch.exp2(power)[..., None]).reshape(W.shape)


def _mxfp4(key: str, stack: Tensor) -> Made:
    """Of a stack `[E, K, N]`, as transformers has it plain."""
    blocks, powers, plain = _microscaled(stack.transpose(1, 2))
    return {f"{key}_blocks": blocks, f"{key}_scales": powers}, plain.transpose(1, 2).contiguous()


def _mxfp4_rows(key: str, W: Tensor) -> Made:
    blocks, powers, plain = _microscaled(W)
    return {f"{key}_packed": blocks.flatten(1), f"{key}_scale": powers}, plain


def _mxfp8(key: str, W: Tensor) -> Made:
    power = torch.ceil(torch.log2(_largest(W, 1, 32) / 448))
    spread = _repeated(torch.exp2(power), 1, 32, W.shape)
    codes = (W / spread).to(torch.float8_e4m3fn)
    return {key: codes, f"{key}_scale": (power + 127).to(torch.uint8)}, codes.float() * spread


def _deepseek_v4(key: str, W: Tensor) -> Made:
    """Experts in pairs of codes, all else in fp8, scales powers of two called `scale`."""
    scale = f"{key.removesuffix('weight')}scale"
    if ".experts." in key:
        blocks, powers, plain = _microscaled(W)
        return {key: blocks.flatten(1).view(torch.int8), scale: powers.view(torch.float8_e8m0fnu)}, plain
    power = torch.ceil(torch.log2(_largest(W, *BLOCK) / 448))
    spread = _repeated(torch.exp2(power), *BLOCK, W.shape)
    codes = (W / spread).to(torch.float8_e4m3fn)
    return {key: codes, scale: (power + 127).to(torch.uint8).view(torch.float8_e8m0fnu)}, codes.float() * spread


def _groups(weights: Mapping[str, Any], format: str) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
        "ignore": ["lm_head", "re:.*mlp.gate$"],
    }


def _modelopt(algorithm: str, weights: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "quant_method": "modelopt",
        "quant_algo": algorithm,
        "producer": {"name": "modelopt", "version": "0.40.0"},
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": dict(weights)}},
        "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
        "ignore": ["lm_head", "model.layers.*.mlp.gate"],
    }


Encoder = Callable[[str, Tensor], Made]
SCHEMES: dict[str, tuple[Encoder, dict[str, Any]]] = {
    "fp8": (_fp8_blocks, {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": list(BLOCK)}),
    "fp8-tensor": (_fp8_tensor, {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}),
    "ct-fp8": (_fp8_channel, _groups({"num_bits": 8, "type": "float", "strategy": "channel"}, "float-quantized")),
    "ct-int8": (
        _int8_channel,
        _groups({"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}, "int-quantized"),
    ),
    "ct-int4": (
        lambda key, W: _int4(key, W, zeros=False),
        _groups(
            {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}, "pack-quantized"
        ),
    ),
    "ct-int4-zeros": (
        lambda key, W: _int4(key, W, zeros=True),
        _groups(
            {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": False}, "pack-quantized"
        ),
    ),
    "gptq": (
        lambda key, W: _columns(key, W, "gptq"),
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "checkpoint_format": "gptq"},
    ),
    "awq": (
        lambda key, W: _columns(key, W, "awq"),
        {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"},
    ),
    "ct-mxfp4": (
        _mxfp4_rows,
        _groups(
            {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
            "mxfp4-pack-quantized",
        ),
    ),
    "ct-mxfp8": (
        _mxfp8,
        _groups({"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32}, "mxfp8-quantized"),
    ),
    "modelopt-mxfp8": (_mxfp8, _modelopt("MXFP8", {"num_bits": 8, "type": "float", "group_size": 32})),
    "fp8-experts-fp4": (
        _deepseek_v4,
        {"quant_method": "fp8", "scale_fmt": "ue8m0", "weight_block_size": list(BLOCK), "expert_dtype": "fp4"},
    ),
    "auto-round": (
        lambda key, W: _columns(key, W, "auto-round"),
        {
            "quant_method": "auto-round",
            "packing_format": "auto_round:auto_gptq",
            "bits": 4,
            "group_size": 32,
            "sym": True,
        }
        | {"data_type": "int", "extra_config": {"lm_head": {"bits": 16, "data_type": "float"}}},
    ),
    "modelopt-fp8": (_fp8_tensor, _modelopt("FP8", {"num_bits": 8, "type": "float", "dynamic": False})),
    "modelopt-fp8-channel": (
        lambda key, W: _fp8_channel(key, W, torch.float32),
        _modelopt("FP8_PER_CHANNEL_PER_TOKEN", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    ),
    "modelopt-nvfp4": (
        lambda key, W: _nvfp4(key, W, divides=False),
        _modelopt("NVFP4", {"num_bits": 4, "type": "float", "group_size": 16, "dynamic": False}),
    ),
    "ct-nvfp4": (
        lambda key, W: _nvfp4(key, W, divides=True),
        _groups(
            {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True},
            "nvfp4-pack-quantized",
        ),
    ),
    "mxfp4": (_mxfp4, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}),
}


_ATTENTION = ("wq_a", "wq_b", "wkv", "wo_a", "wo_b")  # of DeepSeek-V4


def _is_coded(scheme: str, key: str, tensor: Tensor) -> bool:
    if scheme == "mxfp4":
        return tensor.ndim == 3
    own = key.rsplit(".", 2)[-2] if key.endswith(".weight") else ""
    named = own.endswith("_proj") or own in ("w1", "w2", "w3", "kv_a_proj_with_mqa", *_ATTENTION)
    return tensor.ndim == 2 and named and not (".compressor." in key or own == "weights_proj")


def quantised(model_type: str, scheme: str, folder: Path, **overrides: Any) -> tuple[Path, Path]:
    """A checkpoint of the family stored so, and the same in float32."""
    build = build_whole if model_type in WHOLE else build_checkpoint
    plain = build(model_type, folder / "plain", **overrides)
    wide = store_coded(plain, scheme, folder / "coded")
    save_file(wide, plain / "model.safetensors", {"format": "pt"})
    return folder / "coded", plain


def store_coded(plain: Path, scheme: str, coded: Path) -> dict[str, Tensor]:
    """Write another folder with a checkpoint's weights stored so; what these mean in float32."""
    encode, config = SCHEMES[scheme]
    coded.mkdir()
    wide, stored = load_file(plain / "model.safetensors"), dict[str, Tensor]()
    for key, tensor in list(wide.items()):
        if _is_coded(scheme, key, tensor):
            made, wide[key] = encode(key, tensor.float())
            stored |= made
        else:
            stored[key] = tensor
    save_file(
        {key: tensor.contiguous() for key, tensor in stored.items()}, coded / "model.safetensors", {"format": "pt"}
    )
    for path in plain.glob("*.json"):
        (coded / path.name).write_text(path.read_text())
    said = json.loads((coded / "config.json").read_text())
    (coded / "config.json").write_text(json.dumps({**said, "quantization_config": config}))
    return {key: tensor.contiguous() for key, tensor in wide.items()}


def edit(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Write the checkpoint again after `change` of its tensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
