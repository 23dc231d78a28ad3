"""`buddymoe bench`: one row per (memory, mode, batch), each in a process of its own.

Rows alternate over `--rounds` (A B A B), so that a noisy machine disturbs all alike; a row's record is the median
round. A child process per row makes `peak_rss_bytes` that row's own.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import statistics
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from buddymoe_ray.commands.common import add_engine_arguments, add_json_argument, emit, engine_config, progress
from buddymoe_ray.config import EngineConfig
from buddymoe_ray.errors import ConfigError

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `bench`."""
    add_engine_arguments(parser, many_modes=True)
    add_json_argument(parser)
    parser.add_argument("--batch", default="1", help="sequences side by side; a list makes rows: 1,8")
    parser.add_argument("--prompt-tokens", type=int, default=128, help="prompt length")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens generated per sequence")
    parser.add_argument("--reps", type=int, default=3, help="repetitions within an engine")
    parser.add_argument("--rounds", type=int, default=1, help="times each row is run, alternating")
    parser.add_argument("--corpus", nargs="+", default=None, help="text to take prompts from; default random token ids")


def run(args: argparse.Namespace) -> int:
    """Print a record per row; exit status 0."""
    for name in ("prompt_tokens", "new_tokens", "reps", "rounds"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(args, name)}, must be at least 1. hint: drop it")
    ids = _corpus_ids(args)
    rows = [
        (engine_config(args, memory=memory, mode=mode, max_running=batch, guard_share=0.0), _workload(args, batch))
        for memory in args.memory.split(",")
        for mode in args.mode.split(",")
        for batch in _integers("--batch", args.batch)
    ]
    rounds: list[list[dict[str, Any]]] = [[] for _ in rows]
    order = [at for _ in range(args.rounds) for at in range(len(rows))]
    for at in progress(order, total=len(order), desc="bench"):
        rounds[at].append(_in_child(*rows[at], ids))
    for (config, workload), records in zip(rows, rounds, strict=True):
        emit(_conditions(config) | workload | _median(records), as_json=args.json)
    return 0


def _in_child(config: EngineConfig, workload: dict[str, int], ids: tuple[int, ...]) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(_measure, config, workload, ids).result()


def _measure(config: EngineConfig, workload: dict[str, int], ids: tuple[int, ...]) -> dict[str, Any]:
    """Runs in the child; the parent never imports torch, so the engine has the memory to itself."""
    from buddymoe_ray.engine.measure import Workload, measure

    return measure(config, Workload(ids=ids, **workload)).as_record()


def _workload(args: argparse.Namespace, batch: int) -> dict[str, int]:
    return {"batch": batch} | {name: getattr(args, name) for name in ("prompt_tokens", "new_tokens", "reps")}


def _corpus_ids(args: argparse.Namespace) -> tuple[int, ...]:
    if args.corpus is None:
        return ()
    from buddymoe_ray.commands.eval import encode_corpus
    from buddymoe_ray.models.resolve import resolve_model
    from buddymoe_ray.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(resolve_model(args.model))
    if tokenizer is None:
        raise ConfigError(f"model {args.model} has no tokenizer, must have one for --corpus. hint: drop --corpus")
    ids = tuple(encode_corpus(tokenizer, args.corpus))
    if len(ids) <= args.prompt_tokens:
        raise ConfigError(f"--corpus is {len(ids)} tokens, must be over {args.prompt_tokens}. hint: give more text")
    return ids


def _conditions(config: EngineConfig) -> dict[str, Any]:
    names = ("model", "memory", "host_memory", "mode", "standin", "expert_dtype", "dtype", "device", "threads")
    return {name: getattr(config, name) for name in names} | {"machine": platform.machine(), "cores": os.cpu_count()}


def _median(records: list[dict[str, Any]]) -> dict[str, Any]:
    merged: dict[str, Any] = {"rounds": len(records)}
    for name in records[0]:
        values = [record[name] for record in records]
        merged[name] = None if None in values else statistics.median(values)
    merged["peak_rss_bytes"] = max(record["peak_rss_bytes"] for record in records)
    return merged


def _integers(name: str, text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = [0]
    if min(numbers) < 1:
        raise ConfigError(f"{name} is {text!r}, must be whole numbers of at least 1. hint: write {name} 1,8")
    return numbers
