"""The low-rank map is its formula, row by row."""

import pytest
import torch

from buddymoe_ray.kernels import lowrank_forward, mean_forward
from buddymoe_ray.kernels.rowwise import rowwise, rowwise_linear

D, r = 96, 8


def tensors(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    shapes = {"down": (r, D), "up": (D, r), "bias": (D,)}
    return {name: torch.randn(shape, generator=rng).to(dtype) for name, shape in shapes.items()}


def rows(R: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(R, D, generator=torch.Generator().manual_seed(2)).to(dtype)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lowrank_is_up_down_x_plus_bias(stored: torch.dtype, dtype: torch.dtype) -> None:
    made, x_RD = tensors(stored), rows(5, dtype)
    wide = {name: t.double() for name, t in made.items()}
    expected = x_RD.double() @ wide["down"].T @ wide["up"].T + wide["bias"]
    got = lowrank_forward(x_RD, made)
    assert got.dtype is dtype and got.shape == x_RD.shape
    tolerance = 1e-2 if dtype is torch.bfloat16 else 1e-5
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


def test_x_of_zero_gives_the_bias() -> None:
    made = tensors()
    assert torch.equal(lowrank_forward(torch.zeros(3, D), made), made["bias"].expand(3, D))
    assert torch.equal(mean_forward(rows(3), made), made["bias"].expand(3, D))
    assert lowrank_forward(rows(0), made).shape == mean_forward(rows(0), made).shape == (0, D)


def test_mean_is_a_copy_in_the_dtype_of_the_rows() -> None:
    made = tensors()
    y = mean_forward(rows(4, torch.bfloat16), made)
    y.zero_()
    assert y.dtype is torch.bfloat16 and made["bias"].abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_do_not_see_each_other(dtype: torch.dtype) -> None:
    made, x_RD = tensors(torch.bfloat16), rows(33, dtype)
    whole = lowrank_forward(x_RD, made)
    for R in (1, 2, 5, 8, 17, 32):
        assert torch.equal(lowrank_forward(x_RD[33 - R :], made), whole[33 - R :]), f"{R} rows"


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(AssertionError, match=r"down is \(8, 96\), must be \(8, 95\)"):
        lowrank_forward(rows(2)[:, :95], tensors())


@pytest.mark.parametrize("shape", [(1, 8), (16, 40), (33, 160)])
def test_rowwise_linear_is_a_linear(shape: tuple[int, int]) -> None:
    rng = torch.Generator().manual_seed(3)
    weight_NK, bias_N = torch.randn(shape, generator=rng), torch.randn(shape[0], generator=rng)
    x_RK = torch.randn(9, shape[1], generator=rng)
    whole = rowwise_linear(x_RK, weight_NK, bias_N)
    torch.testing.assert_close(whole, torch.nn.functional.linear(x_RK, weight_NK, bias_N), rtol=1e-5, atol=1e-5)
    for row in range(9):
        assert torch.equal(rowwise_linear(x_RK[row : row + 1], weight_NK, bias_N)[0], whole[row])
    assert rowwise_linear(x_RK[:0], weight_NK).shape == (0, shape[0])


def test_rowwise_shows_a_function_one_row_at_a_time() -> None:
    seen: list[tuple[int, ...]] = []

    def halve(x: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(x.shape))
        return x[..., ::2].sigmoid()

    x_RK = torch.randn(3, 10)
    assert torch.equal(rowwise(halve, x_RK)[1], x_RK[1:2, ::2].sigmoid()[0])
    assert seen == [(1, 10)] * 3
    assert rowwise(halve, x_RK[:0]).shape == (0, 5)
