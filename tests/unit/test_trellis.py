"""Trellis codes: the search finds the best way round, in machine code what the spec finds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from buddymoe_ray.kernels import trellis
from buddymoe_ray.kernels.trellis import best_codes, levels_above, values, values_of_quads, windows_of
from buddymoe_ray.kernels.trellis_tables import RINGS, SPREAD, TABLES

BITS = [1, 2, 3]


def error(codes: Tensor, x: Tensor, weight: Tensor, bits: int) -> float:
    return float(((values_of_quads(codes, bits) - x).square() * weight.clamp_min(0)).sum())


def some(N: int, quads: int, seed: int) -> tuple[Tensor, Tensor]:
    """Targets and weights of quads, some inputs and outputs of which are not there."""
    rng = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(quads, 4, N, generator=rng) * SPREAD, torch.rand(quads, 4, N, generator=rng) + 0.1
    weight[0, 2:] = -1.0
    weight[:, :, N // 2] = -1.0
    return x, weight


@pytest.mark.parametrize("bits", BITS)
@settings(max_examples=10)
@given(N=st.integers(1, 70), seed=st.integers(0, 999))
def test_machine_code_finds_what_the_spec_finds(bits: int, N: int, seed: int) -> None:
    x, weight = some(N, 3, seed)
    ours = best_codes(x, weight, bits)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trellis, "_search", trellis._search_in_torch)
        spec = best_codes(x, weight, bits)
        again = best_codes(x, weight, bits, spec, half=True)
    assert ours.dtype is torch.uint8 and int(ours.max()) < 1 << bits and not ours[weight < 0].any()
    assert error(ours, x, weight, bits) == pytest.approx(error(spec, x, weight, bits), rel=1e-4)
    better = best_codes(x, weight, bits, spec, half=True)
    assert error(better, x, weight, bits) == pytest.approx(error(again, x, weight, bits), rel=1e-4)
    assert error(better, x, weight, bits) <= error(spec, x, weight, bits) * (1 + 1e-5) and not better[weight < 0].any()


@pytest.mark.parametrize("bits", BITS)
def test_no_other_codes_between_the_same_ends_are_better(bits: int) -> None:
    """Of a ring all but 12 bits are held: brute force over these."""
    rng = torch.Generator().manual_seed(bits)
    N, free = RINGS[bits] // 4, 12 // bits
    x, weight = torch.randn(1, 4, N, generator=rng) * SPREAD, torch.rand(1, 4, N, generator=rng) + 0.1
    codes = best_codes(x, weight, bits)
    ring, target, counts = (part.transpose(1, 2).reshape(-1) for part in (codes, x, weight))
    tried = ring.repeat(1 << (free * bits), 1)
    number, begin = torch.arange(len(tried)), RINGS[bits] // 4
    for i in range(free):
        tried[:, begin + i] = (number >> (bits * i) & ((1 << bits) - 1)).to(torch.uint8)
    found = levels_above(bits, x.device)[windows_of(tried, bits).long()]
    errors = ((found - target).square() * counts).sum(dim=1)
    assert error(codes, x, weight, bits) <= float(errors.min()) * (1 + 1e-5) < float(errors.median()) / 1.1


@pytest.mark.parametrize(("bits", "most"), [(1, 0.297), (2, 0.085), (3, 0.0255)])
def test_normal_weights_lose_less_than_codes_alone_leave(bits: int, most: float) -> None:
    """These leave .364, .120 and .038; the tables' levels are those nearest to what is coded by them, on average."""
    x = torch.randn(64, 4, 256, generator=torch.Generator().manual_seed(0)) * SPREAD
    got = values_of_quads(best_codes(x, torch.ones_like(x), bits), bits)
    assert float((got - x).square().mean()) / SPREAD**2 < most
    assert abs(float((got * x).sum() / got.square().sum()) - 1) < 0.01 and len(TABLES[bits]) == 128


@pytest.mark.parametrize("bits", BITS)
def test_a_matrix_has_the_values_of_its_quads(bits: int) -> None:
    q_NK = torch.randint(0, 1 << bits, (21, 10), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    whole = torch.zeros(21, 12, dtype=torch.uint8)
    whole[:, :10] = q_NK
    quads = values_of_quads(whole.T.reshape(3, 4, 21), bits)
    assert torch.equal(values(q_NK, bits), quads.reshape(12, 21)[:10].T)
