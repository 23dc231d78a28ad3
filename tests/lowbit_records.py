"""Random low-bit records for tests: codes and scales drawn from a seed, laid out as on disk."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from buddymoe_ray.kernels import LowbitFormat, dequantise, pack, packed_parts, record_tensors
from buddymoe_ray.kernels.lowbit_format import groups_of
from buddymoe_ray.types import SlotTensor

Shapes = dict[str, tuple[int, ...]]


def silu_gate(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return functional.silu(gate) * up


def gelu_gate(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return functional.gelu(gate, approximate="tanh") * up


def relu2(x: Tensor) -> Tensor:
    return functional.relu(x).square()


def gpt_oss_gate(x: Tensor) -> Tensor:
    gate, up = x[..., ::2].clamp(max=7.0), x[..., 1::2].clamp(min=-7.0, max=7.0)
    return (up + 1) * gate * torch.sigmoid(gate * 1.702)


def random_codes(N: int, K: int, fmt: LowbitFormat, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    q_NK = torch.randint(0, fmt.levels, (N, K), generator=rng).to(torch.uint8)
    return q_NK, torch.randint(0, min(90, 1 << fmt.scale_bits), (N, groups_of(K)), generator=rng).to(torch.uint8)


def base_of(largest: float, fmt: LowbitFormat) -> Tensor:
    """The base of a matrix with scales up to `largest`; of 16 scales each step is of another length."""
    if fmt.scale_bits == 8:
        return torch.tensor([largest])
    return largest * 0.9 ** torch.arange(16.0).pow(1.25)


def views_of(record: Tensor, layout: tuple[SlotTensor, ...]) -> dict[str, Tensor]:
    return {t.name: record[t.offset : t.offset + t.nbytes].view(getattr(torch, t.dtype)).view(t.shape) for t in layout}


def random_records(
    shapes: Shapes, fmt: LowbitFormat, seed: int, count: int = 1
) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """`count` records in one byte tensor, and the views of each."""
    rng = torch.Generator().manual_seed(seed)
    layout, nbytes = record_tensors(shapes, fmt)
    records = torch.zeros(count * nbytes, dtype=torch.uint8)
    views = [views_of(record, layout) for record in records.split(nbytes)]
    for tensors in views:
        for name, shape in shapes.items():
            if len(shape) == 1:
                tensors[name].copy_(torch.randn(shape, generator=rng) * 0.1)
                continue
            own = fmt.of(name)
            packed = pack(*random_codes(*shape, own, rng), base_of(0.5 / own.levels, own), own)
            for part, tensor in packed.named(name).items():
                tensors[part].copy_(tensor)
    return records, views


def weights_of(tensors: dict[str, Tensor], shapes: Shapes, fmt: LowbitFormat) -> dict[str, Tensor]:
    """The same expert in float32, for the reference."""

    return {
        name: dequantise(packed_parts(tensors, name), fmt.of(name)) if len(shape) == 2 else tensors[name].float()
        for name, shape in shapes.items()
    }
