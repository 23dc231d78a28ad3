"""What `plan` says against what `bench` measures, on shapes that nobody fitted anything to.

    python tests/plan_truth.py OUT.json BASE[,FIELD=NUMBER ...][@FORMAT][+FLAG=VALUE ...] ...

A BASE is a shape of `synth` whose config takes other numbers, as
`mixtral-8x7b,hidden_size=1024,intermediate_size=2048,num_hidden_layers=4@fp8+expert-dtype=int4`. Each is written with
random weights, calibrated on random ids and removed afterwards; a plan and its bench follow each other within the
minute, as others may load the machine. Prints predicted, measured and their ratio, which is asked to be within 30 %.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from buddymoe_ray.cli import main as command
from buddymoe_ray.models import synth

MEMORIES, MODES = ("100%", "50%", "25%"), ("exact", "bounded", "fast")
PROMPT, NEW, REPS = 512, 48, 3
WITHIN = 1.3


@dataclass(frozen=True, kw_only=True)
class Row:
    """A plan and its measurement; `load` are processes that wanted a core meanwhile."""

    shape: str
    memory: str
    mode: str
    load: float
    tok_s: tuple[float, float]
    ttft_s: tuple[float, float]
    hit_percent: tuple[float, float]
    standin_percent: tuple[float, float]
    read_bytes: tuple[float, float]

    def ratios(self) -> dict[str, float]:
        """Predicted by measured."""
        return {
            name: predicted / measured for name in ("tok_s", "ttft_s") for predicted, measured in [vars(self)[name]]
        }


def told(*args: str) -> dict[str, Any] | None:
    """What a command says, as its last record; None where memory is too little. Raises SystemExit."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        status = command([*args, "--json"])
    if status == 1 and args[0] == "plan":
        return None
    if status:
        raise SystemExit(f"buddymoe {' '.join(args)} ended with {status}")
    return dict(json.loads(out.getvalue().splitlines()[-1]))


def rows(spec: str, folder: Path) -> Iterator[Row]:
    """Of one shape."""
    shape, *options = spec.split("+")
    shape, _, fmt = shape.partition("@")
    base, *fields = shape.split(",")
    numbers = {name: int(value) for name, _, value in (field.partition("=") for field in fields)}
    synth.SHAPES[spec] = {**synth.SHAPES[base], **numbers}  # type: ignore[index]
    model = synth.synth_checkpoint(spec, folder / "model", fmt=fmt or "bf16")
    vocab = json.loads((model / "config.json").read_text())["vocab_size"]
    np.save(folder / "ids.npy", np.random.default_rng(0).integers(0, vocab, 24_000))
    flags = [part for option in options for part in ("--" + option.partition("=")[0], option.partition("=")[2])]
    calibrated = ["--model", str(model), "--max-model-len", "600"]
    served = [*calibrated, *flags]
    few = ["--tokens", "4096", "--loss-tokens", "512", "--kinds", "lowbit2,lowbit3,lowbit4", "--rounding", "plain"]
    told("profile", *calibrated, "--corpus", str(folder / "ids.npy"), *few)
    drawn = ["--prompt-tokens", str(PROMPT), "--new-tokens", str(NEW), "--reps", str(REPS), "--temperature", "1"]
    for memory in MEMORIES:
        for mode in MODES:
            planned = told("plan", *served, "--memory", memory, "--mode", mode)
            if planned is None:
                continue
            found = told("bench", *served, "--memory", memory, "--mode", mode, *drawn)
            assert found is not None, "it was planned"
            yield Row(
                shape=spec,
                memory=memory,
                mode=mode,
                load=os.getloadavg()[0],
                tok_s=(planned["predicted_decode_tok_s"], found["decode_tok_s"]),
                ttft_s=(planned["predicted_ttft_seconds"], found["ttft_ms"] / 1e3),
                hit_percent=(planned["predicted_hit_percent"], found["hit_rate"]),
                standin_percent=(planned["predicted_standin_percent"], found["standin_rate"]),
                read_bytes=(planned["predicted_miss_bytes_per_token"], found["bytes_read_per_token"]),
            )


def main(out: Path, specs: list[str]) -> int:
    """All shapes; how many figures are not within 30 %."""
    found, outside = list[Row](), 0
    for spec in specs:
        with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
            for row in rows(spec, Path(folder)):
                found.append(row)
                out.write_text(json.dumps([asdict(row) for row in found], indent=1))
                missed = [name for name, ratio in row.ratios().items() if not 1 / WITHIN <= ratio <= WITHIN]
                outside += len(missed)
                figures = " ".join(
                    f"{name} {vars(row)[name][0]:,.2f} for {vars(row)[name][1]:,.2f} ({ratio:.2f})"
                    for name, ratio in row.ratios().items()
                )
                also = f"hits {row.hit_percent[0]:.0f} for {row.hit_percent[1]:.0f} %, load {row.load:.1f}"
                print(f"{spec[:24]:24} {row.memory:>5} {row.mode:8} {figures}, {also} {'!' * len(missed)}", flush=True)
    return outside


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]) > 0)
