"""What may be set in the configs of families, by case: what is served as transformers' `generate` has it, and what is
refused. `test_family_switches` proves them, the table of deployments/README.md is made from them.
"""

from __future__ import annotations

from typing import Any

from tiny_configs import FULL, LINEAR, SLIDING

from buddymoe_ray.models.families import FAMILIES

__all__ = ["CASES", "ORIGINAL", "REFUSED", "WINDOW"]

ORIGINAL = 30  # crossed by the short prompt while it decodes, by the long one in its prompt
WINDOW = 8


def scaled(kind: str, dim: int, **more: Any) -> dict[str, Any]:
    """`rope_parameters` of a kind, for rotary heads of `dim`."""
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 10000.0, **more}
    if kind in ("linear", "dynamic", "yarn", "llama3"):
        rope["factor"] = 4.0
    if kind in ("yarn", "llama3", "longrope"):
        rope["original_max_position_embeddings"] = ORIGINAL
    if kind == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * (dim // 2), "long_factor": [2.0 + k for k in range(dim // 2)]}
    return {"rope_parameters": rope}


def window(**fields: Any) -> dict[str, Any]:
    return {"sliding_window": WINDOW, **fields}


def two_ropes(kind: str) -> dict[str, Any]:
    """Of the kind in full layers alone."""
    plain = {"rope_type": "default", "rope_theta": 5000.0}
    return {"rope_parameters": {FULL: scaled(kind, 12)["rope_parameters"], SLIDING: plain}}


PHI = {"short_mscale": 1.1, "long_mscale": 1.3, "original_max_position_embeddings": ORIGINAL}
DYNAMIC = {**scaled("dynamic", 12), "max_position_embeddings": ORIGINAL}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in FAMILIES},
    "mixtral, no window": ("mixtral", {"sliding_window": None}),
    "mixtral, all outputs": (
        "mixtral",
        {"output_router_logits": True, "output_hidden_states": True, "use_cache": False},
    ),
    "phimoe, window in the mask alone": ("phimoe", window()),
    "qwen2_moe, window": ("qwen2_moe", window(use_sliding_window=True)),
    "qwen2_moe, window in one layer": ("qwen2_moe", window(use_sliding_window=True, max_window_layers=1)),
    "qwen2_moe, window off": ("qwen2_moe", window(use_sliding_window=False)),
    "qwen2_moe, layer types": (
        "qwen2_moe",
        window(use_sliding_window=True, layer_types=[FULL, SLIDING, SLIDING]),
    ),
    "qwen3_moe, window": ("qwen3_moe", window(use_sliding_window=True)),
    "qwen3_moe, window off": ("qwen3_moe", window(use_sliding_window=False)),
    "dots1, window above a layer": ("dots1", window(max_window_layers=1)),
    "dots1, layer types": ("dots1", window(layer_types=[SLIDING, FULL, SLIDING])),
    "gpt_oss, sinks without window": ("gpt_oss", {"layer_types": [FULL] * 3}),
    "minimax, window that decode steps forget": ("minimax", window()),
    "olmoe, window that prompts forget": ("olmoe", window()),
    "olmoe, clipped": ("olmoe", {"clip_qkv": 0.5, "norm_topk_prob": True, "tie_word_embeddings": True}),
    "deepseek_v2, greedy, no q rank": ("deepseek_v2", {"topk_method": "greedy", "q_lora_rank": None}),
    "deepseek_v3, not interleaved": ("deepseek_v3", {"rope_interleave": False, "q_lora_rank": None}),
    "glm4_moe, groups": ("glm4_moe", {"n_group": 2, "topk_group": 1, "partial_rotary_factor": 1.0}),
    "dots1, groups": ("dots1", {"n_group": 4, "topk_group": 2}),
    "minimax_m2, partial rotary": ("minimax_m2", {"rotary_dim": 4}),
    "hunyuan_v1_moe, alpha": (
        "hunyuan_v1_moe",
        scaled("dynamic", 12, alpha=100.0) | {"moe_topk": [2, 2, 2]},
    ),
    "ernie4_5_moe, untied": ("ernie4_5_moe", {"tie_word_embeddings": False, "moe_layer_interval": 2}),
    "lfm2_moe, untied": ("lfm2_moe", {"tie_embedding": False}),
    "qwen3_moe, linear": ("qwen3_moe", scaled("linear", 16)),
    "deepseek_v3, yarn": ("deepseek_v3", scaled("yarn", 8, mscale=1.0, mscale_all_dim=0.7)),
    "glm4_moe, llama3": ("glm4_moe", scaled("llama3", 6)),
    "flex_olmo, proportional": ("flex_olmo", scaled("proportional", 12, partial_rotary_factor=0.5)),
    "minimax, dynamic": ("minimax", DYNAMIC),
    "olmoe, dynamic": ("olmoe", DYNAMIC),
    "granitemoe, longrope": ("granitemoe", scaled("longrope", 12)),
    "qwen3_next, longrope": ("qwen3_next", scaled("longrope", 4)),
    "phimoe, longrope": ("phimoe", scaled("longrope", 12, **PHI)),
    "phimoe, linear with mscale": ("phimoe", scaled("linear", 12, **PHI)),
    "afmoe, no shared experts": ("afmoe", {"num_shared_experts": 0, "mup_enabled": False}),
    "bailing_hybrid, another gate": ("bailing_hybrid", {"kda_safe_gate": False, "moe_renormalize": False}),
    "cohere2_moe, sigmoid, summed": (
        "cohere2_moe",
        {"expert_selection_fn": "sigmoid", "shared_expert_combination_strategy": "sum", "norm_topk_prob": False},
    ),
    "cohere2_moe, dense first": ("cohere2_moe", {"first_k_dense_replace": 1, "prefix_dense_intermediate_size": 40}),
    "cohere2_moe, untied": ("cohere2_moe", {"num_shared_experts": 0, "tie_word_embeddings": False}),
    "deepseek_v4, sigmoid, limited": ("deepseek_v4", {"scoring_func": "sigmoid", "swiglu_limit": 0.5}),
    "exaone_moe, no window": ("exaone_moe", {"layer_types": [FULL] * 3, "norm_topk_prob": False}),
    "flint, other layers sparse": ("flint", {"decoder_sparse_step": 2, "layer_types": [FULL] * 3}),
    "gemma4_text, keys are values": ("gemma4_text", {"attention_k_eq_v": True, "final_logit_softcapping": None}),
    "gemma4_text, keys of other layers": ("gemma4_text", {"num_kv_shared_layers": 2}),
    "gemma4_text, no inputs by layer": (
        "gemma4_text",
        {"hidden_size_per_layer_input": 0, "use_bidirectional_attention": "vision", "tie_word_embeddings": False},
    ),
    "glm4_moe_lite, no q rank": ("glm4_moe_lite", {"q_lora_rank": None, "rope_interleave": False}),
    "glm_moe_dsa, all are chosen": ("glm_moe_dsa", {"index_topk": 64, "indexer_types": ["full"] * 3}),
    "granitemoe_swa, one theta": ("granitemoe_swa", {"layer_rope_theta": None, "shared_intermediate_size": 0}),
    "granitemoehybrid, rope": ("granitemoehybrid", {"position_embedding_type": "rope", "mamba_n_groups": 2}),
    "hy_v3, biases": ("hy_v3", {"enable_moe_fp32_combine": False, "mlp_bias": True, "attention_bias": True}),
    "kimi_linear, q rank": ("kimi_linear", {"q_lora_rank": 24, "moe_renormalize": False}),
    "laguna, no gate": ("laguna", {"gating": False, "moe_router_logit_softcapping": 2.0}),
    "laguna, gates by element": ("laguna", {"gating": "per-element", "attention_bias": True}),
    "laguna, longrope in some layers": ("laguna", two_ropes("longrope")),
    "mellum, llama3 in some layers": ("mellum", two_ropes("llama3")),
    "mimo_v2_flash, yarn in some layers": ("mimo_v2_flash", {**two_ropes("yarn"), "attention_value_scale": None}),
    "minimax_m3_vl_text, limited": ("minimax_m3_vl_text", {"swiglu_limit": 0.5, "index_local_blocks": 2}),
    "mistral4, no q rank": ("mistral4", {"q_lora_rank": None, "first_k_dense_replace": 0}),
    "nemotron_h, latent experts": ("nemotron_h", {"moe_latent_size": 16, "norm_topk_prob": False}),
    "nemotron_h, biases": ("nemotron_h", {"use_bias": True, "mamba_proj_bias": True, "attention_bias": True}),
    "qwen3_5_moe_text, mrope": (
        "qwen3_5_moe_text",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0]}},
    ),
    "zaya, no windows": ("zaya", {"layer_types": ["hybrid"] * 3, "sliding_window": None}),
}

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("qwen2_moe", window(use_sliding_window=False, layer_types=[SLIDING, FULL, FULL]), "sliding_window is 0"),
    ("olmoe", {"is_causal": False}, "is_causal false"),
    ("dots1", {"layer_types": ["chunked_attention", FULL, FULL]}, "chunked_attention"),
    ("laguna", two_ropes("dynamic"), "rope_type of full_attention .*'dynamic'"),
    ("gemma4_text", {"use_bidirectional_attention": "all"}, "is_causal false"),
    ("gemma4_text", {"enable_moe_block": False}, "no routed experts"),
    ("granitemoehybrid", {"num_local_experts": 0}, "num_local_experts"),
    ("granitemoehybrid", {"layer_types": [LINEAR] * 3}, "layer_types"),
    ("phimoe", scaled("linear", 12, short_mscale=1.1, long_mscale=1.3), "original_max_position_embeddings"),
]
"""Switches that a family's config knows and that are refused, with what the refusal names."""
