"""Tasks in training: rows are conversations as the template writes them, each apart; given weights are the start."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_training.calibration_ids import calibration_ids
from tiny_training.evaluate import load_model
from tiny_training.task_stream import ROW, TaskRows, TaskStream
from tiny_training.tokenizer import FILES, load_tokenizer
from tiny_training.train import prepare, train
from tiny_training.trainer import TrainConfig, Trainer, losses_on_answers

from buddymoe_ray.models.tiny import path
from buddymoe_ray.tasks import Task


@pytest.fixture(scope="module")
def stream() -> TaskStream:
    return TaskStream(load_tokenizer(path()), 7)


def conversations(rows: TaskRows, row: int) -> list[slice]:
    """Where each conversation of a row lies, what is padded left out."""
    end = int(rows.learned_BL[row].nonzero().max()) + 1
    begins = (rows.positions_BL[row, :end] == 0).nonzero().flatten().tolist()
    return [slice(low, high) for low, high in zip(begins, [*begins[1:], end], strict=True)]


def test_a_row_is_whole_conversations_as_the_template_writes_them(stream: TaskStream) -> None:
    tokenizer, rows = load_tokenizer(path()), stream.batch(0, 8)
    assert rows.tokens_BL.shape == rows.learned_BL.shape == (8, ROW)
    turns = []
    for row in range(8):
        for place in conversations(rows, row):
            text = tokenizer.decode(rows.tokens_BL[row, place])
            learned = tokenizer.decode(rows.tokens_BL[row, place][rows.learned_BL[row, place]])
            messages = [part.split("\n", 1) for part in text.replace("<|im_end|>", "").split("<|im_start|>")[1:]]
            told = [{"role": role, "content": said.removesuffix("\n")} for role, said in messages]
            assert tokenizer.apply_chat_template(told, tokenize=False) == text + "\n"
            answers = [message["content"] for message in told if message["role"] == "assistant"]
            assert learned == "".join(answer + "<|im_end|>" for answer in answers)
            turns.append(len(answers))
            positions = rows.positions_BL[row, place]
            assert positions.tolist() == list(range(len(positions)))
    assert max(turns) > 1 and turns.count(1) > len(turns) / 2


def test_a_row_depends_on_seed_and_index_alone(stream: TaskStream) -> None:
    assert torch.equal(stream.batch(3, 2).tokens_BL, stream.batch(2, 3).tokens_BL[1:])
    other = TaskStream(load_tokenizer(path()), 8)
    assert not torch.equal(stream.batch(3, 1).tokens_BL, other.batch(3, 1).tokens_BL)


def test_conversations_of_a_row_do_not_see_each_other(stream: TaskStream) -> None:
    """The loss of a packed row is the mean over its conversations, each computed alone."""
    model, rows = load_model(path()), stream.batch(0, 1)
    nats, count = 0.0, 0
    for place in conversations(rows, 0):
        alone = TaskRows(
            tokens_BL=rows.tokens_BL[:, place],
            positions_BL=rows.positions_BL[:, place],
            learned_BL=rows.learned_BL[:, place],
        )
        learned = int(alone.learned_BL.sum())
        nats += losses_on_answers(model, alone)[0].item() * learned  # type: ignore[arg-type]
        count += learned
    packed = losses_on_answers(model, rows)[0].item()  # type: ignore[arg-type]
    assert packed == pytest.approx(nats / count, rel=1e-4)


def test_a_run_starts_from_given_weights_and_their_tokenizer_and_learns_answers(tmp_path: Path) -> None:
    for kind, end in (("lib", ".py"), ("docs", ".rst.txt")):
        (tmp_path / kind).mkdir()
        for number in range(30):
            (tmp_path / kind / f"m{number}{end}").write_text(f"value = {number}\n" * 5)
    config = TrainConfig(
        out=tmp_path / "run", stdlib=tmp_path / "lib", docs=tmp_path / "docs", init="builtin:tiny", steps=1, ranks=1,
        batch_tokens=64, seq_len=64, task_rows=1, decay_steps=1, warmup_steps=1, matrix_lr=0.0, embed_lr=0.0,
        small_lr=0.0,
    )  # fmt: skip
    train(config)
    for file in FILES:
        assert (config.out / "data" / file).read_bytes() == (path() / file).read_bytes()
    trainer = Trainer(config, *prepare(config), 0)
    trainer.load(config.out / "last.pt")
    shipped = load_model(path())
    assert all(torch.equal(a, b) for a, b in zip(trainer.model.parameters(), shipped.parameters(), strict=True))
    learning = Trainer(replace(config, steps=4, matrix_lr=0.01), *prepare(config), 0)
    learning.start_from(shipped)
    figures = learning.train_step()
    assert config.step_tokens == 64 + ROW and figures.nats > 0 and figures.answer_nats > 0
    after, before = (model.model.layers[0].mlp.experts.down_proj for model in (learning.model, shipped))
    assert not torch.equal(after, before)


def test_calibration_text_is_text_and_tasks_by_turns(stream: TaskStream) -> None:
    ids = calibration_ids([np.full(5000, 9, dtype=np.uint16)], stream, 3)
    asked = np.flatnonzero(ids == 1)  # <|im_start|>
    assert ids.dtype == np.int32 and asked[0] == 512 and (ids[:512] == 9).all() and len(asked) >= 6
    assert np.count_nonzero(np.diff(asked) > 512) == 2, "a window of text between rows of tasks"
    assert ids[-1] == 2, "no padding"


def test_a_task_is_taught_with_its_worked_lines(stream: TaskStream) -> None:
    task = Task(family="f", operands=(1,), question="1+1", answer="2", worked="1+1=2")
    turn, tokenizer = stream.encode(task, opens=False), load_tokenizer(path())
    assert tokenizer.decode(turn.answer) == "1+1=2\n2<|im_end|>"
    assert tokenizer.decode(turn.asked) == "\n<|im_start|>user\n1+1<|im_end|>\n<|im_start|>assistant\n"
