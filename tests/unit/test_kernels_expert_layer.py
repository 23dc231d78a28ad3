"""One call for a layer's experts gives the bits of one call per expert, whatever their arithmetic."""

from __future__ import annotations

import pytest
import torch
from lowbit_records import Shapes, gelu_gate, gpt_oss_gate, random_records, relu2, silu_gate
from numba import types
from torch import Tensor
from torch.nn import functional

from buddymoe_ray.device import open_device
from buddymoe_ray.errors import ProfileError
from buddymoe_ray.kernels import (
    ExpertLayer,
    ExpertMath,
    LowbitFormat,
    cpu,
    expert_layer,
    lowbit_forward,
    record_tensors,
)
from buddymoe_ray.kernels.expert_rows import activate
from buddymoe_ray.kernels.lowbit import lowbit_forward_reference
from buddymoe_ray.moe import record_computes
from buddymoe_ray.moe.standin_compute import RecordCompute
from buddymoe_ray.types import ExpertLayout, SlotTensor

D, F, E, K = 96, 40, 6, 3
SHAPES: Shapes = {"gate_up_proj": (2 * F, D), "down_proj": (D, F)}
SILU = ExpertMath(activate=silu_gate)
FMT = LowbitFormat(bits=4)
LAYOUT = record_tensors(SHAPES, FMT)[0]


def layer_of(fmt: LowbitFormat, threads: int = 1, dtype: torch.dtype = torch.float32) -> ExpertLayer:
    return ExpertLayer(layout=record_tensors(SHAPES, fmt)[0], fmt=fmt, math=SILU, dtype=dtype, threads=threads)


def any_layer_of(kind: str, math: ExpertMath, shapes: Shapes) -> RecordCompute:
    tensors, nbytes = record_tensors(shapes, LowbitFormat.of_kind(kind))
    layout = ExpertLayout(
        tensors=tensors, slot_bytes=nbytes, expert_bytes=nbytes, layers=1, experts_per_layer=(E,), pieces={}
    )
    (made,) = record_computes(kind, layout, [math], threads=1, device=open_device("cpu"), dtype=torch.float32)
    return made


def accesses(T: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows and distinct experts per row, a third of the accesses answered by others."""
    rng = torch.Generator().manual_seed(seed)
    expert_TK = torch.stack([torch.randperm(E, generator=rng)[:K] for _ in range(T)])
    expert_TK[torch.rand(T, K, generator=rng) < 0.33] = -1
    return torch.randn(T, D, generator=rng), expert_TK


def places(records: Tensor, missing: tuple[int, ...] = ()) -> Tensor:
    at_E = torch.arange(E) * (len(records) // E)
    at_E[list(missing)] = -1
    return at_E


@pytest.mark.parametrize("kind", ["lowbit12", "lowbit3", "lowbit4", "lowbit8", "lowbit24", "lowbit48"])
@pytest.mark.parametrize("T", [1, 2, 9, 80])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_layer_is_its_experts_one_by_one(kind: str, T: int, dtype: torch.dtype) -> None:
    fmt = LowbitFormat.of_kind(kind)
    records, views = random_records(SHAPES, fmt, 1, E)
    x_TD, expert_TK = accesses(T, fmt.bits)
    x_TD = x_TD.to(dtype)
    out_ND = torch.full((T * K, D), 7.0, dtype=dtype)
    layer_of(fmt, dtype=dtype)(x_TD, records, places(records, missing=(4,)), expert_TK, out_ND)
    for n, expert in enumerate(expert_TK.flatten().tolist()):
        if expert in (-1, 4):
            assert bool((out_ND[n] == 7.0).all()), "an access that others answer was written"
        else:
            assert torch.equal(out_ND[n], lowbit_forward(x_TD[n // K][None], views[expert], fmt, SILU)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("R", [0, 1, 5, 70])
def test_one_expert_from_the_views_of_its_record(R: int, dtype: torch.dtype) -> None:
    fmt, shapes = LowbitFormat(bits=4), SHAPES | {"gate_up_proj_bias": (2 * F,), "down_proj_bias": (D,)}
    _, views = random_records(shapes, fmt, 17, 3)
    math = ExpertMath(activate=gpt_oss_gate, bias=True)
    layer = ExpertLayer(layout=record_tensors(shapes, fmt)[0], fmt=fmt, math=math, dtype=dtype)
    x_RD = torch.randn(R, 2 * D, generator=torch.Generator().manual_seed(18)).to(dtype)[:, ::2]
    for tensors in views:
        got = layer.expert(x_RD, tensors)
        assert got.dtype is dtype and torch.equal(got, lowbit_forward(x_RD, tensors, fmt, math))


KINDS: dict[str, tuple[ExpertMath, bool]] = {  # with whether the layer's kernel knows them
    "bias": (ExpertMath(activate=silu_gate, bias=True), True),
    "gpt_oss": (ExpertMath(activate=gpt_oss_gate, bias=True), True),
    "gelu": (ExpertMath(activate=gelu_gate), True),
    "relu2": (ExpertMath(activate=relu2, gated=False), True),
    "post_norm": (ExpertMath(activate=silu_gate, post_norm=lambda y: functional.rms_norm(y, (D,))), False),
    "erf": (ExpertMath(activate=lambda x: functional.gelu(x[..., :F]) * x[..., F:]), False),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("kind", ["lowbit3", "lowbit8", "lowbit24"])
def test_every_family_is_computed_in_one_call_or_one_by_one(name: str, kind: str) -> None:
    fmt, (math, known) = LowbitFormat.of_kind(kind), KINDS[name]
    shapes: Shapes = {math.first: (2 * F if math.gated else F, D), "down_proj": (D, F)}
    if math.bias:
        shapes |= {f"{math.first}_bias": (2 * F,), "down_proj_bias": (D,)}
    made = any_layer_of(kind, math, shapes)
    assert isinstance(made, ExpertLayer) is known
    records, views = random_records(shapes, fmt, 2, E)
    x_TD, expert_TK = accesses(5, 3)
    out_ND = torch.zeros(5 * K, D)
    made(x_TD, records, places(records), expert_TK, out_ND)
    for n, expert in enumerate(expert_TK.flatten().tolist()):
        expected = torch.zeros(D)
        if expert >= 0:
            expected = lowbit_forward_reference(x_TD[n // K][None], views[expert], fmt, math)[0]
        torch.testing.assert_close(out_ND[n], expected, rtol=1e-5, atol=1e-5 * max(1.0, expected.abs().max().item()))


def test_records_that_another_version_packed_are_refused() -> None:
    """The layout of old files: rows of planar codes."""
    old = (
        SlotTensor(name="gate_up_proj.codes", shape=(80, 36), dtype="uint8", offset=0, nbytes=2880),
        SlotTensor(name="gate_up_proj.scales", shape=(80, 3), dtype="uint8", offset=2880, nbytes=240),
        SlotTensor(name="gate_up_proj.base", shape=(1,), dtype="float32", offset=3136, nbytes=4),
    )
    layout = ExpertLayout(tensors=old, slot_bytes=3200, expert_bytes=3200, layers=1, experts_per_layer=(E,), pieces={})
    how = {"threads": 1, "device": open_device("cpu"), "dtype": torch.float32}
    with pytest.raises(ProfileError, match=r"lowbit3 .*gate_up_proj.sizes is None, must be .* hint: run buddymoe prof"):
        record_computes("lowbit3", layout, [SILU], **how)


def test_records_of_two_kinds_share_one_buffer() -> None:
    """Each kind has its own table of places; the two calls fill the rows of both."""
    three, four = LowbitFormat(bits=3), LowbitFormat(bits=4)
    (a, views_a), (b, views_b) = (random_records(SHAPES, fmt, 4, E) for fmt in (three, four))
    buffer = torch.cat([a, b])
    odd = torch.arange(E) % 2 == 1
    at_a, at_b = places(a).masked_fill(odd, -1), (places(b) + len(a)).masked_fill(~odd, -1)
    x_TD, expert_TK = accesses(8, 5)
    out_ND = torch.zeros(8 * K, D)
    layer_of(three)(x_TD, buffer, at_a, expert_TK, out_ND)
    layer_of(four)(x_TD, buffer, at_b, expert_TK, out_ND)
    for n, expert in enumerate(expert_TK.flatten().tolist()):
        if expert >= 0:
            views, fmt = (views_b, four) if expert % 2 else (views_a, three)
            assert torch.equal(out_ND[n], lowbit_forward(x_TD[n // K][None], views[expert], fmt, SILU)[0])


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_do_not_change_bits(threads: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_layer, "THREADED_WEIGHTS", 0)
    fmt = LowbitFormat(bits=4)
    records, _ = random_records(SHAPES, fmt, 6, E)
    x_TD, expert_TK = accesses(30, 7)
    one, many = torch.zeros(2, 30 * K, D, dtype=dtype)
    layer_of(fmt, 1, dtype)(x_TD.to(dtype), records, places(records), expert_TK, one)
    layer_of(fmt, threads, dtype)(x_TD.to(dtype), records, places(records), expert_TK, many)
    assert torch.equal(one, many) and bool(one.any())


def test_a_step_has_nothing_to_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    fmt = LowbitFormat(bits=3)
    records, _ = random_records(SHAPES, fmt, 15, E)
    layer, (x_TD, expert_TK), out_ND = layer_of(fmt), accesses(4, 16), torch.zeros(4 * K, D)
    for name in ("experts_kernel", "_tiles"):
        monkeypatch.setattr(cpu, name, lambda *_: pytest.fail("compiled in a step"))
    layer(x_TD, records, places(records), expert_TK, out_ND)
    assert bool(out_ND.any())


def test_nothing_to_do_is_done() -> None:
    fmt = LowbitFormat(bits=3)
    records, _ = random_records(SHAPES, fmt, 8, E)
    layer, out_ND = layer_of(fmt), torch.ones(2 * K, D)
    layer(torch.randn(2, D), records, places(records), torch.full((2, K), -1), out_ND)
    assert bool((out_ND == 1).all())
    layer(torch.randn(0, D), records, places(records), torch.zeros(0, K, dtype=torch.int64), torch.ones(0, D))
    layer(torch.randn(2, D), records[:0], torch.full((E,), -1), torch.zeros(2, K, dtype=torch.int64), out_ND)
    assert bool((out_ND == 1).all()), "nobody has a record, nor is there room for one"


def test_what_would_read_or_write_past_an_end_is_refused() -> None:
    fmt = LowbitFormat(bits=3)
    records, _ = random_records(SHAPES, fmt, 9, E)
    layer, (x_TD, expert_TK), out_ND = layer_of(fmt), accesses(2, 10), torch.zeros(2 * K, D)
    with pytest.raises(AssertionError, match=r"out is \(5, 96\), must be \(6, 96\)"):
        layer(x_TD, records, places(records), expert_TK, out_ND[:5])
    with pytest.raises(AssertionError, match="expert is 6, must be below 6"):
        layer(x_TD, records, places(records), torch.full((2, K), E), out_ND)
    with pytest.raises(AssertionError, match=r"x is \(1, 96\), must be \(2, 96\)"):
        layer(x_TD[:1], records, places(records), expert_TK, out_ND)
    with pytest.raises(AssertionError, match=r"x is torch\.bfloat16, out torch\.float32, not torch\.float32"):
        layer(x_TD.bfloat16(), records, places(records), expert_TK, out_ND)
    with pytest.raises(AssertionError, match="the last record ends at byte"):
        layer(x_TD, records[:-64], places(records), expert_TK, out_ND)
    with pytest.raises(AssertionError, match="threads is 0, must be at least 1"):
        layer_of(fmt, threads=0)


@pytest.mark.parametrize(
    ("activate", "known"),
    [
        (silu_gate, 0),
        (lambda x: functional.silu(x[..., :F]) * x[..., F:], 0),
        (lambda x: functional.silu(x[..., F:]) * x[..., :F], None),
        (lambda x: functional.silu(x[..., ::2]) * x[..., 1::2], None),
        (lambda x: functional.silu(x[..., :F].clamp(max=7.0)) * x[..., F:], None),
        (lambda x: functional.silu(x[..., :F]) * x[..., F:].clamp(-200.0, 200.0), None),
        (gelu_gate, 1),
        (lambda x: functional.gelu(x[..., :F]) * x[..., F:], None),
        (gpt_oss_gate, 2),
        (relu2, None),
    ],
)
def test_experts_are_told_apart_by_what_they_answer(activate, known: int | None) -> None:
    math = ExpertMath(activate=activate if activate is not relu2 else lambda x: relu2(x[..., :F]))
    assert cpu.activation_of(math, F) == known and ExpertLayer.covers(LAYOUT, FMT, math) is (known is not None)
    assert cpu.activation_of(ExpertMath(activate=activate, post_norm=lambda y: y), F) is None


def test_ungated_experts_are_known_too() -> None:
    assert cpu.activation_of(ExpertMath(activate=relu2, gated=False), F) == 3
    assert cpu.activation_of(ExpertMath(activate=functional.relu, gated=False), F) is None


def test_large_gates_saturate_as_silu_does() -> None:
    """The kernel's own exp at its ends: no overflow, no NaN of its making, and NaN stays NaN."""
    fmt = LowbitFormat(bits=4)
    _, (views,) = random_records(SHAPES, fmt, 11)
    x_RD = torch.randn(4, D, generator=torch.Generator().manual_seed(12)) * torch.tensor([[1e-3], [1.0], [1e2], [1e6]])
    got, expected = (f(x_RD, views, fmt, SILU) for f in (lowbit_forward, lowbit_forward_reference))
    for row in range(4):
        torch.testing.assert_close(got[row], expected[row], rtol=1e-5, atol=1e-5 * expected[row].abs().max().item())
    x_RD[2, 5] = float("nan")
    assert lowbit_forward(x_RD, views, fmt, SILU).isnan().all(dim=1).tolist() == [False, False, True, False]


def test_activations_are_computed_in_vectors() -> None:
    """A division that looks for a zero divisor keeps a loop from it."""
    row = types.float32[::1]
    activate.compile((types.int64, row, types.int64, row))
    assert all("fdiv <" in code for code in activate.inspect_llvm().values())
