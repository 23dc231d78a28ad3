"""The command line as a person or a script meets it: JSON lines, exit statuses, one-line errors, true numbers."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build_checkpoint

from buddymoe_ray.cli import main
from buddymoe_ray.models.reference import reference_model
from buddymoe_ray.models.resolve import resolve_model
from buddymoe_ray.models.tokenizer import load_tokenizer


def records(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    out = capsys.readouterr().out
    assert ": " not in out.split('"', 1)[0], "JSON must be compact"
    return [json.loads(line, parse_constant=pytest.fail) for line in out.splitlines()]  # JSON has no infinity


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = resolve_model("builtin:tiny") / "heldout"
    path = tmp_path_factory.mktemp("corpus") / "held-out.txt"
    path.write_text((folder / "python.txt").read_text()[:9000] + (folder / "docs.txt").read_text()[:5000])
    return path


def test_eval_splits_memory_as_dynamic_placement_does(corpus: Path, capsys) -> None:
    """A stand-in for every expert leaves less memory for full ones."""
    found = {}
    for placement in ("static", "dynamic"):
        arguments = ["eval", "--corpus", str(corpus), "--memory", "50%", "--tokens", "192", "--mode", "fast", "--json"]
        assert main([*arguments, "--placement", placement]) == 0
        found[placement] = json.loads(capsys.readouterr().out)
    assert found["dynamic"]["placement"] == "dynamic" and "placement" not in found["static"]
    assert found["dynamic"]["miss_rate"] > found["static"]["miss_rate"]
    assert found["dynamic"]["standin_fraction"] == found["static"]["standin_fraction"] == 100


def test_eval_exact_costs_nothing_and_is_what_transformers_computes(corpus: Path, capsys) -> None:
    """At a quarter of the memory: no rise, full agreement, and stock transformers' perplexity within .1 %."""
    arguments = ["eval", "--corpus", str(corpus), "--memory", "25%", "--tokens", "700", "--batch", "4", "--json"]
    assert main(arguments) == 0
    (got,) = records(capsys)
    assert got["dppl_percent"] == 0 and got["top1_agreement"] == 100 and got["kl"] == 0 and got["dppl_se"] == 0
    assert got["tokens"] == 768 and got["miss_rate"] > 0 and got["fetched_fraction"] == 100
    folder = resolve_model("builtin:tiny")
    ids = load_tokenizer(folder).encode(corpus.read_text(), add_special_tokens=False)  # type: ignore[union-attr]
    windows = torch.tensor([ids[256 * i : 256 * (i + 1)] for i in range(4)])
    with torch.no_grad():
        logits = reference_model(folder)(windows).logits[:, 63:255]
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 64:].flatten())
    assert got["ppl"] == pytest.approx(math.exp(nll), rel=1e-3)


def test_bench_prints_a_row_per_memory_and_batch(tmp_path: Path, capsys) -> None:
    build_checkpoint("olmoe", tmp_path)
    arguments = ["bench", "--model", str(tmp_path), "--memory", "50%,100%", "--prompt-tokens", "8"]
    more = ["--new-tokens", "10", "--reps", "2", "--dtype", "float32", "--turns", "2", "--beside", "150", "--json"]
    assert main([*arguments, *more]) == 0
    half, full = records(capsys)
    assert half["cached_tokens"] == full["cached_tokens"] == 16 and full["ttft_second_turn_ms"] > 0
    assert (half["memory"], full["memory"]) == ("50%", "100%") and half["batch"] == full["batch"] == 1
    assert full["bytes_read_per_token"] == 0 and full["hit_rate"] == 100 and full["stall_ms_per_token"] == 0
    assert half["bytes_read_per_token"] > 0 and half["hit_rate"] < 100
    for row in (half, full):
        assert row["decode_tok_s"] > 0 and row["prefill_tok_s"] > 0 and row["ttft_ms"] > 0 and row["p99_itl_ms"] > 0
        assert min(row[f"beside_{what}_ms"] for what in ("ttft", "ttft_alone", "p99_itl", "p99_itl_alone")) > 0
        assert row["peak_rss_bytes"] > 50 << 20 and row["total_bytes_read"] > 0


def test_plan_of_the_builtin_model_names_its_folder(capsys) -> None:
    assert main(["plan", "--memory", "25%", "--json"]) == 0
    (plan,) = records(capsys)
    assert Path(plan["path"]) == resolve_model("builtin:tiny").resolve()
    (device,) = plan["devices"]
    held = device["slots"] * plan["expert_bytes"] + plan["overhead_bytes"]
    assert held <= device["expert_budget_bytes"] == plan["total_expert_bytes"] // 4
    assert plan["activation_bytes"] >= plan["prefill_tokens"] * plan["kv_bytes_per_token"] > 1 << 20
    assert main(["plan", "--memory", "25%"]) == 0
    assert "device tier" in capsys.readouterr().out


def test_chat_answers_each_line(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("What is a list?\n\nAnd a dict?\n/quit\nnever\n"))
    assert main(["chat", "--max-tokens", "5", "--json"]) == 0
    answers = records(capsys)
    assert len(answers) == 2 and all(a["usage"]["completion_tokens"] <= 5 for a in answers)
    assert answers[1]["usage"]["prompt_tokens"] > answers[0]["usage"]["prompt_tokens"], "the conversation is sent whole"


def test_synth_writes_what_it_says(tmp_path: Path, capsys) -> None:
    out = tmp_path / "made"
    assert main(["synth", "--shape", "olmoe-tiny", "--out", str(out), "--layers", "1", "--json"]) == 0
    (said,) = records(capsys)
    assert said["bytes"] == sum(p.stat().st_size for p in out.iterdir()) and said["layers"] == 1


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["plan", "--memory", "half"], 2, "must be like 25% or 6GiB"),
        (["plan", "--memory", "0.1%"], 1, "hint: use --memory"),
        (["plan", "--model", "/nowhere"], 1, "nowhere"),
        (["plan", "--kv-memory", "1"], 1, "kv_memory is 1 bytes, must be at least"),
        (["plan", "--threads", "5000"], 2, "threads is 5000, must be a number from 1 to 1024"),
        (["chat", "--temperature", "5"], 2, "temperature is 5.0, must be"),
        (["key", "a b", "--file", "/tmp/never"], 2, "name is 'a b', must be small letters"),
        (["eval", "--corpus", __file__, "--tokens", "0"], 2, "--tokens is 0, must be at least 1"),
        (["eval", "--corpus", "/nowhere"], 2, "file or folder that exists"),
        (["bench", "--batch", "two"], 2, "whole numbers"),
        (["bench", "--reps", "0"], 2, "--reps is 0"),
        (["synth", "--shape", "unheard-of", "--out", "/tmp/never"], 2, "unheard-of"),
    ],
)
def test_errors_are_one_line_with_a_status(arguments, status, message, capsys) -> None:
    assert main(arguments) == status
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.startswith(f"buddymoe {arguments[0]}: ") and not captured.out


def test_a_corpus_that_is_too_short_is_refused(tmp_path: Path, capsys) -> None:
    (tmp_path / "short.txt").write_text("too short")
    assert main(["eval", "--corpus", str(tmp_path)]) == 2
    assert "must be at least 256" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["dance"], ["plan", "--colour"]])
def test_bad_usage_is_status_2(arguments, capsys) -> None:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2 and "usage" in capsys.readouterr().err
