"""The text that builtin:tiny learns: Python's standard library and the Python documentation, both PSF-2.0.

Collects files, drops duplicates by content, splits by file (a hash of the relative path decides, so the split is the
same everywhere) and derives chat documents from the training files' own functions. Knows nothing of tokens or
tensors.
Invariant: no file, and no content, is in both splits. Neighbour: tokenizer.py turns documents into token ids.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from buddymoe_ray.errors import ConfigError

Kind = Literal["python", "docs", "chat"]
Split = Literal["train", "heldout"]

HELDOUT_PERMILLE = 30
DEFAULT_STDLIB = Path(sysconfig.get_paths()["stdlib"])
DEFAULT_DOCS = Path("/usr/share/doc/python3.11/html/_sources")
# encodings/ is generated tables that would flatter the held-out score; pydoc_data/ repeats (would leak) the docs.
SKIPPED_PARTS = frozenset({"site-packages", "dist-packages", "encodings", "pydoc_data", "__pycache__"})
CHAT_MAX_CHARS = 1500


@dataclass(frozen=True, kw_only=True)
class Document:
    """One source file (python, docs) or one derived question with its answer (chat)."""

    kind: Kind
    name: str
    text: str
    question: str = ""


def split_of(kind: Kind, name: str) -> Split:
    """Decide by the relative path alone; about 3 % of the files are held out."""
    digest = hashlib.sha256(f"{kind}/{name}".encode()).digest()
    return "heldout" if int.from_bytes(digest[:8], "big") % 1000 < HELDOUT_PERMILLE else "train"


def read_tree(root: Path, pattern: str, kind: Kind) -> Iterator[Document]:
    """Yield every readable UTF-8 file under `root` in path order; empty and badly encoded files are left out."""
    if not root.is_dir():
        hint = "install python3.11-doc or pass --docs"
        raise ConfigError(f"corpus folder is {root}, must be an existing folder. hint: {hint}")
    for path in sorted(root.rglob(pattern)):
        relative = path.relative_to(root)
        if SKIPPED_PARTS.intersection(relative.parts) or not path.is_file():
            continue
        try:
            text = path.read_bytes().decode("utf-8").replace("\r\n", "\n")
        except UnicodeDecodeError:
            continue
        if text.strip():
            yield Document(kind=kind, name=relative.as_posix(), text=text)


def dedupe(documents: Iterable[Document]) -> list[Document]:
    """Keep the first document of each content (compared without surrounding white space)."""
    seen: set[str] = set()
    kept: list[Document] = []
    for document in documents:
        digest = hashlib.sha256(document.text.strip().encode()).hexdigest()
        if digest not in seen:
            seen.add(digest)
            kept.append(document)
    return kept


def collect(stdlib: Path, docs: Path) -> dict[Split, list[Document]]:
    """Read both trees, dedupe over their union, split by file."""
    documents = dedupe([*read_tree(stdlib, "*.py", "python"), *read_tree(docs, "*.rst.txt", "docs")])
    splits: dict[Split, list[Document]] = {"train": [], "heldout": []}
    for document in documents:
        splits[split_of(document.kind, document.name)].append(document)
    return splits


def _signature(node: ast.FunctionDef) -> str:
    positional = [*node.args.posonlyargs, *node.args.args]
    names = [a.arg for a in positional]
    if node.args.vararg:
        names.append("*" + node.args.vararg.arg)
    names += [a.arg for a in node.args.kwonlyargs]
    if node.args.kwarg:
        names.append("**" + node.args.kwarg.arg)
    return f"{node.name}({', '.join(names)})"


def chat_documents(documents: Iterable[Document], max_chars: int) -> list[Document]:
    """Questions "Write a Python function ..." whose answers are documented functions and methods of `documents`.

    Deterministic: functions are ordered by the hash of their text and taken until `max_chars` is reached.
    """
    found: dict[str, Document] = {}
    for document in documents:
        if document.kind != "python":
            continue
        try:
            tree = ast.parse(document.text)
        except (SyntaxError, ValueError):
            continue
        lines = document.text.split("\n")
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef):
                continue
            summary = (ast.get_docstring(node) or "").strip().split("\n")[0].strip()
            answer = _dedent(lines[node.lineno - 1 : node.end_lineno], node.col_offset)
            if len(summary) <= 8 or len(answer) > CHAT_MAX_CHARS or answer.count("\n") < 2:
                continue
            question = f"Write a Python function `{_signature(node)}`: {summary}"
            chat = Document(kind="chat", name=f"{document.name}:{node.name}", text=answer, question=question)
            found.setdefault(hashlib.sha256(answer.encode()).hexdigest(), chat)
    chosen: list[Document] = []
    for key in sorted(found):
        max_chars -= len(found[key].text) + len(found[key].question)
        if max_chars < 0:
            break
        chosen.append(found[key])
    return chosen


def _dedent(lines: list[str], columns: int) -> str:
    """Take a function's own indentation off its lines."""
    return "\n".join(line[columns:] if line[:columns].isspace() else line for line in lines)


def sample_heldout(documents: Iterable[Document], kind: Kind, max_bytes: int, largest: int) -> list[Document]:
    """Choose whole held-out files of one kind in hash order, none above `largest` bytes: varied sources."""
    ordered = sorted(
        (d for d in documents if d.kind == kind),
        key=lambda d: hashlib.sha256(f"sample/{d.name}".encode()).hexdigest(),
    )
    chosen: list[Document] = []
    used = 0
    for document in ordered:
        size = len(document.text.encode())
        if size <= largest and used + size <= max_bytes:
            chosen.append(document)
            used += size
    return chosen
