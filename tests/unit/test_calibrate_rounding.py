"""Rounding against brute force and against its own invariants, on inputs as uneven as a real model's."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, product

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import pad

from buddymoe_ray.calibrate.rounding import (
    ExpertRows,
    Metric,
    Rounded,
    dequantise_rounded,
    moment,
    quantise_expert,
    quantise_expert_plain,
    round_in,
    round_plain,
    unbiased,
)
from buddymoe_ray.kernels.lowbit import (
    LowbitFormat,
    dequantise,
    lowbit_forward,
    pack,
    packed_parts,
    record_tensors,
    unpack,
)
from buddymoe_ray.kernels.lowbit_format import PARTS, groups_of, scales_of
from buddymoe_ray.kernels.reference import ExpertMath, expert_forward
from buddymoe_ray.kernels.rounding import base_for, nearest_code, round_nearest, scale_of
from buddymoe_ray.kernels.rounding_cpu import pack_plain

BITS = (1, 2, 3, 4, 8)


def _swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up


def _inputs(rows: int, width: int, seed: int = 0) -> Tensor:
    """Correlated rows; a few inputs are ten times as active as the rest."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator) / width**0.5 + torch.eye(width)
    x = torch.randn(rows, width, generator=generator) @ mix
    x[:, :: width // 4] *= 10
    return x


def round_compensated(W: Tensor, H: Tensor, fmt: LowbitFormat, *, passes: int = 4, damping: float = 0.01) -> Rounded:
    return round_in(W, Metric.of(H, damping=damping), fmt, passes=passes)


def weighted_error(W: Tensor, rounded: Rounded, H: Tensor, fmt: LowbitFormat) -> float:
    """tr(E H E^T): the mean squared norm of the output error on inputs whose second moment is H."""
    E = W - dequantise_rounded(rounded, fmt)
    return float(((E @ H) * E).sum())


def _matrix(N: int, K: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(N, K, generator=generator) * torch.rand(N, 1, generator=generator).add(0.1)


def _check(rounded: Rounded, W: Tensor, fmt: LowbitFormat) -> None:
    N, K = W.shape
    assert rounded.q.shape == (N, K) and rounded.q.dtype == torch.uint8 and int(rounded.q.max()) < fmt.levels
    assert rounded.code.shape == (N, groups_of(K)) and rounded.code.dtype == torch.uint8
    assert rounded.base.shape == (16 if fmt.scale_bits == 4 else 1,) and bool((rounded.base > 0).all())
    assert int(rounded.code.max()) < 1 << fmt.scale_bits


# --- plain


@pytest.mark.parametrize("bits", (4, 8))
def test_nearest_codes_are_the_nearest_under_their_scale(bits: int) -> None:
    fmt, W = LowbitFormat(bits=bits), _matrix(12, 96)
    rounded = round_nearest(W, fmt)
    _check(rounded, W, fmt)
    scale = scales_of(rounded.base)[rounded.code.long()]
    levels = torch.arange(fmt.levels) - (fmt.levels - 1) / 2
    every = scale.repeat_interleave(32, dim=1).unsqueeze(-1) * levels
    nearest = (every - W.unsqueeze(-1)).abs().amin(dim=-1)
    assert torch.allclose((dequantise_rounded(rounded, fmt) - W).abs(), nearest, atol=1e-5)


@pytest.mark.parametrize("bits", BITS)
def test_plain_copies_are_as_large_as_their_matrix(bits: int) -> None:
    """Of every group `<w, copy>` is `<w, w>`, to about a step of the scale codes; the codes know the scale that is
    stored, so that the error is that of least squares and what the larger scale adds."""
    fmt, W = LowbitFormat(bits=bits), _matrix(12, 72)
    if bits == 1:  # a ring is of 16 outputs, and those that are larger choose for all
        W = torch.randn(16, 96, generator=torch.Generator().manual_seed(1))
    rounded, least = round_plain(W, fmt), round_nearest(W, fmt)
    ends = (0, 64)
    copy, size = dequantise_rounded(rounded, fmt), lambda other: [(W * other)[:, at : at + 32].sum(1) for at in ends]
    step = 0.03 if fmt.scale_bits == 8 else float(rounded.base[0] / rounded.base[1]) - 1
    for kept, wanted in zip(size(copy), size(W), strict=True):
        torch.testing.assert_close(kept, wanted, rtol=step, atol=0)
    error = lambda copied: float((W - dequantise_rounded(copied, fmt)).square().sum())  # noqa: E731
    assert error(rounded) < {1: 1.6, 2: 1.2, 3: 1.2}.get(bits, 1.05) * error(least)
    if bits < 4:
        shrunk = float((W * dequantise_rounded(least, fmt)).sum() / W.square().sum())
        assert shrunk < 0.985 < float((W * copy).sum() / W.square().sum())


def _left(W: Tensor, q: Tensor, fmt: LowbitFormat) -> Tensor:
    """What the best scale leaves of each group's squares, as a share `[N, G]`."""
    groups = [pad(part, (0, -W.shape[1] % 32)).unflatten(1, (-1, 32)) for part in (W.float(), q - (fmt.levels - 1) / 2)]
    ww, wu, uu = ((one * two).sum(-1) for one, two in ((groups[0], groups[0]), groups, (groups[1], groups[1])))
    return 1 - wu.square() / (ww * uu)


@settings(max_examples=30)
@given(
    bits=st.sampled_from(BITS),
    N=st.integers(1, 40),
    K=st.integers(1, 100),
    half=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_machine_code_packs_what_the_spec_does(bits: int, N: int, K: int, half: bool, seed: int) -> None:
    """All but where two scales or codes are equally near; and a matrix that is not contiguous."""
    fmt, W = LowbitFormat(bits=bits), _matrix(K, N, seed).T
    W = W.bfloat16() if half else W
    ours, spec = pack_plain(W, fmt), pack(*round_plain(W, fmt), fmt)
    assert [getattr(ours, part).shape for part in PARTS] == [getattr(spec, part).shape for part in PARTS]
    (q, code), (q_spec, code_spec) = unpack(ours, fmt), unpack(spec, fmt)
    torch.testing.assert_close(ours.base, spec.base, rtol=1e-5, atol=0)
    other = code != code_spec
    assert float((q != q_spec).float().mean()) < 0.01 + 1 / len(q) and int(other.sum()) <= 1 + 0.02 * other.numel()
    far = (code.int() - code_spec.int()).abs() > 1  # another try was as good
    assert int((q.int() - q_spec.int()).abs().max()) <= (3 if far.any() else 1)
    torch.testing.assert_close(_left(W, q, fmt)[far], _left(W, q_spec, fmt)[far], rtol=0, atol=0.03)
    q_padded, _ = unpack(replace(ours, sizes=torch.empty(-(-N // 16) * 16, -(-K // 32) * 32, 0)), fmt)
    assert not q_padded[N:].any() and not q_padded[:, K:].any(), "padding has code 0"


@pytest.mark.parametrize(("bits", "share"), [(1, 0.42), (2, 0.095), (3, 0.029), (4, 0.013), (8, 1e-4)])
def test_plain_error_is_near_the_best_for_normal_weights(bits: int, share: float) -> None:
    W = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    fmt = LowbitFormat(bits=bits)
    assert float((W - dequantise_rounded(round_plain(W, fmt), fmt)).square().mean()) < share


@pytest.mark.parametrize("bits", (2, 3, 4))
def test_plain_scales_are_near_those_of_a_dense_grid(bits: int) -> None:
    fmt, W = LowbitFormat(bits=bits), _matrix(64, 32)
    ours = (W - dequantise_rounded(round_plain(W, fmt), fmt)).square().sum(dim=1)
    best = torch.full_like(ours, float("inf"))
    half = (fmt.levels - 1) / 2
    for share in torch.linspace(0.3, 1.2, 200):
        scale = share * W.abs().amax(dim=1, keepdim=True) / half
        code = (W / scale + half).round().clamp(0, fmt.levels - 1)
        best = best.minimum((W - scale * (code - half)).square().sum(dim=1))
    assert float(ours.sum()) < 1.2 * float(best.sum())


def test_plain_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    fmt, W = LowbitFormat(bits=3), _matrix(50, 64)
    whole = round_plain(W, fmt)
    monkeypatch.setattr("buddymoe_ray.kernels.rounding.CHUNK", 64 * 7)
    cut = round_plain(W, fmt)
    assert torch.equal(whole.q, cut.q) and torch.equal(whole.code, cut.code) and torch.equal(whole.base, cut.base)


@pytest.mark.parametrize(("octaves", "step"), [(0.0, 1 / 24), (3.0, 0.2), (20.0, 0.4)])
def test_sixteen_scales_go_as_far_apart_as_a_matrix_needs(octaves: float, step: float) -> None:
    """By even steps, not finer than those of a byte; groups that are less than a 64th of the largest have its 64th."""
    fmt, scale = LowbitFormat(bits=2), 3 * 2 ** -torch.linspace(0, octaves, 40).view(8, 5)
    base = base_for(scale, fmt)
    torch.testing.assert_close(-base.log2().diff(), torch.full((15,), step))
    found = scale_of(nearest_code(scale, base), base)
    assert float(base[0]) == 3 and float((found / scale.clamp_min(3 / 64)).log2().abs().max()) <= step / 2 + 1e-5


def test_importance_favours_the_inputs_that_matter() -> None:
    fmt, W = LowbitFormat(bits=2), _matrix(64, 64)
    importance = torch.ones(64)
    importance[::8] = 1000
    matters = lambda rounded: float(((W - dequantise_rounded(rounded, fmt)).square() * importance).sum())  # noqa: E731
    assert matters(round_nearest(W, fmt, importance_K=importance)) < matters(round_nearest(W, fmt))


@pytest.mark.parametrize("bits", BITS)
def test_zero_and_constant_matrices(bits: int) -> None:
    fmt = LowbitFormat(bits=bits)
    for value in (0.0, 0.37):
        W = torch.full((16, 32), value)
        for rounded in (round_plain(W, fmt), round_compensated(W, torch.eye(32), fmt)):
            _check(rounded, W, fmt)
            error = dequantise_rounded(rounded, fmt) - W
            if value and fmt.trellis:  # tables are of normal weights
                assert float(error.square().mean()) <= {1: 0.06, 2: 0.02, 3: 0.005}[bits]
            else:
                assert float(error.abs().max()) <= 0.01


def test_bfloat16_weights_are_rounded_as_their_float32_values() -> None:
    W, fmt = _matrix(8, 64).bfloat16(), LowbitFormat(bits=3)
    one, other = round_plain(W, fmt), round_plain(W.float(), fmt)
    assert torch.equal(one.q, other.q) and torch.equal(one.code, other.code)


# --- compensated


@pytest.mark.parametrize("bits", BITS)
def test_compensation_lowers_the_output_error(bits: int) -> None:
    fmt, W, H = LowbitFormat(bits=bits), _matrix(48, 96), moment(_inputs(2000, 96))
    plain, ours = round_plain(W, fmt), round_compensated(W, H, fmt)
    _check(ours, W, fmt)
    # 8 bits: steps of a scale code (3 %) are coarser than those of a weight, and little is left to gain
    assert weighted_error(W, ours, H, fmt) < (0.5 if bits < 8 else 1.0) * weighted_error(W, plain, H, fmt)


def test_some_rows_speak_for_all() -> None:
    """Of many outputs a share is tried; the scales of one that is fifty times as large are known all the same."""
    fmt, W, H = LowbitFormat(bits=3), _matrix(640, 96), moment(_inputs(2000, 96))
    W[1] *= 50
    ours, plain = round_compensated(W, H, fmt, passes=0), round_plain(W, fmt)
    errors = []
    for rounded in (ours, plain):
        E = W - dequantise_rounded(rounded, fmt)
        errors.append(((E @ H) * E).sum(dim=1))
    for rows in (slice(0, 1), slice(1, 2), slice(2, None)):
        assert float(errors[0][rows].sum()) < 0.7 * float(errors[1][rows].sum())


def test_widths_share_what_is_known_of_the_rows() -> None:
    math, weights = _expert(64, 32)
    shared = ExpertRows(weights, _inputs(300, 64), torch.ones(300), math)
    for fmt in (
        *(LowbitFormat(bits=bits) for bits in BITS),
        LowbitFormat(bits=2, down=4),
        LowbitFormat(bits=4, down=8),
    ):
        alone = ExpertRows(weights, _inputs(300, 64), torch.ones(300), math)
        ours, spec = (quantise_expert(rows, fmt) for rows in (shared, alone))
        assert all(torch.equal(ours[name], spec[name]) for name in spec)


@pytest.mark.parametrize(
    ("narrow", "between", "wide"),
    [("lowbit2", "lowbit24", "lowbit4"), ("lowbit4", "lowbit48", "lowbit8"), ("lowbit1", "lowbit12", "lowbit2")],
)
def test_the_second_projection_may_have_more_bits(narrow: str, between: str, wide: str) -> None:
    math, weights = _expert(64, 32)
    x, fresh = (_inputs(1500, 64)[at::2] / 4 for at in (0, 1))
    exact, rows = expert_forward(fresh, weights, math), ExpertRows(weights, x, torch.ones(len(x)), math)
    fmts = [LowbitFormat.of_kind(kind) for kind in (narrow, between, wide)]
    records = [quantise_expert(rows, fmt) for fmt in fmts]
    errors = [
        float((exact - lowbit_forward(fresh, record, fmt, math)).square().sum())
        for record, fmt in zip(records, fmts, strict=True)
    ]
    assert errors[2] < errors[1] < 0.7 * errors[0], "most of the error is the second projection's"
    assert torch.equal(records[1][f"{math.first}.codes"], records[0][f"{math.first}.codes"])
    plain = [quantise_expert_plain(weights, fmt, math) for fmt in fmts]
    for name, other in ((math.first, plain[0]), ("down_proj", plain[2])):
        assert torch.equal(plain[1][f"{name}.codes"], other[f"{name}.codes"])


def test_the_moment_measures_the_output_error() -> None:
    fmt, W, x = LowbitFormat(bits=3), _matrix(16, 64), _inputs(300, 64)
    weight = torch.rand(300, generator=torch.Generator().manual_seed(3))
    rounded = round_plain(W, fmt)
    outputs = (x @ (W - dequantise_rounded(rounded, fmt)).T).square().sum(dim=1)
    wanted = float((outputs * weight**2).sum() / (weight**2).sum())
    assert weighted_error(W, rounded, moment(x, weight), fmt) == pytest.approx(wanted, rel=1e-4)


def test_each_pass_lowers_the_error() -> None:
    fmt, W, H = LowbitFormat(bits=2), _matrix(48, 96), moment(_inputs(2000, 96))
    damped = H + 0.01 * H.diagonal().mean() * torch.eye(96)
    errors = [weighted_error(W, round_compensated(W, H, fmt, passes=n), damped, fmt) for n in (0, 1, 2, 4)]
    assert all(later <= before * (1 + 1e-5) for before, later in pairwise(errors))
    assert errors[-1] < 0.97 * errors[0]


@pytest.mark.parametrize("bits", (2, 3))
def test_unbiased_copies_answer_as_large_as_their_matrix(bits: int) -> None:
    fmt, W, x = LowbitFormat(bits=bits), _matrix(48, 96), _inputs(2000, 96)
    rounded = round_compensated(W, moment(x), fmt)
    for copy, low, high in ((rounded, 0.0, 0.9995), (unbiased(rounded, W, moment(x), fmt), 0.9999, 1.0001)):
        exact, ours = x @ W.T, x @ dequantise_rounded(copy, fmt).T
        assert low < float((exact * ours).sum() / exact.square().sum()) < high
    zero = torch.zeros(96, 96)
    assert unbiased(rounded, W, zero, fmt) == rounded, "no inputs say nothing"


def test_close_to_the_best_of_all_codes() -> None:
    """With the scale held, brute force over all 16^4 codes of a row cannot do much better."""
    fmt, W, H = LowbitFormat(bits=4), _matrix(6, 4), moment(_inputs(200, 4))
    ours = round_compensated(W, H, fmt, damping=1e-4, passes=6)
    codes = torch.tensor(list(product(range(16), repeat=4))).float() - 7.5
    scale = scales_of(ours.base)[ours.code.long()]
    best = total = 0.0
    for row in range(6):
        E = W[row] - scale[row] * codes
        best += float(((E @ H) * E).sum(dim=1).min())
        mine = W[row : row + 1] - dequantise_rounded(ours, fmt)[row : row + 1]
        total += float(((mine @ H) * mine).sum())
    assert best <= total * (1 + 1e-5) and total < 1.5 * best


def test_singular_and_bad_moments_fall_back_to_something_sane() -> None:
    fmt, W = LowbitFormat(bits=3), _matrix(16, 64)
    plain = (W - dequantise_rounded(round_plain(W, fmt), fmt)).square().sum()
    for H in (torch.zeros(64, 64), torch.full((64, 64), float("nan"))):
        rounded = round_compensated(W, H, fmt)
        _check(rounded, W, fmt)
        assert float((W - dequantise_rounded(rounded, fmt)).square().sum()) < 1.5 * float(plain)
    single = moment(_inputs(1, 64))  # rank one
    rounded = round_compensated(W, single, fmt)
    _check(rounded, W, fmt)
    assert weighted_error(W, rounded, single, fmt) <= weighted_error(W, round_plain(W, fmt), single, fmt)


@settings(max_examples=25)
@given(
    bits=st.sampled_from(BITS),
    N=st.integers(1, 9),
    K=st.sampled_from([8, 24, 32, 40, 72]),
    rows=st.integers(1, 200),
    seed=st.integers(0, 1000),
)
@example(bits=4, N=1, K=8, rows=1, seed=76)  # plain rounding without importance was the best
def test_any_shape(bits: int, N: int, K: int, rows: int, seed: int) -> None:
    fmt, W, H = LowbitFormat(bits=bits), _matrix(N, K, seed), moment(_inputs(rows, K, seed))
    rounded = round_compensated(W, H, fmt)
    _check(rounded, W, fmt)
    damped = H + 0.01 * H.diagonal().mean() * torch.eye(K)
    assert weighted_error(W, rounded, damped, fmt) <= weighted_error(W, round_plain(W, fmt), damped, fmt) * 1.02


# --- experts


def _expert(D: int, F: int, *, gated: bool = True, bias: bool = False) -> tuple[ExpertMath, dict[str, Tensor]]:
    activate = _swiglu if gated else functional.relu
    math = ExpertMath(activate=activate, gated=gated, bias=bias)
    weights = {math.first: _matrix(2 * F if gated else F, D, 5) / D**0.5, "down_proj": _matrix(D, F, 6)}
    if bias:
        weights[f"{math.first}_bias"] = torch.randn(len(weights[math.first])) / 4
        weights["down_proj_bias"] = torch.randn(D) / 4
    return math, weights


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("gated", "bias"), [(True, False), (False, True)])
def test_record_has_its_layout_and_computes_like_the_expert(bits: int, gated: bool, bias: bool) -> None:
    torch.manual_seed(0)
    math, weights = _expert(64, 32, gated=gated, bias=bias)
    fmt, x = LowbitFormat(bits=bits), _inputs(400, 64) / 4
    record = quantise_expert(ExpertRows(weights, x, torch.ones(400), math), fmt)
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    layout, _ = record_tensors(shapes, fmt, torch.float32)
    assert {t.name: (t.shape, t.dtype) for t in layout} == {
        name: (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")) for name, tensor in record.items()
    }
    exact, ours = expert_forward(x, weights, math), lowbit_forward(x, record, fmt, math)
    share = float((exact - ours).square().sum() / exact.square().sum())
    assert share < {1: 0.5, 2: 0.15, 3: 0.04, 4: 0.01, 8: 1e-4}[bits]


@pytest.mark.parametrize("bits", (2, 3, 4))
def test_experts_by_compensation_beat_plain_ones(bits: int) -> None:
    math, weights = _expert(64, 32)
    fmt, x = LowbitFormat(bits=bits), _inputs(1500, 64) / 4
    fresh = _inputs(4000, 64)[1500:] / 4
    weight = torch.rand(1500, generator=torch.Generator().manual_seed(2))
    exact = expert_forward(fresh, weights, math)
    error = lambda record: float((exact - lowbit_forward(fresh, record, fmt, math)).square().sum())  # noqa: E731
    assert error(quantise_expert(ExpertRows(weights, x, weight, math), fmt)) < 0.8 * error(
        quantise_expert_plain(weights, fmt, math)
    )


def test_few_rows_are_not_trusted() -> None:
    """With as many rows as inputs, compensation still beats plain rounding on fresh inputs."""
    math, weights = _expert(64, 32)
    fmt, fresh = LowbitFormat(bits=3), _inputs(3000, 64)[64:] / 4
    exact = expert_forward(fresh, weights, math)
    error = lambda record: float((exact - lowbit_forward(fresh, record, fmt, math)).square().sum())  # noqa: E731
    compensated = quantise_expert(ExpertRows(weights, _inputs(3000, 64)[:64] / 4, torch.ones(64), math), fmt)
    assert error(compensated) < error(quantise_expert_plain(weights, fmt, math))


def test_second_projection_is_rounded_for_what_the_rounded_first_one_gives() -> None:
    """Rounding each projection for exact inputs is worse."""
    math, weights = _expert(64, 32)
    fmt, x, one = LowbitFormat(bits=2), _inputs(1500, 64) / 4, torch.ones(1500)
    first = round_compensated(weights[math.first], moment(x), fmt)
    down = round_compensated(weights["down_proj"], moment(_swiglu(x @ weights[math.first].T)), fmt)
    apart = _swiglu(x @ dequantise_rounded(first, fmt).T) @ dequantise_rounded(down, fmt).T
    exact = expert_forward(x, weights, math)
    ours = lowbit_forward(x, quantise_expert(ExpertRows(weights, x, one, math), fmt), fmt, math)
    assert float((exact - ours).square().sum()) < float((exact - apart).square().sum())


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_experts_with_few_rows_stay_close_to_plain_ones(rows: int) -> None:
    math, weights = _expert(64, 32)
    fmt, x = LowbitFormat(bits=3), _inputs(500, 64) / 4
    record = quantise_expert(ExpertRows(weights, x[:rows], torch.ones(rows), math), fmt)
    exact, plain = expert_forward(x, weights, math), quantise_expert_plain(weights, fmt, math)
    error = lambda made: float((exact - lowbit_forward(x, made, fmt, math)).square().sum())  # noqa: E731
    assert error(record) < 4 * error(plain)
    if rows == 0:
        assert all(torch.equal(record[name], plain[name]) for name in plain)


def test_packed_record_is_what_was_rounded() -> None:
    math, weights = _expert(64, 32)
    fmt = LowbitFormat(bits=3)
    record = quantise_expert_plain(weights, fmt, math)
    for name in (math.first, "down_proj"):
        packed = packed_parts(record, name)
        assert torch.allclose(dequantise(packed, fmt), dequantise_rounded(round_plain(weights[name], fmt), fmt))
