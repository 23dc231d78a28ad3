"""`buddymoe chat`: talk to a model in the terminal, in this process, without Ray.

A conversation is kept in memory and sent whole each turn. With `--json` (or a pipe) each line of stdin is one user
message and each answer one line of stdout.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from rich.console import Console

from buddymoe_ray.commands.common import add_engine_arguments, add_json_argument, emit, engine_config
from buddymoe_ray.types import GenerationRequest, SamplingParams, TokenEvent

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `chat`."""
    add_engine_arguments(parser)
    add_json_argument(parser)
    parser.add_argument("--system", default=None, help="system message")
    parser.add_argument("--max-tokens", type=int, default=256, help="most tokens of an answer")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--seed", type=int, default=None, help="seed of the sampler")


def run(args: argparse.Namespace) -> int:
    """Answer until end of input or /quit; exit status 0."""
    from buddymoe_ray.engine.engine import Engine

    sampling = SamplingParams(temperature=args.temperature, max_tokens=args.max_tokens, seed=args.seed)
    engine = Engine.from_config(engine_config(args))
    try:
        _converse(engine, args, sampling)
    finally:
        engine.close()
    return 0


def _converse(engine: Any, args: argparse.Namespace, sampling: SamplingParams) -> None:
    messages: list[dict[str, str]] = [{"role": "system", "content": args.system}] if args.system else []
    console = Console(highlight=False)
    for turn, said in enumerate(_lines(args.json)):
        messages.append({"role": "user", "content": said})
        events = list(_answer(engine, messages, sampling, turn, None if args.json else console))
        text = "".join(event.text for event in events)
        messages.append({"role": "assistant", "content": text})
        if args.json:
            usage = events[-1].usage
            emit(
                {"text": text, "finish_reason": events[-1].finish_reason, "usage": usage and asdict(usage)},
                as_json=True,
            )


def _answer(
    engine: Any, messages: list[dict[str, str]], sampling: SamplingParams, turn: int, console: Console | None
) -> Iterator[TokenEvent]:
    ids = tuple(engine.encode_chat(messages))
    engine.add(GenerationRequest(request_id=f"chat-{turn}", prompt_token_ids=ids, sampling=sampling))
    while engine.has_work():
        for event in engine.step():
            if console is not None:
                console.print(event.text, end="", markup=False)
            yield event
    if console is not None:
        console.print()


def _lines(as_json: bool) -> Iterator[str]:
    asked = sys.stdin.isatty() and not as_json
    while True:
        try:
            line = input("> " if asked else "")
        except EOFError:
            return
        if line.strip() == "/quit":
            return
        if line.strip():
            yield line
