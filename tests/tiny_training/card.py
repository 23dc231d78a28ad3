"""The training record of builtin:tiny and the model card made from it.

`card.md.jinja` holds the words; every figure in the card is one in training.json.
Neighbours: export.py fills the record and writes both files.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, Template

from buddymoe_ray.engine.accuracy import Accuracy
from tiny_training.corpus import HELDOUT_PERMILLE
from tiny_training.evaluate import Evaluation, LayerBalance, Score
from tiny_training.trainer import TrainConfig

_EVALUATED = ("heldout", "shipped_text")


@dataclass(frozen=True, kw_only=True)
class TrainingRecord:
    """What was trained, on what, for how long, and how well it does on files and tasks it never saw.

    `tasks` are right answers by family and in `all`, in per cent; `began` is the record of the weights it began from.
    """

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
    task_tokens: int = 0
    tasks: dict[str, Accuracy] = field(default_factory=dict)
    began: TrainingRecord | None = None

    @classmethod
    def read(cls, folder: Path) -> TrainingRecord:
        """What export.py wrote beside a model."""
        return cls._from(json.loads((folder / "training.json").read_text(encoding="utf-8")))

    @classmethod
    def _from(cls, written: dict[str, Any]) -> TrainingRecord:
        made = {name: {context: _evaluation(at) for context, at in written[name].items()} for name in _EVALUATED}
        made["commands"] = tuple(written["commands"])
        if written.get("tasks"):
            made["tasks"] = {family: Accuracy(**found) for family, found in written["tasks"].items()}
        if written.get("began"):
            made["began"] = cls._from(written["began"])
        return cls(**written | made)


def _evaluation(found: dict[str, Any]) -> Evaluation:
    scores = {kind: Score(**score) for kind, score in found["scores"].items()}
    balance = tuple(LayerBalance(**layer) for layer in found["router_balance"])
    return Evaluation(**found | {"scores": scores, "total": Score(**found["total"]), "router_balance": balance})


def model_card(record: TrainingRecord, config: TrainConfig) -> str:
    """README.md of the shipped folder."""
    template = Path(__file__).with_name("card.md.jinja").read_text(encoding="utf-8")
    made = Template(template, trim_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined)
    return made.render(record=record, config=config, heldout_permille=HELDOUT_PERMILLE)
