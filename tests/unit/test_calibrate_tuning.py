"""Tuning on builtin:tiny with a few short steps: the divergence falls, formats stay, latents are what is packed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from buddymoe_ray.calibrate.rounding import quantise_expert_plain
from buddymoe_ray.calibrate.tuning import TuneSettings, fits, tune
from buddymoe_ray.calibrate.tuning_latent import LatentMatrix
from buddymoe_ray.errors import ConfigError
from buddymoe_ray.kernels.lowbit import LowbitFormat, PackedMatrix, dequantise
from buddymoe_ray.kernels.reference import ExpertMath
from buddymoe_ray.models import tiny
from buddymoe_ray.models.load import LoadedModel, load_model
from buddymoe_ray.models.reference import reference_model

FORMAT = LowbitFormat(bits=2)


def _swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up


MATH = ExpertMath(activate=_swiglu)
Layers = list[list[dict[str, Tensor]]]


def _dequantised(record: dict[str, Tensor], name: str, fmt: LowbitFormat) -> Tensor:
    return dequantise(PackedMatrix(**{part: record[f"{name}.{part}"] for part in ("codes", "scales", "base")}), fmt)


def _random_record(bits: int) -> tuple[Tensor, dict[str, Tensor], LowbitFormat]:
    fmt = LowbitFormat(bits=bits)
    W = torch.randn(12, 64, generator=torch.Generator().manual_seed(bits)) / 8
    math = ExpertMath(activate=functional.relu, gated=False)
    return W, quantise_expert_plain({"up_proj": W, "down_proj": W}, fmt, math), fmt


# --- one matrix


@pytest.mark.parametrize("bits", (2, 3, 4, 8))
def test_latent_starts_at_the_record_and_packs_what_it_computes(bits: int) -> None:
    W, record, fmt = _random_record(bits)
    latent = LatentMatrix(W, record, "up_proj", fmt)
    started = _dequantised(record, "up_proj", fmt)
    assert torch.allclose(latent(), started, rtol=1e-5, atol=1e-7)
    with torch.no_grad():
        latent.level_NK += torch.randn(latent.level_NK.shape, generator=torch.Generator().manual_seed(1)) * 2
        latent.step_NG += torch.randn(latent.step_NG.shape, generator=torch.Generator().manual_seed(2)) * 30
    packed = latent.packed("up_proj")
    assert {name: (t.shape, t.dtype) for name, t in packed.items()} == {
        name: (t.shape, t.dtype) for name, t in record.items() if name.startswith("up_proj")
    }
    assert torch.allclose(_dequantised(packed, "up_proj", fmt), latent(), rtol=1e-5, atol=1e-7)
    assert not torch.allclose(latent(), started, atol=1e-3)


def test_gradients_reach_codes_and_scales() -> None:
    W, record, fmt = _random_record(3)
    latent = LatentMatrix(W, record, "up_proj", fmt)
    (latent().square().sum() / 2).backward()
    assert latent.level_NK.grad is not None and latent.step_NG.grad is not None
    scale = latent().detach().abs().view(12, 2, 32).amin(dim=2)
    assert float(latent.level_NK.grad.abs().max()) > 0
    assert bool((latent.step_NG.grad < 0).all()), f"a longer step must shrink the weights, scales {scale}"


def test_descent_recovers_the_matrix_it_is_pulled_to() -> None:
    """Squared error against another matrix: each weight ends on one of its two nearest levels, mostly the nearest."""
    W, record, fmt = _random_record(4)
    other = W + torch.randn(W.shape, generator=torch.Generator().manual_seed(9)) / 16
    latent = LatentMatrix(W, record, "up_proj", fmt)
    optimiser = torch.optim.Adam([{"params": [latent.level_NK], "lr": 0.05}, {"params": [latent.step_NG], "lr": 0.3}])
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.01, total_iters=150)
    for _ in range(150):
        optimiser.zero_grad()
        loss = (latent() - other).square().sum()
        loss.backward()
        optimiser.step()
        latent.tidy()
        schedule.step()
    math = ExpertMath(activate=functional.relu, gated=False)
    direct = _dequantised(quantise_expert_plain({"up_proj": other, "down_proj": other}, fmt, math), "up_proj", fmt)
    start = _dequantised(record, "up_proj", fmt)
    error, least, first = (float((made - other).square().sum()) for made in (latent().detach(), direct, start))
    assert error < 2.5 * least and error < 0.2 * first


# --- the whole model


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model(tiny.path(), dtype=torch.float32)


@pytest.fixture(scope="module")
def exact(loaded: LoadedModel) -> Layers:
    layers = reference_model(tiny.path()).model.layers
    names = ("gate_up_proj", "down_proj")
    return [
        [{name: getattr(layer.mlp.experts, name)[e].detach() for name in names} for e in range(32)] for layer in layers
    ]


@pytest.fixture(scope="module")
def records(exact: Layers) -> Layers:
    return [[quantise_expert_plain(weights, FORMAT, MATH) for weights in layer] for layer in exact]


@pytest.fixture(scope="module")
def windows() -> Tensor:
    return torch.randint(5, 4000, (6, 48), generator=torch.Generator().manual_seed(0))


def _tune(
    loaded: LoadedModel, exact: Layers, records: Layers, windows: Tensor, settings: TuneSettings
) -> tuple[Layers, list[float]]:
    kls: list[float] = []
    formats = [[FORMAT] * len(layer) for layer in records]
    made = tune(loaded, exact, records, formats, MATH, windows, settings, report=lambda _, kl: kls.append(kl))
    return made, kls


def test_divergence_falls_and_formats_stay(
    loaded: LoadedModel, exact: Layers, records: Layers, windows: Tensor
) -> None:
    settings = TuneSettings(steps=12, batch=6, rate=0.05, scale_rate=0.3)
    made, kls = _tune(loaded, exact, records, windows, settings)
    assert len(kls) == 12 and kls[-1] < 0.8 * kls[0]
    for before, after in zip(records, made, strict=True):
        for old, new in zip(before, after, strict=True):
            assert {k: (t.shape, t.dtype) for k, t in old.items()} == {k: (t.shape, t.dtype) for k, t in new.items()}
    # what was packed is what the last step left: a second call starts from there
    _, again = _tune(loaded, exact, made, windows, TuneSettings(steps=1, batch=6))
    assert again[0] < 0.8 * kls[0]


def test_no_steps_change_no_weight(loaded: LoadedModel, exact: Layers, records: Layers, windows: Tensor) -> None:
    made, kls = _tune(loaded, exact, records, windows, TuneSettings(steps=0))
    assert kls == []
    for name in ("gate_up_proj", "down_proj"):
        old, new = (_dequantised(layers[1][7], name, FORMAT) for layers in (records, made))
        assert torch.allclose(old, new, rtol=1e-5, atol=1e-7)


def test_same_seed_same_records(loaded: LoadedModel, exact: Layers, records: Layers, windows: Tensor) -> None:
    settings = TuneSettings(steps=2, batch=2, rate=0.05, full_share=0.5, seed=3)
    one, other = (_tune(loaded, exact, records, windows, settings) for _ in range(2))
    assert one[1] == other[1]
    for name, tensor in one[0][2][5].items():
        assert torch.equal(tensor, other[0][2][5][name])


def test_nearly_all_exact_experts_leave_nearly_no_divergence(
    loaded: LoadedModel, exact: Layers, records: Layers, windows: Tensor
) -> None:
    _, kls = _tune(loaded, exact, records, windows, TuneSettings(steps=1, batch=2, full_share=0.97))
    _, all_kls = _tune(loaded, exact, records, windows, TuneSettings(steps=1, batch=2))
    assert 0 <= kls[0] < 0.3 * all_kls[0]


def test_small_models_fit(loaded: LoadedModel) -> None:
    assert fits(loaded)


@pytest.mark.parametrize(
    ("settings", "message"), [({"steps": -1}, "steps"), ({"batch": 0}, "batch"), ({"full_share": 1.0}, "full_share")]
)
def test_settings_that_mean_nothing(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TuneSettings(**settings)  # type: ignore[arg-type]
