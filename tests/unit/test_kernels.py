"""The reference kernel against transformers' own eager experts, and the sum's independence of arrival order."""

import pytest
import torch
from torch.nn import functional

from buddymoe_ray.kernels import ExpertMath, UpcastScratch, combine, expert_forward

D, F = 16, 24


def silu_gate(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, dim=-1)
    return functional.silu(gate) * up


def weights(seed: int, transposed: bool, bias: bool) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    made = {"gate_up_proj": torch.randn(2 * F, D, generator=rng), "down_proj": torch.randn(D, F, generator=rng)}
    if transposed:
        made = {name: w.T.contiguous() for name, w in made.items()}
    if bias:
        made |= {
            "gate_up_proj_bias": torch.randn(2 * F, generator=rng),
            "down_proj_bias": torch.randn(D, generator=rng),
        }
    return made


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_expert_forward_is_the_textbook_formula(transposed: bool, bias: bool) -> None:
    w = weights(1, transposed, bias)
    x = torch.randn(5, D, generator=torch.Generator().manual_seed(2))
    first, second = (w[n].T if transposed else w[n] for n in ("gate_up_proj", "down_proj"))
    b1, b2 = (w.get(f"{n}_bias", torch.zeros(())) for n in ("gate_up_proj", "down_proj"))
    expected = silu_gate(x @ first.T + b1) @ second.T + b2
    got = expert_forward(x, w, ExpertMath(activate=silu_gate, bias=bias, transposed=transposed))
    torch.testing.assert_close(got, expected)


def test_ungated_experts_and_post_norm() -> None:
    w = {"up_proj": torch.randn(F, D), "down_proj": torch.randn(D, F)}
    x = torch.randn(3, D)
    math = ExpertMath(activate=functional.relu, gated=False, post_norm=lambda y: y * 2)
    torch.testing.assert_close(expert_forward(x, w, math), 2 * (functional.relu(x @ w["up_proj"].T) @ w["down_proj"].T))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_do_not_depend_on_where_the_weights_lie(dtype: torch.dtype) -> None:
    """The bits of an expert's output are the same from any slot of a byte pool."""
    w = {name: t.to(dtype) for name, t in weights(3, False, False).items()}
    x = torch.randn(7, D).to(dtype)
    pool = torch.empty(4, 64 * 1024, dtype=torch.uint8)
    outputs = []
    for slot in range(4):
        views, at = {}, 64 * slot
        for name, t in w.items():
            n = t.numel() * t.element_size()
            view = pool[slot, at : at + n].view(dtype).view(t.shape)
            view.copy_(t)
            views[name], at = view, at + (n + 63) // 64 * 64
        outputs.append(expert_forward(x, views, ExpertMath(activate=silu_gate)))
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


def test_combine_is_a_weighted_sum_in_slot_order() -> None:
    y = torch.randn(6, 4, D)
    g = torch.rand(6, 4)
    expected = sum(y[:, k] * g[:, k, None] for k in range(4))
    torch.testing.assert_close(combine(y, g), expected)


def test_upcast_is_exact_and_counts_its_bytes() -> None:
    shapes = {"gate_up_proj": (2 * F, D), "down_proj": (D, F)}
    w = {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}
    scratch = UpcastScratch(shapes, stored=torch.bfloat16, compute=torch.float32, device=torch.device("cpu"))
    wide = scratch.widen(w)
    assert all(wide[name].dtype is torch.float32 and torch.equal(wide[name].bfloat16(), w[name]) for name in w)
    nbytes = UpcastScratch.nbytes_for(shapes, stored=torch.bfloat16, compute=torch.float32)
    assert nbytes == max(t.numel() for t in w.values()) * 4 == wide["gate_up_proj"].untyped_storage().nbytes()
    assert wide["gate_up_proj"].data_ptr() == wide["down_proj"].data_ptr(), "matrices share one buffer"
    assert UpcastScratch.nbytes_for(shapes, stored=torch.float32, compute=torch.float32) == 0
    same = UpcastScratch(shapes, stored=torch.bfloat16, compute=torch.bfloat16, device=torch.device("cpu"))
    assert same.widen(w) is w
