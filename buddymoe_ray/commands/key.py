"""`buddymoe key`: make a named API key. Its hash and limits go into the file that `serve --api-keys` reads.

The key is on stdout and nowhere else. A running service knows it a second later. Neighbour: `serve.keys` has the file.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from buddymoe_ray.commands.common import add_json_argument, add_option, emit, print_facts

__all__ = ["add_arguments", "run"]

_LIMITS = {
    "requests_per_minute": "most requests a minute",
    "tokens_per_minute": "most tokens a minute, of prompts and answers",
    "concurrent_requests": "most requests side by side",
}
_WEIGHT = "its share where keys wait for each other, beside 1 of others"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `key`."""
    parser.add_argument("name", metavar="NAME", help="what the key is called in logs and metrics")
    parser.add_argument(
        "--file", default="~/.buddymoe/api_keys.toml", help="where its hash goes (default ~/.buddymoe/api_keys.toml)"
    )
    for name, note in _LIMITS.items():
        add_option(parser, name, None, f"{note} (none: no limit)", kind="int")
    add_option(parser, "weight", None, f"{_WEIGHT} (none: 1)", kind="float")
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Print the key; exit status 0, or 1 when the file cannot hold it."""
    from buddymoe_ray.serve.keys import add_key

    path = Path(args.file).expanduser()
    key = add_key(path, args.name, {name: getattr(args, name) for name in (*_LIMITS, "weight")})
    if args.json:
        emit({"name": args.name, "key": key, "file": str(path)})
    else:
        print_facts({"key": key, "of": f"{args.name}; shown once, its hash is in {path}"})
    return 0
