"""What `quantization_config` says of stored weights: which methods are served, and by what keys a weight's codes,
scales and zero points are found. Everything else is refused by name.

Pure: no torch, so that a download is refused before its first byte. Sources: transformers 5.23 (fp8, mxfp4),
compressed-tensors (float-, int-, pack-, nvfp4-pack-, mxfp4-pack-, mxfp8-quantized), NVIDIA's Model Optimizer
(modelopt), AutoGPTQ, AutoAWQ (gemm) and Intel's AutoRound, which packs as these two.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from buddymoe_ray.errors import CheckpointError, UnsupportedModel
from buddymoe_ray.models.families import Family, family_of, text_part
from buddymoe_ray.models.tensor_index import read_json

__all__ = ["INSTEAD", "METHODS", "UNREAD", "CodedKeys", "Scheme", "check_method", "served_family", "with_own_file"]

METHODS: Mapping[str, str] = {
    "fp8": "e4m3, a scale per block (DeepSeek, Qwen), output channel or tensor; experts in MXFP4 (DeepSeek-V4)",
    "compressed-tensors": "fp8 per block, channel, tensor; int8 per channel, tensor; int4 in groups, zero points too; "
    "NVFP4, MXFP4, MXFP8",
    "modelopt": "NVFP4, MXFP8; FP8 per tensor or channel",
    "mxfp4": "the experts of gpt-oss",
    "gptq": "int4 in groups, inputs in their own order",
    "awq": "int4 in groups, version gemm",
    "auto-round": "int4 in groups, packed as gptq or awq",
}
"""`quant_method`s that are served, with what of them."""
INSTEAD = f"hint: use a release of the model in {', '.join(METHODS)}, or the unquantised one"
UNREAD = re.compile(
    r"\.(input_scale|input_global_scale|input_zero_point|weight_shape|activation_scale|k_scale|v_scale)$"
)
"""Keys that no weight needs: static scales of activations and of the KV cache, shapes that codes have themselves."""
_COMPRESSED = {
    "8-bit float": ("tensor", "channel", "block", "group"),
    "8-bit int": ("tensor", "channel"),
    "4-bit int": ("group",),
    "4-bit float": ("tensor_group", "group"),
}
_PLAIN_CODES = {"float8_e4m3fn": "fp8", "int8": "int8"}
_NVFP4_GROUP, _MX_GROUP = 16, 32
_OWN_FILES = {"hf_quant_config.json": "modelopt", "quantize_config.json": "gptq"}
"""Files that say it, with the method where they do not name one."""


@dataclass(frozen=True, kw_only=True)
class CodedKeys:
    """A quantised weight: `base` is what it would be called unquantised, `keys` are those of its `codes`, `scales`,
    maybe `zeros`, `order` or `global_scale`, by which scales are divided if it `divides`. `block` as in CodeFormat;
    None: as the shape of the scales says."""

    base: str
    codes: str
    block: tuple[int, int] | None
    keys: Mapping[str, str]
    divides: bool = False


def with_own_file(config: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
    """What a config says, with what some releases have elsewhere of quantisation where it says nothing: older ones of
    compressed-tensors under another name, modelopt's and AutoGPTQ's in a file, DeepSeek-V4 the experts' codes beside
    it. Raises CheckpointError."""
    said = config.get("quantization_config")
    if isinstance(said, Mapping) and config.get("expert_dtype"):
        return {**config, "quantization_config": {"expert_dtype": config["expert_dtype"], **said}}
    if not config.get("quantization_config") and config.get("compression_config"):
        return {**config, "quantization_config": config["compression_config"]}
    for name, method in _OWN_FILES.items():
        if not config.get("quantization_config") and (folder / name).is_file():
            said = read_json(folder / name)
            said = said.get("quantization") if method == "modelopt" else said
            named = {"quant_method": method, **said} if isinstance(said, dict) else said
            return {**config, "quantization_config": named}
    return config


def served_family(folder: Path, where: str = "") -> Family:
    """The family of the checkpoint in `folder`, which is stored in a way that is served; `where` is what errors call
    its config.json. Raises CheckpointError, UnsupportedModel."""
    path = folder / "config.json"
    config, where = read_json(path), where or str(path)
    family = family_of(config, where)
    check_method(with_own_file(text_part(config), folder), where)
    return family


def check_method(config: Mapping[str, Any], where: str) -> None:
    """Raises UnsupportedModel for a `quantization_config` that says what is not served."""
    if config.get("quantization_config"):
        Scheme.of(config["quantization_config"], where)


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How a method stores weights; `zeros` says that there must be zero points, `fp4` as what codes of four bits are
    floats."""

    method: str
    block: tuple[int, int] | None
    zeros: bool = False
    fp4: str = ""

    @classmethod
    def of(cls, said: Any, where: str) -> Scheme:
        """What a `quantization_config` says. Raises UnsupportedModel."""
        method = said.get("quant_method", "unknown") if isinstance(said, Mapping) else said
        if not isinstance(said, Mapping) or not isinstance(method, str) or method not in METHODS:
            raise UnsupportedModel(f"{where} is quantised ({method}), must be {', '.join(METHODS)} or plain. {INSTEAD}")
        if method == "mxfp4":
            return cls(method=method, block=(1, _MX_GROUP))
        if method == "compressed-tensors":
            return cls._of_groups(said, where)
        if method == "modelopt":
            _check(said, "quant_algo", ("NVFP4", "MXFP8", "FP8", "FP8_PER_CHANNEL_PER_TOKEN"), where)
            group = {"NVFP4": _NVFP4_GROUP, "MXFP8": _MX_GROUP}.get(said["quant_algo"])
            fp4 = "nvfp4" if group == _NVFP4_GROUP else ""
            return cls(method=method, block=None if group is None else (1, group), fp4=fp4)
        if method == "fp8":
            _check(said, "expert_dtype", ("fp8", "fp4", None), where)
            block = said.get("weight_block_size")
            fp4 = "mxfp4" if said.get("expert_dtype") == "fp4" else ""
            return cls(method=method, block=None if block is None else _block(block, where), fp4=fp4)
        if method == "auto-round":
            _check(said, "packing_format", ("auto_round:auto_gptq", "auto_round:auto_awq"), where)
            _check(said, "data_type", ("int", None), where)
            method = said["packing_format"].removeprefix("auto_round:auto_")
        _check_modules(said, where)
        _check(said, "bits", (4,), where)
        _check(said, "desc_act", (False, None), where)
        _check(said, "version", ("gemm", "GEMM", None), where)
        for name in ("checkpoint_format", "format"):  # of gptq_v2 zero points are stored as they are
            _check(said, name, ("gptq" if method == "gptq" else "gemm", None), where)
        return cls(method=method, block=_block([1, said.get("group_size")], where), zeros=True)

    @classmethod
    def _of_groups(cls, said: Mapping[str, Any], where: str) -> Scheme:
        """compressed-tensors: all groups must store weights alike."""
        groups = said.get("config_groups")
        every = groups.values() if isinstance(groups, Mapping) else ()
        found: list[Any] = [group.get("weights") if isinstance(group, Mapping) else {} for group in every]
        schemes = [weights for weights in found if weights is not None]  # the others are of activations alone
        names = ("num_bits", "type", "strategy", "group_size", "symmetric")
        kinds = {tuple(scheme.get(name) for name in names) for scheme in schemes}
        if len(kinds) != 1:
            raise UnsupportedModel(f"{where} has {len(kinds)} schemes of weights, must be one. {INSTEAD}")
        [(bits, kind, strategy, size, symmetric)], first = kinds, schemes[0]
        if strategy not in _COMPRESSED.get(f"{bits}-bit {kind}", ()):
            raise UnsupportedModel(
                f"{where} has {bits}-bit {kind} weights with a scale per {strategy}, must be one of "
                f"{', '.join(f'{bits} per {strategies}' for bits, strategies in _COMPRESSED.items())}. {INSTEAD}"
            )
        _check(said, "transform_config", (None, {}), where)
        if bits == 8 and said.get("format") == "pack-quantized":
            raise UnsupportedModel(f"{where} has packed 8-bit weights (pack-quantized), must be bytes. {INSTEAD}")
        if kind == "float" and strategy in ("tensor_group", "group"):
            group = _NVFP4_GROUP if strategy == "tensor_group" else _MX_GROUP
            _check(first, "group_size", (group,), where)
            fp4 = "" if bits == 8 else "nvfp4" if group == _NVFP4_GROUP else "mxfp4"
            return cls(method="compressed-tensors", block=(1, group), fp4=fp4)
        said_block = {"block": first.get("block_structure"), "group": [1, size]}.get(strategy)
        block = None if said_block is None else _block(said_block, where)
        return cls(method="compressed-tensors", block=block, zeros=bits == 4 and symmetric is False)

    def coded(self, key: str, dtype: str, keys: Collection[str]) -> CodedKeys | None:
        """The weight whose codes are at `key`, among all `keys`; None where there are none.

        Raises CheckpointError for codes without scales, UnsupportedModel.
        """
        if self.method in ("gptq", "awq"):
            stem = key.removesuffix(".qweight")
            parts = {"codes": key, "scales": f"{stem}.scales", "zeros": f"{stem}.qzeros"}
            if self.method == "gptq" and f"{stem}.g_idx" in keys:
                parts["order"] = f"{stem}.g_idx"
            return None if stem == key else self._found(f"{stem}.weight", self.method, parts, keys)
        if self.method == "mxfp4":
            base = key.removesuffix("_blocks")
            return None if base == key else self._found(base, "mxfp4", {"codes": key, "scales": f"{base}_scales"}, keys)
        if self.fp4 == "nvfp4":
            return self._nvfp4(key, dtype, keys)
        base = key.removesuffix("_packed") if key.endswith(".weight_packed") else key
        codes = _PLAIN_CODES.get(dtype) if base == key else "int4"
        if self.fp4 and (base != key or codes == "int8"):
            codes = self.fp4
        if codes is None or UNREAD.search(key) or key.endswith("_zero_point"):
            return None
        zeros, order = f"{base}_zero_point", f"{base}_g_idx"
        if order in keys or (zeros in keys and codes != "int4"):
            refused = order if order in keys else zeros
            raise UnsupportedModel(f"key {refused!r} is beside {codes} codes, must not be there. {INSTEAD}")
        names = [f"{base}_scale", f"{base}_scale_inv", f"{base.removesuffix('weight')}scale"]
        scales = next((name for name in names if name in keys), names[codes == "fp8"])
        parts = {"codes": key, "scales": scales} | ({"zeros": zeros} if self.zeros or zeros in keys else {})
        found = self._found(base, codes, parts, keys)
        return replace(found, block=(1, _MX_GROUP)) if codes == "mxfp4" else found

    def _nvfp4(self, key: str, dtype: str, keys: Collection[str]) -> CodedKeys | None:
        divides = self.method == "compressed-tensors"
        base = key.removesuffix("_packed")
        if not base.endswith(".weight") or dtype != "uint8" or (base != key) != divides:
            return None
        whole = f"{base}_global_scale" if divides else f"{base}_scale_2"
        parts = {"codes": key, "scales": f"{base}_scale", "global_scale": whole}
        return replace(self._found(base, "nvfp4", parts, keys), divides=divides)

    def _found(self, base: str, codes: str, parts: Mapping[str, str], keys: Collection[str]) -> CodedKeys:
        for name in parts.values():
            if name not in keys:
                raise CheckpointError(
                    f"key {name!r} is missing beside {parts['codes']!r}, must be there. hint: finish the download"
                )
        beside = f"{base.removesuffix('weight')}pre_quant_scale"  # of inputs, by modelopt's AWQ
        if beside in keys:
            raise UnsupportedModel(f"key {beside!r} is beside {parts['codes']!r}, must not be there. {INSTEAD}")
        return CodedKeys(base=base, codes=codes, block=self.block, keys=parts)


def _check(said: Mapping[str, Any], name: str, served: tuple[object, ...], where: str) -> None:
    if said.get(name) not in served:
        raise UnsupportedModel(f"{where} is quantised with {name} {said.get(name)!r}, must be {served[0]!r}. {INSTEAD}")


def _check_modules(said: Mapping[str, Any], where: str) -> None:
    """Raises UnsupportedModel where AutoRound or GPTQModel say that a module is stored in another way; plain it may."""
    named = [of for of in (said.get("extra_config"), said.get("dynamic")) if isinstance(of, Mapping)]
    for module, own in [item for of in named for item in of.items() if isinstance(item[1], Mapping)]:
        for name in ("bits", "group_size") if own.get("bits") != 16 else ():
            if own.get(name) not in (None, wanted := said.get(name)):
                told = f"{module!r:.80} in {name} {own[name]!r:.40}"
                raise UnsupportedModel(f"{where} has {told}, must be {wanted} as elsewhere. {INSTEAD}")


def _block(said: Any, where: str) -> tuple[int, int]:
    """Outputs and inputs that share a scale. Raises UnsupportedModel."""
    sizes = list(said) if isinstance(said, list | tuple) else []
    if len(sizes) != 2 or not all(type(n) is int and n > 0 for n in sizes) or sizes[1] % 32:
        raise UnsupportedModel(f"{where} has blocks of {said}, must be [outputs, a multiple of 32 inputs]. {INSTEAD}")
    return sizes[0], sizes[1]
