"""Weights as a checkpoint stores them: products against float64, rows that do not see each other, and the experts and
linear layers built on them."""

from __future__ import annotations

import ctypes

import pytest
import torch
from lowbit_records import gelu_gate, gpt_oss_gate, relu2, silu_gate
from torch import Tensor, nn

from buddymoe_ray.cache import slot_views
from buddymoe_ray.kernels import CpuLinear, ExpertLayer, ExpertMath, expert_forward, stored, widens
from buddymoe_ray.kernels.cpu import FIRST_AT, linear_kernel
from buddymoe_ray.kernels.expert_calls import ANYWHERE, OK, Call, Expert, plan_of
from buddymoe_ray.kernels.machine_code import native_functions
from buddymoe_ray.kernels.stored_dots import has_dots
from buddymoe_ray.kernels.stored_tiles import stored_module_text
from buddymoe_ray.models.dense_dtype import StoredLinear
from buddymoe_ray.models.expert_layout import slot_tensors
from buddymoe_ray.types import ExpertLayout

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
WIDTHS = [(48, 96), (1, 32), (7, 33), (30, 31), (5, 1), (64, 257)]


def linear_of(weight: Tensor, dtype: torch.dtype, bias: Tensor | None = None, threads: int = 1) -> CpuLinear:
    return CpuLinear(weight, None, dtype, bias, threads=threads)


@pytest.mark.parametrize("weights", DTYPES)
@pytest.mark.parametrize("shape", WIDTHS)
@pytest.mark.parametrize("R", [1, 2, 3, 4, 11])
def test_a_product_is_the_exact_one_rounded(weights: torch.dtype, shape: tuple[int, int], R: int) -> None:
    """To 1e-6 of the sum of sizes, however odd the matrix."""
    rng = torch.Generator().manual_seed(R)
    weight, bias = torch.randn(shape, generator=rng).to(weights), torch.randn(shape[0], generator=rng)
    x_RK = torch.randn(R, shape[1], generator=rng)
    got = linear_of(weight, torch.float32, bias)(x_RK)
    exact = x_RK.double() @ weight.double().T + bias
    sizes = x_RK.abs().double() @ weight.abs().double().T + bias.abs()
    assert got.shape == exact.shape and bool(((got - exact).abs() <= 1e-6 * sizes).all())


@pytest.mark.parametrize("weights", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_alone_gives_the_bits_that_it_gives_among_others(weights: torch.dtype, dtype: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(1)
    weight, x_RK = torch.randn(70, 90, generator=rng).to(weights), torch.randn(80, 90, generator=rng).to(dtype)
    linear = linear_of(weight, dtype)
    together = linear(x_RK)
    assert together.dtype is dtype
    for first, last in ((0, 1), (1, 3), (3, 6), (6, 13), (13, 80)):
        assert torch.equal(linear(x_RK[first:last]), together[first:last])
    for threads in (2, 3, 9):
        assert torch.equal(linear_of(weight, dtype, threads=threads)(x_RK), together)


@pytest.mark.parametrize("weights", DTYPES)
def test_a_head_in_parts_gives_the_bits_of_its_outputs_alone(weights: torch.dtype) -> None:
    """As many outputs as are not multiplied at once, with a bias; threads cut them elsewhere."""
    rng = torch.Generator().manual_seed(2)
    weight, bias = torch.randn(9000, 33, generator=rng).to(weights), torch.randn(9000, generator=rng)
    x_RK = torch.randn(5, 33, generator=rng).to(weights)
    head = linear_of(weight, weights, bias)(x_RK)
    pieces = [linear_of(w, weights, b)(x_RK) for w, b in zip(weight.split(1000), bias.split(1000), strict=True)]
    assert torch.equal(head, torch.cat(pieces, dim=1))
    assert torch.equal(linear_of(weight, weights, bias, threads=2)(x_RK), head)


@pytest.mark.parametrize("bias", DTYPES)
def test_a_linear_layer_is_replaced_with_its_weights_where_they_are(bias: torch.dtype) -> None:
    linear = nn.Linear(40, 24, dtype=bias)
    made, x = StoredLinear(linear, 1), torch.randn(2, 3, 40, dtype=bias)
    assert made.weight is linear.weight and made.bias is linear.bias
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[bias]
    torch.testing.assert_close(made(x), linear(x), rtol=tolerance, atol=tolerance)
    assert made(x).shape == (2, 3, 24)


def test_infinite_and_missing_numbers_stay_what_they_are() -> None:
    weight, x_RK = torch.ones(3, 40), torch.ones(3, 40)
    x_RK[0, 7], x_RK[1, 39] = float("nan"), float("inf")
    got = linear_of(weight, torch.float32)(x_RK)
    assert bool(got[0].isnan().all()) and bool(got[1].isinf().all()) and bool((got[2] == 40).all())


@pytest.mark.skipif(not has_dots(), reason="no bfloat16 products")
@pytest.mark.parametrize("shape", [*WIDTHS, (6, 4100)])  # of the last one four rows are more than is near
@pytest.mark.parametrize("R", [1, 2, 3, 4, 5, 7, 8, 11, 16, 23])
def test_bfloat16_products_have_the_bits_of_fused_additions(
    shape: tuple[int, int], R: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one CPU has an instruction for, others compute to the last bit, in tiles of any size."""
    rng = torch.Generator().manual_seed(R)
    weight = (torch.randn(shape, generator=rng) * 3 ** torch.randn(shape, generator=rng)).bfloat16()
    x_RK = torch.randn(R, shape[1], generator=rng).bfloat16()
    x_RK[0, 0] = float("inf")
    dots = linear_of(weight, torch.bfloat16)(x_RK)
    for registers in (16, 32):
        names = ("project", "spread_rounded")
        made = dict(native_functions(stored_module_text("bfloat16", registers=registers), names)) | {"spread": 0}
        monkeypatch.setattr(stored, "_dot_functions", lambda: {})
        monkeypatch.setattr(stored, "_stored_functions", lambda _, made=made: made)
        assert torch.equal(linear_of(weight, torch.bfloat16)(x_RK).view(torch.int16), dots.view(torch.int16))


@pytest.mark.parametrize("inputs", [64, 72, 5])
def test_a_row_of_values_is_added_up_to_the_same_bits_beside_any_others(inputs: int) -> None:
    """With few registers and many, in the order of the matrix's rows: of float32, as fused additions give it."""
    rng, groups, R, N = torch.Generator().manual_seed(7), (inputs + 31) // 32 * 32, 23, 37
    values, shares = torch.randn(N, inputs, generator=rng), torch.rand(R, N, generator=rng)
    expected = torch.zeros(R, inputs, dtype=torch.float64)
    for n in range(N):
        expected = (expected + shares[:, n : n + 1].double() * values[n].double()).float().double()
    for registers in (16, 32):
        made = native_functions(stored_module_text("float32", registers=registers), ("blend",))
        blend = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 7)(made["blend"])
        for rows in (1, 2, 3, 7, 12, R):
            out = torch.zeros(rows, groups)
            pairs = torch.tensor([[share.data_ptr(), row.data_ptr()] for share, row in zip(shares, out, strict=False)])
            blend(values.data_ptr(), 4 * inputs, inputs, N, pairs.data_ptr(), rows, 0)
            assert torch.equal(out[:, :inputs].double(), expected[:rows])


def test_what_an_expert_computes_between_its_products_is_rounded_as_its_rows_are() -> None:
    weight, x_RK = torch.randn(9, 40).bfloat16(), torch.randn(3, 40)
    product = stored.stored_product(weight.data_ptr(), (9, 40), weight.dtype, torch.bfloat16)
    plan, out = plan_of(Expert(0, 0), product, product), torch.empty(3, 9)
    call = Call(x_RK.data_ptr(), out.data_ptr(), 0, ANYWHERE, 4, N=3)
    assert linear_kernel()(tuple(call), plan.ctypes.data + FIRST_AT) == OK
    assert torch.equal(out, linear_of(weight, torch.float32)(x_RK.bfloat16().float()))


MATHS = {
    "silu": ExpertMath(activate=silu_gate),
    "gelu": ExpertMath(activate=gelu_gate),
    "gpt_oss": ExpertMath(activate=gpt_oss_gate, bias=True),
    "relu2": ExpertMath(activate=relu2, gated=False),
}
D, F, E, K = 50, 36, 5, 3


def stored_layout(math: ExpertMath, dtype: str) -> ExpertLayout:
    shapes: dict[str, tuple[int, ...]] = {math.first: (2 * F if math.gated else F, D), "down_proj": (D, F)}
    if math.bias:
        shapes |= {f"{math.first}_bias": (2 * F,), "down_proj_bias": (D,)}
    tensors = slot_tensors(shapes, dict.fromkeys(shapes, dtype))
    nbytes = -(-(tensors[-1].offset + tensors[-1].nbytes) // 64) * 64
    return ExpertLayout(
        tensors=tensors, slot_bytes=nbytes, expert_bytes=nbytes, layers=1, experts_per_layer=(E,), pieces={}
    )


@pytest.mark.parametrize("name", MATHS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_layer_of_stored_experts_is_the_reference_of_each(name: str, dtype: str) -> None:
    """bfloat16 weights and float32 rows need no copy of the weights; one call has the bits of one row alone."""
    math, rng = MATHS[name], torch.Generator().manual_seed(4)
    layout = stored_layout(math, dtype)
    assert ExpertLayer.covers(layout.tensors, None, math)
    records = torch.zeros(E * layout.slot_bytes, dtype=torch.uint8)
    views = [slot_views(record, layout) for record in records.split(layout.slot_bytes)]
    for view in views:
        for tensor in view.values():
            tensor.copy_(torch.randn(tensor.shape, generator=rng) / 6)
    layer = ExpertLayer(layout=layout.tensors, fmt=None, math=math)
    expert_TK = torch.stack([torch.randperm(E, generator=rng)[:K] for _ in range(20)])
    expert_TK[3, 1] = -1
    x_TD, out_ND = torch.randn(20, D, generator=rng), torch.full((20 * K, D), 7.0)
    layer(x_TD, records, torch.arange(E) * layout.slot_bytes, expert_TK, out_ND)
    for n, expert in enumerate(expert_TK.flatten().tolist()):
        if expert < 0:
            assert bool((out_ND[n] == 7).all())
            continue
        wide = {key: tensor.float() for key, tensor in views[expert].items()}
        row = x_TD[n // K][None]
        torch.testing.assert_close(out_ND[n], expert_forward(row, wide, math)[0], rtol=1e-5, atol=1e-5)
        assert torch.equal(out_ND[n], layer.expert(row, views[expert])[0])


def test_what_the_kernels_do_not_read_is_left_to_torch() -> None:
    silu, biased = MATHS["silu"], ExpertMath(activate=silu_gate, bias=True)
    assert widens("bfloat16") and widens("float32") and not widens("float8_e4m3fn")
    assert not ExpertLayer.covers(
        stored_layout(silu, "bfloat16").tensors, None, ExpertMath(activate=silu_gate, transposed=True)
    )
    assert not ExpertLayer.covers(stored_layout(biased, "float16").tensors, None, biased), "a bias in float16"
    assert not ExpertLayer.covers(
        stored_layout(silu, "bfloat16").tensors, None, ExpertMath(activate=silu_gate, post_norm=lambda y: y)
    )
    assert not StoredLinear.covers(nn.Linear(8, 8, device="meta"))
