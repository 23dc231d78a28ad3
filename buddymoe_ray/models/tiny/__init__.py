"""builtin:tiny: a small, well trained Qwen3-MoE that ships with the package; importing this package imports no torch.

The code that trained it is not installed: `tests/tiny_training` of the repository.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["path"]


def path() -> Path:
    """The folder of the shipped checkpoint: weights, tokenizer, model card and held-out text."""
    return Path(__file__).resolve().parent / "weights"
