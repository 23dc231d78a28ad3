"""`buddymoe batch`: a file of requests in, a file of answers out, as OpenAI's Batch API has them; no server, no Ray.

All requests go through one engine, as many side by side as memory allows: each missing expert is then read once a step
for all of them. What is finished is kept beside the output, and a run that was killed goes on when it is started again.
Exit status 0 also where lines were refused: each says so in its place.
"""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from buddymoe_ray.commands.common import (
    add_engine_arguments,
    add_json_argument,
    add_option,
    emit,
    engine_config,
    print_facts,
    print_table,
)
from buddymoe_ray.config import EngineConfig, option_notes
from buddymoe_ray.errors import ConfigError
from buddymoe_ray.observe import progress

if TYPE_CHECKING:
    from buddymoe_ray.batch.run import BatchRun
    from buddymoe_ray.engine.engine import Engine
    from buddymoe_ray.serve.args import ServeArgs
    from buddymoe_ray.serve.batches.journal import Journal, JournalEntry
    from buddymoe_ray.serve.batches.lines import BatchInput

__all__ = ["add_arguments", "run"]

_SERVICE = ("model_name", "default_max_tokens")
_SYNC_SECONDS = 0.5
_NOTHING_DONE = dict.fromkeys(("prompt_tokens", "tokens", "seconds", "preemptions", "max_running"), 0) | dict.fromkeys(
    ("tok_s", "bytes_read_per_token", "expected_rise_percent")
)
_SHOWN = {
    "requests": "{requests:,}",
    "ok": "{ok:,}",
    "failed": "{failed:,}",
    "before": "{earlier:,}",
    "prompt tokens": "{prompt_tokens:,}",
    "tokens": "{tokens:,}",
    "tok/s": "{tok_s:,.1f}",
    "read/ token": "{bytes_read_per_token:bytes}",
    "expected rise %": "{expected_rise_percent:.2f}",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `batch`."""
    from buddymoe_ray.serve.args import ServeArgs

    parser.add_argument("input", metavar="IN.jsonl", help="requests, a JSON object a line, as OpenAI's Batch API reads")
    parser.add_argument("output", metavar="OUT.jsonl", help="answers, a line for each request, in the same order")
    add_engine_arguments(parser, without=("max_running",))
    note = f"{option_notes(EngineConfig)['max_running']}; default as many as there are and memory allows, at most 256"
    add_option(parser, "max_running", None, note, kind="int")
    for name in _SERVICE:
        field = ServeArgs.model_fields[name]
        add_option(
            parser, name, field.default, option_notes(ServeArgs)[name], kind=getattr(field.annotation, "__name__", "")
        )
    parser.add_argument("--restart", action="store_true", help="start over, and replace an output that is there")
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Answer every line; exit status 0."""
    config = engine_config(args, max_running=EngineConfig.max_running if args.max_running is None else args.max_running)
    service = _service(args)
    from buddymoe_ray.serve.batches.lines import BatchInput  # late: what comes now imports numpy and pydantic
    from buddymoe_ray.serve.batches.output import write_output

    output = Path(args.output).resolve()
    with closing(BatchInput(Path(args.input))) as source, closing(_journal(args, config, source, output)) as journal:
        kept = journal.finished
        told = _NOTHING_DONE if kept == len(source) else _answer(args, config, service, source, journal)
        write_output(output, (entry.data for entry in journal.entries()))
        summary = _counts(journal, kept) | told
        journal.remove()
    if args.json:
        emit(summary)
    else:
        print_table([summary], _SHOWN, title=f"batch: {output}")
    return 0


def _service(args: argparse.Namespace) -> ServeArgs:
    from buddymoe_ray.serve.args import ServeArgs

    return ServeArgs.from_options({"model": args.model} | {name: getattr(args, name) for name in _SERVICE})


def _journal(args: argparse.Namespace, config: EngineConfig, source: BatchInput, output: Path) -> Journal:
    """The journal of this batch, with what an earlier run of it finished. Raises ConfigError."""
    from buddymoe_ray.models.fingerprint import model_hash
    from buddymoe_ray.models.resolve import resolve_model
    from buddymoe_ray.serve.batches.journal import Journal

    path = output.with_name(output.name + ".partial")
    if source.path.resolve() in (output, path) or (output.exists() and not output.is_file()):
        raise ConfigError(f"output is {output}, must be a file of its own. hint: choose another name")
    if not path.exists():
        _refuse_finished(output, args.restart)
    binding: dict[str, object] = {"input": source.digest, "model": model_hash(resolve_model(args.model))}
    binding |= config.binding() | {name: getattr(args, name) for name in _SERVICE}
    journal = Journal.open(path, binding, count=len(source), restart=args.restart)
    try:
        if not journal.found:  # then the run that had it may have ended just now
            _refuse_finished(output, args.restart)
    except ConfigError:
        journal.remove()
        raise
    return journal


def _refuse_finished(output: Path, restart: bool) -> None:
    if output.exists() and not restart:
        raise ConfigError(
            f"{output} is there, must be a new file. hint: choose another name, or --restart to replace it"
        )


def _answer(
    args: argparse.Namespace, config: EngineConfig, service: ServeArgs, source: BatchInput, journal: Journal
) -> dict[str, Any]:
    """Answer what the journal has not; what that took."""
    from buddymoe_ray.batch.run import BatchRun  # late: torch
    from buddymoe_ray.batch.sizes import rows_of, sized
    from buddymoe_ray.engine.engine import Engine
    from buddymoe_ray.serve.calls import ModelNames

    engine = Engine.from_config(sized(config, choices=source.choices, max_running=args.max_running))
    try:
        rows = rows_of(engine.limits)
        if not args.json:
            _announce(engine, rows, source, journal)
        names = ModelNames(model=service.served_name, path=service.model)
        batch = BatchRun(engine, source, names, default_max_tokens=service.default_max_tokens, rows=rows)
        return _drive(batch, engine, source, journal) | {"max_running": rows}
    except KeyboardInterrupt:
        journal.sync()
        kept = f"{journal.finished:,} of {len(source):,} requests are kept in {journal.path}"
        print(f"buddymoe batch: interrupted, {kept}. hint: run the same command again to go on", file=sys.stderr)
        raise
    finally:
        engine.close()


def _drive(batch: BatchRun, engine: Engine, source: BatchInput, journal: Journal) -> dict[str, Any]:
    def keep(ended: list[JournalEntry]) -> None:
        for entry in ended:
            journal.append(entry)
        journal.sync(after=_SYNC_SECONDS)

    positions = (at for at in range(len(source)) if not journal.has(at))
    begun, before = time.perf_counter(), engine.snapshot()
    for _ in progress(batch.results(positions, keep), total=len(source) - journal.finished, desc="batch"):
        pass
    journal.sync()
    seconds, after, spent = time.perf_counter() - begun, engine.snapshot(), batch.spent
    tokens = spent.completion_tokens
    return {
        "prompt_tokens": spent.prompt_tokens,
        "tokens": tokens,
        "seconds": seconds,
        "tok_s": tokens / seconds,
        "bytes_read_per_token": (after.bytes_read_disk - before.bytes_read_disk) / tokens if tokens else None,
        "expected_rise_percent": 100 * spent.expected_rise / tokens if tokens else None,
        "preemptions": after.preemptions,
    }


def _announce(engine: Engine, rows: int, source: BatchInput, journal: Journal) -> None:
    config, residency = engine.config, engine.snapshot().residency
    earlier = f", {journal.finished:,} of them answered before" if journal.finished else ""
    print_facts(
        {
            "batch": f"{len(source):,} requests in {source.path}{earlier}",
            "model": f"{config.model} in mode {config.mode}",
            "memory": f"{config.memory}: {100 * residency:.0f} % of its experts are resident",
            "side by side": f"up to {rows} sequences; the KV cache holds {engine.limits.kv_tokens:,} tokens",
        }
    )


def _counts(journal: Journal, kept: int) -> dict[str, Any]:
    """Requests of the whole batch; `earlier` are those that runs before this one answered."""
    done, ok = journal.finished, journal.succeeded
    return {"requests": done, "ok": ok, "failed": done - ok, "earlier": kept}
