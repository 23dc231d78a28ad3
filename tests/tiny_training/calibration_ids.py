"""Write the token ids on which the shipped profile is calibrated: training text and training tasks by turns.

    python -m tiny_training.calibration_ids --run DIR --to ids.npy
    buddymoe profile --corpus ids.npy

Two thirds are windows of text, in an order of its own; nothing held out is among it. Neighbours: stream.py and
task_stream.py give the windows, train.py left the tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tiny_training.export import read_history
from tiny_training.stream import TokenStream
from tiny_training.task_stream import ROW, TaskStream
from tiny_training.train import prepare

WINDOWS = 256
_SEED = 2**20  # no training run's


def calibration_ids(documents: Sequence[np.ndarray], tasks: TaskStream, windows: int) -> np.ndarray:
    """int32 ids: a window of text, twice as long as a row of tasks, then a row of tasks, and so on."""
    text = TokenStream(documents, 2 * ROW, _SEED)
    parts: list[np.ndarray] = []
    for index in range(windows):
        rows = tasks.batch(index, 1)
        filled = int(rows.learned_BL[0].nonzero().max()) + 1
        parts += [text.window(index)[:-1], rows.tokens_BL[0, :filled].numpy()]
    return np.concatenate(parts).astype(np.int32)


def main(argv: Sequence[str] | None = None) -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(prog="python -m tiny_training.calibration_ids", description="Calibration text.")
    parser.add_argument("--run", type=Path, required=True, help="the --out folder of the training run")
    parser.add_argument("--to", type=Path, required=True)
    options = parser.parse_args(argv)
    config = read_history(options.run).config
    documents, tokenizer = prepare(config)
    ids = calibration_ids(documents, TaskStream(tokenizer, _SEED), WINDOWS)
    np.save(options.to, ids)
    print(f"{options.to}: {ids.size:,} tokens")


if __name__ == "__main__":
    main()
