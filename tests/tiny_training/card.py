"""The training record of builtin:tiny and the model card made from it.

`card.md.jinja` holds the words; every figure in the card is one in training.json.
Neighbours: export.py fills the record and writes both files.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jinja2 import StrictUndefined, Template

from tiny_training.corpus import HELDOUT_PERMILLE
from tiny_training.evaluate import Evaluation
from tiny_training.trainer import TrainConfig


@dataclass(frozen=True, kw_only=True)
class TrainingRecord:
    """What was trained, on what, for how long, and how well it does on files it never saw."""

    parameters: int
    steps: int
    decay_steps: int
    tokens: int
    corpus_tokens: int
    corpus_documents: int
    seconds: int
    commands: tuple[str, ...]
    heldout: dict[str, Evaluation]
    shipped_text: dict[str, Evaluation]
    torch: str
    transformers: str


def model_card(record: TrainingRecord, config: TrainConfig) -> str:
    """README.md of the shipped folder."""
    template = Path(__file__).with_name("card.md.jinja").read_text(encoding="utf-8")
    made = Template(template, trim_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined)
    return made.render(record=record, config=config, heldout_permille=HELDOUT_PERMILLE)
