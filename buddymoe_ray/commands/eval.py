"""`buddymoe eval`: an engine beside the exact one on the same text, or on the same tasks.

`--corpus`: perplexity over windows of 256 tokens: 64 are prefilled, the other 192 are scored one decode step at a time
(teacher forcing) through the Engine that serves. Errors are of paired differences, clustered by window.
`--tasks`: exact match on held-out tasks in the chat form, greedy; errors of paired differences.
Lists in `--memory` and `--standin` make a row each, all scored beside one exact engine; a row that does not fit says so
in `error` (exit status 1).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from buddymoe_ray.commands.common import (
    NOT_MEASURED,
    add_engine_arguments,
    add_json_argument,
    emit,
    measured_config,
    print_table,
)
from buddymoe_ray.config import EngineConfig
from buddymoe_ray.errors import BudgetError, ConfigError
from buddymoe_ray.observe import progress
from buddymoe_ray.tasks import held_out

if TYPE_CHECKING:
    from buddymoe_ray.engine.accuracy import TaskResult
    from buddymoe_ray.engine.evaluate import EvalResult

__all__ = ["add_arguments", "run"]

TASKS = 2040
_TOLD = ("model", "mode", "memory", "budget", "standin", "policy", "expert_dtype", "dense_dtype")
_TEXT = (".txt", ".py", ".rst", ".md")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `eval`."""
    add_engine_arguments(parser, without=NOT_MEASURED)
    add_json_argument(parser)
    scored = parser.add_mutually_exclusive_group(required=True)
    scored.add_argument("--corpus", nargs="+", help="text files, or folders of .txt, .py, .rst, .md files")
    scored.add_argument(
        "--tasks", type=int, nargs="?", const=TASKS, help=f"accuracy on that many generated tasks ({TASKS})"
    )
    parser.add_argument("--tokens", type=int, default=None, help="most scored tokens; default the whole corpus")
    parser.add_argument(
        "--placement",
        choices=("static", "dynamic"),
        default="static",
        help="which experts keep a stand-in: static those that calibration chose, dynamic all, so that any may move",
    )
    parser.add_argument("--batch", type=int, default=32, help="windows decoded side by side")


def run(args: argparse.Namespace) -> int:
    """Print a record per memory and stand-in; exit status 0."""
    for name in ("batch", "tokens", "tasks"):
        if (number := getattr(args, name)) is not None and number < 1:
            raise ConfigError(f"--{name} is {number}, must be at least 1. hint: leave the number out")
    configs = [
        measured_config(args, memory=memory, standin=standin, max_running=args.batch, guard_share=0.0)
        for memory in args.memory.split(",")
        for standin in args.standin.split(",")
    ]
    dynamic = args.placement == "dynamic"
    results: Sequence[EvalResult | TaskResult | BudgetError]
    results = _on_tasks(args, configs) if args.tasks is not None else _on_corpus(args, configs, movable=dynamic)
    if len(results) == 1 and isinstance(results[0], BudgetError):
        raise results[0]
    records = [
        _conditions(config)
        | ({"placement": "dynamic"} if dynamic else {})
        | ({"error": str(result)} if isinstance(result, BudgetError) else result.as_record())
        for config, result in zip(configs, results, strict=True)
    ]
    if args.json:
        for record in records:
            emit(record)
    elif args.tasks is not None:
        _print_tasks(records)
    else:
        _print(records)
    return 1 if any("error" in record for record in records) else 0


def _on_corpus(
    args: argparse.Namespace, configs: list[EngineConfig], *, movable: bool
) -> list[EvalResult | BudgetError]:
    text = read_corpus(args.corpus)
    tokenizer = tokenizer_of(args.model, "for eval. hint: copy tokenizer.json there")
    from buddymoe_ray.engine.evaluate import cut_windows, evaluate_many  # late: they import torch

    windows = cut_windows(tokenizer.encode(text, add_special_tokens=False, verbose=False), tokens=args.tokens)
    return evaluate_many(configs, windows, batch=args.batch, movable=movable, progress=progress)


def _on_tasks(args: argparse.Namespace, configs: list[EngineConfig]) -> list[TaskResult | BudgetError]:
    if args.tokens is not None or args.placement != "static":
        raise ConfigError("--tokens or --placement is given with --tasks, must go with --corpus. hint: leave it out")
    from buddymoe_ray.engine.accuracy import evaluate_tasks  # late: it imports torch

    tasks = list(progress(held_out(args.tasks), total=args.tasks, desc="tasks"))
    return evaluate_tasks(configs, tasks)


def _print_tasks(records: list[dict[str, Any]]) -> None:
    for record in records:
        if "error" in record:
            print(f"memory {record['memory']}: {record['error']}")
            continue
        rows = [{"task": name} | found for name, found in record["by_task"].items()]
        told = {name: record.get(name) for name in _TOLD}
        print_table(
            [told | row for row in (*rows, {"task": "all"} | record)],
            {
                "task": "{task}",
                "right %": "{accuracy:.1f}",
                "exact %": "{accuracy_exact:.1f}",
                "difference": "{difference:+.2f} ± {difference_se:.2f}",
                "tasks": "{tasks:,}",
            },
            conditions={name.replace("_", " "): f"{{{name}}}" for name in _TOLD},
        )


def _print(records: list[dict[str, Any]]) -> None:
    measured = [{"budget": None, "standin": None, "policy": None} | record for record in records]
    print_table(
        [record for record in measured if "error" not in record],
        {
            "perplexity": "{ppl:.3f}",
            "exact": "{ppl_exact:.3f}",
            "rise %": "{dppl_percent:.2f} ± {dppl_se:.2f}",
            "same top token %": "{top1_agreement:.1f}",
            "misses %": "{miss_rate:.1f}",
            "of them fetched %": "{fetched_fraction:.1f}",
            "tokens": "{tokens:,}",
        },
        conditions={name.replace("_", " "): f"{{{name}}}" for name in _TOLD},
    )
    for record in measured:
        if "error" in record:
            print(f"memory {record['memory']}: {record['error']}")


def _conditions(config: EngineConfig) -> dict[str, Any]:
    names = ["model", "memory", "expert_dtype", "dense_dtype", "mode"]
    names += ["budget"] if config.mode == "bounded" else []
    names += ["standin", "standin_layers", "policy"] if config.mode != "exact" else []
    return {name: getattr(config, name) for name in names}


def tokenizer_of(model: str, wanted: str) -> Any:
    """The model's tokenizer. Raises ConfigError, which ends with what it is `wanted` for, when there is none."""
    from buddymoe_ray.models.resolve import resolve_model
    from buddymoe_ray.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(resolve_model(model))
    if tokenizer is None:
        raise ConfigError(f"model {model} has no tokenizer, must have one {wanted}")
    return tokenizer


def encode_corpus(tokenizer: Any, names: list[str]) -> list[int]:
    """Token ids of the corpus, without special tokens. Raises ConfigError."""
    ids: list[int] = tokenizer.encode(read_corpus(names), add_special_tokens=False, verbose=False)
    return ids


def read_corpus(names: list[str]) -> str:
    """Text of all files, in the order given; folders are walked in sorted order. Raises ConfigError."""
    texts = []
    for name in names:
        path = Path(name)
        if not path.exists():
            raise ConfigError(f"--corpus is {name}, must be a file or folder that exists. hint: check the path")
        found = [path] if path.is_file() else sorted(path.rglob("*"))
        files = [file for file in found if file == path or (file.is_file() and file.suffix in _TEXT)]
        texts += [file.read_text(encoding="utf-8", errors="replace") for file in files]
    return "\n".join(texts)
