"""Quantised weights as stored: products against float64, rows that do not see each other, the same bits from every
instruction set, and experts built on them."""

from __future__ import annotations

import ctypes
from math import prod

import pytest
import torch
from coded_checkpoints import SCHEMES
from lowbit_records import gpt_oss_gate, silu_gate
from torch import Tensor

from buddymoe_ray.cache import slot_views
from buddymoe_ray.kernels import (
    CodedWeight,
    CpuLinear,
    ExpertLayer,
    ExpertMath,
    coded_forward,
    coded_shapes,
    decoded,
    expert_forward,
    plain_weights,
)
from buddymoe_ray.kernels.coded_format import FP4
from buddymoe_ray.kernels.coded_tiles import coded_module_text
from buddymoe_ray.kernels.coded_wide import has_wide, wide_module_text
from buddymoe_ray.kernels.lowbit_tiles import host_level
from buddymoe_ray.kernels.machine_code import native_functions
from buddymoe_ray.models.expert_layout import slot_tensors
from buddymoe_ray.types import CodedMatrix, CodeFormat, ExpertLayout

FORMATS = [
    CodeFormat(codes="fp8", block=(128, 128), scale="float32"),
    CodeFormat(codes="fp8", block=(16, 32), scale="bfloat16"),
    CodeFormat(codes="fp8", block=(1, 0), scale="bfloat16"),
    CodeFormat(codes="fp8", block=(0, 0), scale="float16"),
    CodeFormat(codes="int8", block=(1, 0), scale="float32"),
    CodeFormat(codes="int4", block=(1, 32), scale="float16"),
    CodeFormat(codes="int4", block=(1, 128), scale="bfloat16"),
    CodeFormat(codes="int4", block=(1, 64), scale="bfloat16", zeros=True),
    CodeFormat(codes="gptq", block=(1, 32), scale="float16", zeros=True),
    CodeFormat(codes="awq", block=(1, 128), scale="float16", zeros=True),
    CodeFormat(codes="nvfp4", block=(1, 16), scale="float8_e4m3fn", global_scale="*"),
    CodeFormat(codes="nvfp4", block=(1, 16), scale="float8_e4m3fn", global_scale="/"),
    CodeFormat(codes="fp8", block=(1, 32), scale="e8m0"),
    CodeFormat(codes="fp8", block=(16, 32), scale="e8m0"),
    CodeFormat(codes="mxfp4", block=(1, 32), scale="e8m0"),
]
SHAPES = [(48, 96), (1, 32), (7, 64), (130, 416), (34, 608), (264, 1000), (5, 72)]


def call_native(address: int, *arguments: int) -> None:
    ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * len(arguments))(address)(*arguments)


def fits(fmt: CodeFormat, N: int, K: int) -> bool:
    return (K % 32 == 0 or fmt.codes != "mxfp4") and (N % 8 == 0 or fmt.codes not in ("gptq", "awq"))


def filled(matrix: CodedMatrix, tensors: dict[str, Tensor], seed: int) -> None:
    """Random codes, and scales of ordinary size."""
    rng, fmt = torch.Generator().manual_seed(seed), matrix.format
    for part, (shape, dtype) in coded_shapes(matrix).items():
        target = tensors[f"{matrix.name}.{part}"]
        if part == "scales" and fmt.scale == "e8m0":
            target.copy_(torch.randint(117, 124, shape, generator=rng))
        elif part == "scales":
            target.copy_(torch.rand(shape, generator=rng) / 50 + 0.001)
        elif part == "global_scale":
            target.copy_(torch.rand(shape, generator=rng) + 0.5)
        elif fmt.codes == "fp8":
            target.copy_(torch.randn(shape, generator=rng))
        else:
            size = prod(shape) * getattr(torch, dtype).itemsize
            made = torch.randint(0, 256, (size,), generator=rng, dtype=torch.uint8)
            target.copy_(made.view(target.dtype).view(shape))


def weight_of(fmt: CodeFormat, N: int, K: int) -> CodedWeight:
    matrix = CodedMatrix(name="w", format=fmt, parts=1, N=N, K=K)
    sized = coded_shapes(matrix)
    tensors = {f"w.{part}": torch.zeros(shape, dtype=getattr(torch, d)) for part, (shape, d) in sized.items()}
    filled(matrix, tensors, N + K)
    return CodedWeight(matrix=matrix, **{name.removeprefix("w."): tensor for name, tensor in tensors.items()})


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_a_format_is_known_by_its_name(fmt: CodeFormat) -> None:
    named = CodeFormat.named(str(fmt))
    assert named is not None
    assert (named.codes, named.block, named.zeros) == (fmt.codes, fmt.block, fmt.zeros)
    assert bool(named.global_scale) == bool(fmt.global_scale)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_a_product_is_the_exact_one_rounded_and_rows_do_not_see_each_other(fmt: CodeFormat) -> None:
    error = 1e-5 if fmt.codes in ("gptq", "awq") else 1e-6  # where sums go by one input after the other
    for N, K in (shape for shape in SHAPES if fits(fmt, *shape)):
        weight, rng = weight_of(fmt, N, K), torch.Generator().manual_seed(1)
        bias, x_RK = torch.randn(N, generator=rng), torch.randn(11, K, generator=rng)
        plain = decoded(weight.named(), weight.matrix).double()
        linear = CpuLinear(weight, None, torch.float32, bias)
        got = linear(x_RK)
        sizes = x_RK.abs().double() @ plain.abs().T + bias.abs()
        assert bool(((got - (x_RK.double() @ plain.T + bias)).abs() <= error * sizes).all()), (N, K)
        for first, last in ((0, 1), (1, 3), (3, 6), (6, 11)):
            assert torch.equal(linear(x_RK[first:last]), got[first:last])
        many = x_RK.repeat(1 + (1 << 20) // (N * K * 11), 1)
        for threads in (2, 3):
            assert torch.equal(CpuLinear(weight, None, torch.float32, bias, threads=threads)(many)[:11], got)


@pytest.mark.parametrize("fmt", [fmt for fmt in FORMATS if fmt.codes in ("int4", "mxfp4", "nvfp4")], ids=str)
def test_codes_looked_up_and_codes_computed_give_the_same_bits(fmt: CodeFormat) -> None:
    N, K = 34, 608
    weight, x_K = weight_of(fmt, N, K), torch.randn(K, generator=torch.Generator().manual_seed(2))
    native = native_functions(coded_module_text(fmt, permutes=False), ("project", "spread"))
    row, out = torch.zeros(K), torch.zeros(N)
    pair = torch.tensor([row.data_ptr(), out.data_ptr()])
    places = weight.places(0)

    call_native(native["spread"], x_K.data_ptr(), K // 32, row.data_ptr())
    call_native(native["project"], *(*places.values(), 0)[:3], K, N, pair.data_ptr(), 1)
    assert torch.equal(out, CpuLinear(weight, None, torch.float32, None)(x_K[None])[0])


@pytest.mark.skipif(not host_level().startswith("avx512"), reason="no such instructions")
@pytest.mark.parametrize("fmt", [fmt for fmt in FORMATS if fmt.codes in FP4 and has_wide(fmt)], ids=str)
def test_codes_looked_up_by_four_bits_and_by_six_give_the_same_bits(fmt: CodeFormat) -> None:
    N, K = 34, 608
    weight, x_RK = weight_of(fmt, N, K), torch.randn(4, K, generator=torch.Generator().manual_seed(2)).bfloat16()
    native = native_functions(wide_module_text(fmt, by_six_bits=False), ("project", "quantise"))
    rows, out = torch.zeros(4, 2048, dtype=torch.uint8), torch.zeros(4, N)
    for x, row in zip(x_RK.float(), rows, strict=True):
        call_native(native["quantise"], x.data_ptr(), K // 32, row.data_ptr())
    pairs = torch.tensor([[row.data_ptr(), y.data_ptr()] for row, y in zip(rows, out, strict=True)])
    call_native(native["project"], *(*weight.places(0).values(), 0)[:3], K, N, pairs.data_ptr(), 4)
    assert torch.equal(out.bfloat16(), CpuLinear(weight, None, torch.bfloat16, None)(x_RK))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_decoded_is_code_times_scale(scheme: str) -> None:
    """To the last bit, by formulas of the tests' own."""
    (encode, _), is_stack = SCHEMES[scheme], scheme == "mxfp4"
    W = torch.randn(72, 96, generator=torch.Generator().manual_seed(3))
    made, plain = encode("w.weight", W.T.contiguous()[None] if is_stack else W)  # a stack of one is [in, out]
    plain = plain[0].T if is_stack else plain
    fmt = {
        "fp8": CodeFormat(codes="fp8", block=(16, 32), scale="float32"),
        "fp8-tensor": CodeFormat(codes="fp8", block=(0, 0), scale="float32"),
        "ct-mxfp4": CodeFormat(codes="mxfp4", block=(1, 32), scale="e8m0"),
        "ct-mxfp8": CodeFormat(codes="fp8", block=(1, 32), scale="e8m0"),
        "modelopt-mxfp8": CodeFormat(codes="fp8", block=(1, 32), scale="e8m0"),
        "fp8-experts-fp4": CodeFormat(codes="fp8", block=(16, 32), scale="e8m0"),
        "ct-fp8": CodeFormat(codes="fp8", block=(1, 0), scale="bfloat16"),
        "ct-int8": CodeFormat(codes="int8", block=(1, 0), scale="bfloat16"),
        "ct-int4": CodeFormat(codes="int4", block=(1, 32), scale="bfloat16"),
        "ct-int4-zeros": CodeFormat(codes="int4", block=(1, 32), scale="bfloat16", zeros=True),
        "gptq": CodeFormat(codes="gptq", block=(1, 32), scale="float16", zeros=True),
        "awq": CodeFormat(codes="awq", block=(1, 32), scale="float16", zeros=True),
        "auto-round": CodeFormat(codes="gptq", block=(1, 32), scale="float16", zeros=True),
        "modelopt-fp8": CodeFormat(codes="fp8", block=(0, 0), scale="float32"),
        "modelopt-fp8-channel": CodeFormat(codes="fp8", block=(1, 0), scale="float32"),
        "modelopt-nvfp4": CodeFormat(codes="nvfp4", block=(1, 16), scale="float8_e4m3fn", global_scale="*"),
        "ct-nvfp4": CodeFormat(codes="nvfp4", block=(1, 16), scale="float8_e4m3fn", global_scale="/"),
        "mxfp4": CodeFormat(codes="mxfp4", block=(1, 32), scale="e8m0"),
    }[scheme]
    matrix = CodedMatrix(name="w", format=fmt, parts=1, N=72, K=96)
    shapes, endings = (
        coded_shapes(matrix),
        {"codes": ("weight", "_packed", "_blocks"), "zeros": ("_zero_point", "qzeros")},
    )
    endings |= {
        "scales": ("weight_scale", "_scale_inv", "scales", "w.scale"),
        "global_scale": ("_global_scale", "_scale_2"),
    }
    tensors = {
        f"w.{part}": next(t for name, t in made.items() if name.endswith(endings[part]))
        .view(getattr(torch, dtype))
        .reshape(shape)
        for part, (shape, dtype) in shapes.items()
    }
    assert torch.equal(decoded(tensors, matrix), plain)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_rows_of_bfloat16_lose_no_more_than_their_own_rounding(fmt: CodeFormat) -> None:
    """Some formats multiply them as 16-bit integers: 4e-5 of the output's norm."""
    for N, K in (shape for shape in SHAPES if fits(fmt, *shape)):
        weight, x_RK = weight_of(fmt, N, K), torch.randn(7, K, generator=torch.Generator().manual_seed(5)).bfloat16()
        linear = CpuLinear(weight, None, torch.bfloat16, None)
        got, exact = linear(x_RK), x_RK.double() @ decoded(weight.named(), weight.matrix).double().T
        assert got.dtype is torch.bfloat16
        allowed = exact.abs() / 256 + 3e-4 * exact.square().mean(dim=1, keepdim=True).sqrt()
        assert bool(((got - exact).abs() <= allowed).all()), (N, K)
        for first, last in ((0, 1), (1, 3), (3, 7)):
            assert torch.equal(linear(x_RK[first:last]), got[first:last])


@pytest.mark.parametrize("fmt", [FORMATS[4], FORMATS[5], FORMATS[-1]], ids=str)
def test_numbers_that_are_none_stay_so(fmt: CodeFormat) -> None:
    weight, x_RK = weight_of(fmt, 16, 256), torch.ones(3, 256, dtype=torch.bfloat16)
    x_RK[0, 7], x_RK[1, 200] = float("nan"), float("inf")
    got = CpuLinear(weight, None, torch.bfloat16, None)(x_RK)
    assert not bool(got[:2].isfinite().any()) and bool(got[2].isfinite().all())


def test_every_code_of_fp8_counts_as_it_should() -> None:
    """Also those without a leading one."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[codes & 127 != 127].repeat(64, 1)[:, :254].contiguous()
    for block in ((1, 0), (1, 32), (2, 64)):
        fmt = CodeFormat(codes="fp8", block=block, scale="float32")
        weight = weight_of(fmt, 64, 254)
        weight.codes.copy_(codes.view(torch.float8_e4m3fn))
        weight.scales.fill_(1.0)
        picked = torch.eye(254)
        got = CpuLinear(weight, None, torch.float32, None)(picked)
        assert torch.equal(got, weight.codes.float().T)


def test_the_smallest_power_is_no_zero() -> None:
    weight = weight_of(FORMATS[-1], 4, 64)
    weight.scales.zero_()
    x = torch.full((1, 64), 2.0**100)
    expected = x.double() @ decoded(weight.named(), weight.matrix).double().T
    assert expected.abs().max() > 0
    torch.testing.assert_close(CpuLinear(weight, None, torch.float32, None)(x).double(), expected, rtol=1e-5, atol=0)


D, F, E, K = 64, 40, 5, 3
MATHS = {"silu": ExpertMath(activate=silu_gate), "gpt_oss": ExpertMath(activate=gpt_oss_gate, bias=True)}


def layout_of(fmt: CodeFormat, math: ExpertMath, F: int) -> ExpertLayout:
    """Gates and ups are two matrices where they are not interleaved."""
    coded = (
        CodedMatrix(name=math.first, format=fmt, parts=1 if math.bias else 2, N=2 * F, K=D),
        CodedMatrix(name="down_proj", format=fmt, parts=1, N=D, K=F),
    )
    sized = {f"{m.name}.{part}": found for m in coded for part, found in coded_shapes(m).items()}
    if math.bias:
        sized |= {f"{math.first}_bias": ((2 * F,), "bfloat16"), "down_proj_bias": ((D,), "bfloat16")}
    tensors = slot_tensors({n: shape for n, (shape, _) in sized.items()}, {n: dtype for n, (_, dtype) in sized.items()})
    nbytes = -(-(tensors[-1].offset + tensors[-1].nbytes) // 64) * 64
    return ExpertLayout(
        tensors=tensors,
        slot_bytes=nbytes,
        expert_bytes=nbytes,
        layers=1,
        experts_per_layer=(E,),
        pieces={},
        coded=coded,
    )


@pytest.mark.parametrize("name", MATHS)
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_a_layer_of_quantised_experts_is_the_reference_of_each(fmt: CodeFormat, name: str) -> None:
    math, F_here = MATHS[name], 64 if fmt.codes == "mxfp4" else F
    layout, rng = layout_of(fmt, math, F_here), torch.Generator().manual_seed(4)
    assert ExpertLayer.covers(layout.tensors, None, math, layout.coded)
    records = torch.zeros(E * layout.slot_bytes, dtype=torch.uint8)
    views = [slot_views(record, layout) for record in records.split(layout.slot_bytes)]
    for e, view in enumerate(views):
        for matrix in layout.coded:
            filled(matrix, view, e)
        for key, tensor in view.items():
            if key.endswith("_bias"):
                tensor.copy_(torch.randn(tensor.shape, generator=rng))
    layer = ExpertLayer(layout=layout.tensors, fmt=None, math=math, coded=layout.coded)
    expert_TK = torch.stack([torch.randperm(E, generator=rng)[:K] for _ in range(9)])
    x_TD, out_ND = torch.randn(9, D, generator=rng), torch.empty(9 * K, D)
    layer(x_TD, records, torch.arange(E) * layout.slot_bytes, expert_TK, out_ND)
    for n, expert in enumerate(expert_TK.flatten().tolist()):
        row, view = x_TD[n // K][None], views[expert]
        plain = {key: tensor.float() for key, tensor in plain_weights(view, layout.coded).items()}
        exact = expert_forward(row, plain, math)
        torch.testing.assert_close(out_ND[n], exact[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(coded_forward(row, view, layout.coded, math), exact, rtol=1e-4, atol=1e-4)
        assert torch.equal(out_ND[n], layer.expert(row, view)[0])


@pytest.mark.parametrize("fmt", [fmt for fmt in FORMATS if fmt.codes in ("gptq", "awq")], ids=str)
def test_more_outputs_than_have_their_totals_at_once(fmt: CodeFormat) -> None:
    N, K = 2 * 4096 + 136, 72
    weight, x_RK = weight_of(fmt, N, K), torch.randn(3, K, generator=torch.Generator().manual_seed(6)).bfloat16()
    got = CpuLinear(weight, None, torch.bfloat16, None)(x_RK)
    exact = x_RK.double() @ decoded(weight.named(), weight.matrix).double().T
    allowed = exact.abs() / 256 + 3e-4 * exact.square().mean(dim=1, keepdim=True).sqrt()
    assert bool(((got - exact).abs() <= allowed).all())
