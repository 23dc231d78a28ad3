"""`buddymoe`: parse, dispatch, turn this package's errors into one line on stderr and an exit status.

0 is success, 1 a failure the user can read about, 2 bad usage. Commands are imported only when called, so `--help` is
quick and needs no torch.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Sequence

from buddymoe_ray.errors import BuddyMoEError, ConfigError

__all__ = ["build_parser", "main"]

COMMANDS = {
    "chat": "talk to a model in the terminal",
    "eval": "score a corpus step by step against the exact engine",
    "bench": "measure decode and prefill speed, latency, bytes and memory",
    "plan": "show what would live where, before anything loads",
    "profile": "calibrate stand-ins on a corpus: what each costs, in a file and a report",
    "synth": "write a random-weight checkpoint of a real shape",
    "simulate": "replay expert placements at cluster scale, on made-up or recorded routes",
}


def build_parser(only: str | None = None) -> argparse.ArgumentParser:
    """The whole parser; with `only`, the options of that one command alone are filled in."""
    parser = argparse.ArgumentParser(prog="buddymoe", description="Serve MoE models bigger than your memory.")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        sub = subparsers.add_parser(name, help=summary, description=summary)
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
    except ConfigError as error:
        print(f"buddymoe {args.command}: {error}", file=sys.stderr)
        return 2
    except BuddyMoEError as error:
        print(f"buddymoe {args.command}: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
