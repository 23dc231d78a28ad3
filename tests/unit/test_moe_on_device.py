"""What a layer on a device apart moves between host and device: each thing once, and what did not change not at all."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from test_kernels_coded import MATHS, filled, layout_of

from buddymoe_ray.cache import Lease, slot_views
from buddymoe_ray.cache.pool import SlotPool
from buddymoe_ray.engine.llm import LLM
from buddymoe_ray.kernels import TritonExperts
from buddymoe_ray.moe import Accesses, MoEBlock, OnDevice, block, rows, waves
from buddymoe_ray.types import CodeFormat, ExpertKey

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_a_wave_leaves_the_table_of_residents_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """And all waves of a layer have the same ids."""
    layout = layout_of(CodeFormat(codes="int8", block=(1, 0), scale="float32"), MATHS["silu"], 40)
    pool = SlotPool(layout, 2, torch.device(DEVICE))
    for slot in range(2):
        for matrix in layout.coded:
            filled(matrix, slot_views(pool.bytes_C[slot], layout), slot)
    kernels = TritonExperts(layout=layout.tensors, fmt=None, math=MATHS["silu"], coded=layout.coded)
    layer, uploads = OnDevice(kernels, 5, complete=False), Counter[str]()
    for module in (waves, rows):
        upload: Any = module.upload  # type: ignore[attr-defined]
        monkeypatch.setattr(
            module, "upload", lambda *args, name=module.__name__, upload=upload: uploads.update([name]) or upload(*args)
        )
    x_TD, ids = torch.randn(2, 64, device=DEVICE), np.array([[0, 3], [3, 0]])
    at_E = np.array([pool.address(0), -1, -1, pool.address(1), -1])
    whole, parts = (torch.zeros(4, 64, device=DEVICE) for _ in range(2))
    layer.resident(x_TD, torch.from_numpy(ids).to(DEVICE), at_E, whole)
    accesses = Accesses(ids, torch.device(DEVICE))
    for slot, expert in ((0, 0), (1, 3)):
        layer(x_TD, accesses, [Lease(ExpertKey(0, expert), slot, pool.generation[slot], pool)], parts)
    assert torch.equal(whole, parts) and bool((whole != 0).any())
    layer.resident(x_TD, torch.from_numpy(ids).to(DEVICE), at_E, whole)
    assert uploads == {waves.__name__: 1 + 2, rows.__name__: 1}


@pytest.mark.parametrize(("mode", "tensors"), [("exact", 1), ("fast", 2)])
def test_a_layer_waits_for_the_device_once(mode: str, tensors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a decode step that is not recorded; for the ids alone where no stand-in may answer."""
    asked, download = list[int](), block.download  # type: ignore[attr-defined]
    monkeypatch.setattr(block, "download", lambda *args: asked.append(len(args)) or download(*args))
    device = "cuda" if DEVICE == "cuda" else "interpret"
    with LLM("builtin:tiny", memory="50%", mode=mode, device=device, guard_share=0.0) as llm:
        llm.engine._runner.recorded = None
        llm.generate(["def add(a, b):\n"], max_tokens=3)
        assert asked == 2 * len(llm.engine._experts.blocks) * [tensors]


def test_ids_of_prompts_are_brought_to_the_host_once(monkeypatch: pytest.MonkeyPatch) -> None:
    brought, cpu = Counter[int](), torch.Tensor.cpu

    def counted(tensor: torch.Tensor) -> torch.Tensor:
        brought[tensor.data_ptr()] += tensor.dtype == torch.int64
        return cpu(tensor)

    called = MoEBlock.__call__

    def watched(self: MoEBlock, *args: Any, **kwargs: Any) -> torch.Tensor:
        with monkeypatch.context() as patched:
            patched.setattr(torch.Tensor, "cpu", counted)
            return called(self, *args, **kwargs)

    with LLM("builtin:tiny", memory="100%", batching="solo") as llm:
        monkeypatch.setattr(MoEBlock, "__call__", watched)
        llm.generate(["def add(a, b):\n"], max_tokens=1)
        layers = len(llm.engine._experts.blocks)
    assert brought.total() == layers, f"{brought.total()} times for {layers} layers"
