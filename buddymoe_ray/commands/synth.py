"""`buddymoe synth`: write a random-weight checkpoint of a real shape, shard by shard."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from rich.filesize import decimal
from tqdm import tqdm

from buddymoe_ray.commands.common import add_json_argument, emit, print_facts

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `synth`."""
    add_json_argument(parser)
    parser.add_argument(
        "--shape", required=True, help="olmoe-1b-7b, mixtral-8x7b, qwen3-30b-a3b, deepseek-v2-lite, ..."
    )
    parser.add_argument("--out", required=True, type=Path, help="folder to write; must be empty or absent")
    parser.add_argument("--layers", type=int, default=None, help="keep the first N layers only")
    parser.add_argument(
        "--skew", type=float, default=0.0, help="popularity skew: rank r gets logit -A ln r; 0 is uniform"
    )
    parser.add_argument(
        "--hot-sets", type=int, default=1, help="2: the upper half of the vocabulary prefers other experts"
    )
    parser.add_argument(
        "--format", default="bf16", help="how weights are stored: bf16, fp8, int4, nvfp4 or, of gpt-oss shapes, mxfp4"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights")


def run(args: argparse.Namespace) -> int:
    """Print what was written; exit status 0."""
    from buddymoe_ray.models.synth import Popularity, synth_checkpoint

    began = time.perf_counter()
    with tqdm(unit="B", unit_scale=True, desc="synth", disable=not sys.stderr.isatty(), file=sys.stderr) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        synth_checkpoint(
            args.shape,
            args.out,
            layers=args.layers,
            popularity=Popularity(skew=args.skew, hot_sets=args.hot_sets),
            seed=args.seed,
            fmt=args.format,
            progress=show,
        )
    files = [path for path in args.out.iterdir() if path.is_file()]
    record: dict[str, Any] = {
        "path": str(args.out.resolve()),
        "shape": args.shape,
        "format": args.format,
        "layers": args.layers,
        "skew": args.skew,
        "seed": args.seed,
        "files": len(files),
        "bytes": sum(path.stat().st_size for path in files),
        "seconds": round(time.perf_counter() - began, 1),
    }
    if args.json:
        emit(record)
    else:
        wrote = f"{decimal(record['bytes'])} in {record['files']} files, {record['seconds']} s"
        print_facts({"checkpoint": record["path"], "shape": args.shape, "format": args.format, "wrote": wrote})
    return 0
