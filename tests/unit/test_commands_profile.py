"""`buddymoe profile` as a person or a script meets it: files left, JSON lines, and what is refused and how."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calibration_rig import random_ids, write_checkpoint

from buddymoe_ray.cli import main
from buddymoe_ray.models.fingerprint import model_hash
from buddymoe_ray.models.profile import load_profile
from buddymoe_ray.models.resolve import resolve_model
from buddymoe_ray.models.standin_files import verify_standins

QUICK = ["--quick", "--window", "64", "--rounding", "plain", "--dtype", "float32", "--json"]


def records(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    out = capsys.readouterr().out
    return [json.loads(line, parse_constant=pytest.fail) for line in out.splitlines()]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("olmoe", tmp_path_factory.mktemp("olmoe"), num_hidden_layers=1)


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ids") / "corpus.npy"
    np.save(path, np.array(random_ids(3000), dtype=np.uint16))
    return path


def test_a_calibration_leaves_profile_records_and_report(model: Path, ids: Path, tmp_path: Path, capsys) -> None:
    """Every row has its error bar, is valid JSON on a line of its own, and is in the profile and the report too."""
    out = tmp_path / "deep" / "m.profile"
    arguments = ["profile", "--model", str(model), "--corpus", str(ids), "--out", str(out), "--kinds", "lowbit4,mean"]
    arguments += ["--window", "64", "--rounding", "plain", "--dtype", "float32", "--json"]
    assert main([*arguments, "--at", "70", "--budgets", "1e-9,.5", "--loss-tokens", "384"]) == 0
    *rows, last = records(capsys)
    compared = [row for row in rows if row["table"] == "comparison"]
    assert [row["standin"] for row in compared] == ["auto", "lowbit4", "mean", "drop"]
    assert all(row["dppl_se"] > 0 and row["memory_percent"] == 70 and row["tokens"] == 384 for row in compared)
    points = [row for row in rows if row["table"] == "budgets"]
    assert [point["budget"] for point in points] == [1e-9, 0.5]
    assert points[0]["fetched_fraction"] > points[1]["fetched_fraction"]
    assert (last["profile"], last["report"]) == (str(out), str(out.with_name("m.html")))
    assert last["recommended"] in ("auto", "lowbit4", None) and last["reason"]
    assert sorted(path.name for path in out.parent.iterdir()) == ["m.html", "m.profile", "m.standins"]
    profile = load_profile(out, model_hash=model_hash(model))
    assert profile.measured and [row.standin for row in profile.comparison] == ["auto", "lowbit4", "mean", "drop"]
    page = (out.parent / "m.html").read_text()
    assert page.startswith("<!") and str(model) in page and "lowbit4" in page
    verify_standins(out.parent / "m.standins")


def test_text_through_the_models_tokenizer(tmp_path: Path, capsys) -> None:
    held = resolve_model("builtin:tiny") / "heldout" / "docs.txt"
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text(held.read_text()[:4000])
    (tmp_path / "b.py").write_text("def f(x):\n    return x\n" * 40)
    out = tmp_path / "t.profile"
    corpus = [str(tmp_path / "text"), str(tmp_path / "b.py")]
    assert main(["profile", "--corpus", *corpus, "--out", str(out), "--kinds", "mean", *QUICK]) == 0
    (last,) = records(capsys)
    assert last["recommended"] is None and "--quick" in last["reason"] and last["calibration_tokens"] % 64 == 0
    assert not load_profile(out, model_hash=model_hash(resolve_model("builtin:tiny"))).measured


def test_beside_the_checkpoint_unless_said(ids: Path, tmp_path: Path, capsys) -> None:
    folder = write_checkpoint("olmoe", tmp_path / "model", num_hidden_layers=1)
    assert main(["profile", "--model", str(folder), "--corpus", str(ids), "--kinds", "mean", *QUICK]) == 0
    (last,) = records(capsys)
    assert Path(last["profile"]) == folder / "buddymoe.profile" and (folder / "buddymoe.html").is_file()
    assert main(["eval", "--model", str(folder), "--corpus", str(ids)]) == 2, "the profile changes nothing for others"


def test_for_a_person_it_is_readable(model: Path, ids: Path, tmp_path: Path, capsys) -> None:
    arguments = ["--corpus", str(ids), "--out", str(tmp_path / "p.profile"), "--kinds", "mean", *QUICK[:-1]]
    assert main(["profile", "--model", str(model), *arguments]) == 0
    out = capsys.readouterr().out
    assert "recommended" in out and "buddymoe profile --model" in out and "{" not in out


@pytest.mark.parametrize(
    ("changes", "status", "said"),
    [
        (["--corpus", "{tmp}/none.txt"], 2, "must have one for a text corpus. hint: give .npy"),
        (["--corpus", "{tmp}/none.npy"], 1, "none.npy cannot be read"),
        (["--corpus", "{tmp}/text.npy"], 1, "text.npy cannot be read"),
        (["--corpus", "{tmp}/floats.npy"], 1, "floats.npy is float64 (9,), must be whole numbers in one row"),
        (["--corpus", "{tmp}/table.npy"], 1, "must be whole numbers in one row. hint: ravel it"),
        (["--corpus", "{tmp}/empty.npy"], 1, "corpus is 0 tokens, must be at least 512"),
        (["--corpus", "{tmp}/tiny.npy"], 1, "corpus is 100 tokens, must be at least 512 (8 windows of 64)"),
        (["--corpus", "{tmp}/foreign.npy"], 1, "corpus holds token id 5000, must be from 0 to 159"),
        (["--corpus", "{tmp}/tiny.npy", "{tmp}/a.txt"], 2, "--corpus mixes text and .npy files"),
        (["--kinds", "lowbit5"], 2, "kinds are ['lowbit5'], must be of"),
        (["--at", "half"], 2, "--at is 'half', must be numbers"),
        (["--at", "0"], 2, "memories are [0.0], must be some numbers above 0"),
        (["--budgets", "3"], 2, "budgets are [3.0]"),
        (["--tokens", "0"], 2, "must be at least 1"),
        (["--loss-tokens", "0"], 2, "expected loss tokens are 0"),
        (["--expert-dtype", "int8"], 2, "expert_dtype is int8, must be native"),
        (["--out", "{tmp}/a.txt/p.profile"], 1, "must be in a folder that can be written"),
        (["--out", "{tmp}"], 1, "a folder, must be a file"),
        (["--model", "{tmp}/nowhere"], 1, "must be builtin:tiny, a folder that exists, or a hub id"),
    ],
)
def test_refusals_are_one_line_with_a_hint(
    model: Path, ids: Path, tmp_path: Path, capsys, changes: list[str], status: int, said: str
) -> None:
    for name, array in {
        "floats": np.zeros(9),
        "table": np.zeros((3, 3), dtype=np.int64),
        "empty": np.zeros(0, dtype=np.int64),
        "tiny": np.zeros(100, dtype=np.int64),
        "foreign": np.full(2000, 5000),
    }.items():
        np.save(tmp_path / f"{name}.npy", array)
    (tmp_path / "text.npy").write_text("not an array")
    (tmp_path / "a.txt").write_text("text")
    wanted = {"--model": [str(model)], "--corpus": [str(ids)], "--out": [str(tmp_path / "p.profile")]}
    wanted[changes[0]] = [word.format(tmp=tmp_path) for word in changes[1:]]
    words = [word for name, values in wanted.items() for word in (name, *values)]
    assert main(["profile", *words, *QUICK]) == status
    captured = capsys.readouterr()
    assert said in captured.err and "hint:" in captured.err and captured.out == ""
    assert len([line for line in captured.err.splitlines() if line.startswith("buddymoe profile:")]) == 1
    assert not (tmp_path / "p.profile").exists() and not list(tmp_path.glob("trace-*"))
