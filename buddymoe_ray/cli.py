"""`buddymoe`: parse, dispatch, turn bad usage and this package's errors into one line on stderr and an exit status.

0 is success, 1 a failure the user can read about, 2 bad usage. Commands are imported only when called, so `--help` is
quick and needs no torch.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NoReturn

from buddymoe_ray import __version__
from buddymoe_ray.config import one_of, refuse_unknown
from buddymoe_ray.errors import BuddyMoEError, ConfigError

__all__ = ["build_parser", "main"]

COMMANDS = {
    "serve": "check a deployment and serve it: an OpenAI API on Ray Serve",
    "doctor": "look for what would keep a model or deployment from being served well here",
    "key": "make a named API key, and put its hash into a service's file",
    "chat": "talk to a model in the terminal",
    "batch": "answer a file of requests, as many side by side as memory allows",
    "eval": "score a corpus, or the answers to tasks, against the exact engine",
    "bench": "measure decode and prefill speed, latency, bytes and memory",
    "plan": "show what would live where and how fast it would be, before anything loads",
    "profile": "calibrate stand-ins on a corpus: what each costs, in a file and a report",
    "synth": "write a random-weight checkpoint of a real shape",
    "simulate": "replay expert placements at cluster scale, on made-up or recorded routes",
}


class _Parser(argparse.ArgumentParser):
    """argparse whose refusals are one line in this package's form."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.register("type", int, partial(_number, int, "a whole number"))
        self.register("type", float, partial(_number, float, "a number"))

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None:
            try:
                one_of((*action.option_strings, action.dest)[0], str(value), map(str, action.choices))
            except ConfigError as error:
                self.error(str(error))

    def error(self, message: str) -> NoReturn:
        if message.startswith("argument "):
            message = message.removeprefix("argument ").replace(": ", " ", 1)
        self.exit(2, f"{self.prog}: {message.rstrip('.')}. usage: {self.prog} --help\n")


class _CommandParser(_Parser):
    """Looks at the names of options first: a misspelt one is named even where it leaves a needed one missing."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        known = [text for action in self._actions for text in action.option_strings]
        try:
            refuse_unknown("option", (word.partition("=")[0] for word in args if word.startswith("--")), known)
        except ConfigError as error:
            self.error(str(error))
        return super().parse_known_args(args, namespace)


def _number(make: Callable[[str], float], wanted: str, text: str) -> float:
    try:
        return make(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"is {text!r}, must be {wanted}") from None


def build_parser(only: str | None = None) -> argparse.ArgumentParser:
    """The whole parser; with `only`, the options of that one command alone are filled in."""
    parser = _Parser(prog="buddymoe", description="Serve MoE models bigger than your memory.")
    parser.add_argument("--version", action="version", version=f"buddymoe {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_CommandParser)
    for name, summary in COMMANDS.items():
        sub = subparsers.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        if only in (None, name):
            importlib.import_module(f"buddymoe_ray.commands.{name}").add_arguments(sub)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    named = words[0] if words and words[0] in COMMANDS else ""
    args = build_parser(only=named).parse_args(words)
    try:
        status = importlib.import_module(f"buddymoe_ray.commands.{args.command}").run(args)
        sys.stdout.flush()
    except ConfigError as error:
        print(f"buddymoe {args.command}: {error}", file=sys.stderr)
        return 2
    except BuddyMoEError as error:
        print(f"buddymoe {args.command}: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left, as `| head`, or there is none
        if full := error.errno == errno.ENOSPC:
            where = error.filename or "the output"
            print(f"buddymoe {args.command}: {where} has no room, must have. hint: free some", file=sys.stderr)
        return int(full)
    except KeyboardInterrupt:
        return 130
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
