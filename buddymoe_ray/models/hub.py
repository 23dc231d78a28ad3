"""Downloads a checkpoint from the hub: config and tokenizer first, then the weights that transformers would.

No pickles and no code are downloaded. An unsupported family is refused before its weights are fetched. Honours
HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE through huggingface_hub, which also resumes what was cut off.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from buddymoe_ray.errors import CheckpointError
from buddymoe_ray.models.schemes import served_family
from buddymoe_ray.models.tensor_index import SINGLE_NAME, named_weights, shard_names, weights_name

__all__ = ["SMALL_FILES", "download"]

SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")
_SUBFOLDERS = ("*/*",)  # other formats of the same weights live there
_TEMPLATES = "additional_chat_templates/*.jinja"  # which conversations with tools may have


def download(repo: str, *, cache_dir: Path | None = None, progress: bool = False) -> Path:
    """Folder of the newest snapshot of `repo`, complete; without a network, of the cached one.

    Raises:
        CheckpointError: unknown or gated repository, no network and no cache, or a full disk.
        UnsupportedModel: a family or a quantisation that cannot be served.
    """
    with _bars(progress), _readable_errors(repo, cache_dir):
        small, elsewhere = list(SMALL_FILES), list(_SUBFOLDERS)
        folder = Path(snapshot_download(repo, cache_dir=cache_dir, allow_patterns=small, ignore_patterns=elsewhere))
        if not (folder / "config.json").exists():
            raise CheckpointError(
                f"{repo} has no config.json, must have one. hint: is it a model repository, of more than GGUF?"
            )
        served_family(folder, f"{repo}'s config.json")
        for names in _weight_files(folder):
            _check_space(repo, folder.name, names, cache_dir)
            snapshot_download(repo, revision=folder.name, cache_dir=cache_dir, allow_patterns=[*names, _TEMPLATES])
    if not any((folder / name).exists() for name in names):
        raise CheckpointError(f"{repo} has no {names[0]}, must have safetensors weights. hint: choose another release")
    return folder


def _weight_files(folder: Path) -> Iterator[list[str]]:
    """What to fetch, in transformers' order: the single file, where there is none the shards of the index."""
    yield [named_weights(folder) or SINGLE_NAME]
    name = weights_name(folder)
    if name is not None and name.endswith(".json"):
        yield shard_names(folder / name)


def _check_space(repo: str, revision: str, names: list[str], cache_dir: Path | None) -> None:
    """Refuse before the first byte what the disk cannot take; silent without a network, where nothing is fetched."""
    missing = {n for n in names if not isinstance(try_to_load_from_cache(repo, n, cache_dir, revision), str)}
    if not missing or constants.HF_HUB_OFFLINE:
        return
    sizes = {f.path: getattr(f, "size", 0) for f in HfApi().list_repo_tree(repo, revision=revision)}
    needed = sum(sizes.get(name, 0) for name in missing)
    cache = Path(cache_dir or constants.HF_HUB_CACHE)
    free = shutil.disk_usage(next(p for p in (cache, *cache.resolve().parents) if p.exists())).free
    if free < needed:
        raise CheckpointError(
            f"{cache} has {free / 1e9:.2f} GB free, must have {needed / 1e9:.2f} GB for {repo}. "
            "hint: free some space, or set HF_HOME to a larger disk"
        )


@contextmanager
def _readable_errors(repo: str, cache_dir: Path | None) -> Iterator[None]:
    try:
        yield
    except GatedRepoError as error:
        raise CheckpointError(
            f"{repo} is gated, must be open to you. hint: accept its terms on the hub and set HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{repo} is unknown to {constants.ENDPOINT} (or private). "
            "hint: check spelling; set HF_TOKEN if it is private"
        ) from error
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{repo} is not completely cached and {constants.ENDPOINT} cannot be reached or refused a file "
            f"({_first_line(error.__cause__ or error)}). "
            "hint: check the network, unset HF_HUB_OFFLINE, or pass a local folder"
        ) from error
    except (HfHubHTTPError, HFValidationError) as error:
        raise CheckpointError(f"{repo} cannot be downloaded ({error}). hint: check the name and try again") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            where = cache_dir or constants.HF_HUB_CACHE
            raise CheckpointError(
                f"{where} is full, must hold {repo}. hint: free some space, or set HF_HOME to a larger disk"
            ) from error
        raise CheckpointError(f"{repo} cannot be downloaded ({error}). hint: check network and disk") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def _bars(wanted: bool) -> Iterator[None]:
    hide = not wanted and not are_progress_bars_disabled()
    if hide:
        disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            enable_progress_bars()
