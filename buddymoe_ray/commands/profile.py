"""`buddymoe profile`: calibrate a model's stand-ins on a corpus and say what they cost.

Writes the profile (bound to the model's hash), packed records beside it, and an HTML report with plots. With `--json`
every stand-in's table is printed, a line per row.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from buddymoe_ray.commands.common import (
    add_engine_arguments,
    add_json_argument,
    emit,
    engine_config,
    print_facts,
    print_table,
)
from buddymoe_ray.config import RECORD_KINDS
from buddymoe_ray.errors import ConfigError, ProfileError
from buddymoe_ray.models.resolve import resolve_model
from buddymoe_ray.observe import progress

if TYPE_CHECKING:
    from buddymoe_ray.models.profile import Profile

__all__ = ["add_arguments", "run"]

_DECIDED = (
    "mode",
    "budget",
    "standin",
    "standin_layers",
    "policy",
    "profile",
    "calibrate",
    "cache_dir",
    "guard_share",
    "seed",
    "generation_config",
)
"""Engine options that calibration decides itself."""
_COMPENSATED = {"auto": None, "compensated": True, "plain": False}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `profile`."""
    add_engine_arguments(parser, memory="100%", without=_DECIDED)
    add_json_argument(parser)
    parser.add_argument("--corpus", nargs="+", required=True, help="text files or folders, or .npy files of token ids")
    parser.add_argument("--out", type=Path, default=None, help="P.profile; default beside the checkpoint")
    parser.add_argument("--tokens", type=int, default=None, help="most tokens traced; default by the model's size")
    parser.add_argument("--window", type=int, default=None, help="tokens of a traced window")
    parser.add_argument(
        "--kinds",
        default=None,
        help=f"some of {','.join(RECORD_KINDS)},buddy; default all, of large models four",
    )
    parser.add_argument(
        "--rounding",
        choices=sorted(_COMPENSATED),
        default="auto",
        help="of low-bit copies; auto compensates what it may",
    )
    parser.add_argument(
        "--rounding-minutes", type=float, default=30.0, help="that auto compensates, worst experts first"
    )
    parser.add_argument("--rank", type=int, default=8, help="rank of low-rank maps")
    parser.add_argument(
        "--quick", action="store_true", help="measure no expected losses: the profile serves mode fast only"
    )
    parser.add_argument("--at", default="75,50,25", help="memories (%%) at which stand-ins are compared")
    parser.add_argument(
        "--budgets",
        default=None,
        help="budgets (nats) of the curve for bounded; default .001,.003,.01,.03 for small models",
    )
    parser.add_argument(
        "--loss-tokens",
        type=int,
        default=None,
        help="most held-out tokens that expected losses are measured on; default by the model's size",
    )


def run(args: argparse.Namespace) -> int:
    """Calibrate; exit status 0."""
    config = engine_config(args, guard_share=0.0, mode="exact", profile=None)
    memories = _numbers("--at", args.at)
    budgets = None if args.budgets is None else _numbers("--budgets", args.budgets)
    folder = resolve_model(args.model)
    ids = _corpus_ids(args)
    from buddymoe_ray.calibrate.expected_loss import LossOptions  # late: they import torch
    from buddymoe_ray.calibrate.report import write_report
    from buddymoe_ray.calibrate.run import CalibrationOptions, calibrate
    from buddymoe_ray.models.profile import NAME

    out = args.out or folder / NAME
    options = CalibrationOptions(
        config=config,
        ids=ids,
        out=out,
        kinds=None if args.kinds is None else tuple(args.kinds.split(",")),
        tokens=args.tokens,
        window=args.window,
        compensated=_COMPENSATED[args.rounding],
        rounding_minutes=args.rounding_minutes,
        rank=args.rank,
        quick=args.quick,
        losses=LossOptions(memories=memories, budgets=budgets, tokens=args.loss_tokens),
    )
    profile = calibrate(options, progress=progress)
    report = out.with_name(out.name.removesuffix(".profile") + ".html")
    write_report(profile, report)
    (_emit if args.json else _print)(profile, out, report)
    return 0


def _emit(profile: Profile, out: Path, report: Path) -> None:
    for row in profile.comparison:
        emit({"table": "comparison"} | asdict(row))
    for point in profile.budget_curve:
        emit({"table": "budgets"} | asdict(point))
    last = {name: getattr(profile, name) for name in ("calibration_tokens", "recommended", "reason")}
    emit({"profile": str(out), "report": str(report)} | last)


def _print(profile: Profile, out: Path, report: Path) -> None:
    from buddymoe_ray.calibrate.report import next_command

    if profile.comparison:
        print_table(
            [asdict(row) for row in profile.comparison],
            {
                "stand-in": "{standin}",
                "memory": "{memory_percent:g}%",
                "rise %": "{dppl_percent:.2f} ± {dppl_se:.2f}",
                "KL (nats)": "{kl:.4f}",
                "same top token %": "{top1_agreement:.1f}",
                "misses %": "{miss_rate:.1f}",
            },
            title="Perplexity with nothing fetched",
        )
    if profile.budget_curve:
        print_table(
            [asdict(point) for point in profile.budget_curve],
            {
                "memory": "{memory_percent:g}%",
                "budget (nats/token)": "{budget:g}",
                "expected rise": "{expected_rise:.4f}",
                "rise %": "{dppl_percent:.2f} ± {dppl_se:.2f}",
                "misses fetched %": "{fetched_fraction:.1f}",
            },
            title="Mode bounded",
        )
    print_facts(
        {
            "profile": str(out),
            "report": str(report),
            "calibrated on": f"{profile.calibration_tokens:,} tokens",
            "recommended": f"{profile.recommended or 'no stand-in'}: {profile.reason}",
            "next": next_command(profile),
        }
    )


def _corpus_ids(args: argparse.Namespace) -> list[int]:
    """Token ids of text files through the model's tokenizer, or of .npy files as they are."""
    from buddymoe_ray.commands.eval import encode_corpus, tokenizer_of

    arrays = [name for name in args.corpus if name.endswith(".npy")]
    if arrays and len(arrays) < len(args.corpus):
        raise ConfigError(
            "--corpus mixes text and .npy files, must be of one sort. hint: encode the text into a .npy file"
        )
    if arrays:
        return [token for name in arrays for token in _read_ids(name)]
    return encode_corpus(tokenizer_of(args.model, "for a text corpus. hint: give .npy files of token ids"), args.corpus)


def _read_ids(name: str) -> list[int]:
    import numpy as np

    try:
        ids: Any = np.load(name, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ProfileError(f"--corpus {name} cannot be read: {error}. hint: save token ids with numpy.save") from error
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ProfileError(
            f"--corpus {name} is {ids.dtype} {ids.shape}, must be whole numbers in one row. hint: ravel it"
        )
    return [int(token) for token in ids]


def _numbers(name: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"{name} is {text!r}, must be numbers like 50,25. hint: leave it out") from None
