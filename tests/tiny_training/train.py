"""Train builtin:tiny on two CPU cores: data-parallel ranks, Muon and AdamW, warmup-stable-decay schedule, resumable.

    python -m tiny_training.train --out DIR --steps N --decay-steps M --seed 0 --ranks 2

Start the same command again after a kill and the run goes on. Because the learning rate is flat until the decay,
--steps may be decided late, by starting again with another value. Knows nothing of the model.
Neighbours: corpus.py and tokenizer.py make the tokens, trainer.py does the steps, evaluate.py and export.py come
after.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from buddymoe_ray.errors import ConfigError
from buddymoe_ray.models.resolve import resolve_model
from tiny_training import corpus, tokenizer
from tiny_training.evaluate import load_model
from tiny_training.trainer import Figures, TrainConfig, Trainer


def prepare(config: TrainConfig) -> tuple[list[np.ndarray], PreTrainedTokenizerBase]:
    """Collect, tokenize and cache the training tokens under out/data."""
    data = config.out / "data"
    if not (data / "tokens.npz").exists():
        data.mkdir(parents=True, exist_ok=True)
        documents = corpus.collect(config.stdlib, config.docs)["train"]
        if config.init:
            for file in tokenizer.FILES:
                shutil.copy(resolve_model(config.init) / file, data)
        else:
            tokenizer.save_tokenizer(tokenizer.train_tokenizer((d.text for d in documents), config.vocab), data)
        learned = tokenizer.load_tokenizer(data)
        chat = corpus.chat_documents(documents, int(config.chat_share * sum(len(d.text) for d in documents)))
        encoded = tokenizer.encode_documents([*documents, *chat], learned)
        partial = data / "tokens.partial.npz"
        np.savez(partial, tokens=np.concatenate(encoded), ends=np.cumsum([len(e) for e in encoded]))
        os.replace(partial, data / "tokens.npz")
    stored = np.load(data / "tokens.npz")
    return np.split(stored["tokens"], stored["ends"][:-1]), tokenizer.load_tokenizer(data)


def note(config: TrainConfig, event: str, step: int) -> None:
    """Append to out/history.jsonl: what was started with which options, and when each checkpoint was written."""
    line: dict[str, object] = {"event": event, "step": step, "time": round(time.time(), 1)}
    if event == "start":
        options = {field.name: getattr(config, field.name) for field in fields(config) if field.name != "out"}
        line["options"] = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    with (config.out / "history.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def run_rank(rank: int, config: TrainConfig) -> None:
    """The training loop of one rank."""
    torch.set_num_threads(1)
    if config.ranks > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{config.out}/rendezvous", rank=rank, world_size=config.ranks
        )
    trainer = Trainer(config, *prepare(config), rank)
    last = config.out / "last.pt"
    if last.exists():
        trainer.load(last)
    elif config.init:
        trainer.start_from(load_model(resolve_model(config.init)))
    leader = Leader(trainer) if rank == 0 else None
    while trainer.step < config.steps:
        if leader:
            leader.before_step()
        figures = trainer.train_step()
        if leader:
            leader.after_step(figures)
    if leader:
        leader.finish()
    if config.ranks > 1:
        dist.barrier()
        dist.destroy_process_group()


class Leader:
    """What rank 0 does beside training: progress, history and checkpoints."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer, self._config = trainer, trainer.config
        self._shown = sys.stderr.isatty()
        self._bar = tqdm(total=trainer.config.steps, initial=trainer.step, disable=not self._shown, unit="step")
        self._saved_at = self._logged_at = time.monotonic()
        self._logged_step, self._sums = trainer.step, np.zeros(len(Figures._fields))
        note(trainer.config, "start", trainer.step)

    def before_step(self) -> None:
        """Keep the state from which the stable phase can go on."""
        if self._trainer.step == self._config.steps - self._config.decay_steps:
            self._trainer.save(self._config.out / "stable.pt")

    def after_step(self, figures: Figures) -> None:
        """Count, log and write a checkpoint when they are due."""
        self._bar.update()
        self._sums += figures
        if self._trainer.step % self._config.log_steps == 0:
            self._log()
        if time.monotonic() - self._saved_at > self._config.checkpoint_seconds:
            self._checkpoint()

    def finish(self) -> None:
        """Close the bar, write the last checkpoint."""
        self._bar.close()
        self._checkpoint()

    def _checkpoint(self) -> None:
        self._trainer.save(self._config.out / "last.pt")
        note(self._config, "checkpoint", self._trainer.step)
        self._saved_at = time.monotonic()

    def _log(self) -> None:
        now, step = time.monotonic(), self._trainer.step
        done = step - self._logged_step
        speed = done * self._config.step_tokens / (now - self._logged_at)
        mean = Figures(*(self._sums / done))
        line = f"loss {mean.nats:.4f} balance {mean.balance:.4f} answers {mean.answer_nats:.4f} tok/s {speed:.0f}"
        self._bar.set_postfix_str(line)
        if not self._shown:
            print(f"{time.strftime('%H:%M:%S')} step {step} {line}", file=sys.stderr, flush=True)
        self._logged_at, self._logged_step = now, step
        self._sums[:] = 0.0


def train(config: TrainConfig) -> None:
    """Prepare the data once, then run all ranks."""
    windows = config.batch_tokens // config.seq_len
    if windows % config.ranks or config.batch_tokens % config.seq_len:
        raise ConfigError(
            f"--batch-tokens is {config.batch_tokens}, must be a multiple of --seq-len x --ranks ="
            f" {config.seq_len * config.ranks}."
            " hint: 8192 fits 512 x 2"
        )
    config.out.mkdir(parents=True, exist_ok=True)
    prepare(config)
    if config.ranks == 1:
        run_rank(0, config)
        return
    (config.out / "rendezvous").unlink(missing_ok=True)
    spawn(run_rank, args=(config,), nprocs=config.ranks)


def parse(argv: Sequence[str] | None = None) -> TrainConfig:
    """Options from the fields of TrainConfig."""
    parser = argparse.ArgumentParser(prog="python -m tiny_training.train", description="Train builtin:tiny.")
    kinds = {"int": int, "float": float, "str": str, "Path": Path}
    for field in fields(TrainConfig):
        name = "--" + field.name.replace("_", "-")
        required = field.name == "out"
        if field.type == "bool":
            parser.add_argument(name, action=argparse.BooleanOptionalAction, default=field.default)
            continue
        parser.add_argument(
            name, type=kinds[str(field.type)], required=required, default=None if required else field.default
        )
    return TrainConfig(**vars(parser.parse_args(argv)))


if __name__ == "__main__":
    train(parse())
