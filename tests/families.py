"""Small random checkpoints of every family that can be served, for tests: `build_checkpoint(model_type, folder)`.

Weights are drawn wide enough that routing, norms and attention all matter. Nothing is trained.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

__all__ = ["TINY_CONFIGS", "build_checkpoint", "stock_logits", "stock_model", "tiny_config"]

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
}


def tiny_config(model_type: str, **overrides: Any) -> PreTrainedConfig:
    """transformers' config of the family's tiny checkpoint."""
    return AutoConfig.for_model(model_type, **{**_BASE, **TINY_CONFIGS[model_type], **overrides})


def stock_model(model_type: str, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random float32 model as transformers builds it, experts eager."""
    torch.manual_seed(seed)
    config = tiny_config(model_type, **overrides)
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.15)
            elif "bias" in name or "sinks" in name:
                parameter.normal_(0.0, 0.1)
        for name, buffer in model.named_buffers():
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
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation="eager").eval()
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits
