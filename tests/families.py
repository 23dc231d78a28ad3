"""Small random checkpoints of every family that can be served, for tests: `build_checkpoint(model_type, folder)`.

Weights are drawn wide enough that routing, norms and attention all matter. Nothing is trained.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_configs import BASE, TINY_CONFIGS
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

__all__ = ["build_checkpoint", "randomise", "stock_logits", "stock_model", "tiny_config"]

torch.set_num_threads(1)  # matrices this small only lose by sharing them out


def tiny_config(model_type: str, **overrides: Any) -> PreTrainedConfig:
    """transformers' config of the family's tiny checkpoint."""
    return AutoConfig.for_model(model_type, **{**BASE, **TINY_CONFIGS[model_type], **overrides})


def stock_model(model_type: str, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random float32 model as transformers builds it, experts eager."""
    torch.manual_seed(seed)
    config = tiny_config(model_type, **overrides)
    auto = AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForImageTextToText
    model: PreTrainedModel = auto.from_config(config, experts_implementation="eager")
    randomise(model)
    return model.eval()


def randomise(model: PreTrainedModel) -> None:
    """Draw its weights and corrections."""
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
