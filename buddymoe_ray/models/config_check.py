"""Whether the numbers of a config.json can be those of a model, so that nonsense is named before anything is built.

Knows what transformers' config classes call their fields, no family in particular. What it lets through may still be
refused by weights that do not fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from buddymoe_ray.errors import CheckpointError

__all__ = ["EXPERTS_PER_TOKEN", "check_config", "read_fields", "rope_parameters"]

EXPERTS_PER_TOKEN = ("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts")
_EXPERTS = ("num_local_experts", "n_routed_experts", "num_experts", "moe_num_experts")
_COUNTS = (
    *("num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("max_position_embeddings", "intermediate_size", "moe_intermediate_size", "n_group", "topk_group"),
)
_KEYLESS = {"linear_attention", "conv", "moe", "mlp"}
"""Types of layers without keys and values: transformers does not generate with these alone."""
_ROPE_NUMBERS = ("rope_theta", "factor", "original_max_position_embeddings", "partial_rotary_factor")


def check_config(config: PreTrainedConfig, written: Mapping[str, Any], where: str) -> None:
    """Raises CheckpointError naming the field that no model can have; `written` is the JSON of the file `where`, which
    may hold others that the family's code does not read."""
    known = read_fields(config)
    experts, per_token = (
        next((name for name in names if name in written), names[0])
        for names in ([name for name in of if name in known] for of in (_EXPERTS, EXPERTS_PER_TOKEN))
    )
    count: Any = getattr(config, experts)
    one = config.per_layer_config[0] if config.is_heterogeneous and config.num_hidden_layers else config
    counts = {name: value for name in _COUNTS if name in known and (value := getattr(one, name, None)) is not None}
    if getattr(config, "use_sliding_window", True) and getattr(config, "sliding_window", None) is not None:
        counts["sliding_window"] = config.sliding_window
    for name, value in {**counts, experts: count, per_token: getattr(config, per_token, None)}.items():
        least = 2 if name == "sliding_window" else 1  # in decode steps transformers forgets nothing of a window of 1
        for each in value if isinstance(value, list | tuple) and name == per_token else (value,):
            if not isinstance(each, int) or isinstance(each, bool) or each < least:
                raise _refusal(where, name, value, f"an integer of at least {least}")
            if name == per_token and each > count:
                raise _refusal(where, name, value, f"at most {experts}, {count}")
    groups = counts.get("n_group", 1)
    if count % groups:
        raise _refusal(where, "n_group", groups, f"a divisor of {experts}, {count}")
    if counts.get("topk_group", 1) > groups:
        raise _refusal(where, "topk_group", counts["topk_group"], f"at most n_group, {groups}")
    for kind, rope in rope_parameters(config).items():
        _check_rope(rope, where)
        if kind and rope.get("rope_type") == "dynamic":
            raise _refusal(where, f"rope_type of {kind}", "dynamic", "one whose frequencies do not follow a text")
    types: set[Any] = {*(getattr(config, "layer_types", None) or ("full_attention",))}
    if types <= _KEYLESS:
        raise _refusal(where, "layer_types", sorted(types), "of layers of which at least one attends")
    activation = getattr(config, "hidden_act", None) if "hidden_act" in known else None
    if activation is not None and activation not in ACT2FN:
        raise _refusal(where, "hidden_act", activation, "an activation that transformers knows")


def read_fields(config: PreTrainedConfig) -> set[str]:
    """Names of the fields that the family's code may read; a release's config.json may hold more."""
    return {*(field.name for field in fields(config)), *config.attribute_map}


def rope_parameters(config: PreTrainedConfig) -> dict[str, dict[str, Any]]:
    """Rotary settings by type of layer; of "" where all layers have the same."""
    rope = getattr(config, "rope_parameters", None) or {}
    nested = {kind: of_kind for kind, of_kind in rope.items() if isinstance(of_kind, dict)}
    return nested or {"": rope}


def _check_rope(rope: dict[str, Any], where: str) -> None:
    kind = rope.get("rope_type", "default")
    if kind not in ("default", *ROPE_INIT_FUNCTIONS):
        raise _refusal(where, "rope_type", kind, f"default or one of {', '.join(ROPE_INIT_FUNCTIONS)}")
    for name in _ROPE_NUMBERS:
        value = rope.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or value <= 0):
            raise _refusal(where, name, value, "a number above 0")


def _refusal(where: str, name: str, value: object, wanted: str) -> CheckpointError:
    return CheckpointError(f"{name} in {where} is {value!r}, must be {wanted}. hint: fix the field")
