"""Small random checkpoints of every family that can be served, for tests: `build_checkpoint(model_type, folder)`.

Weights are drawn wide enough that routing, norms and attention all matter. Nothing is trained.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging

from buddymoe_ray.models.reference import reference_model

__all__ = [
    "FULL",
    "SLIDING",
    "THOROUGH",
    "TINY_CONFIGS",
    "build_checkpoint",
    "stock_logits",
    "stock_model",
    "tiny_config",
]

torch.set_num_threads(1)  # matrices this small only lose by sharing them out

_BASE: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_MLA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "intermediate_size": 80,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "n_group": 2,
    "topk_group": 1,
}
_QWEN: dict[str, Any] = {
    "intermediate_size": 80,
    "moe_intermediate_size": 24,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "decoder_sparse_step": 1,
}
_GLM: dict[str, Any] = {
    "intermediate_size": 80,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "head_dim": 12,
}
_MIXTRAL: dict[str, Any] = {"intermediate_size": 40, "num_local_experts": 6, "num_experts_per_tok": 2}

_MOE: dict[str, Any] = {
    "intermediate_size": 80,
    "moe_intermediate_size": 24,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "head_dim": 12,
}
_GRANITE: dict[str, Any] = {
    "intermediate_size": 40,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "embedding_multiplier": 2.0,
    "residual_multiplier": 0.5,
    "logits_scaling": 2.0,
    "attention_multiplier": 0.2,
}
_GROUPS = {"n_group": 2, "topk_group": 1}
_LATE = {"mlp_layer_types": ["dense", "sparse", "sparse"]}
SLIDING, FULL, LINEAR = "sliding_attention", "full_attention", "linear_attention"
_INDEXER: dict[str, Any] = {
    "index_topk": 8,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "layer_types": ["indexed_attention"] * 3,
}
_KIMI: dict[str, Any] = {
    **_LATE,
    "intermediate_size": 80,
    "moe_intermediate_size": 24,
    "num_experts": 8,
    "num_experts_per_token": 3,
    "num_expert_group": 2,
    "topk_group": 1,
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "model_max_length": 256,
    "layer_types": [LINEAR, FULL, LINEAR],
    "linear_head_dim": 8,
    "linear_num_heads": 4,
}
_NEXT: dict[str, Any] = {
    **_MOE,
    "head_dim": 16,
    "shared_expert_intermediate_size": 32,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_WINDOW: dict[str, Any] = {"sliding_window": 8, "layer_types": [SLIDING, FULL, SLIDING]}
_TWO_ROPES: dict[str, Any] = {
    "rope_parameters": {
        FULL: {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5},
        SLIDING: {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    }
}

TINY_CONFIGS: dict[str, dict[str, Any]] = {
    "deepseek_v2": {**_MLA, "topk_method": "group_limited_greedy", "head_dim": 8},
    "deepseek_v3": {**_MLA, "n_group": 2, "topk_group": 1, "num_mtp_layers": 0},
    "dots1": {**_GLM},
    "ernie4_5_moe": {
        "intermediate_size": 80,
        "moe_intermediate_size": 24,
        "moe_num_experts": 8,
        "moe_k": 3,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
        "tie_word_embeddings": True,
    },
    "flex_olmo": {"intermediate_size": 40, "num_experts": 7, "num_experts_per_tok": 3},
    "glm4_moe": {**_GLM, "use_qk_norm": True, "num_mtp_layers": 0},
    "gpt_oss": {
        "intermediate_size": 32,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "head_dim": 12,
        "sliding_window": 8,
    },
    "granitemoe": {
        "intermediate_size": 40,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.5,
        "logits_scaling": 2.0,
        "attention_multiplier": 0.2,
    },
    "hunyuan_v1_moe": {"intermediate_size": 40, "num_experts": 6, "moe_topk": 2, "head_dim": 12},
    "jamba": {
        "intermediate_size": 40,
        "num_hidden_layers": 4,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "attn_layer_period": 4,
        "attn_layer_offset": 2,
        "mamba_d_state": 8,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
        "mamba_dt_rank": 6,
        "use_mamba_kernels": False,
    },
    "lfm2_moe": {
        "intermediate_size": 80,
        "moe_intermediate_size": 24,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "num_dense_layers": 1,
        "layer_types": ["conv", "full_attention", "conv"],
        "tie_word_embeddings": True,
    },
    "minimax": {
        **_MIXTRAL,
        "head_dim": 12,
        "block_size": 16,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    },
    "minimax_m2": {**_MIXTRAL, "head_dim": 12},
    "mixtral": {**_MIXTRAL, "sliding_window": 16},
    "olmoe": {"intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 3},
    "phimoe": {**_MIXTRAL, "sliding_window": None, "attention_bias": True, "lm_head_bias": True},
    "qwen2_moe": {**_QWEN, "shared_expert_intermediate_size": 32},
    "qwen3_moe": {**_QWEN, "head_dim": 16, "norm_topk_prob": True},
    "qwen3_next": {
        **_QWEN,
        "head_dim": 16,
        "num_hidden_layers": 4,
        "shared_expert_intermediate_size": 32,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    },
    "afmoe": {**_MOE, **_WINDOW, "num_shared_experts": 1, "route_scale": 1.7, "mup_enabled": True},
    "aria_text": {
        "intermediate_size": 24,
        "moe_num_experts": 8,
        "moe_topk": 3,
        "moe_num_shared_experts": 2,
        "head_dim": 12,
    },
    "axk1": {**_MLA, **_LATE},
    "cohere2_moe": {**_MOE, **_WINDOW, "num_shared_experts": 1, "logit_scale": 1.0, "tie_word_embeddings": True},
    "exaone_moe": {**_MOE, **_GROUPS, **_LATE, **_WINDOW, "num_shared_experts": 1},
    "flint": {**_MOE, **_WINDOW, "shared_expert_intermediate_size": 32, "mlp_only_layers": [0]},
    "glm4_moe_lite": {**_MLA, **_LATE},
    "granitemoe_swa": {**_GRANITE, **_WINDOW, "shared_intermediate_size": 32, "layer_rope_theta": [1e4, 0.0, 500.0]},
    "granitemoeshared": {**_GRANITE, "shared_intermediate_size": 32},
    "hy_v3": {**_MOE, **_LATE, "num_shared_experts": 1},
    "kolibri1": {**_MOE, **_WINDOW, "num_local_experts": 8, "shared_expert_intermediate_size": 32},
    "laguna": {
        **_MOE,
        **_LATE,
        **_WINDOW,
        **_TWO_ROPES,
        "shared_expert_intermediate_size": 32,
        "num_attention_heads_per_layer": [4, 6, 4],
        "moe_routed_scaling_factor": 1.5,
    },
    "mellum": {**_MOE, **_LATE, **_WINDOW, "num_local_experts": 8},
    "mimo_v2_flash": {**_GLM, **_GROUPS, **_LATE, **_WINDOW, **_TWO_ROPES, "v_head_dim": 8},
    "mistral4": {
        **_MLA,
        "head_dim": 24,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 30,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
            "partial_rotary_factor": 1 / 3,
        },
    },
    "solar_open": {**_GLM, **_GROUPS},
    "axk2": {**_MLA, **_LATE, **_INDEXER, "gated_norm_rank": 4},
    "bailing_hybrid": {**_KIMI, "q_lora_rank": 24},
    "deepseek_v32": {**_MLA, **_LATE, **_INDEXER},
    "deepseek_v4": {
        "moe_intermediate_size": 24,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "head_dim": 16,
        "q_lora_rank": 24,
        "num_key_value_heads": 1,
        "layer_types": [SLIDING, "compressed_sparse_attention", "heavily_compressed_attention"],
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        "mlp_layer_types": ["hash_moe", "moe", "moe"],
        "sliding_window": 8,
        "o_groups": 2,
        "o_lora_rank": 12,
        "index_n_heads": 2,
        "index_head_dim": 16,
        "index_topk": 4,
        "hc_mult": 2,
        "qk_rope_head_dim": 8,
        "partial_rotary_factor": 0.5,
    },
    "gemma4_text": {
        **_MOE,
        "top_k_experts": 3,
        "enable_moe_block": True,
        "num_hidden_layers": 4,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 160,
        "sliding_window": 8,
        "layer_types": [SLIDING, FULL, SLIDING, FULL],
        "per_layer_config": {"1": {"head_dim": 24}, "3": {"head_dim": 24}},
        "final_logit_softcapping": 3.0,
        "tie_word_embeddings": True,
    },
    "glm_moe_dsa": {**_MLA, **_LATE, **_INDEXER, "indexer_types": ["full", "shared", "full"]},
    "granitemoehybrid": {
        **_GRANITE,
        "shared_intermediate_size": 32,
        "layer_types": [LINEAR, FULL, LINEAR],
        "mamba_n_heads": 4,
        "mamba_d_state": 8,
        "mamba_d_head": 24,
        "mamba_chunk_size": 16,
    },
    "hy_v4": {**_MLA, **_LATE, **_INDEXER, "indexer_types": ["full", "shared", "full"]},
    "kimi_linear": {**_KIMI},
    "minimax_m3_vl_text": {
        **_MIXTRAL,
        **_LATE,
        "head_dim": 12,
        "rotary_dim": 6,
        "dense_intermediate_size": 80,
        "shared_intermediate_size": 32,
        "layer_types": ["minimax_m3_sparse", FULL, "minimax_m3_sparse"],
        "index_n_heads": 2,
        "index_head_dim": 16,
        "index_block_size": 4,
        "index_topk_blocks": 2,
    },
    "nemotron_h": {
        **_GLM,
        **_GROUPS,
        "moe_shared_expert_intermediate_size": 32,
        "layers_block_type": [LINEAR, "moe", FULL, "moe", "mlp"],
        "num_hidden_layers": 5,
        "ssm_state_size": 8,
        "mamba_num_heads": 4,
        "mamba_head_dim": 12,
        "n_groups": 2,
        "expand": 1,
        "chunk_size": 16,
        "use_mamba_kernels": False,
    },
    "qwen3_5_moe_text": {**_NEXT, "layer_types": [LINEAR, FULL, LINEAR]},
    "zaya": {
        **_MOE,
        "num_experts_per_tok": 1,
        "layer_types": ["hybrid", "hybrid_sliding", "hybrid"],
        "sliding_window": 8,
        "router_hidden_size": 16,
    },
}

THOROUGH = tuple(TINY_CONFIGS)[: tuple(TINY_CONFIGS).index("qwen3_next") + 1]
"""Families that go through every test; the others are made of the same parts, and go through those of what they say."""


def tiny_config(model_type: str, **overrides: Any) -> PreTrainedConfig:
    """transformers' config of the family's tiny checkpoint."""
    return AutoConfig.for_model(model_type, **{**_BASE, **TINY_CONFIGS[model_type], **overrides})


def stock_model(model_type: str, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random float32 model as transformers builds it, experts eager."""
    torch.manual_seed(seed)
    config = tiny_config(model_type, **overrides)
    auto = AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForImageTextToText
    model = auto.from_config(config, experts_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.15)
            elif "bias" in name or "sinks" in name:
                parameter.normal_(0.0, 0.1)
        for name, buffer in model.named_buffers():
            if name.endswith("tid2eid"):  # experts by token
                buffer.copy_(torch.stack([torch.randperm(8)[: buffer.shape[1]] for _ in buffer]))
            if "e_score_correction_bias" in name or "expert_bias" in name:
                buffer.normal_(0.0, 0.1)
    return model.eval()


def build_checkpoint(
    model_type: str,
    folder: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "50GB",
    **overrides: Any,
) -> Path:
    """Save a tiny random checkpoint of the family with stock transformers; returns the folder."""
    model = stock_model(model_type, seed=seed, **overrides).to(dtype)
    logging.disable_progress_bar()
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def stock_logits(folder: Path, ids: torch.Tensor, *, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Logits of a prompt by stock transformers with every weight in memory, experts eager."""
    with torch.no_grad():
        return reference_model(folder, dtype)(input_ids=ids, use_cache=False).logits
