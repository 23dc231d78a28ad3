"""The packed low-bit format is what its formula says, and every twin of the forward computes it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lowbit_records import (
    Shapes,
    base_of,
    gelu_gate,
    gpt_oss_gate,
    random_codes,
    random_records,
    relu2,
    silu_gate,
    weights_of,
)
from torch.nn import functional

from buddymoe_ray.kernels import (
    ExpertMath,
    LowbitFormat,
    dequantise,
    expert_forward,
    lowbit_forward,
    matrix_at,
    pack,
    record_tensors,
    unpack,
)
from buddymoe_ray.kernels.lowbit import lowbit_forward_reference
from buddymoe_ray.kernels.trellis_tables import TABLES

BITS = [1, 2, 3, 4, 8]


@pytest.mark.parametrize("bits", BITS)
@settings(max_examples=25)
@given(N=st.integers(1, 40), K=st.integers(1, 100), seed=st.integers(0, 999))
def test_unpack_inverts_pack(bits: int, N: int, K: int, seed: int) -> None:
    fmt = LowbitFormat(bits=bits)
    q_NK, code_NG = random_codes(N, K, fmt, torch.Generator().manual_seed(seed))
    packed = pack(q_NK, code_NG, base_of(0.25, fmt), fmt)
    A, G = -(-N // 16), -(-K // 32)
    assert packed.codes.shape == (A, G, 64 * bits) and packed.codes.dtype is torch.uint8
    assert packed.scales.shape == (A, G, 8 if bits <= 3 else 16) and packed.sizes.shape == fmt.sizes(N, K)
    q, code = unpack(packed, fmt)
    assert torch.equal(q, q_NK) and torch.equal(code, code_NG)


@pytest.mark.parametrize("bits", BITS)
def test_bytes_lie_as_the_header_says(bits: int) -> None:
    """Brute force over single codes: the format is on disk, so its bytes may never move."""
    fmt, N, K = LowbitFormat(bits=bits), 40, 72
    q_NK, code_NG = random_codes(N, K, fmt, torch.Generator().manual_seed(bits))
    packed = pack(q_NK, code_NG, base_of(1.0, fmt), fmt)
    q, code = functional.pad(q_NK, (0, 24, 0, 8)).tolist(), functional.pad(code_NG, (0, 0, 0, 8)).tolist()
    for a, g in ((0, 0), (1, 1), (2, 2), (2, 0)):
        quad = lambda j: [q[16 * a + n][32 * g + 4 * j + i] for n in range(16) for i in range(4)]  # noqa: B023, E731
        if bits == 8:
            vectors = [quad(j) for j in range(8)]
        elif bits == 4:
            vectors = [[x | y << 4 for x, y in zip(quad(j), quad(j + 4), strict=True)] for j in range(4)]
        else:
            string = [x >> bit & 1 for j in range(8) for x in quad(j) for bit in range(bits)]
            vectors = [[sum(bit << i for i, bit in enumerate(string[at : at + 8])) for at in range(0, len(string), 8)]]
        assert packed.codes[a, g].tolist() == [byte for vector in vectors for byte in vector]
        scales = [code[16 * a + n][g] for n in range(16)]
        if bits <= 3:
            scales = [scales[n] | scales[n + 8] << 4 for n in range(8)]
        assert packed.scales[a, g].tolist() == scales


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("K", [24, 32, 40, 160])
def test_dequantise_is_the_formula(bits: int, K: int) -> None:
    fmt = LowbitFormat(bits=bits)
    q_NK, code_NG = random_codes(4, K, fmt, torch.Generator().manual_seed(7))
    packed = pack(q_NK, code_NG, base := base_of(0.75, fmt), fmt)
    got = dequantise(packed, fmt)
    for n in range(4):
        for k in range(K):
            code = int(code_NG[n, k // 32])
            scale = float(base[code]) if bits <= 3 else 0.75 * 2 ** (-code / 24)
            if bits > 3:
                level = int(q_NK[n, k]) - (2**bits - 1) / 2
            else:
                quad, ring_bits = packed.codes[0, k // 32].tolist(), {1: 64, 2: 64, 3: 48}[bits]
                begin = 64 * bits * (k % 32 // 4) + bits * (4 * n + k % 4)
                first = begin // ring_bits * ring_bits
                places = [first + (begin - first + bits - 7 + i) % ring_bits for i in range(7)]
                level = TABLES[bits][sum((quad[at // 8] >> at % 8 & 1) << i for i, at in enumerate(places))] - 127.5
            assert got[n, k].item() == pytest.approx(scale * level, rel=1e-6)
    assert got.dtype is torch.float32 and not bool((got == 0).any()), "mid-rise codes have no zero"


def test_formats_that_do_not_exist() -> None:
    with pytest.raises(AssertionError, match=r"bits=5, down=0\), must be 1, 2, 3, 4 or 8"):
        LowbitFormat(bits=5)


def test_pack_refuses_what_it_cannot_hold() -> None:
    fmt = LowbitFormat(bits=2)
    q, code = torch.zeros(2, 32, dtype=torch.uint8), torch.zeros(2, 1, dtype=torch.uint8)
    base = base_of(1.0, fmt)
    with pytest.raises(AssertionError, match="largest code is 4, must be below 4"):
        pack(q + 4, code, base, fmt)
    with pytest.raises(AssertionError, match=r"scale codes are \(2, 2\), must be \(2, 1\)"):
        pack(q, torch.zeros(2, 2, dtype=torch.uint8), base, fmt)
    with pytest.raises(AssertionError, match="must be uint8"):
        pack(q.int(), code, base, fmt)
    with pytest.raises(AssertionError, match="largest scale code is 16, must be below 16"):
        pack(q, code + 16, base, fmt)
    with pytest.raises(AssertionError, match=r"base has shape \(1,\), must be \(16,\)"):
        pack(q, code, base[:1], fmt)


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
    assert by_name["gate_up_proj.codes"].shape == (8, 5, 64 * bits)
    scales = 8 if bits <= 3 else 16
    assert by_name["gate_up_proj.scales"].shape == (8, 5, scales) and by_name["down_proj.scales"].shape[2] == scales
    assert by_name["down_proj.sizes"].shape == fmt.sizes(160, 64) and by_name["down_proj.sizes"].nbytes == 0
    assert by_name["down_proj.base"].dtype == "float32" and by_name["down_proj_bias"].dtype == "float32"
    weights = 128 * 160 + 160 * 64
    plain = record_tensors({name: shape for name, shape in shapes.items() if len(shape) == 2}, fmt)[1]
    assert plain <= weights * fmt.weight_bits / 8 + 6 * 64


@pytest.mark.parametrize("forward", [lowbit_forward, lowbit_forward_reference])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    "case",
    ["plain", "bias", "transposed", "ungated", "relu2", "gelu", "gpt_oss", "post_norm", "odd_sizes", "smallest"],
)
def test_forward_is_the_expert_with_dequantised_weights(forward, bits: int, case: str) -> None:
    fmt, (D, F) = LowbitFormat(bits=bits), {"odd_sizes": (41, 87), "smallest": (1, 1)}.get(case, (64, 96))
    gated, bias = case not in ("ungated", "relu2"), case in ("bias", "gpt_oss")
    first, N = ("gate_up_proj", 2 * F) if gated else ("up_proj", F)
    shapes: Shapes = {first: (N, D), "down_proj": (D, F)}
    if bias:
        shapes |= {f"{first}_bias": (N,), "down_proj_bias": (D,)}
    activate = {"ungated": functional.relu, "relu2": relu2, "gelu": gelu_gate, "gpt_oss": gpt_oss_gate}.get(
        case, silu_gate
    )
    post_norm = (lambda y: y * 2) if case == "post_norm" else None
    _, (views,) = random_records(shapes, fmt, 3)
    plain = ExpertMath(activate=activate, gated=gated, bias=bias, post_norm=post_norm)
    math = ExpertMath(activate=activate, gated=gated, bias=bias, post_norm=post_norm, transposed=case == "transposed")
    x_RD = torch.randn(7, D, generator=torch.Generator().manual_seed(4))
    expected = expert_forward(x_RD, weights_of(views, shapes, fmt), plain)
    got = forward(x_RD, views, fmt, math)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_layouts_of_others_are_told() -> None:
    """What says where bytes are is checked before it is believed."""
    fmt = LowbitFormat(bits=3)
    layout, _ = record_tensors({"down_proj": (40, 72)}, fmt)
    assert matrix_at(layout, "down_proj", fmt) == (0, layout[1].offset, layout[2].offset, 40, 72)
    with pytest.raises(ValueError, match=r"down_proj.sizes is None, must be \[outputs, inputs, 0, 7\]"):
        matrix_at(layout[:3], "down_proj", fmt)
    with pytest.raises(ValueError, match=r"down_proj.sizes is \(40, 72, 0, 7\), must be \[outputs, inputs, 0\]"):
        matrix_at(layout, "down_proj", LowbitFormat(bits=4))
    with pytest.raises(ValueError, match=r"down_proj.codes is .*, must be \('uint8', \(3, 3, 128\)\)"):
        matrix_at(layout, "down_proj", LowbitFormat(bits=2))
    lying = (*layout[:3], replace(layout[3], shape=(400, 72, 0, 7)))
    with pytest.raises(ValueError, match=r"down_proj.codes is .*, must be \('uint8', \(25, 3, 192\)\)"):
        matrix_at(lying, "down_proj", fmt)


@pytest.mark.parametrize("forward", [lowbit_forward, lowbit_forward_reference])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
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


def test_bfloat16_is_read_and_rounded_as_torch_does() -> None:
    """With a norm that does nothing torch converts the rows, without it the kernel does: nothing else differs."""
    fmt = LowbitFormat(bits=4)
    _, (views,) = random_records({"up_proj": (96, 64), "down_proj": (64, 96)}, fmt, 10)
    x_RD = torch.randn(40, 64, generator=torch.Generator().manual_seed(11)) * torch.logspace(-12, 12, 40)[:, None]
    x_RD = x_RD.bfloat16()
    x_RD[7, 3], x_RD[9, 0] = float("nan"), float("inf")
    by_kernel, by_torch = (
        lowbit_forward(x_RD, views, fmt, ExpertMath(activate=relu2, gated=False, post_norm=norm))
        for norm in (None, lambda y: y)
    )
    assert by_kernel.dtype is torch.bfloat16
    torch.testing.assert_close(by_kernel, by_torch, rtol=0, atol=0, equal_nan=True)
    assert by_kernel.isnan().all(dim=1).nonzero().flatten().tolist() == [7, 9] and int(by_kernel.isnan().sum()) == 128


@pytest.mark.parametrize("forward", [lowbit_forward, lowbit_forward_reference])
def test_no_rows_and_strided_rows(forward) -> None:
    fmt, math = LowbitFormat(bits=3), ExpertMath(activate=silu_gate)
    _, (views,) = random_records({"gate_up_proj": (64, 48), "down_proj": (48, 32)}, fmt, 8)
    x_RD = torch.randn(10, 96, generator=torch.Generator().manual_seed(9))[::2, ::2]
    assert forward(x_RD[:0], views, fmt, math).shape == (0, 48)
    assert torch.equal(forward(x_RD, views, fmt, math), forward(x_RD.contiguous(), views, fmt, math))
