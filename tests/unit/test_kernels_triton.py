"""Triton's kernels for a layer's experts, on a GPU where there is one and else in the interpreter: against float64."""

from __future__ import annotations

import pytest
import torch
from lowbit_records import Shapes, gelu_gate, gpt_oss_gate, random_records, relu2, silu_gate, views_of, weights_of
from test_kernels_coded import filled, layout_of
from torch import Tensor
from torch.nn import functional

from buddymoe_ray.cache import slot_views
from buddymoe_ray.kernels import ExpertMath, LowbitFormat, lowrank_forward, mean_forward, plain_weights, record_tensors
from buddymoe_ray.kernels.reference import combine, expert_forward
from buddymoe_ray.kernels.triton.experts import TritonExperts, combine_on_device
from buddymoe_ray.models.expert_layout import slot_tensors
from buddymoe_ray.types import CodeFormat

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
D, F, E, K = 48, 24, 4, 2  # no multiple of a tile
AT = (2, -1, 0, 1)  # which record is whose: expert 1 has none

MATHS: dict[str, ExpertMath] = {
    "silu": ExpertMath(activate=silu_gate),
    "gelu": ExpertMath(activate=gelu_gate),
    "interleaved": ExpertMath(activate=gpt_oss_gate, bias=True),
    "ungated": ExpertMath(activate=relu2, gated=False),
}


def shapes_of(math: ExpertMath) -> Shapes:
    first = 2 * F if math.gated else F
    shapes: Shapes = {math.first: (first, D), "down_proj": (D, F)}
    return shapes | ({f"{math.first}_bias": (first,), "down_proj_bias": (D,)} if math.bias else {})


def slots(shapes: Shapes, dtype: str, *, transposed: bool) -> tuple[Tensor, int, list[dict[str, Tensor]]]:
    """Three experts in plain weights: their bytes, those of a slot, and their tensors."""
    stored = {name: shape[::-1] if transposed and len(shape) == 2 else shape for name, shape in shapes.items()}
    layout = slot_tensors(stored, dict.fromkeys(stored, dtype))
    nbytes = -(-(layout[-1].offset + layout[-1].nbytes) // 64) * 64
    rng, memory = torch.Generator().manual_seed(2), torch.zeros(3 * nbytes, dtype=torch.uint8)
    views = [views_of(slot, layout) for slot in memory.split(nbytes)]
    for tensors in views:
        for tensor in tensors.values():
            tensor.copy_(torch.randn(tensor.shape, generator=rng) * 0.2)
    return memory, nbytes, views


def rows(T: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Rows and their experts: some without a record, one that somebody else answers."""
    rng = torch.Generator().manual_seed(3)
    expert_TK = torch.stack([torch.randperm(E, generator=rng)[:K] for _ in range(T)])
    expert_TK[-1, 0] = -1
    return torch.randn(T, D, generator=rng).to(dtype), expert_TK


def run(layer: TritonExperts, memory: Tensor, nbytes: int, x_TD: Tensor, expert_TK: Tensor) -> Tensor:
    held = memory.to(DEVICE)
    at_E = torch.tensor([place * nbytes if place >= 0 else -1 for place in AT], device=DEVICE)
    out_ND = torch.full((expert_TK.numel(), x_TD.shape[1]), 7.0, dtype=x_TD.dtype, device=DEVICE)
    layer(x_TD.to(DEVICE), held, at_E, expert_TK.to(DEVICE), out_ND)
    addressed = torch.full_like(out_ND, 7.0)
    at_E = torch.where(at_E < 0, at_E, at_E + held.data_ptr())
    layer(x_TD.to(DEVICE), None, at_E, expert_TK.to(DEVICE), addressed)
    assert torch.equal(out_ND, addressed)
    return out_ND.cpu()


def check(
    out_ND: Tensor,
    x_TD: Tensor,
    expert_TK: Tensor,
    math: ExpertMath,
    weights: list[dict[str, Tensor]],
    error: float = 1e-6,
) -> None:
    """Against the reference in float64; float32 sums of so few terms, rounded once to the dtype of the rows."""
    wide = [{name: tensor.double() for name, tensor in tensors.items()} for tensors in weights]
    for n, expert in enumerate(expert_TK.flatten().tolist()):
        if expert < 0 or AT[expert] < 0:
            assert bool((out_ND[n] == 7.0).all()), "an access that others answer was written"
            continue
        expected = expert_forward(x_TD[n // K][None].double(), wide[AT[expert]], math)[0]
        slack = torch.finfo(out_ND.dtype).eps / 2 * expected.abs() + error * expected.abs().max()
        assert bool(((out_ND[n].double() - expected).abs() <= slack).all()), f"access {n}"


@pytest.mark.parametrize("outputs", [1, 256])
@pytest.mark.parametrize("kind", ["lowbit2", "lowbit3", "lowbit4", "lowbit8", "lowbit12"])
def test_packed_records(kind: str, outputs: int) -> None:
    fmt, math = LowbitFormat.of_kind(kind), MATHS["silu"]
    memory, views = random_records(shapes_of(math), fmt, fmt.bits, 3)
    layout, nbytes = record_tensors(shapes_of(math), fmt)
    layer = TritonExperts(layout=layout, fmt=fmt, math=math, outputs=outputs)
    x_TD, expert_TK = rows(2)
    out_ND = run(layer, memory, nbytes, x_TD, expert_TK)
    check(out_ND, x_TD, expert_TK, math, [weights_of(tensors, shapes_of(math), fmt) for tensors in views])


@pytest.mark.parametrize("kind", ["lowbit2", "lowbit3"])
def test_sums_go_on_where_lanes_end(kind: str) -> None:
    """Of more inputs than all lanes have at once, the last ones no whole group."""
    fmt, math, D, F = LowbitFormat.of_kind(kind), MATHS["silu"], 1100, 8
    shapes: Shapes = {"gate_up_proj": (2 * F, D), "down_proj": (D, F)}
    memory, views = random_records(shapes, fmt, 8, 3)
    layout, nbytes = record_tensors(shapes, fmt)
    layer = TritonExperts(layout=layout, fmt=fmt, math=math, outputs=256)
    x_TD = torch.randn(1, D, generator=torch.Generator().manual_seed(3))
    expert_TK = torch.tensor([[2, 0]])
    out_ND = run(layer, memory, nbytes, x_TD, expert_TK)
    check(out_ND, x_TD, expert_TK, math, [weights_of(tensors, shapes, fmt) for tensors in views])


def test_records_may_lie_further_apart_than_32_bits_tell() -> None:
    """Of which nobody touches what is between them."""
    fmt, math = LowbitFormat(bits=4), MATHS["silu"]
    near, _ = random_records(shapes_of(math), fmt, 9, 3)
    layout, nbytes = record_tensors(shapes_of(math), fmt)
    apart, places = torch.empty(5 << 30, dtype=torch.uint8, device=DEVICE), (0, (1 << 31) + 64, (1 << 32) + 128)
    for place, record in zip(places, near.split(nbytes), strict=True):
        apart[place : place + nbytes] = record.to(DEVICE)
    layer, (x_TD, expert_TK) = TritonExperts(layout=layout, fmt=fmt, math=math), rows(2)
    out_ND = torch.full((expert_TK.numel(), D), 7.0, device=DEVICE)
    at_E = torch.tensor([places[at] if at >= 0 else -1 for at in AT], device=DEVICE)
    layer(x_TD.to(DEVICE), apart, at_E, expert_TK.to(DEVICE), out_ND)
    assert torch.equal(out_ND.cpu(), run(layer, near, nbytes, x_TD, expert_TK))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_plain_weights(dtype: str, transposed: bool) -> None:
    math = ExpertMath(activate=silu_gate, transposed=transposed)
    memory, nbytes, views = slots(shapes_of(math), dtype, transposed=transposed)
    layout = slot_tensors({n: tuple(t.shape) for n, t in views[0].items()}, dict.fromkeys(views[0], dtype))
    layer = TritonExperts(layout=layout, fmt=None, math=math)
    x_TD, expert_TK = rows(3, getattr(torch, dtype))
    check(run(layer, memory, nbytes, x_TD, expert_TK), x_TD, expert_TK, math, views)


CODED = [
    CodeFormat(codes="fp8", block=(16, 32), scale="float32"),
    CodeFormat(codes="fp8", block=(128, 128), scale="bfloat16"),
    CodeFormat(codes="fp8", block=(0, 0), scale="float16"),
    CodeFormat(codes="fp8", block=(1, 32), scale="e8m0"),
    CodeFormat(codes="int8", block=(1, 0), scale="float32"),
    CodeFormat(codes="int4", block=(1, 32), scale="float16"),
    CodeFormat(codes="int4", block=(1, 64), scale="bfloat16", zeros=True),
    CodeFormat(codes="gptq", block=(1, 32), scale="float16", zeros=True),
    CodeFormat(codes="awq", block=(1, 32), scale="float16", zeros=True),
    CodeFormat(codes="awq", block=(1, 128), scale="float16", zeros=True),
    CodeFormat(codes="mxfp4", block=(1, 32), scale="e8m0"),
    CodeFormat(codes="nvfp4", block=(1, 16), scale="float8_e4m3fn", global_scale="*"),
    CodeFormat(codes="nvfp4", block=(1, 16), scale="float8_e4m3fn", global_scale="/"),
    CodeFormat(codes="int4", block=(1, 16), scale="float16"),
]


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("fmt", CODED, ids=str)
def test_quantised_matrices_as_checkpoints_store_them(fmt: CodeFormat, biased: bool) -> None:
    """In one part, interleaved and with biases, or in two; no multiple of a tile."""
    math = MATHS["interleaved" if biased else "silu"]
    layout, rng = layout_of(fmt, math, 64 if fmt.codes == "mxfp4" else 40), torch.Generator().manual_seed(4)
    assert TritonExperts.covers(layout.tensors, None, math, layout.coded)
    memory = torch.zeros(3 * layout.slot_bytes, dtype=torch.uint8)
    views = [slot_views(slot, layout) for slot in memory.split(layout.slot_bytes)]
    for at, view in enumerate(views):
        for matrix in layout.coded:
            filled(matrix, view, at)
            if fmt.codes == "fp8":  # also those without a leading one
                view[f"{matrix.name}.codes"].view(torch.uint8).flatten()[:120].copy_(torch.arange(120))
            if fmt.scale == "e8m0":
                view[f"{matrix.name}.scales"][0, 0] = 0
        for key, tensor in view.items():
            if key.endswith("_bias"):
                tensor.copy_(torch.randn(tensor.shape, generator=rng))
    weights = [dict(plain_weights(view, layout.coded)) for view in views]
    _, expert_TK = rows(2)
    x_TD = torch.randn(2, weights[0]["down_proj"].shape[0], generator=rng)
    layer = TritonExperts(layout=layout.tensors, fmt=None, math=math, coded=layout.coded)
    together = run(layer, memory, layout.slot_bytes, x_TD, expert_TK)
    check(together, x_TD, expert_TK, math, weights, error=4e-6)  # the reference's weights are rounded
    if biased:  # nor does a row's neighbour count
        assert torch.equal(run(layer, memory, layout.slot_bytes, x_TD[:1], expert_TK[:1]), together[:K])


@pytest.mark.parametrize("name", MATHS)
@pytest.mark.parametrize("bits", [0, 4])
def test_what_experts_compute_between_their_products(name: str, bits: int) -> None:
    math = MATHS[name]
    shapes, fmt = shapes_of(math), LowbitFormat(bits=bits) if bits else None
    if fmt is None:
        memory, nbytes, views = slots(shapes, "bfloat16", transposed=False)
        layout, weights = slot_tensors(shapes, dict.fromkeys(shapes, "bfloat16")), views
    else:
        memory, views = random_records(shapes, fmt, 5, 3)
        layout, nbytes = record_tensors(shapes, fmt)
        weights = [weights_of(tensors, shapes, fmt) for tensors in views]
    assert TritonExperts.covers(layout, fmt, math)
    x_TD, expert_TK = rows(2)
    x_TD *= 20  # so that a clamp has something to do
    layer = TritonExperts(layout=layout, fmt=fmt, math=math)
    check(run(layer, memory, nbytes, x_TD, expert_TK), x_TD, expert_TK, math, weights)


def test_a_rows_bits_depend_on_that_row_alone() -> None:
    fmt, math = LowbitFormat(bits=3), MATHS["silu"]
    memory, _ = random_records(shapes_of(math), fmt, 6, 3)
    layout, nbytes = record_tensors(shapes_of(math), fmt)
    layer = TritonExperts(layout=layout, fmt=fmt, math=math)
    x_TD, expert_TK = rows(4)
    together = run(layer, memory, nbytes, x_TD, expert_TK)
    for at, size in ((0, 1), (1, 2)):
        part = run(layer, memory, nbytes, x_TD[at : at + size], expert_TK[at : at + size])
        assert torch.equal(part, together[at * K : (at + size) * K])


@pytest.mark.parametrize("rank", [0, 3, 8])
def test_maps_of_low_rank_and_mean_outputs(rank: int) -> None:
    shapes: Shapes = {"down": (rank, D), "up": (D, rank), "bias": (D,)} if rank else {"bias": (D,)}
    memory, nbytes, views = slots(shapes, "bfloat16", transposed=False)
    layer = TritonExperts(layout=slot_tensors(shapes, dict.fromkeys(shapes, "bfloat16")), fmt=None, math=None)
    x_TD, expert_TK = rows(2)
    out_ND, forward = run(layer, memory, nbytes, x_TD, expert_TK), lowrank_forward if rank else mean_forward
    for n, expert in enumerate(expert_TK.flatten().tolist()):
        known = expert >= 0 and AT[expert] >= 0
        expected = forward(x_TD[n // K][None], views[AT[expert]])[0] if known else torch.full((D,), 7.0)
        torch.testing.assert_close(out_ND[n], expected, rtol=1e-5, atol=1e-5)


def test_what_no_kernel_knows_is_not_covered() -> None:
    shapes = shapes_of(MATHS["silu"])
    plain = slot_tensors(shapes, dict.fromkeys(shapes, "bfloat16"))
    assert TritonExperts.covers(plain, None, MATHS["silu"])
    normed = ExpertMath(activate=silu_gate, post_norm=lambda y: functional.rms_norm(y, (D,)))
    assert not TritonExperts.covers(plain, None, normed)
    coded = slot_tensors(shapes, dict.fromkeys(shapes, "int8"))
    assert not TritonExperts.covers(coded, None, MATHS["silu"])
    layout = layout_of(CodeFormat(codes="int4", block=(1, 24), scale="float16"), MATHS["silu"], F)
    assert not TritonExperts.covers(layout.tensors, None, MATHS["silu"], layout.coded), "loads of parts of blocks"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_combined_in_slot_order(dtype: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(7)
    y_TKD, weight_TK = torch.randn(5, 3, 300, generator=rng).to(dtype), torch.rand(5, 3, generator=rng).to(dtype)
    got = combine_on_device(y_TKD.to(DEVICE), weight_TK.to(DEVICE)).cpu()
    torch.testing.assert_close(got, combine(y_TKD, weight_TK), rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert torch.equal(got[2:3], combine_on_device(y_TKD[2:3].to(DEVICE), weight_TK[2:3].to(DEVICE)).cpu())
