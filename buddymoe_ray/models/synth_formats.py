"""How `synth` quantises what it writes: codes of the same random weights, in the layouts of real checkpoints.

Weights are drawn from a normal distribution of known width, so that all blocks of a tensor have one scale and nothing
is read twice. Knows keys and layouts; `quantised` reads what is written here.

Legend: N outputs, K inputs of a weight, E experts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from buddymoe_ray.errors import ConfigError
from buddymoe_ray.models.shard_writer import StoredTensor
from buddymoe_ray.models.synth_weights import SynthWeights

__all__ = ["QUANTISATION", "CodedWeights", "stored_as"]

BLOCK, GROUP = 128, 32
QUANTISATION: Mapping[str, Mapping[str, Any]] = {
    "bf16": {},
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]},
    "int4": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP, "symmetric": True},
            }
        },
        "ignore": ["lm_head", "re:.*gate$"],
    },
    "nvfp4": {
        "quant_method": "modelopt",
        "quant_algo": "NVFP4",
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "float", "group_size": 16}}
        },
        "ignore": ["lm_head"],
    },
    "mxfp4": {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]},
}
"""What config.json says, by the name of the format."""
_LINEAR = re.compile(r"(_proj|_proj_with_mqa|\.w[123])\.weight$")
_STACK = re.compile(r"experts\.(gate_up_proj|down_proj)$")
_LARGEST = {"fp8": 448.0, "int4": 7.0, "nvfp4": 6.0, "mxfp4": 6.0}
_WIDTHS = {"fp8": 5.0, "int4": 3.0, "nvfp4": 3.0, "mxfp4": 3.0}
"""Standard deviations that the largest code stands for."""


def stored_as(tensors: Iterable[StoredTensor], fmt: str) -> list[StoredTensor]:
    """What is written in the place of bfloat16 tensors. Raises ConfigError where nothing can be stored so."""
    given, wanted = list(tensors), _STACK if fmt == "mxfp4" else _LINEAR
    if fmt == "bf16":
        return given
    if any(_STACK.search(tensor.key) for tensor in given) != (fmt == "mxfp4"):
        raise ConfigError(f"format is {fmt!r}, must be mxfp4 for gpt-oss and for nothing else. hint: use bf16")
    return [part for t in given for part in (_coded(t, fmt) if wanted.search(t.key) else [t])]


def _coded(tensor: StoredTensor, fmt: str) -> list[StoredTensor]:
    *stack, N, K = tensor.shape
    if fmt == "mxfp4":
        N, K = K, N  # transposed in bfloat16 alone
    if fmt != "fp8" and K % GROUP:
        raise ConfigError(f"{tensor.key} has {K} inputs, must be a multiple of {GROUP} in {fmt}. hint: use fp8 or bf16")
    kinds: dict[str, tuple[tuple[str, str, tuple[int, ...], int], ...]] = {
        "fp8": (("", "F8_E4M3", (N, K), 1), ("_scale_inv", "F32", (-(-N // BLOCK), -(-K // BLOCK)), 4)),
        "int4": (("_packed", "I32", (N, K // 8), 4), ("_scale", "BF16", (N, K // GROUP), 2)),
        "nvfp4": (
            *(("", "U8", (N, K // 2), 1), ("_scale", "F8_E4M3", (N, K // 16), 1)),
            ("_scale_2", "F32", (), 4),
        ),
        "mxfp4": (("_blocks", "U8", (*stack, N, K // GROUP, 16), 1), ("_scales", "U8", (*stack, N, K // GROUP), 1)),
    }
    return [
        StoredTensor(key=f"{tensor.key}{suffix}", shape=shape, nbytes=size * math.prod(shape), dtype=dtype, of=tensor)
        for suffix, dtype, shape, size in kinds[fmt]
    ]


class CodedWeights:
    """`SynthWeights` in a format: called with a tensor of `stored_as`, yields its bytes in order."""

    def __init__(self, weights: SynthWeights, fmt: str) -> None:
        self._weights, self._fmt = weights, fmt

    def __call__(self, tensor: StoredTensor) -> Iterator[memoryview]:
        """Pieces of at most a few MB."""
        if tensor.of is None:
            return self._weights(tensor)
        std = self._weights.std(tensor.of)
        scale = std * _WIDTHS[self._fmt] / _LARGEST[self._fmt]
        if self._fmt == "mxfp4":
            scale = 2.0 ** round(math.log2(scale))
        if tensor.key.endswith(("_scale", "_scales", "_scale_inv", "_scale_2")):
            return iter([_bytes(_scales(tensor, scale))])
        return (_bytes(self._codes(piece.float() / scale)) for piece in self._weights.rows(tensor.of))

    def _codes(self, x: Tensor) -> Tensor:
        """Of some weights, in the order in which they are stored."""
        if self._fmt == "fp8":
            return x.clamp(-448, 448).to(torch.float8_e4m3fn)
        if self._fmt == "int4":
            codes = (x + 8).round().clamp(0, 15).to(torch.uint8)
        else:
            size = x.abs()
            large = torch.where(size < 3.5, size.round() + 2, (size / 2).round().clamp(max=3) + 4)
            codes = torch.where(size < 1.75, (2 * size).round(), large).to(torch.uint8) | (x < 0).to(torch.uint8) << 3
        pairs = codes.reshape(-1, 2)
        return pairs[:, 0] | pairs[:, 1] << 4


def _scales(tensor: StoredTensor, scale: float) -> Tensor:
    if tensor.dtype == "F8_E4M3":  # beside a scale of all
        return torch.ones(tensor.shape, dtype=torch.float8_e4m3fn)
    if tensor.dtype == "U8":
        return torch.full(tensor.shape, round(math.log2(scale)) + 127, dtype=torch.uint8)
    return torch.full(tensor.shape, scale, dtype=torch.float32 if tensor.dtype == "F32" else torch.bfloat16)


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
