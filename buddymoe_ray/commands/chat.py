"""`buddymoe chat`: talk to a model in the terminal, in this process, without Ray.

A conversation is kept in memory and sent whole each turn; every answer says what it cost. With `--json` each line of
stdin is one user message and each answer one line of stdout.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, cast, get_args

from buddymoe_ray.commands.common import add_engine_arguments, add_json_argument, emit, engine_config
from buddymoe_ray.config import one_of, refuse_unknown
from buddymoe_ray.engine.interrupts import interrupts_wait
from buddymoe_ray.engine.validate import checked_sampling, plain_text
from buddymoe_ray.errors import ConfigError, RequestError
from buddymoe_ray.types import GenerationRequest, Mode, SamplingParams, TokenEvent, Usage

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `chat`."""
    add_engine_arguments(parser, without=("max_running", "guard_share"))
    add_json_argument(parser)
    parser.add_argument("--system", default=None, help="system message")
    parser.add_argument("--max-tokens", type=int, default=256, help="most tokens of an answer")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")


def run(args: argparse.Namespace) -> int:
    """Answer until end of input or /quit; exit status 0."""
    config = engine_config(args)
    sampling = checked_sampling(SamplingParams(temperature=args.temperature, max_tokens=args.max_tokens))
    from buddymoe_ray.engine.engine import Engine  # late: it imports torch

    engine = Engine.from_config(config)
    try:
        _Chat(engine, args, sampling).run()
    finally:
        engine.close()
    return 0


class _Chat:
    """One conversation. `mode` is that of the next answers; None is the engine's own."""

    def __init__(self, engine: Any, args: argparse.Namespace, sampling: SamplingParams) -> None:
        self._engine, self._json, self._sampling = engine, args.json, sampling
        self._first = [{"role": "system", "content": plain_text("system", args.system)}] if args.system else []
        self._messages = list(self._first)
        self._mode: Mode | None = None
        self._turn = 0

    def run(self) -> None:
        """Until end of input or /quit."""
        if not self._json:
            config, residency = self._engine.config, self._engine.snapshot().residency
            print(
                f"{config.model} in mode {config.mode}, memory {config.memory}: {100 * residency:.0f} % of its experts"
            )
            print("/help lists the commands, /quit ends")
        for line in _lines(self._json):
            if line == "/quit":
                return
            if line.startswith("/") and not self._json:
                self._command(line)
            else:
                self._say(line)

    def _command(self, line: str) -> None:
        word, _, rest = line.partition(" ")
        try:
            refuse_unknown("command", [word], _COMMANDS)
            if word == "/help":
                print("\n".join(f"{name:<26}{what}" for name, what in _COMMANDS.values()))
            elif word == "/mode":
                one_of("mode", rest.strip(), get_args(Mode))
                self._mode = cast(Mode, rest.strip())
            else:
                self._messages = list(self._first)
        except ConfigError as error:
            print(error)

    def _say(self, said: str) -> None:
        self._messages.append({"role": "user", "content": said})
        begun = time.perf_counter()
        try:
            plain_text("message", said)  # a terminal may send bytes that are no text
            events = list(self._answer())
            if events[-1].error is not None:
                raise RequestError(events[-1].error)
        except RequestError as error:
            del self._messages[-1]
            if self._json:
                raise
            print(error)
            return
        text, usage = "".join(event.text for event in events), events[-1].usage
        self._messages.append({"role": "assistant", "content": text})
        if self._json:
            emit({"text": text, "finish_reason": events[-1].finish_reason, "usage": usage and asdict(usage)})
        elif usage is not None:
            print("\n" + _cost(usage, time.perf_counter() - begun))

    def _answer(self) -> Iterator[TokenEvent]:
        ids = tuple(self._engine.encode_chat(self._messages))
        self._turn += 1
        name = f"chat-{self._turn}"
        self._engine.add(
            GenerationRequest(request_id=name, prompt_token_ids=ids, sampling=self._sampling, mode=self._mode)
        )
        made = deque[TokenEvent]()
        try:
            while self._engine.has_work():
                with interrupts_wait():
                    made.extend(self._engine.step())
                while made:
                    if not self._json:
                        print(made[0].text, end="", flush=True)
                    yield made.popleft()
        except KeyboardInterrupt:  # ends the answer, not the conversation
            self._engine.cancel(name)
            yield from (*made, *self._engine.drain())


def _cost(usage: Usage, seconds: float) -> str:
    """What the answer's accesses were, and what that costs."""
    accesses = max(1, usage.hits + usage.peer + usage.host + usage.fetched + usage.standins.total)
    tokens = max(1, usage.completion_tokens)
    parts = [
        f"{usage.completion_tokens} tokens, {usage.completion_tokens / seconds:,.0f} tok/s",
        f"{usage.mode}: {100 * usage.hits / accesses:.0f} % hits, "
        f"{100 * usage.standins.total / accesses:.0f} % stand-ins, "
        f"{100 * (usage.fetched + usage.peer + usage.host) / accesses:.0f} % fetched",
        f"expected rise {100 * usage.expected_rise / tokens:.2f} %",
    ]
    return f"[{'; '.join(parts)}]"


_COMMANDS = {
    "/help": ("/help", "this list"),
    "/mode": ("/mode exact|bounded|fast", "how missing experts are answered from now on"),
    "/reset": ("/reset", "forget the conversation"),
    "/quit": ("/quit", "end; so does the end of the input"),
}


def _lines(as_json: bool) -> Iterator[str]:
    asked = sys.stdin.isatty() and not as_json
    while True:
        try:
            line = input("> " if asked else "").strip()
        except EOFError:
            return
        if line:
            yield line
