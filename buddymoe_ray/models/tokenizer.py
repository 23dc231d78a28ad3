"""The checkpoint's own tokenizer, or None when it has none (then prompts are token ids and text stays empty).

Never runs code from a checkpoint. Does not know chat or streaming; `engine.detokenize` and `engine.chat` do.
"""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from buddymoe_ray.errors import CheckpointError

__all__ = ["TOKENIZER_FILES", "load_tokenizer"]

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer of the checkpoint in `folder`; None without tokenizer files.

    Raises:
        CheckpointError: tokenizer files are there and cannot be used.
    """
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        return None
    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers and tokenizers raise many kinds for a damaged file
        raise CheckpointError(
            f"the tokenizer in {folder} is unusable ({type(error).__name__}: {error}), must be one that transformers "
            "loads without running code. hint: download tokenizer.json and tokenizer_config.json again"
        ) from error
