"""A decode step whose experts are all on the device asks the host nothing: it runs on `meta`, where nothing can be had.

What a GPU would be waited for raises there (a value, a shape that depends on values, a copy to the host), in our code
and in transformers'. Launches of kernels are left out, as nothing lies at an address.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from families import build_checkpoint
from torch import Tensor
from torch.overrides import TorchFunctionMode

from buddymoe_ray.cache import Glance
from buddymoe_ray.device.host_recording import HostRecording
from buddymoe_ray.engine import attention
from buddymoe_ray.engine.attention import ChunkRows
from buddymoe_ray.engine.kv import KVPool
from buddymoe_ray.engine.plain_forward import own_forward
from buddymoe_ray.engine.recorded import RecordedDecode, StepSizes
from buddymoe_ray.engine.runner import PackedRunner, probe
from buddymoe_ray.kernels import TritonExperts
from buddymoe_ray.kernels.sample import SamplingState, settings_of
from buddymoe_ray.kernels.triton import launching
from buddymoe_ray.models.expert_math import expert_math
from buddymoe_ray.models.experts_hook import attach
from buddymoe_ray.models.families import CARRYING, FAMILIES
from buddymoe_ray.models.load import load_model
from buddymoe_ray.moe import MoEBlock, OnDevice, Phase, StepState, StepTerms
from buddymoe_ray.types import SamplingParams

META = torch.device("meta")
PACKED = sorted(name for name, family in FAMILIES.items() if family.packed and name not in CARRYING)
BLOCKS = ((0, 1), (2,), (5, 3))  # of three sequences, of four tokens each; the last one's do not lie side by side
LENGTHS = (7, 2, 6)


class AllThere:
    """Of a cache, what a layer asks that misses nothing."""

    def glance(self, layer: int) -> Glance:
        return Glance(np.full(EXPERTS[layer], 64, np.int64), lambda ids: True)


EXPERTS: Sequence[int] = ()


class Uploads(TorchFunctionMode):
    """Counts what waits for a copy from the host."""

    def __init__(self) -> None:
        super().__init__()
        self.waits = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, where = getattr(func, "__name__", ""), (*args[1:], kwargs.get("device"))
        moves = name == "to" and META in where and args[0].device != META and not kwargs.get("non_blocking")
        self.waits += moves or (name in ("tensor", "as_tensor") and META in where)
        return func(*args, **kwargs)


def runner_on_meta(folder: Path, *, complete: bool) -> PackedRunner:
    """An engine's, whose experts are all on the device; `complete` says so."""
    global EXPERTS
    attention.register()
    loaded = load_model(folder, dtype=torch.float32, attn=attention.NAME)
    loaded = replace(loaded, model=loaded.model.to(META), device=META)
    EXPERTS, step, paged = loaded.layout.experts_per_layer, StepState(), attention.PagedAttention()
    maths = [expert_math(module, loaded.layout) for module in loaded.experts]

    def block(layer: int, _: object) -> MoEBlock:
        kernels = TritonExperts(layout=loaded.layout.tensors, fmt=None, math=maths[layer])
        compute = OnDevice(kernels, EXPERTS[layer], complete=complete)
        return MoEBlock(layer=layer, cache=AllThere(), compute=compute, step=step, standins=None)  # type: ignore[arg-type]

    attach(loaded.experts, block)
    attention.attach(loaded.model, paged)
    probe(loaded, step, use_cache=False)
    pool = KVPool(dict(sorted(paged.shapes.items())), blocks=8, block_size=4, dtype=torch.float32, device=META)
    paged.open(pool, apart=True)
    compute, blocks = own_forward(loaded.model), [module.__dict__["buddymoe_block"] for module in loaded.experts]
    twin: Any = SimpleNamespace(torch=META, record=HostRecording)
    sizes = StepSizes(experts_per_token=loaded.experts_per_token, columns=16, nobody=7)
    runner = PackedRunner(compute, paged, step, device=META)
    runner.recorded = RecordedDecode(compute, paged, step, blocks, device=twin, sizes=sizes)
    return runner


def decode(runner: PackedRunner, count: int) -> Tensor:
    rows = [ChunkRows(row=at, count=1, start=LENGTHS[at], blocks=BLOCKS[at]) for at in range(count)]
    return runner._forward(Phase.DECODE, rows, list(range(count)), list(LENGTHS[:count]), 0)


@pytest.mark.parametrize("model_type", PACKED)
def test_a_step_is_recorded_and_replayed(model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the Python of the model; where nothing is missing in one piece. So are those that are begun behind it,
    from tokens that are chosen there, greedily or not."""
    build_checkpoint(model_type, tmp_path)
    runner = runner_on_meta(tmp_path, complete=True)
    recorded = runner.recorded
    assert recorded is not None
    for count in (1, 3):
        rows = [ChunkRows(row=at, count=1, start=LENGTHS[at], blocks=BLOCKS[at]) for at in range(count)]
        for _ in range(2):
            logits_BV = recorded.decode(rows, list(range(count)), StepTerms())
            assert logits_BV is not None and len(logits_BV) == count
    assert sorted(recorded._steps) == [1, 4]
    monkeypatch.setattr("buddymoe_ray.engine.recorded.download", lambda *tensors: lambda: list(tensors))
    how = [SamplingParams(temperature=0.0), SamplingParams(temperature=0.7, top_k=5), SamplingParams(top_p=0.9)]
    states = [SamplingState(params=params, seed=1, token_ids=[4, 4], prompt_length=1) for params in how]
    tokens_B, stalled = torch.zeros(3, dtype=torch.int64, device=META), None
    with torch.inference_mode(), Uploads() as uploads:
        for settings in (None, settings_of(states, ahead=1)):
            begun = recorded._steps[4].begin(rows, tokens_B, None, settings, stalled)
            tokens_B, stalled = begun.tokens_B, begun.stalled
    assert tokens_B.shape == (3,) and tokens_B.device == META and uploads.waits == 0


@pytest.fixture(autouse=True)
def nothing_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "launch", lambda *_: None)


@pytest.mark.parametrize("model_type", PACKED)
def test_a_step_asks_the_host_nothing(model_type: str, tmp_path: Path) -> None:
    build_checkpoint(model_type, tmp_path)
    runner = runner_on_meta(tmp_path, complete=True)
    with Uploads() as uploads:
        for count in (1, 3):
            assert decode(runner, count).shape[0] == count
    assert uploads.waits == 0


def test_a_layer_that_must_know_who_is_named_is_seen(tmp_path: Path) -> None:
    build_checkpoint("qwen3_moe", tmp_path)
    runner = runner_on_meta(tmp_path, complete=False)
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        decode(runner, 1)
