"""The rank-r map against brute force: exact on linear experts, optimal among its neighbours, weighted, mean at 0."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from buddymoe_ray.calibrate.lowrank import fit_lowrank
from buddymoe_ray.kernels.lowrank import lowrank_forward

D = 24


def _error(tensors: dict[str, Tensor], x: Tensor, y: Tensor, weight: Tensor) -> float:
    return float(((lowrank_forward(x, tensors) - y).square().sum(dim=1) * weight.square()).sum())


@pytest.fixture
def rows() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(D, D, generator=generator)
    x = torch.randn(600, D, generator=generator) @ mix + 1.5
    y = torch.tanh(x @ torch.randn(D, D, generator=generator) / 8) + 0.3
    return x, y, torch.rand(600, generator=generator) + 0.05


@pytest.mark.parametrize("rank", [1, 3])
def test_recovers_a_linear_expert_of_that_rank(rows: tuple[Tensor, Tensor, Tensor], rank: int) -> None:
    x, _, weight = rows
    generator = torch.Generator().manual_seed(rank)
    linear = torch.randn(D, rank, generator=generator) @ torch.randn(rank, D, generator=generator)
    y = x @ linear.T + torch.randn(D, generator=generator)
    tensors = fit_lowrank(x, y, weight, rank, ridge=0.0, dtype=torch.float32)
    assert tensors["down"].shape == (rank, D) and tensors["up"].shape == (D, rank)
    assert torch.allclose(lowrank_forward(x, tensors), y, atol=1e-3, rtol=1e-4)


def test_no_nearby_map_is_better(rows: tuple[Tensor, Tensor, Tensor]) -> None:
    x, y, weight = rows
    tensors = fit_lowrank(x, y, weight, 4, ridge=0.0, dtype=torch.float32)
    best = _error(tensors, x, y, weight)
    generator = torch.Generator().manual_seed(7)
    for _ in range(60):
        moved = {k: t + 1e-2 * t.abs().mean() * torch.randn(t.shape, generator=generator) for k, t in tensors.items()}
        assert _error(moved, x, y, weight) >= best * (1 - 1e-5)


def test_error_falls_with_rank_to_that_of_ordinary_least_squares(rows: tuple[Tensor, Tensor, Tensor]) -> None:
    x, y, weight = rows
    errors = [
        _error(fit_lowrank(x, y, weight, rank, ridge=0.0, dtype=torch.float32), x, y, weight) for rank in (0, 2, 8, D)
    ]
    assert errors == sorted(errors, reverse=True)
    design = torch.cat([x, torch.ones(len(x), 1)], dim=1) * weight[:, None]
    solution = torch.linalg.lstsq(design.double(), (y * weight[:, None]).double()).solution
    least = float((design.double() @ solution - y * weight[:, None]).square().sum())
    assert errors[-1] == pytest.approx(least, rel=1e-3)


def test_rank_zero_is_the_weighted_mean(rows: tuple[Tensor, Tensor, Tensor]) -> None:
    x, y, weight = rows
    share = weight**2 / (weight**2).sum()
    tensors = fit_lowrank(x, y, weight, 0, dtype=torch.float32)
    assert torch.allclose(tensors["bias"], share @ y, atol=1e-5)
    assert torch.allclose(lowrank_forward(x[:3], tensors), (share @ y).expand(3, -1), atol=1e-5)


def test_rows_count_by_their_squared_weight(rows: tuple[Tensor, Tensor, Tensor]) -> None:
    x, y, weight = rows
    twice = torch.ones(len(x))
    twice[:200] = 2.0
    repeated = (torch.cat([x, *[x[:200]] * 3]), torch.cat([y, *[y[:200]] * 3]), torch.ones(len(x) + 600))
    one, other = fit_lowrank(x, y, twice, 3, ridge=0.0), fit_lowrank(*repeated, 3, ridge=0.0)
    for name in ("down", "up"):  # eigenvectors: signs are free, products are not
        assert one[name].shape == other[name].shape
    assert torch.allclose(lowrank_forward(x, one), lowrank_forward(x, other), atol=0.05)
    assert not torch.allclose(
        lowrank_forward(x, one), lowrank_forward(x, fit_lowrank(x, y, weight, 3, ridge=0.0)), atol=0.05
    )


def test_with_fewer_rows_than_inputs_the_same_map_is_found(rows: tuple[Tensor, Tensor, Tensor]) -> None:
    """By the rows' products it is that of the inputs' moments."""
    x, y, weight = (part[: D - 4] for part in rows)
    by_rows = fit_lowrank(x, y, weight, 3, dtype=torch.float32)
    twice = torch.cat([x, x]), torch.cat([y, y]), torch.cat([weight, weight])
    ridge = 0.01 * D / (D - 4)  # what few rows are damped more
    by_inputs = fit_lowrank(*twice, 3, ridge=ridge, dtype=torch.float32)
    everywhere = rows[0]
    torch.testing.assert_close(
        lowrank_forward(everywhere, by_rows), lowrank_forward(everywhere, by_inputs), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("rows_seen", [1, 2, 5])
def test_few_rows_stay_finite_and_tame(rows: tuple[Tensor, Tensor, Tensor], rows_seen: int) -> None:
    x, y, weight = rows
    tensors = fit_lowrank(x[:rows_seen], y[:rows_seen], weight[:rows_seen], 4)
    answer = lowrank_forward(x, tensors)
    assert bool(torch.isfinite(answer).all())
    assert float(answer.norm(dim=1).mean()) < 5 * float(y.norm(dim=1).mean())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_changes_little(rows: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype) -> None:
    x, y, weight = rows
    full, half = (fit_lowrank(x, y, weight, 4, dtype=kind) for kind in (torch.float32, dtype))
    assert all(t.dtype == dtype for t in half.values())
    difference = (lowrank_forward(x, full) - lowrank_forward(x, half)).norm() / lowrank_forward(x, full).norm()
    assert float(difference) < (0.01 if dtype == torch.bfloat16 else 0.002)


def test_refuses_impossible_ranks_and_no_rows(rows: tuple[Tensor, Tensor, Tensor]) -> None:
    x, y, weight = rows
    with pytest.raises(AssertionError, match="rank is 25"):
        fit_lowrank(x, y, weight, D + 1)
    with pytest.raises(AssertionError, match="0 rows"):
        fit_lowrank(x[:0], y[:0], weight[:0], 1)
