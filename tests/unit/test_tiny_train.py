"""Training of builtin:tiny: the kernel equals eager experts, Muon orthogonalises, a resumed run is bit-identical."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_training import losses, moe_train
from tiny_training.optim import Muon, newton_schulz
from tiny_training.stream import TokenStream
from tiny_training.tokenizer import load_tokenizer
from tiny_training.train import parse, train
from tiny_training.trainer import TrainConfig, Trainer, schedule
from torch import Tensor
from torch.nn import functional
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from buddymoe_ray.errors import ConfigError
from buddymoe_ray.models.tiny import path


def experts_and_routing(tokens: int, experts: int) -> tuple[Qwen3MoeExperts, Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    config = Qwen3MoeConfig(hidden_size=32, moe_intermediate_size=16, num_experts=experts, num_experts_per_tok=2)
    config._experts_implementation = "eager"
    module = Qwen3MoeExperts(config).double()
    for param in module.parameters():
        torch.nn.init.normal_(param, std=0.3)
    x_TD = torch.randn(tokens, 32, dtype=torch.float64, requires_grad=True)
    index_TK = torch.rand(tokens, experts).topk(2).indices
    weight_TK = torch.rand(tokens, 2, dtype=torch.float64, requires_grad=True)
    return module, x_TD, index_TK, weight_TK


@pytest.mark.parametrize(("tokens", "experts"), [(40, 8), (3, 16), (1, 4)])
def test_kernel_equals_eager_experts_forward_and_backward(tokens: int, experts: int) -> None:
    module, x_TD, index_TK, weight_TK = experts_and_routing(tokens, experts)
    inputs = [x_TD, module.gate_up_proj, module.down_proj, weight_TK]
    dy_TD = torch.randn(tokens, 32, dtype=torch.float64)
    expected = module(x_TD, index_TK, weight_TK)
    actual = moe_train.sorted_experts(module, x_TD, index_TK, weight_TK)
    torch.testing.assert_close(actual, expected)
    pairs = zip(torch.autograd.grad(actual, inputs, dy_TD), torch.autograd.grad(expected, inputs, dy_TD), strict=True)
    for got, wanted in pairs:
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("chunk", [5, 16, 64])
def test_chunked_cross_entropy_equals_torch(chunk: int) -> None:
    torch.manual_seed(2)
    hidden_TD = torch.randn(23, 8, dtype=torch.float64, requires_grad=True)
    head_VD = torch.randn(31, 8, dtype=torch.float64, requires_grad=True)
    target_T = torch.randint(0, 31, (23,))
    actual = losses.ChunkedCrossEntropy.apply(hidden_TD, head_VD, target_T, chunk)
    expected = functional.cross_entropy(hidden_TD @ head_VD.t(), target_T)
    torch.testing.assert_close(actual, expected)
    pairs = zip(
        torch.autograd.grad(3 * actual, [hidden_TD, head_VD]),
        torch.autograd.grad(3 * expected, [hidden_TD, head_VD]),
        strict=True,
    )
    for got, wanted in pairs:
        torch.testing.assert_close(got, wanted)


def test_balance_loss_is_one_when_balanced_and_more_when_not() -> None:
    even = torch.eye(8).repeat(4, 1) * 1e-3
    skewed = torch.zeros(32, 8)
    skewed[:, :2] = 5.0
    assert losses.balance_loss((even,), 1).item() == pytest.approx(1.0, abs=1e-3)
    assert losses.balance_loss((even, skewed), 2).item() > 2.0


@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (3, 32, 48), (2, 2, 16, 40)])
def test_newton_schulz_brings_singular_values_near_one(shape: tuple[int, ...]) -> None:
    torch.manual_seed(3)
    result = newton_schulz(torch.randn(shape))
    assert result.shape == shape
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.3 and values.max() < 1.3


def test_muon_treats_gate_and_up_as_two_matrices() -> None:
    torch.manual_seed(4)
    whole = torch.zeros(3, 32, 24, requires_grad=True)
    whole.grad = torch.randn(3, 32, 24)
    gate = torch.zeros(3, 16, 24, requires_grad=True)
    gate.grad = whole.grad[:, :16].clone()
    Muon([{"params": [whole], "fused_halves": True}, {"params": [gate]}], lr=0.1).step()
    torch.testing.assert_close(whole[:, :16], gate)


def tiny_config(out: Path, **changes: object) -> TrainConfig:
    config = TrainConfig(
        out=out, steps=3, decay_steps=2, warmup_steps=1, ranks=1, batch_tokens=64, seq_len=16,
        hidden=32, layers=2, experts=4, top_k=2, ffn=32, vocab=300,
    )  # fmt: skip
    return dataclasses.replace(config, **changes)


@pytest.fixture
def documents() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 300, size, dtype=np.uint16) for size in (40, 90, 33, 61)]


def test_resumed_run_is_bit_identical(tmp_path: Path, documents: list[np.ndarray]) -> None:
    config = tiny_config(tmp_path)
    straight = Trainer(config, documents, load_tokenizer(path()), 0)
    losses = [straight.train_step() for _ in range(3)]
    first = Trainer(config, documents, load_tokenizer(path()), 0)
    assert first.train_step() == losses[0]
    first.save(tmp_path / "last.pt")
    second = Trainer(dataclasses.replace(config, seed=0), documents, load_tokenizer(path()), 0)
    second.load(tmp_path / "last.pt")
    assert [second.train_step() for _ in range(2)] == losses[1:]
    for name, value in straight.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_training_from_files_lowers_the_loss_and_leaves_checkpoints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lib, docs = tmp_path / "lib", tmp_path / "docs"
    lib.mkdir()
    docs.mkdir()
    for number in range(12):
        (lib / f"m{number}.py").write_text(f"def f{number}(x):\n    return x + {number}\n" * 4)
    (docs / "page.rst.txt").write_text("A page\n======\n")
    train(tiny_config(tmp_path / "run", stdlib=lib, docs=docs, steps=12, decay_steps=4, log_steps=6))
    lines = [line for line in capsys.readouterr().err.splitlines() if " loss " in line]
    first, last = (float(line.split(" loss ")[1].split()[0]) for line in lines)
    assert last < first
    assert (tmp_path / "run" / "last.pt").exists()
    assert (tmp_path / "run" / "stable.pt").exists()


def test_token_stream_covers_every_window_once_per_epoch(documents: list[np.ndarray]) -> None:
    stream = TokenStream(documents, 16, seed=5)
    starts = {stream.window(i).tobytes() for i in range(stream.windows)}
    assert len(starts) == stream.windows == 223 // 16
    assert not torch.equal(stream.batch(0, 4), stream.batch(stream.windows, 4))
    assert torch.equal(stream.batch(0, 4), TokenStream(documents, 16, seed=5).batch(0, 4))


def test_schedule_warms_up_stays_and_decays_to_zero(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, steps=100, warmup_steps=10, decay_steps=20)
    assert schedule(0, config) == pytest.approx(0.1)
    assert schedule(9, config) == schedule(50, config) == schedule(80, config) == 1.0
    assert schedule(99, config) == pytest.approx(0.05)


def test_options_are_the_fields_of_the_config(tmp_path: Path) -> None:
    config = parse(["--out", str(tmp_path), "--steps", "7", "--balance", "0.5", "--compile-norms"])
    assert config == dataclasses.replace(TrainConfig(out=tmp_path), steps=7, balance=0.5, compile_norms=True)


def test_batch_that_does_not_divide_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--batch-tokens is 100, must be a multiple of"):
        train(tiny_config(tmp_path, batch_tokens=100))
