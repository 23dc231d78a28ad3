"""Random expert files and the layout that describes them: what the cache tests use instead of a model."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from buddymoe_ray.policy import split_slots
from buddymoe_ray.types import ExpertKey, ExpertLayout, ExpertPiece, SlotPlan, SlotTensor

__all__ = ["expert_bytes_of", "make_layout", "plan_of"]


def plan_of(layout: ExpertLayout, slots: int) -> SlotPlan:
    """A budget of so many slots, and nothing else in it."""
    return split_slots(
        budget_bytes=slots * layout.slot_bytes,
        slot_bytes=layout.slot_bytes,
        expert_bytes=layout.expert_bytes,
        experts_per_layer=layout.experts_per_layer,
        overhead_bytes=0,
    )


def make_layout(
    folder: Path, *, experts_per_layer: tuple[int, ...] = (6, 6, 6), rows: int = 12, cols: int = 20, seed: int = 0
) -> tuple[ExpertLayout, dict[ExpertKey, bytes]]:
    """Write one file per layer with experts scattered at odd offsets; returns the layout and every expert's true bytes.

    Each expert has a bfloat16 `gate_up_proj` stored as two pieces (gate and up, in different places of the file) and a
    float32 `down_proj` in one.
    """
    rng = np.random.default_rng(seed)
    first, second = rows * cols * 2, rows * cols * 4
    down_at = -(-first // 64) * 64
    tensors = (
        SlotTensor(name="gate_up_proj", shape=(rows, cols), dtype="bfloat16", offset=0, nbytes=first),
        SlotTensor(name="down_proj", shape=(cols, rows), dtype="float32", offset=down_at, nbytes=second),
    )
    truth: dict[ExpertKey, bytes] = {}
    pieces: dict[ExpertKey, tuple[ExpertPiece, ...]] = {}
    for layer, count in enumerate(experts_per_layer):
        path, content = folder / f"layer{layer}.bin", bytearray(rng.bytes(17 + 8 * layer))
        for expert in range(count):
            key, made = ExpertKey(layer, expert), []
            data = _weights(rng, rows * cols)
            cuts = ((0, first // 2, 0), (first // 2, first, first // 2), (first, first + second, down_at))
            for begin, end, slot_offset in cuts:
                content += rng.bytes(int(rng.integers(1, 50)))
                made.append(
                    ExpertPiece(path=str(path), offset=len(content), nbytes=end - begin, slot_offset=slot_offset)
                )
                content += data[begin:end]
            truth[key], pieces[key] = data, tuple(made)
        path.write_bytes(bytes(content))
    layout = ExpertLayout(
        tensors=tensors,
        slot_bytes=-(-(down_at + second) // 64) * 64,
        expert_bytes=first + second,
        layers=len(experts_per_layer),
        experts_per_layer=experts_per_layer,
        pieces=pieces,
    )
    return layout, truth


def _weights(rng: np.random.Generator, count: int) -> bytes:
    """Finite numbers: `count` in bfloat16 (float32 cut to its upper half), then `count` in float32."""
    wide = rng.standard_normal(2 * count, dtype=np.float32)
    narrow = (wide[:count].view(np.uint32) >> 16).astype(np.uint16)
    return narrow.tobytes() + wide[count:].tobytes()


def expert_bytes_of(tensors: dict) -> bytes:  # type: ignore[type-arg]
    """The bytes a lease shows, in the order of `make_layout`'s truth."""
    import torch

    parts = [
        tensors[name].contiguous().view(torch.uint8).cpu().numpy().tobytes() for name in ("gate_up_proj", "down_proj")
    ]
    return b"".join(parts)
