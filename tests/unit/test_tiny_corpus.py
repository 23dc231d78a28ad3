"""The corpus of builtin:tiny: splits are disjoint by file and content, deterministic, and chat documents render."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_training import corpus
from tiny_training.tokenizer import encode_documents, load_tokenizer, render

from buddymoe_ray.errors import ConfigError
from buddymoe_ray.models.tiny import path

FUNCTION = '''class Box:
    def grow(self, by, *more, limit=3, **rest):
        """Grow the box by some amount.

        Never beyond the limit.
        """
        self.size += by
        return self.size
'''


@pytest.fixture
def trees(tmp_path: Path) -> tuple[Path, Path]:
    """A small standard library with a duplicate, an undecodable file and site-packages, and some documentation."""
    stdlib, docs = tmp_path / "lib", tmp_path / "docs"
    for folder in (stdlib / "site-packages", stdlib / "pkg", docs / "library"):
        folder.mkdir(parents=True)
    for number in range(300):
        (stdlib / "pkg" / f"module{number}.py").write_text(f"value = {number}\n")
    (stdlib / "copy.py").write_text("value = 7\n\n")
    (stdlib / "bad.py").write_bytes(b"name = '\xff\xfe'\n")
    (stdlib / "empty.py").write_text("\n")
    (stdlib / "box.py").write_text(FUNCTION)
    (stdlib / "site-packages" / "foreign.py").write_text("foreign = True\n")
    for number in range(100):
        (docs / "library" / f"page{number}.rst.txt").write_text(f"Page {number}\n=======\n")
    return stdlib, docs


def test_splits_are_disjoint_by_file_and_by_content(trees: tuple[Path, Path]) -> None:
    splits = corpus.collect(*trees)
    names = {split: {(d.kind, d.name) for d in documents} for split, documents in splits.items()}
    texts = {split: {d.text.strip() for d in documents} for split, documents in splits.items()}
    assert not names["train"] & names["heldout"]
    assert not texts["train"] & texts["heldout"]
    assert {d.kind for d in splits["heldout"]} == {"python", "docs"}
    assert sum(map(len, names.values())) == 300 + 1 + 100  # the copy, the bad and the empty file are left out


def test_split_is_deterministic_and_depends_on_the_path_alone(trees: tuple[Path, Path]) -> None:
    first, second = corpus.collect(*trees), corpus.collect(*trees)
    assert first == second
    stdlib, docs = trees
    (stdlib / "new.py").write_text("unrelated = 1\n")
    assert [d for d in corpus.collect(stdlib, docs)["heldout"] if d.name != "new.py"] == first["heldout"]


def test_foreign_and_undecodable_files_are_left_out(trees: tuple[Path, Path]) -> None:
    names = {d.name for documents in corpus.collect(*trees).values() for d in documents}
    assert not names & {"site-packages/foreign.py", "bad.py", "empty.py"}


def test_missing_folder_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"must be an existing folder\. hint: "):
        corpus.collect(tmp_path / "nowhere", tmp_path)


def test_chat_documents_ask_for_documented_functions() -> None:
    documents = [corpus.Document(kind="python", name="box.py", text=FUNCTION)]
    (chat,) = corpus.chat_documents(documents, 10_000)
    assert (
        chat.question == "Write a Python function `grow(self, by, *more, limit, **rest)`: Grow the box by some amount."
    )
    assert chat.text.startswith("def grow(")
    assert "\n    self.size += by\n" in chat.text
    assert corpus.chat_documents(documents, 10) == []


def test_chat_documents_render_through_the_template() -> None:
    tokenizer = load_tokenizer(path())
    document = corpus.Document(kind="chat", name="x", text="def one():\n    return 1", question="Write one.")
    assert render(document, tokenizer) == (
        "<|im_start|>user\nWrite one.<|im_end|>\n"
        "<|im_start|>assistant\n```python\ndef one():\n    return 1\n```<|im_end|>\n"
    )
    (ids,) = encode_documents([document], tokenizer)
    names = tokenizer.convert_ids_to_tokens(ids.tolist())
    assert names.count("<|im_start|>") == 2
    assert names.count("<|im_end|>") == 2
    assert names[-1] == "<|endoftext|>"


def test_heldout_sample_is_whole_varied_files_within_the_budget(trees: tuple[Path, Path]) -> None:
    heldout = corpus.collect(*trees)["heldout"]
    chosen = corpus.sample_heldout(heldout, "python", 100, largest=11)
    assert chosen == corpus.sample_heldout(list(reversed(heldout)), "python", 100, largest=11)
    assert 0 < sum(len(d.text) for d in chosen) <= 100
    assert max(len(d.text) for d in chosen) <= 11
    assert set(chosen) <= set(heldout)
