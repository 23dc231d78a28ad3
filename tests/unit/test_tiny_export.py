"""From a training run to a shipped folder: history becomes commands, time lost in a kill is not counted, files load."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_training import corpus, export
from tiny_training.task_stream import ROW
from tiny_training.train import train
from tiny_training.trainer import TrainConfig
from transformers import AutoModelForCausalLM, AutoTokenizer


def test_history_becomes_commands_and_kept_seconds(tmp_path: Path) -> None:
    lines = [
        {"event": "start", "step": 0, "time": 100.0, "options": {"steps": 9, "balance": 0.5, "docs": "/d"}},
        {"event": "checkpoint", "step": 4, "time": 160.0},
        {
            "event": "start",
            "step": 4,
            "time": 500.0,
            "options": {"steps": 7, "compile_norms": True, "batch_tokens": 100, "task_rows": 2},
        },
        {"event": "checkpoint", "step": 7, "time": 540.0},
    ]
    (tmp_path / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    history = export.read_history(tmp_path)
    config = history.config
    assert (config.steps, config.compile_norms, config.balance) == (7, True, TrainConfig(out=tmp_path).balance)
    assert history.seconds == 60.0 + 40.0
    assert (history.tokens, history.task_tokens) == (4 * 8192 + 3 * 100, 3 * 2 * ROW)
    assert history.commands == (
        "python -m tiny_training.train --out DIR --steps 9 --balance 0.5  # from step 0",
        "python -m tiny_training.train --out DIR --steps 7 --compile-norms --batch-tokens 100 --task-rows 2"
        "  # from step 4",
    )


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run of two steps on a few hundred small files, some of which are held out."""
    lib, docs, out = tmp_path / "lib", tmp_path / "docs", tmp_path / "run"
    lib.mkdir()
    docs.mkdir()
    for number in range(200):
        (lib / f"m{number}.py").write_text(f"def f{number}(x):\n    return x + {number}\n")
        (docs / f"page{number}.rst.txt").write_text(f"Page {number}\n=======\n\nAbout m{number}.\n")
    train(
        TrainConfig(
            out=out, stdlib=lib, docs=docs, steps=2, decay_steps=1, warmup_steps=1, ranks=1, batch_tokens=64,
            seq_len=16, hidden=32, layers=2, experts=4, top_k=2, ffn=32, vocab=300,
        )
    )  # fmt: skip
    return out


def test_export_writes_a_folder_that_stock_transformers_load(run: Path, tmp_path: Path) -> None:
    target = tmp_path / "weights"
    export.main(["--run", str(run), "--to", str(target)])
    assert AutoModelForCausalLM.from_pretrained(target).config.num_experts == 4
    assert AutoTokenizer.from_pretrained(target).chat_template
    names = {p.relative_to(target).as_posix() for p in target.rglob("*") if p.is_file()}
    assert names == {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json", "training.json", "heldout/docs.txt", "heldout/python.txt",
    }  # fmt: skip
    record = json.loads((target / "training.json").read_text())
    assert record["steps"] == 2
    assert record["tokens"] == 128
    heldout = corpus.collect(tmp_path / "lib", tmp_path / "docs")["heldout"]
    total = record["heldout"]["context_512"]["total"]
    assert total["documents"] == len(heldout)
    assert total["bytes"] == sum(len(d.text.encode()) for d in heldout)
    assert f"{total['bits_per_byte']:.3f}" in (target / "README.md").read_text()
