"""Rounding with error feedback in machine code against its spec, and products to three digits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from buddymoe_ray.calibrate import rounding_compensated
from buddymoe_ray.calibrate.rounding_compensated import Metric, moment
from buddymoe_ray.kernels.feedback import round_group
from buddymoe_ray.kernels.lowbit_format import GROUP, LowbitFormat
from buddymoe_ray.kernels.rough_product import rough_product


@given(
    bits=st.sampled_from([1, 2, 3, 4]), N=st.sampled_from([1, 15, 48, 100, 256, 300, 520]), seed=st.integers(0, 1000)
)
@settings(max_examples=40, deadline=None)
def test_a_group_is_rounded_as_the_spec_does(bits: int, N: int, seed: int) -> None:
    """But where sums that are rounded otherwise make another code the nearest: seldom, and no worse."""
    rng, fmt = torch.Generator().manual_seed(seed), LowbitFormat(bits=bits)
    x = torch.randn(200, GROUP, generator=rng) @ torch.randn(GROUP, GROUP, generator=rng)
    metric = Metric.of(moment(x), damping=0.05)
    assert metric is not None and metric.factor is not None
    W, counts = torch.randn(GROUP, N, generator=rng), metric.factor.diagonal().pow(-2)
    scale = (W.square().mean(dim=0) + 1e-3).sqrt() * (2.0 / fmt.levels if bits == 4 else 1 / 32)
    if seed % 3 == 0:
        counts = torch.where(torch.arange(GROUP) % 7 == 6, -1.0, counts)
    found = []
    for round_ in (round_group, rounding_compensated._round_group):
        left, errors = W.clone(), torch.empty_like(W)
        codes = round_(left, scale, counts, metric.factor, fmt, errors)
        found.append((codes, errors, left))
    (codes, errors, left), (spec, spec_errors, spec_left) = found
    same = (codes == spec).all(dim=0)
    assert float(same.float().mean()) > 0.9 or N < 50
    for ours, theirs in ((errors, spec_errors), (left, spec_left)):
        torch.testing.assert_close(ours[:, same], theirs[:, same], rtol=1e-3, atol=1e-3)
    cost, spec_cost = errors.square().sum(), spec_errors.square().sum()
    assert float(cost) == pytest.approx(float(spec_cost), rel=0.02)
    if fmt.trellis:
        assert not codes[counts < 0].any()


def test_large_products_are_right_to_three_digits_and_small_ones_to_all() -> None:
    rng = torch.Generator().manual_seed(0)
    A, B = torch.randn(300, 700, generator=rng), torch.randn(700, 400, generator=rng)
    exact = A.double() @ B.double()
    assert float((rough_product(A, B) - exact).norm() / exact.norm()) < 4e-3
    assert torch.equal(rough_product(A[:8], B), A[:8] @ B)


def test_the_factor_of_the_inverse_is_that_of_the_inverse() -> None:
    """Of matrices that are halved and of those that are not."""
    for K in (32, 256, 288, 608):
        x = torch.randn(2 * K, K, generator=torch.Generator().manual_seed(K))
        metric = Metric.of(moment(x), damping=0.02)
        assert metric is not None and metric.factor is not None
        H = metric.H_KK[metric.order][:, metric.order].double()
        product = metric.factor.double().T @ metric.factor.double() @ H
        assert torch.equal(metric.factor, metric.factor.triu())
        torch.testing.assert_close(product, torch.eye(K).double(), rtol=0, atol=2e-4)
