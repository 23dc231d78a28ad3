"""One task: a question, its exact answer and who may learn from it.

A task is in the held-out split when a hash of its family and operands says so, so no seed and no phrasing moves it.
Knows nothing of models or tokens. Neighbours: the families make tasks, generate.py draws them.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

__all__ = ["Split", "Task"]

Split = Literal["train", "heldout"]

_HELDOUT_PERCENT = 10


@dataclass(frozen=True, kw_only=True)
class Task:
    """A question to a model and the one answer that is right.

    `operands` are what makes this task another one than its siblings of `family`. `worked` are lines that a model is
    taught to write before the answer; they are not scored.
    """

    family: str
    operands: tuple[str | int, ...]
    question: str
    answer: str
    worked: str = ""
    system: str = ""

    @property
    def split(self) -> Split:
        """Decided by family and operands alone."""
        digest = hashlib.sha256(repr((self.family, self.operands)).encode()).digest()
        return "heldout" if int.from_bytes(digest[:8], "big") % 100 < _HELDOUT_PERCENT else "train"

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation up to the answer, as chat templates take it."""
        told = [{"role": "system", "content": self.system}] if self.system else []
        return [*told, {"role": "user", "content": self.question}]

    @property
    def taught(self) -> str:
        """What a model learns to say: the worked lines, if any, and the answer."""
        return f"{self.worked}\n{self.answer}" if self.worked else self.answer

    def is_right(self, said: str) -> bool:
        """Exact match, white space around it aside; of an answer that may be worked out, the last line counts."""
        said = said.strip()
        return (said.rpartition("\n")[2] if self.worked else said) == self.answer
