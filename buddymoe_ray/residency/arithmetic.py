"""The arithmetic of an engine's experts: which kernels compute what its checkpoint stores, on its device.

Builds, decides nothing else. Neighbours: `tier` gives it to the blocks, `kernels` computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from buddymoe_ray.device import Device
from buddymoe_ray.errors import ConfigError
from buddymoe_ray.kernels import (
    ExpertLayer,
    ExpertMath,
    LowbitFormat,
    TritonExperts,
    UpcastScratch,
    coded_forward,
    combine_kernel,
    expert_forward,
    interpreted,
    lowbit_forward,
    prepare_lowbit,
)
from buddymoe_ray.models.load import LoadedModel
from buddymoe_ray.moe import ExpertCompute, OnDevice, OneByOne, OneCall, WaveCompute
from buddymoe_ray.types import ExpertLayout

__all__ = ["cpu_layers", "expert_computes", "layer_waves", "stored_dtype", "stored_shapes"]


def layer_waves(
    loaded: LoadedModel,
    maths: list[ExpertMath],
    packed: LowbitFormat | None,
    threads: int,
    device: Device,
    *,
    complete: bool,
) -> Sequence[tuple[WaveCompute, WaveCompute]]:
    """What computes every layer's waves in decode, and in prompts: on a device apart kernels that find experts by
    address, and one expert after the other; in the CPU's own memory one call. One after the other too where those do
    not know what experts compute. `complete`: no expert is ever missing. Raises ConfigError."""
    if loaded.device.type == "cpu":
        combine_kernel()  # now, and not in the first step
    counts = loaded.layout.experts_per_layer
    layers = None if device.apart else cpu_layers(loaded, maths, packed, threads)
    if layers is not None:
        waves = [OneCall(layer, experts) for layer, experts in zip(layers, counts, strict=True)]
        return [(wave, wave) for wave in waves]
    prompts = [OneByOne(compute) for compute in _by_expert(loaded, maths, packed)]
    stored, coded = loaded.layout.tensors, loaded.layout.coded
    if device.apart:
        _check_triton(device)
    if not device.apart or not all(TritonExperts.covers(stored, packed, math, coded) for math in maths):
        return [(wave, wave) for wave in prompts]
    made = partial(TritonExperts, layout=stored, fmt=packed, coded=coded)
    decoding = [OnDevice(made(math=math), count, complete=complete) for math, count in zip(maths, counts, strict=True)]
    return list(zip(decoding, prompts, strict=True))


def _check_triton(device: Device) -> None:
    """Raise ConfigError where Triton is not there, or would run its kernels elsewhere."""
    try:
        found = interpreted()
    except ModuleNotFoundError as error:
        raise ConfigError("triton is missing, must be installed. hint: pip install 'buddymoe-ray[gpu]'") from error
    wanted = device.torch.type == "cpu"
    if found != wanted:
        raise ConfigError(
            f"TRITON_INTERPRET is {int(found)} in this process, must be {int(wanted)} for the device. hint: set it, or "
            "unset it, before the process begins, or choose another device"
        )


def expert_computes(loaded: LoadedModel, maths: list[ExpertMath], packed: LowbitFormat | None) -> list[ExpertCompute]:
    """The arithmetic of every layer's experts, for one thread: all layers share one scratch."""
    layers = cpu_layers(loaded, maths, packed, 1)
    return _by_expert(loaded, maths, packed) if layers is None else [layer.expert for layer in layers]


def cpu_layers(
    loaded: LoadedModel, maths: list[ExpertMath], packed: LowbitFormat | None, threads: int
) -> list[ExpertLayer] | None:
    """Every layer's experts in the CPU's machine code, made here and not in the first step; None where that does not
    know what they compute."""
    stored, coded = loaded.layout.tensors, loaded.layout.coded
    if not all(ExpertLayer.covers(stored, packed, math, coded) for math in maths):
        return None
    made = partial(ExpertLayer, layout=stored, fmt=packed, dtype=loaded.compute_dtype, threads=threads, coded=coded)
    return [made(math=math) for math in maths]


def _by_expert(loaded: LoadedModel, maths: list[ExpertMath], packed: LowbitFormat | None) -> list[ExpertCompute]:
    """Packed experts, quantised ones, or plain ones widened to the compute dtype one matrix at a time."""
    if packed is not None:
        if loaded.device.type == "cpu":
            prepare_lowbit(packed, loaded.compute_dtype)
        return [partial(lowbit_forward, fmt=packed, math=math) for math in maths]
    if loaded.layout.coded:
        return [partial(coded_forward, coded=loaded.layout.coded, math=math) for math in maths]
    shapes, stored = stored_shapes(loaded.layout), stored_dtype(loaded.layout)
    scratch = UpcastScratch(shapes, stored=stored, compute=loaded.compute_dtype, device=loaded.device)

    def widened(math: ExpertMath) -> ExpertCompute:
        return lambda x_RD, tensors: expert_forward(x_RD, scratch.widen(tensors), math)

    return list(map(widened, maths))


def stored_shapes(layout: ExpertLayout) -> dict[str, tuple[int, ...]]:
    """Of an expert's tensors in a slot."""
    return {tensor.name: tensor.shape for tensor in layout.tensors}


def stored_dtype(layout: ExpertLayout) -> torch.dtype:
    """Of an expert's first tensor in a slot."""
    return getattr(torch, layout.tensors[0].dtype)
