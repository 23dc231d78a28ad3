"""The packed low-bit format is what its formula says, and every twin of the forward computes it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lowbit_records import Shapes, gpt_oss_gate, random_codes, random_records, silu_gate, weights_of
from torch.nn import functional

from buddymoe_ray.kernels import (
    ExpertMath,
    LowbitFormat,
    dequantise,
    expert_forward,
    lowbit_forward,
    pack,
    record_tensors,
    unpack,
)
from buddymoe_ray.kernels.lowbit import lowbit_forward_reference

BITS = [2, 3, 4, 8]


@pytest.mark.parametrize("bits", BITS)
@settings(max_examples=25, deadline=None)
@given(N=st.integers(1, 5), K8=st.integers(1, 24), group=st.sampled_from([1, 8, 24, 32, 64]), seed=st.integers(0, 999))
def test_unpack_inverts_pack(bits: int, N: int, K8: int, group: int, seed: int) -> None:
    fmt = LowbitFormat(bits=bits, group=group)
    q_NK, code_NG = random_codes(N, 8 * K8, fmt, torch.Generator().manual_seed(seed))
    packed = pack(q_NK, code_NG, 0.25, fmt)
    assert packed.codes.shape == (N, fmt.row_bytes(8 * K8)) and packed.codes.dtype is torch.uint8
    q, code = unpack(packed, fmt)
    assert torch.equal(q, q_NK) and torch.equal(code, code_NG)


@pytest.mark.parametrize("bits", BITS)
def test_bytes_lie_as_the_header_says(bits: int) -> None:
    """Brute force over single codes: the format is on disk, so its bytes may never move."""
    fmt, K = LowbitFormat(bits=bits), 64
    q_NK, code_NG = random_codes(3, K, fmt, torch.Generator().manual_seed(bits))
    codes = pack(q_NK, code_NG, 1.0, fmt).codes
    for n in range(3):
        q, row = q_NK[n].tolist(), codes[n].tolist()
        if bits == 8:
            assert row == q
        elif bits == 4:
            assert row == [q[i] | q[i + K // 2] << 4 for i in range(K // 2)]
        else:
            low = [sum((q[i + j * K // 4] & 3) << 2 * j for j in range(4)) for i in range(K // 4)]
            high = [sum((q[i + j * K // 8] >> 2) << j for j in range(8)) for i in range(K // 8)]
            assert row == (low if bits == 2 else low + high)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("K", [32, 40, 160])
def test_dequantise_is_the_formula(bits: int, K: int) -> None:
    fmt = LowbitFormat(bits=bits)
    q_NK, code_NG = random_codes(4, K, fmt, torch.Generator().manual_seed(7))
    got = dequantise(pack(q_NK, code_NG, 0.75, fmt), fmt)
    group = fmt.group_of(K)
    for n in range(4):
        for k in range(K):
            scale = 0.75 * 2 ** (-int(code_NG[n, k // group]) / 24)
            assert got[n, k].item() == pytest.approx(scale * (int(q_NK[n, k]) - (2**bits - 1) / 2), rel=1e-6)
    assert got.dtype is torch.float32 and not bool((got == 0).any()), "mid-rise codes have no zero"


def test_group_is_the_largest_divisor_not_above_it() -> None:
    fmt = LowbitFormat(bits=4)
    assert [fmt.group_of(K) for K in (2048, 1408, 160, 40, 24, 8)] == [32, 32, 32, 20, 24, 8]


@pytest.mark.parametrize(
    ("bits", "group", "message"), [(5, 32, "bits is 5, must be 2, 3, 4 or 8"), (4, 0, "group is 0, must be")]
)
def test_formats_that_do_not_exist(bits: int, group: int, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        LowbitFormat(bits=bits, group=group)


def test_pack_refuses_what_it_cannot_hold() -> None:
    fmt = LowbitFormat(bits=2)
    q, code = torch.zeros(2, 32, dtype=torch.uint8), torch.zeros(2, 1, dtype=torch.uint8)
    with pytest.raises(AssertionError, match="largest code is 4, must be below 4"):
        pack(q + 4, code, 1.0, fmt)
    with pytest.raises(AssertionError, match=r"scale codes are \(2, 2\), must be \(2, 1\)"):
        pack(q, torch.zeros(2, 2, dtype=torch.uint8), 1.0, fmt)
    with pytest.raises(AssertionError, match="must be a positive multiple of 8"):
        pack(q[:, :12], code, 1.0, fmt)
    with pytest.raises(AssertionError, match="must be uint8"):
        pack(q.int(), code, 1.0, fmt)


@pytest.mark.parametrize("bits", BITS)
def test_records_are_aligned_disjoint_and_small(bits: int) -> None:
    fmt = LowbitFormat(bits=bits)
    shapes = {"gate_up_proj": (128, 160), "down_proj": (160, 64), "gate_up_proj_bias": (128,), "down_proj_bias": (160,)}
    layout, nbytes = record_tensors(shapes, fmt, torch.float32)
    at = 0
    for tensor in layout:
        assert tensor.offset % 64 == 0 and tensor.offset >= at
        at = tensor.offset + tensor.nbytes
    assert nbytes % 64 == 0 and at <= nbytes < at + 64
    by_name = {tensor.name: tensor for tensor in layout}
    assert by_name["gate_up_proj.codes"].shape == (128, 160 * bits // 8)
    assert by_name["gate_up_proj.scales"].shape == (128, 5) and by_name["down_proj.scales"].shape == (160, 2)
    assert by_name["down_proj.base"].dtype == "float32" and by_name["down_proj_bias"].dtype == "float32"
    weights = 128 * 160 + 160 * 64
    plain = record_tensors({name: shape for name, shape in shapes.items() if len(shape) == 2}, fmt)[1]
    assert plain <= weights * (fmt.bits + 8 / fmt.group) / 8 + 6 * 64


@pytest.mark.parametrize("forward", [lowbit_forward, lowbit_forward_reference])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    "case", ["plain", "bias", "transposed", "ungated", "gpt_oss", "post_norm", "odd_groups", "smallest"]
)
def test_forward_is_the_expert_with_dequantised_weights(forward, bits: int, case: str) -> None:
    fmt, (D, F) = LowbitFormat(bits=bits), {"odd_groups": (40, 88), "smallest": (8, 8)}.get(case, (64, 96))
    gated, bias = case != "ungated", case in ("bias", "gpt_oss")
    first, N = ("gate_up_proj", 2 * F) if gated else ("up_proj", F)
    shapes: Shapes = {first: (N, D), "down_proj": (D, F)}
    if bias:
        shapes |= {f"{first}_bias": (N,), "down_proj_bias": (D,)}
    activate = {"ungated": functional.relu, "gpt_oss": gpt_oss_gate}.get(case, silu_gate)
    post_norm = (lambda y: y * 2) if case == "post_norm" else None
    _, (views,) = random_records(shapes, fmt, 3)
    plain = ExpertMath(activate=activate, gated=gated, bias=bias, post_norm=post_norm)
    math = ExpertMath(activate=activate, gated=gated, bias=bias, post_norm=post_norm, transposed=case == "transposed")
    x_RD = torch.randn(7, D, generator=torch.Generator().manual_seed(4))
    expected = expert_forward(x_RD, weights_of(views, shapes, fmt), plain)
    got = forward(x_RD, views, fmt, math)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("forward", [lowbit_forward, lowbit_forward_reference])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activate", [silu_gate, gpt_oss_gate])
def test_rows_do_not_see_each_other(forward, bits: int, dtype: torch.dtype, activate) -> None:
    """The same row has the same bits alone, in any batch and at any place in it."""
    fmt = LowbitFormat(bits=bits)
    _, (views,) = random_records({"gate_up_proj": (144, 160), "down_proj": (160, 72)}, fmt, 5)
    math = ExpertMath(activate=activate)
    x_RD = torch.randn(70, 160, generator=torch.Generator().manual_seed(6)).to(dtype)
    whole = forward(x_RD, views, fmt, math)
    assert whole.dtype is dtype
    for R in (1, 2, 3, 4, 5, 8, 17, 32, 65):
        assert torch.equal(forward(x_RD[70 - R :], views, fmt, math), whole[70 - R :]), f"{R} rows"
        assert torch.equal(forward(x_RD[:R].flip(0), views, fmt, math).flip(0), whole[:R]), f"{R} rows reversed"


@pytest.mark.parametrize("forward", [lowbit_forward, lowbit_forward_reference])
def test_no_rows_and_strided_rows(forward) -> None:
    fmt, math = LowbitFormat(bits=3), ExpertMath(activate=silu_gate)
    _, (views,) = random_records({"gate_up_proj": (64, 48), "down_proj": (48, 32)}, fmt, 8)
    x_RD = torch.randn(10, 96, generator=torch.Generator().manual_seed(9))[::2, ::2]
    assert forward(x_RD[:0], views, fmt, math).shape == (0, 48)
    assert torch.equal(forward(x_RD, views, fmt, math), forward(x_RD.contiguous(), views, fmt, math))
