"""One call for a layer's experts gives the bits of one call per expert; the kernel's cache is optional."""

from __future__ import annotations

import importlib.util
import logging
import shutil
import sys
from pathlib import Path

import pytest
import torch
from lowbit_records import Shapes, gpt_oss_gate, random_records, silu_gate
from torch import Tensor
from torch.nn import functional

from buddymoe_ray.kernels import (
    ExpertMath,
    LowbitFormat,
    LowbitLayer,
    lowbit_cpu,
    lowbit_forward,
    lowbit_layer,
    record_tensors,
)
from buddymoe_ray.kernels.lowbit import lowbit_forward_reference
from buddymoe_ray.moe import record_computes
from buddymoe_ray.moe.standin_compute import RecordCompute
from buddymoe_ray.types import ExpertLayout

D, F, E, K = 96, 40, 6, 3
SHAPES: Shapes = {"gate_up_proj": (2 * F, D), "down_proj": (D, F)}
SILU = ExpertMath(activate=silu_gate)


def layer_of(fmt: LowbitFormat, threads: int = 1) -> LowbitLayer:
    return LowbitLayer(layout=record_tensors(SHAPES, fmt)[0], fmt=fmt, threads=threads)


def general_layer_of(fmt: LowbitFormat, math: ExpertMath, shapes: Shapes) -> RecordCompute:
    tensors, nbytes = record_tensors(shapes, fmt)
    layout = ExpertLayout(
        tensors=tensors, slot_bytes=nbytes, expert_bytes=nbytes, layers=1, experts_per_layer=(E,), pieces={}
    )
    (made,) = record_computes(f"lowbit{fmt.bits}", layout, [math], 1, torch.device("cpu"))
    assert not isinstance(made, LowbitLayer)
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


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("T", [1, 2, 9, 80])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_is_its_experts_one_by_one(bits: int, T: int, dtype: torch.dtype) -> None:
    fmt = LowbitFormat(bits=bits)
    records, views = random_records(SHAPES, fmt, 1, E)
    x_TD, expert_TK = accesses(T, bits)
    x_TD = x_TD.to(dtype)
    out_ND = torch.full((T * K, D), 7.0, dtype=dtype)
    layer_of(fmt)(x_TD, records, places(records, missing=(4,)), expert_TK, out_ND)
    for n, expert in enumerate(expert_TK.flatten().tolist()):
        if expert in (-1, 4):
            assert bool((out_ND[n] == 7.0).all()), "an access that others answer was written"
        else:
            assert torch.equal(out_ND[n], lowbit_forward(x_TD[n // K][None], views[expert], fmt, SILU)[0])


@pytest.mark.parametrize("name", ["bias", "gpt_oss", "post_norm", "gelu"])
def test_other_families_take_the_general_path(name: str) -> None:
    fmt, bias = LowbitFormat(bits=3), name == "bias"
    shapes = SHAPES | ({"gate_up_proj_bias": (2 * F,), "down_proj_bias": (D,)} if bias else {})
    math = {
        "bias": ExpertMath(activate=silu_gate, bias=True),
        "gpt_oss": ExpertMath(activate=gpt_oss_gate),
        "post_norm": ExpertMath(activate=silu_gate, post_norm=lambda y: functional.rms_norm(y, (D,))),
        "gelu": ExpertMath(activate=lambda x: functional.gelu(x[..., :F]) * x[..., F:]),
    }[name]
    assert not lowbit_cpu.is_plain(math, F)
    records, views = random_records(shapes, fmt, 2, E)
    x_TD, expert_TK = accesses(5, 3)
    out_ND = torch.zeros(5 * K, D)
    general_layer_of(fmt, math, shapes)(x_TD, records, places(records), expert_TK, out_ND)
    for n, expert in enumerate(expert_TK.flatten().tolist()):
        expected = torch.zeros(D)
        if expert >= 0:
            expected = lowbit_forward_reference(x_TD[n // K][None], views[expert], fmt, math)[0]
        torch.testing.assert_close(out_ND[n], expected, rtol=1e-5, atol=1e-5 * max(1.0, expected.abs().max().item()))


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
def test_threads_do_not_change_bits(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowbit_layer, "THREADED_WEIGHTS", 0)
    fmt = LowbitFormat(bits=4)
    records, _ = random_records(SHAPES, fmt, 6, E)
    x_TD, expert_TK = accesses(30, 7)
    one, many = torch.zeros(2, 30 * K, D)
    layer_of(fmt)(x_TD, records, places(records), expert_TK, one)
    layer_of(fmt, threads=threads)(x_TD, records, places(records), expert_TK, many)
    assert torch.equal(one, many) and bool(one.any())


def test_a_step_has_nothing_to_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    fmt = LowbitFormat(bits=3)
    records, _ = random_records(SHAPES, fmt, 15, E)
    layer, (x_TD, expert_TK), out_ND = layer_of(fmt), accesses(4, 16), torch.zeros(4 * K, D)
    monkeypatch.setattr(lowbit_cpu, "_compiled", lambda compile: pytest.fail("compiled in a step"))
    layer(x_TD, records, places(records), expert_TK, out_ND)
    assert bool(out_ND.any())


def test_nothing_to_do_is_done() -> None:
    fmt = LowbitFormat(bits=3)
    records, _ = random_records(SHAPES, fmt, 8, E)
    layer, out_ND = layer_of(fmt), torch.ones(2 * K, D)
    layer(torch.randn(2, D), records, places(records), torch.full((2, K), -1), out_ND)
    assert bool((out_ND == 1).all())
    layer(torch.randn(0, D), records, places(records), torch.zeros(0, K, dtype=torch.int64), torch.ones(0, D))


def test_what_would_read_or_write_past_an_end_is_refused() -> None:
    fmt = LowbitFormat(bits=3)
    records, _ = random_records(SHAPES, fmt, 9, E)
    layer, (x_TD, expert_TK), out_ND = layer_of(fmt), accesses(2, 10), torch.zeros(2 * K, D)
    with pytest.raises(AssertionError, match=r"out is \(5, 96\), must be \(6, 96\)"):
        layer(x_TD, records, places(records), expert_TK, out_ND[:5])
    with pytest.raises(AssertionError, match="expert is 6, must be below 6"):
        layer(x_TD, records, places(records), torch.full((2, K), E), out_ND)
    with pytest.raises(AssertionError, match="the last record ends at byte"):
        layer(x_TD, records[:-64], places(records), expert_TK, out_ND)
    with pytest.raises(AssertionError, match="threads is 0, must be at least 1"):
        layer_of(fmt, threads=0)


@pytest.mark.parametrize(
    ("activate", "plain"),
    [
        (silu_gate, True),
        (lambda x: functional.silu(x[..., :F]) * x[..., F:], True),
        (lambda x: functional.silu(x[..., F:]) * x[..., :F], False),
        (lambda x: functional.silu(x[..., ::2]) * x[..., 1::2], False),
        (lambda x: functional.silu(x[..., :F].clamp(max=7.0)) * x[..., F:], False),
        (gpt_oss_gate, False),
    ],
)
def test_plain_experts_are_told_from_others_by_what_they_answer(activate, plain: bool) -> None:
    assert lowbit_cpu.is_plain(ExpertMath(activate=activate), F) is plain


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


def test_a_cache_that_cannot_be_used_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    asked = []

    def compile(*, cache: bool):
        asked.append(cache)
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return print

    with caplog.at_level(logging.INFO):
        assert lowbit_cpu._compiled(compile) is print
    assert asked == [True, False] and "no locator available" in caplog.text


def test_machine_code_is_kept_on_disk_and_follows_its_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A changed source is not answered by machine code that an earlier process left on the disk."""
    pytest.importorskip("numba", reason="the kernel's cache is numba's")
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    kernels = Path(lowbit_cpu.__file__).parent
    for name in ("lowbit_format.py", "lowbit_numba.py", "lowbit_vector.py"):
        shutil.copy(kernels / name, tmp_path)

    def hits() -> int:
        """Compile as a new process would, with an empty body in place of the slow one."""
        spec = importlib.util.spec_from_file_location("copied_kernel", tmp_path / "lowbit_numba.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "copied_kernel", module)
        spec.loader.exec_module(module)
        module._linear = module.njit(lambda x, R, matrix, out, table: None)
        return sum(module.compile_linear(cache=True).stats.cache_hits.values())

    assert hits() == 0
    assert list(tmp_path.rglob("*.nbc"))
    assert hits() == 1
    vector = tmp_path / "lowbit_vector.py"
    vector.write_text(vector.read_text() + "\n# changed\n")
    assert hits() == 0
