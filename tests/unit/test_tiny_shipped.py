"""The shipped folder of builtin:tiny: stock transformers load it, it is small, and its record says how good it is."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from tiny_training import corpus
from tiny_training.card import TrainingRecord, model_card
from tiny_training.evaluate import (
    Evaluator,
    evaluate_texts,
    load_model,
    spans,
)
from tiny_training.tokenizer import load_tokenizer
from tiny_training.trainer import TrainConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from buddymoe_ray.errors import ConfigError
from buddymoe_ray.models.tiny import path

SHIPPED_LIMIT_BYTES = 24 << 20


def test_path_needs_no_torch() -> None:
    code = (
        "import sys; from buddymoe_ray.models.tiny import path; assert path().is_dir() and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_stock_transformers_load_the_weights_and_generate() -> None:
    tokenizer = AutoTokenizer.from_pretrained(path())
    model = AutoModelForCausalLM.from_pretrained(path())
    assert type(model).__name__ == "Qwen3MoeForCausalLM"
    assert model.dtype == torch.bfloat16
    assert not any(torch.isnan(p).any() for p in model.parameters())
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Write a Python function `add(a, b)`: Return the sum."}],
        add_generation_prompt=True,
        return_tensors="pt",
    )
    answer = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert answer.shape[1] > prompt["input_ids"].shape[1]
    assert set(model.generation_config.eos_token_id) == set(
        tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    )


def test_tokenizer_keeps_every_byte() -> None:
    tokenizer = load_tokenizer(path())
    text = "def f(x):\r\n\tif x:\n        return 'äöü 漢字 \U0001f600'  # \x00\x7f\n\n\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_shipped_folder_is_small_and_its_heldout_text_was_held_out() -> None:
    assert sum(p.stat().st_size for p in path().rglob("*") if p.is_file()) <= SHIPPED_LIMIT_BYTES
    python = (path() / "heldout" / "python.txt").read_text(encoding="utf-8")
    docs = (path() / "heldout" / "docs.txt").read_text(encoding="utf-8")
    assert 250_000 <= len(python.encode()) + len(docs.encode()) <= 300_000
    if corpus.DEFAULT_STDLIB.name == "python3.11":
        trained = corpus.read_tree(corpus.DEFAULT_STDLIB / "email", "*.py", "python")
        assert not any(d.text in python for d in trained if corpus.split_of("python", f"email/{d.name}") == "train")


def test_record_and_card_hold_the_heldout_bits_per_byte() -> None:
    record = json.loads((path() / "training.json").read_text(encoding="utf-8"))
    card = (path() / "README.md").read_text(encoding="utf-8")
    evaluation = record["heldout"]["context_512"]
    for score in (*evaluation["scores"].values(), evaluation["total"]):
        assert 0.5 < score["bits_per_byte"] < 1.3
        assert f"{score['bits_per_byte']:.3f}" in card
    assert set(evaluation["scores"]) == {"python", "docs"}
    assert all(layer["max_over_mean"] < 3 for layer in evaluation["router_balance"])
    assert record["began"]["tokens"] >= 15_000_000


def test_tasks_were_learned_and_cost_text_little() -> None:
    """Nine of ten held-out tasks are answered exactly; bits per byte are within 5 % of the weights it began from."""
    record = TrainingRecord.read(path())
    assert record.began is not None and not record.began.tasks
    assert record.tasks["all"].tasks >= 2000 and record.tasks["all"].accuracy >= 90
    for context, found in record.heldout.items():
        for kind, score in found.scores.items():
            before = record.began.heldout[context].scores[kind]
            assert (score.bytes, score.documents) == (before.bytes, before.documents)
            assert score.bits_per_byte <= 1.05 * before.bits_per_byte, (context, kind)


def test_evaluation_repeats_the_recorded_quality_on_a_piece_of_heldout_text() -> None:
    evaluator = Evaluator(load_model(path()), load_tokenizer(path()))
    text = (path() / "heldout" / "python.txt").read_text(encoding="utf-8")[:8000]
    evaluation = evaluate_texts(evaluator, [("python", [text]), ("same", [text])])
    assert evaluation.scores["python"] == evaluation.scores["same"]
    assert evaluation.total.nats_per_token == pytest.approx(evaluation.scores["python"].nats_per_token)
    assert evaluation.total.bits_per_byte < 1.6
    tokens = evaluation.total.tokens
    assert evaluator.load_LE.sum(dim=1).tolist() == [tokens * 4] * evaluator.load_LE.shape[0]


@pytest.mark.parametrize(("length", "context", "stride"), [(1, 8, 4), (8, 8, 4), (9, 8, 4), (50, 8, 3), (20, 8, 8)])
def test_spans_score_every_target_once_within_the_context(length: int, context: int, stride: int) -> None:
    covered: list[int] = []
    for start, first, end in spans(length, context, stride):
        assert start <= first < end <= start + context
        assert start == 0 or first - start >= context - stride
        covered += range(first, end)
    assert covered == list(range(length))


def test_stride_beyond_the_context_is_a_clear_error() -> None:
    with pytest.raises(ConfigError, match=r"--stride is 9, must be 1 \.\.\. --context \(8\)"):
        Evaluator(load_model(path()), load_tokenizer(path()), context=8, stride=9)


def test_the_shipped_card_is_what_its_record_says() -> None:
    card = model_card(TrainingRecord.read(path()), TrainConfig(out=path()))
    assert card == (path() / "README.md").read_text(encoding="utf-8")
