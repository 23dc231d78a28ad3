"""`buddymoe eval`: perplexity of an engine beside the exact one on the same windows, decoded step by step.

Windows of 256 tokens: 64 are prefilled, the other 192 are scored one decode step at a time (teacher forcing) through
the Engine that serves. Errors are of paired differences, clustered by window. Lists in `--memory` and `--standin` make
a row each, all scored beside one exact engine; a row that does not fit says so in `error` (exit status 1).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from buddymoe_ray.commands.common import add_engine_arguments, add_json_argument, emit, engine_config, print_table
from buddymoe_ray.config import EngineConfig
from buddymoe_ray.errors import BudgetError, ConfigError
from buddymoe_ray.observe import progress

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `eval`."""
    add_engine_arguments(parser, without=("max_running", "guard_share", "seed", "generation_config"))
    add_json_argument(parser)
    parser.add_argument(
        "--corpus", nargs="+", required=True, help="text files, or folders of .txt, .py, .rst, .md files"
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
    if args.batch < 1:
        raise ConfigError(f"--batch is {args.batch}, must be at least 1. hint: leave it at 32")
    configs = [
        engine_config(args, memory=memory, standin=standin, max_running=args.batch, guard_share=0.0)
        for memory in args.memory.split(",")
        for standin in args.standin.split(",")
    ]
    text = read_corpus(args.corpus)
    tokenizer = tokenizer_of(args.model, "for eval. hint: copy tokenizer.json there")
    from buddymoe_ray.engine.evaluate import cut_windows, evaluate_many  # late: they import torch

    windows = cut_windows(tokenizer.encode(text, add_special_tokens=False, verbose=False), tokens=args.tokens)
    dynamic = args.placement == "dynamic"
    results = evaluate_many(configs, windows, batch=args.batch, movable=dynamic, progress=progress)
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
    else:
        _print(records)
    return 1 if any("error" in record for record in records) else 0


def _print(records: list[dict[str, Any]]) -> None:
    measured = [{"budget": None, "standin": None, "policy": None} | record for record in records]
    told = ("model", "mode", "memory", "budget", "standin", "policy", "expert_dtype", "dense_dtype")
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
        conditions={name.replace("_", " "): f"{{{name}}}" for name in told},
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
        files = [path] if path.is_file() else _text_files(path)
        texts += [file.read_text(encoding="utf-8", errors="replace") for file in files]
    return "\n".join(texts)


def _text_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix in {".txt", ".py", ".rst", ".md"})
