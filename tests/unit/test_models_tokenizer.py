"""The checkpoint's tokenizer loads without running code; none is None; a damaged one is an error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from buddymoe_ray.errors import CheckpointError
from buddymoe_ray.models.tokenizer import TOKENIZER_FILES, load_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    inner = Tokenizer(models.WordLevel({"<unk>": 0, "hello": 1, "world": 2}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>").save_pretrained(tmp_path)
    return tmp_path


def test_tokenizer_is_loaded(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None
    assert tokenizer.encode("hello world moon") == [1, 2, 0]


def test_folder_without_tokenizer_files_has_none(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "olmoe"}')
    assert load_tokenizer(tmp_path) is None


@pytest.mark.parametrize("name", TOKENIZER_FILES)
def test_damaged_tokenizer_is_an_error_not_none(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "olmoe"}')
    (tmp_path / name).write_bytes(b"\x00\x01 not a tokenizer")
    with pytest.raises(CheckpointError, match=r"tokenizer in .* is unusable.*hint"):
        load_tokenizer(tmp_path)


def test_tokenizer_that_asks_for_its_own_code_runs_none_of_it(folder: Path) -> None:
    config = folder / "tokenizer_config.json"
    fields = {**json.loads(config.read_text()), "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    config.write_text(json.dumps(fields))
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    try:
        tokenizer = load_tokenizer(folder)
    except CheckpointError:
        return
    assert tokenizer is not None and type(tokenizer).__module__.startswith("transformers")
