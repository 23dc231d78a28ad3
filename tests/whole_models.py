"""Small random checkpoints of models of more than text, whose text part is one of the families."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from families import randomise, tiny_config
from safetensors.torch import load_file, save_file
from tiny_configs import TINY_CONFIGS
from transformers import AutoConfig, AutoModelForImageTextToText

__all__ = ["WHOLE", "build_whole"]

_TOWER = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
WHOLE: dict[str, tuple[str, dict[str, Any] | None]] = {
    "aria": ("aria_text", {**_TOWER, "image_size": 16, "patch_size": 8}),
    "gemma4": ("gemma4_text", None),
    "kimi_k25": ("deepseek_v3", {**_TOWER, "patch_size": 4}),
    "minimax_m3_vl": ("minimax_m3_vl_text", _TOWER),
    "mistral3": ("mistral4", {**_TOWER, "model_type": "pixtral", "head_dim": 16, "image_size": 16, "patch_size": 8}),
    "qwen3_5_moe": (
        "qwen3_5_moe_text",
        {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 48},
    ),
}
"""The family of the text part, and the sizes of what sees."""


def build_whole(model_type: str, folder: Path) -> Path:
    """Save such a checkpoint in its release's layout; returns the folder."""
    family, tower = WHOLE[model_type]
    text = {**tiny_config(family).to_dict(), **TINY_CONFIGS[family], "model_type": family}
    config = AutoConfig.for_model(
        model_type, text_config=text, vision_config=tower, tie_word_embeddings=text["tie_word_embeddings"]
    )
    torch.manual_seed(4)
    model = AutoModelForImageTextToText.from_config(config, experts_implementation="eager")
    randomise(model)
    model.save_pretrained(folder)
    if model_type == "kimi_k25":  # transformers calls its layers blocks when it saves, the release does not
        path = folder / "model.safetensors"
        tensors = {key.replace("model.blocks.", "model.layers."): tensor for key, tensor in load_file(path).items()}
        save_file(tensors, path, {"format": "pt"})
    return folder
