"""builtin:tiny: a small, well trained Qwen3-MoE that ships with the package, and the code that trained it.

`path()` is all that serving needs; importing this package imports no torch.
Training: `python -m buddymoe_ray.models.tiny.train`, then `.evaluate` and `.export`.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["path"]


def path() -> Path:
    """The folder of the shipped checkpoint: weights, tokenizer, model card and held-out text."""
    return Path(__file__).resolve().parent / "weights"
