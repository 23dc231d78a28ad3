"""`buddymoe bench`: one row per (memory, mode, batch, workers), every worker in a process of its own.

Rows alternate over `--rounds` (A B A B), so that a noisy machine disturbs all alike; a row's record is the median
round. A child process per row makes `peak_rss_bytes` that row's own.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import platform
import statistics
import threading
from multiprocessing.connection import Connection, wait
from multiprocessing.synchronize import Barrier
from typing import Any

from buddymoe_ray.commands.common import (
    NOT_MEASURED,
    add_engine_arguments,
    add_json_argument,
    emit,
    measured_config,
    print_table,
)
from buddymoe_ray.config import EngineConfig
from buddymoe_ray.errors import BuddyMoEError, CapacityError, ConfigError
from buddymoe_ray.observe import progress

__all__ = ["add_arguments", "run"]

_MOST_WORKERS = 64  # that a node's store has rows for
_ADDED = ("decode_tok_s", "prefill_tok_s", "total_bytes_read", "process_read_bytes")
_SHOWN = {
    "decode tok/s": "{decode_tok_s:,.1f}",
    "prefill tok/s": "{prefill_tok_s:,.1f}",
    "first token ms": "{ttft_ms:,.1f}",
    "p99 token ms": "{p99_itl_ms:,.1f}",
    "hits %": "{hit_rate:.1f}",
    "stand-ins %": "{standin_rate:.1f}",
    "read/ token": "{bytes_read_per_token:bytes}",
    "peak memory": "{peak_rss_bytes:bytes}",
}
_SECOND = {"second turn ms": "{ttft_second_turn_ms:,.1f}", "cached tokens": "{cached_tokens:,.0f}"}
_BESIDE = {
    "prompt alone ms": "{beside_ttft_alone_ms:,.0f}",
    "beside ms": "{beside_ttft_ms:,.0f}",
    "p99 alone ms": "{beside_p99_itl_alone_ms:,.1f}",
    "beside p99 ms": "{beside_p99_itl_ms:,.1f}",
}
_WORST = (
    "p99_itl_ms",
    "ttft_ms",
    "ttft_second_turn_ms",
    "beside_ttft_ms",
    "beside_p99_itl_ms",
    "peak_rss_bytes",
    "load_seconds",
    "decode_tok_s_spread",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `bench`."""
    add_engine_arguments(parser, without=NOT_MEASURED)
    add_json_argument(parser)
    parser.add_argument("--batch", default="1", help="sequences side by side; a list makes rows: 1,8")
    parser.add_argument("--prompt-tokens", type=int, default=128, help="prompt length")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens generated per sequence")
    parser.add_argument(
        "--turns", type=int, default=1, choices=(1, 2), help="2: every prompt again, its answer appended"
    )
    parser.add_argument(
        "--beside", type=int, default=0, help="tokens of a prompt that arrives while the others decode; 0: none"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="of the tokens; random weights repeat themselves at 0, and hit"
    )
    parser.add_argument("--reps", type=int, default=3, help="repetitions within an engine")
    parser.add_argument("--rounds", type=int, default=1, help="times each row is run, alternating")
    parser.add_argument("--workers", default="1", help="engines side by side on this node; a list makes rows: 1,2")
    parser.add_argument("--isolated", action="store_true", help="workers share nothing (default: one expert store)")
    parser.add_argument("--corpus", nargs="+", default=None, help="text to take prompts from; default random token ids")


def run(args: argparse.Namespace) -> int:
    """Print a record per row; exit status 0."""
    for name in ("prompt_tokens", "new_tokens", "reps", "rounds"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(args, name)}, must be at least 1. hint: drop it")
    if args.beside < 0:
        raise ConfigError(f"--beside is {args.beside}, must be at least 0. hint: drop it")
    rows = [
        (
            _config(args, mode, memory=memory, max_running=batch + bool(args.beside), guard_share=0.0),
            _workload(args, batch),
            workers,
        )
        for memory in args.memory.split(",")
        for mode in args.mode.split(",")
        for batch in _integers("--batch", args.batch)
        for workers in _integers("--workers", args.workers, most=_MOST_WORKERS)
    ]
    ids = _corpus_ids(args)
    rounds: list[list[dict[str, Any]]] = [[] for _ in rows]
    order = [at for _ in range(args.rounds) for at in range(len(rows))]
    for at in progress(order, total=len(order), desc="bench"):
        config, workload, workers = rows[at]
        rounds[at].append(_in_children(config, workload, ids, workers, args.isolated))
    measured = []
    for (config, workload, workers), records in zip(rows, rounds, strict=True):
        shared = {"workers": workers, "shared": workers > 1 and not args.isolated}
        measured.append(_conditions(config) | workload | shared | _median(records))
    if args.json:
        for row in measured:
            emit(row)
    else:
        told = (
            *("model", "memory", "mode", "batch", "workers", "threads"),
            *("expert_dtype", "expert_format", "dense_dtype", "prompt_tokens", "new_tokens"),
        )
        shown = _SHOWN | (_SECOND if args.turns > 1 else {}) | (_BESIDE if args.beside else {})
        print_table(measured, shown, conditions={name.replace("_", " "): f"{{{name}}}" for name in told})
    return 0


def _config(args: argparse.Namespace, mode: str, **changes: Any) -> EngineConfig:
    """Of a row in `mode`; beside other modes, one in exact is without what they alone are asked for."""
    inexact = next((name for name in args.mode.split(",") if name != "exact"), None)
    if mode != "exact" or inexact is None:
        return measured_config(args, mode=mode, **changes)
    return measured_config(args, mode=inexact, **changes).exactly(**changes)


def _in_children(
    config: EngineConfig, workload: dict[str, Any], ids: tuple[int, ...], workers: int, isolated: bool
) -> dict[str, Any]:
    """One record of `workers` engines side by side, each in a process of its own; with one worker it is that one's."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["buddymoe_ray.engine.measure"])  # once: it takes longer than a small row
    gate = context.Barrier(workers)
    shared = 0 if isolated or workers == 1 else workers
    children = []
    for worker in range(workers):
        receiver, sender = context.Pipe(duplex=False)
        target = context.Process(target=_measure, args=(config, workload | {"seed": worker}, ids, shared, gate, sender))
        target.start()
        sender.close()
        children.append((target, receiver))
    records: list[Any] = []
    pending = [receiver for _, receiver in children]
    while pending:
        ready = wait(pending)
        for receiver in [each for each in pending if each in ready]:
            pending.remove(receiver)
            try:
                records.append(receiver.recv())
            except EOFError:
                gate.abort()  # the others would wait for it there
                records.append(CapacityError("a worker died, must live to be measured. hint: see its message above"))
    for target, _ in children:
        target.join()
    failed = next((record for record in records if isinstance(record, BaseException)), None)
    if failed is not None:
        raise failed
    return _together(records)


def _measure(
    config: EngineConfig, workload: dict[str, Any], ids: tuple[int, ...], shared: int, gate: Barrier, sender: Connection
) -> None:
    """Runs in the child; the parent never imports torch, so the engine has the memory to itself."""
    from buddymoe_ray.engine.measure import BenchLoad, measure
    from buddymoe_ray.residency.sharing import Sharing

    sharing = Sharing(workers=shared, tag="bench") if shared else None
    try:
        sender.send(measure(config, BenchLoad(ids=ids, **workload), sharing=sharing, gate=gate.wait).as_record())
    except BuddyMoEError as error:
        gate.abort()
        sender.send(error)
    except threading.BrokenBarrierError:
        sender.send(CapacityError("another worker failed. hint: see its message"))
    except KeyboardInterrupt:  # as its parent was, who says so by its status
        gate.abort()


def _together(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Speeds add up, the worst latency and the largest process count, everything else is the mean."""
    merged: dict[str, Any] = {}
    for name in records[0]:
        values = [record[name] for record in records]
        if None in values or isinstance(values[0], str):
            merged[name] = values[0] if None not in values else None
        elif name in _ADDED:
            merged[name] = sum(values)
        else:
            merged[name] = max(values) if name in _WORST else statistics.fmean(values)
    return merged


def _workload(args: argparse.Namespace, batch: int) -> dict[str, Any]:
    names = ("prompt_tokens", "new_tokens", "reps", "turns", "beside", "temperature")
    return {"batch": batch} | {name: getattr(args, name) for name in names}


def _corpus_ids(args: argparse.Namespace) -> tuple[int, ...]:
    if args.corpus is None:
        return ()
    from buddymoe_ray.commands.eval import encode_corpus, tokenizer_of

    ids = tuple(encode_corpus(tokenizer_of(args.model, "for --corpus. hint: drop --corpus"), args.corpus))
    longest = max(args.prompt_tokens, args.beside)
    if len(ids) <= longest:
        raise ConfigError(f"--corpus is {len(ids)} tokens, must be over {longest}. hint: give more text")
    return ids


def _conditions(config: EngineConfig) -> dict[str, Any]:
    names = (
        *("model", "memory", "host_memory", "mode", "standin"),
        *("expert_dtype", "dense_dtype", "dtype", "device", "threads"),
    )
    return {name: getattr(config, name) for name in names} | {"machine": platform.machine(), "cores": os.cpu_count()}


def _median(records: list[dict[str, Any]]) -> dict[str, Any]:
    merged: dict[str, Any] = {"rounds": len(records)}
    for name in records[0]:
        values = [record[name] for record in records]
        if None in values or isinstance(values[0], str):
            merged[name] = values[0] if None not in values else None
        else:
            merged[name] = statistics.median(values)
    merged["peak_rss_bytes"] = max(record["peak_rss_bytes"] for record in records)
    return merged


def _integers(name: str, text: str, *, most: float = math.inf) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = [0]
    if min(numbers) < 1 or max(numbers) > most:
        limit = f"from 1 to {most}" if math.isfinite(most) else "of at least 1"
        raise ConfigError(f"{name} is {text!r}, must be whole numbers {limit}. hint: write {name} 1,8")
    return numbers
