"""Memory budgets: from what a user writes to slots per layer. Pure arithmetic.

Invariant: slots and overhead together never exceed the budget, except that a budget of all experts' bytes (`100%`)
keeps every expert resident and then padding, staging and the scratch of the kernels come on top.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from buddymoe_ray.errors import BudgetError, ConfigError
from buddymoe_ray.types import SlotPlan

__all__ = ["MIN_SLOTS", "Staging", "parse_memory", "plan_staging", "split_slots"]

MIN_SLOTS = 2
_WAVE_SHARE = 0.04
_STAGING_SHARE = 0.06
_PAGE = 4096
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_FORM = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*(%|[a-zA-Z]*)\s*$")


def parse_memory(text: str, *, total_expert_bytes: int) -> int:
    """Bytes of `50%` (of all routed experts as stored), `6GiB`, `300MB` or `1234`. Raises ConfigError."""
    match = _FORM.match(text)
    unit = match.group(2).lower() if match else ""
    if match is None or (unit != "%" and unit not in _UNITS):
        raise ConfigError(f"memory is {text!r}, must be like 25% or 6GiB. hint: units are %, KiB, MiB, GiB, KB, MB, GB")
    number = float(match.group(1))
    return int(number * total_expert_bytes / 100) if unit == "%" else int(number * _UNITS[unit])


@dataclass(frozen=True, kw_only=True)
class Staging:
    """Bounce buffers of the disk reader: `depth` of them, each `buffer_bytes`, a multiple of the page."""

    depth: int
    buffer_bytes: int

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return self.depth * self.buffer_bytes


def plan_staging(
    *, largest_piece: int, budget_bytes: int, depth: int = 4, most: int = 2 << 20, share: float = _STAGING_SHARE
) -> Staging:
    """Buffers that hold a piece with its alignment, as deep as a `share` of the budget allows (at least a page)."""
    whole = _pages(min(largest_piece, most) + 2 * _PAGE)
    allowed = int(share * budget_bytes)
    for count in range(depth, 0, -1):
        if count * whole <= allowed:
            return Staging(depth=count, buffer_bytes=whole)
    return Staging(depth=1, buffer_bytes=max(_PAGE, min(whole, allowed // _PAGE * _PAGE)))


def split_slots(
    *,
    budget_bytes: int,
    slot_bytes: int,
    expert_bytes: int,
    experts_per_layer: Sequence[int],
    overhead_bytes: int,
    workers: int = 1,
) -> SlotPlan:
    """Cut a budget into slots: wave slots first (about 4 %, at least 2 per worker), the rest evenly over the layers.

    Args:
        budget_bytes: the hard limit.
        slot_bytes, expert_bytes: one expert with and without alignment padding.
        experts_per_layer: E of every MoE layer; a layer gets no more slots than experts.
        overhead_bytes: staging and scratch that live in the same budget.
        workers: engines that use the slots together.

    Raises:
        BudgetError: fewer than 2 slots per worker fit; names the minimum.
    """
    total = sum(experts_per_layer)
    if budget_bytes >= total * expert_bytes:
        return SlotPlan(
            budget_bytes=budget_bytes,
            slot_bytes=slot_bytes,
            overhead_bytes=0,
            wave_slots=0,
            layer_slots=tuple(experts_per_layer),
            fully_resident=True,
        )
    count = max(0, budget_bytes - overhead_bytes) // slot_bytes
    fewest = MIN_SLOTS * workers
    if count < fewest:
        least = fewest * slot_bytes + overhead_bytes
        percent = 100 * least / (total * expert_bytes)
        raise BudgetError(
            f"memory is {budget_bytes} bytes, must be at least {least} bytes ({percent:.2g} %) for {fewest} expert "
            f"slots and staging. hint: use --memory {percent / workers * 1.05 + 0.1:.1f}%"
        )
    waves = min(count, max(fewest, round(_WAVE_SHARE * count)))
    layer_slots = _spread(count - waves, experts_per_layer)
    return SlotPlan(
        budget_bytes=budget_bytes,
        slot_bytes=slot_bytes,
        overhead_bytes=overhead_bytes,
        wave_slots=min(count - sum(layer_slots), total),
        layer_slots=layer_slots,
        fully_resident=False,
    )


def _spread(count: int, experts_per_layer: Sequence[int]) -> tuple[int, ...]:
    """`count` slots as evenly as caps allow; earlier layers get the remainder."""
    slots = [0] * len(experts_per_layer)
    while count > 0:
        open_layers = [layer for layer, cap in enumerate(experts_per_layer) if slots[layer] < cap]
        if not open_layers:
            break
        share = max(1, count // len(open_layers))
        for layer in open_layers:
            given = min(share, experts_per_layer[layer] - slots[layer], count)
            slots[layer] += given
            count -= given
    return tuple(slots)


def _pages(nbytes: int) -> int:
    return -(-nbytes // _PAGE) * _PAGE
