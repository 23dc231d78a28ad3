"""Every family: we load what `from_pretrained` loads, tensor by tensor, and every expert's slot holds its bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import build_checkpoint
from slot_oracle import SlotBuffer
from tiny_configs import THOROUGH, TINY_CONFIGS
from transformers import PreTrainedModel

from buddymoe_ray.models.hf_loading import experts_modules, kept_in_float32
from buddymoe_ray.models.load import LoadedModel, load_model
from buddymoe_ray.models.reference import reference_model
from buddymoe_ray.types import ExpertKey

KEPT_IN_FLOAT32 = {"deepseek_v3", "dots1", "ernie4_5_moe", "glm4_moe"}
FIRST = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = [(name, dtype) for name in TINY_CONFIGS for dtype in (FIRST if name in THOROUGH else (torch.bfloat16,))]


def both(folder: Path, dtype: torch.dtype) -> tuple[LoadedModel, PreTrainedModel]:
    return load_model(folder, dtype=dtype), reference_model(folder, dtype)


@pytest.mark.parametrize(("model_type", "dtype"), DTYPES)
def test_dense_tensors_are_those_of_from_pretrained(model_type: str, dtype: torch.dtype, tmp_path: Path) -> None:
    loaded, stock = both(build_checkpoint(model_type, tmp_path, seed=4), dtype)
    experts = {f"{name}.{p}" for name, m in experts_modules(stock).items() for p, _ in m.named_parameters()}
    ours = {**dict(loaded.model.named_parameters()), **dict(loaded.model.named_buffers())}
    theirs = {**dict(stock.named_parameters()), **dict(stock.named_buffers())}
    assert ours.keys() == theirs.keys()
    for name in theirs.keys() - experts:
        assert ours[name].dtype is theirs[name].dtype, name
        assert torch.equal(ours[name], theirs[name]), name
    assert loaded.model.training is stock.training is False


@pytest.mark.parametrize("model_type", TINY_CONFIGS)
def test_every_slot_holds_its_experts_parameters(model_type: str, tmp_path: Path) -> None:
    """Routing may never name some expert in a short prompt; here each one is compared."""
    loaded, stock = both(build_checkpoint(model_type, tmp_path, seed=5, max_shard_size="70KB"), torch.float32)
    buffer = SlotBuffer(loaded.layout, seed=6)
    modules = list(experts_modules(stock).values())
    assert len(modules) == loaded.layout.layers
    for layer, module in enumerate(modules):
        names = [name for name, _ in module.named_parameters()]
        assert [t.name for t in loaded.layout.tensors] == names
        for name in names:
            stack = module.get_parameter(name)
            assert stack.shape[0] == loaded.layout.experts_per_layer[layer]
            for expert, want in enumerate(stack):
                assert torch.equal(buffer.tensor(ExpertKey(layer, expert), name), want), (layer, expert, name)


@pytest.mark.parametrize("model_type", THOROUGH)
def test_tensors_kept_in_float32_are_known_before_the_load(model_type: str, tmp_path: Path) -> None:
    loaded, _ = both(build_checkpoint(model_type, tmp_path), torch.bfloat16)
    kept = kept_in_float32(loaded.model)
    state = loaded.model.state_dict()
    assert bool(kept) == (model_type in KEPT_IN_FLOAT32)
    assert all(state[name].dtype is torch.float32 for name in kept)


@pytest.mark.parametrize("model_type", THOROUGH)
def test_flags_that_the_kernels_read_are_transformers_own(model_type: str, tmp_path: Path) -> None:
    loaded, stock = both(build_checkpoint(model_type, tmp_path), torch.float32)
    for ours, theirs in zip(loaded.experts, experts_modules(stock).values(), strict=True):
        flags = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "has_post_expert_norm")
        assert [getattr(ours, f) for f in flags] == [getattr(theirs, f) for f in flags]
        gate_up = torch.randn(3, loaded.layout.tensors[0].shape[-1 if ours.is_transposed else 0])
        assert torch.equal(ours._apply_gate(gate_up), theirs._apply_gate(gate_up))
