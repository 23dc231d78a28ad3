"""The shapes that `synth` can write: real models' configurations, and a tiny one of each family for tests and demos.

Pure data. Field names are transformers', and what is not named is its default, which is the family's first model.
Weights are bfloat16 and nothing here is trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["SHAPES"]

Shape = Mapping[str, Any]

_OLMOE: Shape = {"model_type": "olmoe", "intermediate_size": 1024}
_MIXTRAL: Shape = {"model_type": "mixtral", "max_position_embeddings": 32768}
_QWEN3: Shape = {
    "model_type": "qwen3_moe",
    "num_hidden_layers": 48,
    "head_dim": 128,
    "norm_topk_prob": True,
    "max_position_embeddings": 40960,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}
_DEEPSEEK_V2: Shape = {
    "model_type": "deepseek_v2",
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
    "q_lora_rank": None,
    "n_group": 1,
    "topk_group": 1,
    "max_position_embeddings": 163840,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 40.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
    },
    "bos_token_id": 100000,
    "eos_token_id": 100001,
}
_GPT_OSS: Shape = {
    "model_type": "gpt_oss",
    "num_hidden_layers": 24,
    "num_local_experts": 32,
    "pad_token_id": 199999,
    "eos_token_id": 200002,
}
_TINY: Shape = {
    "vocab_size": 512,
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_TINY_HEADS: Shape = {"num_key_value_heads": 2, "head_dim": 32}

SHAPES: Mapping[str, Shape] = {
    "olmoe-1b-7b": _OLMOE,
    "mixtral-8x7b": _MIXTRAL,
    "qwen3-30b-a3b": _QWEN3,
    "deepseek-v2-lite": _DEEPSEEK_V2,
    "gpt-oss-20b": _GPT_OSS,
    "olmoe-tiny": {**_OLMOE, **_TINY, "intermediate_size": 64, "num_experts": 32},
    "mixtral-tiny": {**_MIXTRAL, **_TINY, "intermediate_size": 192, "num_key_value_heads": 2},
    "qwen3-tiny": {
        **{**_QWEN3, **_TINY, **_TINY_HEADS},
        "intermediate_size": 192,
        "moe_intermediate_size": 48,
        "num_experts": 32,
        "num_experts_per_tok": 4,
    },
    "deepseek-v2-tiny": {
        **{**_DEEPSEEK_V2, **_TINY},
        "intermediate_size": 192,
        "moe_intermediate_size": 48,
        "num_key_value_heads": 4,
        "n_routed_experts": 16,
        "num_experts_per_tok": 3,
        "kv_lora_rank": 32,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 32,
        "v_head_dim": 32,
    },
    "gpt-oss-tiny": {
        **{**_GPT_OSS, **_TINY, **_TINY_HEADS},
        "intermediate_size": 64,
        "num_local_experts": 16,
        "sliding_window": 32,
    },
}
