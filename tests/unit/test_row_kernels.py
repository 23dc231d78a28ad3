"""Norms, activations and routers whose rows do not see each other, and that no step has machine code to make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import build_checkpoint
from torch import Tensor, nn
from torch.nn import functional

from buddymoe_ray import LLM
from buddymoe_ray.kernels import CpuNorm, cpu, decoder, machine_code, norm, numba_calls, paged_attention, stored
from buddymoe_ray.models.row_kernels import RowNorm, WholeVectors, rows_apart


class LlamaRMSNorm(nn.Module):
    def __init__(self, n: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.rand(n).to(dtype) + 0.5), 1e-5

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.variance_epsilon)).to(x)


class GemmaRMSNorm(LlamaRMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return (normed * (1.0 + self.weight.float())).to(x)


class CentredRMSNorm(LlamaRMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(-1, keepdim=True))


class Model(nn.Module):
    device = torch.device("cpu")

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.act, self.gate = norm, nn.SiLU(), Router()


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 40).bfloat16())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        narrow = functional.linear(x.to(self.weight.dtype), self.weight)
        return narrow, functional.linear(x.float(), self.weight.float()).sigmoid()


def apart(norm: nn.Module) -> Model:
    model = Model(norm)
    rows_apart(model, [model.gate, None])
    return model


def each_alone(function: Any, x_RK: Tensor) -> Tensor:
    return torch.cat([function(row.clone()) for row in x_RK.split(1)])


@pytest.mark.parametrize("kind", [LlamaRMSNorm, GemmaRMSNorm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 15, 40, 256])
def test_a_norm_is_the_models_and_sees_one_row(kind: type[LlamaRMSNorm], dtype: torch.dtype, n: int) -> None:
    made = kind(n, dtype)
    norm = apart(made).norm
    assert isinstance(norm, RowNorm) and norm.weight is made.weight
    x_RK = (torch.randn(9, n) * torch.logspace(-3, 3, 9)[:, None]).to(dtype)
    with torch.inference_mode():
        got, expected = norm(x_RK), made(x_RK)
        assert got.dtype is dtype and torch.equal(each_alone(norm, x_RK), got)
        assert torch.equal(norm(x_RK.view(3, 3, n)), got.view(3, 3, n))
    tolerance = 1e-6 if dtype is torch.float32 else 8e-3  # the last bit of a bfloat16
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=0.0)
    x_RK[4, 0] = float("nan")
    assert norm(x_RK).isnan().any(dim=1).tolist() == [row == 4 for row in range(9)]


def test_what_only_is_called_a_norm_is_left_alone() -> None:
    made = CentredRMSNorm(24, torch.float32)
    assert apart(made).norm is made
    assert not CpuNorm.covers(torch.zeros(2, dtype=torch.float16))


@pytest.mark.parametrize("width", [4, 24, 40, 64, 100])
def test_an_activation_of_any_width_sees_one_row(width: int) -> None:
    act, x_RK = apart(LlamaRMSNorm(8, torch.float32)).act, 3 * torch.randn(7, width)
    assert isinstance(act, WholeVectors)
    assert torch.equal(each_alone(act, x_RK), act(x_RK))
    torch.testing.assert_close(act(x_RK), functional.silu(x_RK))


def test_a_router_in_either_precision_sees_one_row() -> None:
    gate, x_RK = apart(LlamaRMSNorm(8, torch.float32)).gate, torch.randn(11, 40)
    with torch.inference_mode():
        for at, expected in enumerate(Router.forward(gate, x_RK)):
            got = gate(x_RK)[at]
            assert got.dtype is expected.dtype
            assert torch.equal(each_alone(lambda row, at=at: gate(row)[at], x_RK), got)
            tolerance = 1e-5 if at else 2e-2
            torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("family", ["dots1", "gpt_oss"])
def test_no_step_has_machine_code_to_make(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an engine needs is there when it is: one router multiplies in float32, one family has experts by torch."""
    build_checkpoint(family, tmp_path, dtype=torch.bfloat16)
    makers = (cpu.combine_kernel, cpu.experts_kernel, cpu.linear_kernel, cpu._tiles)
    made = (*makers, stored._stored_functions, stored._dot_functions)
    for maker in (*made, norm.norm_kernel, paged_attention.attention_kernel, decoder.decoder_kernel):
        maker.cache_clear()
    with LLM(str(tmp_path), memory="60%", max_model_len=64) as llm:
        for module in (machine_code, numba_calls):
            for name in ("native_functions", "compiled"):
                if hasattr(module, name):
                    monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("made in a step"))
        [result] = llm.generate([[5, 6, 7]], max_tokens=3)
    assert len(result.token_ids) == 3
