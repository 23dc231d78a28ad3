"""The model families that can be served, and what each one's sequences need to remember.

Pure table; knows neither torch nor transformers. `packed` families keep keys and values per token, and some a state of
fixed size per layer, so rows of many sequences share one pass; `solo` families run one forward per sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from buddymoe_ray.errors import UnsupportedModel

__all__ = ["CARRYING", "FAMILIES", "WINDOWED", "Family", "family_of", "text_part"]


@dataclass(frozen=True, kw_only=True)
class Family:
    """One `model_type` of transformers. `packed` says whether ragged rows may share a pass over a paged KV cache."""

    model_type: str
    packed: bool


_PACKED = (
    *("aria_text", "axk1", "deepseek_v2", "deepseek_v3", "ernie4_5_moe", "flex_olmo", "glm4_moe", "glm4_moe_lite"),
    *("granitemoe", "granitemoeshared", "hunyuan_v1_moe", "hy_v3", "minimax_m2", "mistral4", "olmoe", "solar_open"),
)
WINDOWED = frozenset(
    {
        *("afmoe", "cohere2_moe", "dots1", "exaone_moe", "flint", "gemma4_text", "gpt_oss", "granitemoe_swa"),
        *("kolibri1", "laguna", "mellum", "mimo_v2_flash", "mixtral", "phimoe", "qwen2_moe", "qwen3_moe", "zaya"),
    }
)
"""Families that keep to the same sliding window in prompts and in decode steps."""

CARRYING = frozenset(
    {
        *("bailing_hybrid", "granitemoehybrid", "jamba", "kimi_linear", "lfm2_moe", "minimax", "nemotron_h"),
        *("qwen3_5_moe_text", "qwen3_next", "zaya"),
    }
)
"""Packed families with layers that carry a state of fixed size from token to token."""

_SOLO = ("axk2", "deepseek_v32", "deepseek_v4", "glm_moe_dsa", "hy_v4", "minimax_m3_vl_text")
"""An indexer, with a cache of its own, chooses the keys or blocks of keys that are attended to, or (deepseek_v4) those
of several tokens are compressed into one: neither is what a paged KV cache holds."""

FAMILIES: Mapping[str, Family] = {
    name: Family(model_type=name, packed=name not in _SOLO) for name in sorted({*_PACKED, *WINDOWED, *CARRYING, *_SOLO})
}

_OF_MORE = frozenset({"aria", "gemma4", "kimi_k25", "minimax_m3_vl", "mistral3", "qwen3_5_moe"})
"""Models of more than text whose text part is of one of the families: that alone is served."""


def text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a `config.json` says of text: of a model of more than that the part that does."""
    text = config.get("text_config")
    if config.get("model_type") not in _OF_MORE or not isinstance(text, Mapping):
        return config
    shared = {
        name: config[name]
        for name in ("quantization_config", "compression_config", "dtype", "torch_dtype")
        if name in config
    }
    kind = text.get("model_type")
    return {**shared, **text, "model_type": "deepseek_v3" if kind == "kimi_k2" else kind}  # as transformers reads it


def family_of(config: Mapping[str, Any], where: str) -> Family:
    """The family of a checkpoint's `config.json`, given as a mapping; `where` names the file in errors.

    Raises:
        UnsupportedModel: unknown family, or an encoder-decoder.
    """
    config = text_part(config)
    name = str(config.get("model_type"))
    if config.get("is_encoder_decoder"):
        raise UnsupportedModel(f"{where} is an encoder-decoder ({name}), must be a decoder. hint: serve a causal model")
    if config.get("is_causal") is False:
        raise UnsupportedModel(f"{where} has is_causal false ({name}), must be true. hint: serve a causal model")
    if name not in FAMILIES:
        raise UnsupportedModel(
            f"{where} has model_type {name!r}, must be one of {', '.join(sorted(FAMILIES))}. "
            "hint: only Mixture-of-Experts families on transformers' experts interface can be served"
        )
    return FAMILIES[name]
