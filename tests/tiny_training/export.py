"""Turn a training run into the shipped folder: Hugging Face files, held-out text, training.json and model card.

    python -m tiny_training.export --run DIR [--checkpoint DIR/last.pt] [--to DIR] [--skip-eval]

Knows of the training loop only what it left in its folder. Invariant: the held-out files are files that were never
trained on.
Neighbours: train.py writes the checkpoint and history.jsonl, evaluate.py the scores, card.py the model card.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from transformers import GenerationConfig
from transformers import __version__ as transformers_version

from buddymoe_ray.commands.eval import TASKS
from buddymoe_ray.config import EngineConfig
from buddymoe_ray.engine.accuracy import Accuracy, TaskResult, evaluate_tasks
from buddymoe_ray.models.resolve import resolve_model
from buddymoe_ray.models.tiny import path
from buddymoe_ray.tasks import held_out
from tiny_training import corpus
from tiny_training.card import TrainingRecord, model_card
from tiny_training.evaluate import Evaluation, Evaluator, evaluate_texts, load_model
from tiny_training.task_stream import ROW
from tiny_training.tokenizer import END_OF_TEXT, FILES, IM_END, load_tokenizer
from tiny_training.trainer import TrainConfig, build_model

HELDOUT_BYTES: dict[corpus.Kind, int] = {"python": 200_000, "docs": 70_000}
HELDOUT_LARGEST: dict[corpus.Kind, int] = {"python": 32_000, "docs": 20_000}
CONTEXTS = (512, 1024)
_PLACES = {"stdlib", "docs"}  # where a machine keeps the text: not part of the command


@dataclass(frozen=True, kw_only=True)
class History:
    """The options of the last start, each start as a command line, and what the kept steps took and learned from."""

    config: TrainConfig
    commands: tuple[str, ...]
    seconds: float
    tokens: int
    task_tokens: int


def read_history(run: Path) -> History:
    """What train.py noted in `run`: steps that a later start did again count once."""
    entries = [json.loads(line) for line in (run / "history.jsonl").read_text(encoding="utf-8").splitlines()]
    starts = [at for at, entry in enumerate(entries) if entry["event"] == "start"]
    default = TrainConfig(out=run)
    config, commands, seconds, tokens, task_tokens = default, [], 0.0, 0, 0
    for low, high in zip(starts, [*starts[1:], len(entries)], strict=True):
        start, last = entries[low], entries[high - 1]
        config = replace(default, **start["options"])
        config = replace(config, stdlib=Path(config.stdlib), docs=Path(config.docs))
        options = [
            f" --{name.replace('_', '-')}" + ("" if value is True else f" {value}")
            for name, value in start["options"].items()
            if str(value) != str(getattr(default, name)) and name not in _PLACES
        ]
        commands.append(f"python -m tiny_training.train --out DIR{''.join(options)}  # from step {start['step']}")
        steps = last["step"] - start["step"]
        seconds += last["time"] - start["time"]
        tokens += steps * config.batch_tokens
        task_tokens += steps * config.task_rows * ROW
    return History(config=config, commands=tuple(commands), seconds=seconds, tokens=tokens, task_tokens=task_tokens)


def export_weights(config: TrainConfig, weights: dict[str, torch.Tensor], target: Path) -> None:
    """Write config, generation config, bf16 weights and tokenizer; whoever has mapped the old files keeps them."""
    model = build_model(config)
    model.load_state_dict(weights)
    tokenizer = load_tokenizer(config.out / "data")
    ends = [tokenizer.convert_tokens_to_ids(token) for token in (IM_END, END_OF_TEXT)]
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=ends[1])
    with tempfile.TemporaryDirectory(dir=target) as name:
        model.bfloat16().save_pretrained(name)
        for file in FILES:
            shutil.copy(config.out / "data" / file, name)
        for written in Path(name).iterdir():
            written.chmod(0o644)
            os.replace(written, target / written.name)


def export_heldout(documents: Sequence[corpus.Document], target: Path) -> None:
    """Write python.txt and docs.txt: whole held-out files, one after the other."""
    target.mkdir(parents=True, exist_ok=True)
    for kind in HELDOUT_BYTES:
        chosen = corpus.sample_heldout(documents, kind, HELDOUT_BYTES[kind], HELDOUT_LARGEST[kind])
        (target / f"{kind}.txt").write_text("".join(d.text for d in chosen), encoding="utf-8", newline="")


def make_record(
    config: TrainConfig, step: int, target: Path, heldout: Sequence[corpus.Document], began: TrainingRecord | None
) -> TrainingRecord:
    """Evaluate the exported folder and gather all that the model card says."""
    history = read_history(config.out)
    stored = np.load(config.out / "data" / "tokens.npz")
    texts = [(kind, [d.text for d in heldout if d.kind == kind]) for kind in HELDOUT_BYTES]
    shipped = [(kind, [(target / "heldout" / f"{kind}.txt").read_text(encoding="utf-8")]) for kind in HELDOUT_BYTES]
    model, tokenizer = load_model(target), load_tokenizer(target)

    def judge(texts: Iterable[tuple[str, list[str]]], context: int) -> Evaluation:
        return evaluate_texts(Evaluator(model, tokenizer, context=context, stride=context // 2), texts)

    return TrainingRecord(
        parameters=sum(p.numel() for p in model.parameters()),
        steps=step,
        decay_steps=config.decay_steps,
        tokens=history.tokens,
        corpus_tokens=int(stored["ends"][-1]),
        corpus_documents=len(stored["ends"]),
        seconds=round(history.seconds),
        commands=history.commands,
        heldout={f"context_{context}": judge(texts, context) for context in CONTEXTS},
        shipped_text={f"context_{context}": judge(shipped, context) for context in CONTEXTS},
        torch=torch.__version__,
        transformers=transformers_version,
        task_tokens=history.task_tokens,
        tasks=judge_tasks(target) if config.task_rows else {},
        began=began,
    )


def judge_tasks(target: Path) -> dict[str, Accuracy]:
    """Right answers of the fully resident model, in all and by family."""
    (result,) = evaluate_tasks([EngineConfig(model=str(target), memory="100%", dtype="float32")], list(held_out(TASKS)))
    assert isinstance(result, TaskResult), "an exact engine keeps no stand-ins"
    return {"all": result.total, **result.families}


def main(argv: Sequence[str] | None = None) -> None:
    """Export, evaluate, record."""
    parser = argparse.ArgumentParser(prog="python -m tiny_training.export", description="Export a run.")
    parser.add_argument("--run", type=Path, required=True, help="the --out folder of the training run")
    parser.add_argument("--checkpoint", type=Path, help="default: last.pt of the run")
    parser.add_argument("--to", type=Path, default=path(), help="default: the folder inside the package")
    parser.add_argument("--skip-eval", action="store_true", help="write no training.json and no model card")
    options = parser.parse_args(argv)
    config = read_history(options.run).config
    options.to.mkdir(parents=True, exist_ok=True)
    began = TrainingRecord.read(resolve_model(config.init)) if config.init else None  # before it is written over
    state = torch.load(options.checkpoint or options.run / "last.pt", map_location="cpu", weights_only=True)
    export_weights(config, state["model"], options.to)
    heldout = corpus.collect(config.stdlib, config.docs)["heldout"]
    export_heldout(heldout, options.to / "heldout")
    if not options.skip_eval:
        record = make_record(config, state["step"], options.to, heldout, began)
        (options.to / "training.json").write_text(json.dumps(asdict(record), indent=2) + "\n", encoding="utf-8")
        (options.to / "README.md").write_text(model_card(record, config), encoding="utf-8")


if __name__ == "__main__":
    main()
