"""A model's name -> the folder of its checkpoint: `builtin:tiny`, a local folder, or a hub id that is downloaded once.

Knows no network: `hub` downloads. Neighbours: every command and the engine start here.

GGUF is refused: of these families transformers 5.23 maps four (qwen2_moe, qwen3_moe, gpt_oss, minimax_m2), and its
reader (gguf 0.19) goes on for ever over 30 bytes that announce an array of 2**40 numbers.
"""

from __future__ import annotations

import re
from pathlib import Path

from buddymoe_ray.errors import CheckpointError, UnsupportedModel
from buddymoe_ray.models.schemes import INSTEAD
from buddymoe_ray.models.tensor_index import has_weights
from buddymoe_ray.models.tiny import path as tiny_path

__all__ = ["BUILTIN_TINY", "is_builtin", "resolve_model"]

BUILTIN_TINY = "builtin:tiny"
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def is_builtin(folder: Path) -> bool:
    """Whether `folder` is the checkpoint shipped with this package."""
    return folder.resolve() == tiny_path().resolve()


def resolve_model(name: str, *, cache_dir: Path | None = None, progress: bool = False) -> Path:
    """Folder of the model `name`; a hub id is downloaded unless it is cached.

    Args:
        cache_dir: hub cache; None is huggingface_hub's own (`HF_HOME`).
        progress: draw download bars on stderr.

    Raises:
        CheckpointError: there is no such folder or hub id, the hub cannot be reached, or the disk is full.
        UnsupportedModel: GGUF, or the hub's config.json names a family that cannot be served; no weights were
            downloaded.
    """
    if name == BUILTIN_TINY:
        if not (tiny_path() / "config.json").exists():
            raise CheckpointError(f"{tiny_path()} is missing from this installation. hint: install the package again")
        return tiny_path()
    if name.startswith("builtin:"):
        raise CheckpointError(f"model is {name!r}, must be {BUILTIN_TINY}, the only one shipped. hint: check spelling")
    folder = Path(name).expanduser()
    if folder.suffix.lower() == ".gguf" or (folder.is_dir() and not has_weights(folder) and any(folder.glob("*.gguf"))):
        raise UnsupportedModel(f"model {name!r} is GGUF, must be a folder of safetensors. {INSTEAD}")
    if name and folder.is_dir():
        return folder.resolve()
    if name and folder.exists():
        raise CheckpointError(f"model is the file {name!r}, must be the folder around it. hint: pass {folder.parent}")
    if not _HUB_ID.fullmatch(name):
        raise CheckpointError(
            f"model is {name!r}, must be {BUILTIN_TINY}, a folder that exists, or a hub id (owner/name). "
            "hint: check the path"
        )
    from buddymoe_ray.models.hub import download  # late: a local model needs no network client

    return download(name, cache_dir=cache_dir, progress=progress)
