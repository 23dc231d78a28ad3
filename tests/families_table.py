"""The table of families in deployments/README.md, from the checkpoints and the cases that the tests prove."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from families import tiny_config
from family_cases import CASES, REFUSED
from whole_models import WHOLE

from buddymoe_ray.models.families import CARRYING, FAMILIES
from buddymoe_ray.models.hf_loading import architecture

__all__ = ["families_table", "unserved"]

_KINDS = {
    "sliding_attention": "window",
    "linear_attention": "linear",
    "indexed_attention": "indexed",
    "minimax_m3_sparse": "indexed",
    "compressed_sparse_attention": "compressed",
    "heavily_compressed_attention": "compressed",
    "conv": "convolution",
    "hybrid": "convolved",
    "hybrid_sliding": "convolved window",
    "moe": "",
    "mlp": "",
}


def unserved() -> list[str]:
    """Model folders of transformers that route to experts and hold no family that is served."""
    folders = sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py"))
    routed = [path.parent.name for path in folders if "use_experts_implementation" in path.read_text()]
    served = {name.removesuffix("_text") for name in FAMILIES} | set(WHOLE)
    return [name for name in routed if name not in served]


def families_table() -> str:
    """Every family that is served, and the names of those that are not."""
    rows = ["| `model_type` | class | attention | rows | switches proven | refused |", "|---|---|---|---|---|---|"]
    for name, family in FAMILIES.items():
        inside = [f"in `{whole}`" for whole, (part, _) in WHOLE.items() if part == name]
        proven = [case.partition(", ")[2] for case, (own, fields) in CASES.items() if own == name and fields]
        refused = [named.replace(".*", "") for own, _, named in REFUSED if own == name]
        config = tiny_config(name)
        columns = (
            ", ".join([f"`{name}`", *inside]),
            architecture(config).removesuffix("ForCausalLM"),
            _attention(config),
            "solo" if not family.packed else "packed, states" if name in CARRYING else "packed",
            "; ".join(proven) or "–",
            "; ".join(refused) or "–",
        )
        rows.append(f"| {' | '.join(columns)} |")
    return "\n".join([*rows, "", f"Refused by their `model_type`: {', '.join(unserved())}."])


def _attention(config: Any) -> str:
    types = list(getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ["full"])
    if getattr(config, "sliding_window", None) and types == ["full"]:
        types = ["window"]
    kinds = [_KINDS.get(kind, kind.replace("_attention", "")) for kind in types]
    if getattr(config, "kv_lora_rank", None):
        kinds.append("latent")
    return ", ".join(dict.fromkeys(kind for kind in kinds if kind))
