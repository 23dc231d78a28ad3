"""Memory budgets: from bytes to slots per layer. Pure arithmetic.

Invariant: slots and overhead together never exceed the budget, except that a budget of all experts' bytes (`100%`)
keeps every expert resident and then padding, staging and the scratch of the kernels come on top.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from buddymoe_ray.errors import BudgetError
from buddymoe_ray.types import SlotPlan

__all__ = [
    "MIN_SLOTS",
    "KVSplit",
    "Prefill",
    "Staging",
    "activation_bytes",
    "kv_cache_bytes",
    "lend_reserved",
    "plan_prefill",
    "plan_staging",
    "recording_bytes",
    "rows_held",
    "split_kv",
    "split_slots",
    "state_slots",
]

MIN_SLOTS = 2
_ACTIVATION_BYTES = 256 << 20
"""What rows of a pass may take, beside weights and KV."""
_PREFILL_BESIDE = 512
_WAVE_SHARE, _STAGING_SHARE = 0.04, 0.06
_PAGE = 4096
_WORKSPACES, _POOLED, _GRAPH = 64 << 20, 32 << 20, 256 << 10
"""What libraries work with, what an allocator keeps of a recording's memory beyond what is used, what a driver keeps of
a piece of it."""


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
    *, largest_read: int, budget_bytes: int, depth: int = 4, most: int = 2 << 20, share: float = _STAGING_SHARE
) -> Staging:
    """Buffers that hold a read with its alignment, as deep as a `share` of the budget allows (at least a page)."""
    whole = _pages(min(largest_read, most) + 2 * _PAGE)
    allowed = int(share * budget_bytes)
    for count in range(depth, 0, -1):
        if count * whole <= allowed:
            return Staging(depth=count, buffer_bytes=whole)
    return Staging(depth=1, buffer_bytes=max(_PAGE, min(whole, allowed // _PAGE * _PAGE)))


def kv_cache_bytes(*, promised: int, explicit: bool, free: int) -> int:
    """Bytes of a KV cache: what is promised, within .9 of the free ones; within .25 if nobody wrote it down."""
    return min(promised, int(free * (0.9 if explicit else 0.25)))


def state_slots(running: int) -> int:
    """Slots for what layers carry from token to token: two of every sequence, and of a text computed beside them, for a
    pass that reads one writes the other."""
    return 2 * (running + 1)


@dataclass(frozen=True, kw_only=True)
class KVSplit:
    """A KV cache's bytes: `states` of `running` sequences, and keys and values of `tokens`."""

    running: int
    states: int
    tokens: int


def split_kv(nbytes: int, *, max_running: int, sequence: int, state: int) -> KVSplit:
    """Cut `nbytes`; of one sequence keys and values are `sequence` bytes, states `state`. Where there is not room for
    `max_running`, as many run as have their states in half of it, which may be none."""
    running = max_running
    if state and nbytes < max_running * sequence + state_slots(max_running) * state:
        running = max(0, min(max_running, nbytes // 2 // state // 2 - 1))
    states = state_slots(running) * state
    return KVSplit(running=running, states=states, tokens=max(0, nbytes - states))


def activation_bytes(*, hidden: int, experts_per_token: int, item_bytes: int) -> int:
    """Of a row: what experts answer (per access, and a copy), attention and norms."""
    return (2 * experts_per_token + 12) * hidden * item_bytes


def recording_bytes(
    *, running: int, layers: int, experts_per_token: int, hidden: int, vocab: int, item_bytes: int, length: int
) -> int:
    """Device memory for decode steps that are recorded, of every power of two of rows up to `running`: what each reads
    and writes, what its pieces hand on in `layers` MoE layers, block tables of texts of `length` tokens (8 bytes for 8
    or more of them); and for two steps that are begun ahead of the host, and their choice of tokens."""
    most = 1 << (running - 1).bit_length()
    told = layers * experts_per_token * 28
    handed = 4 * layers * hidden * item_bytes
    work = 2 * activation_bytes(hidden=hidden, experts_per_token=experts_per_token, item_bytes=4)
    rows = (2 * most - 1) * (told + handed + work + (4 + item_bytes) * vocab + length)
    ahead = 2 * most * (told + 4 * vocab) + 8 * 80 * vocab  # of 8 rows that are sorted together
    return rows + ahead + _WORKSPACES + most.bit_length() * (_POOLED + layers * _GRAPH)


@dataclass(frozen=True, kw_only=True)
class Prefill:
    """Most prompt tokens of a pass: `beside` sequences that decode, or another pass, and `alone`. `row_bytes` are what
    a token's activations take meanwhile. `fixed`: a prompt is cut at multiples of `beside`, whoever else there is."""

    beside: int
    alone: int
    row_bytes: int = 0
    fixed: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of activations, at most, of a pass and of those beside it."""
        return (self.alone + self.beside) * self.row_bytes


def plan_prefill(
    asked: int | None,
    *,
    hidden: int,
    experts_per_token: int,
    item_bytes: int,
    fully_resident: bool,
    fixed: bool = False,
) -> Prefill:
    """What was `asked` for, else 512 tokens. Every pass reads the missing experts once more, so one alone then takes as
    many tokens as 256 MiB of activations hold; where bits depend on the cuts, which are `fixed` then, every one."""
    beside = asked or _PREFILL_BESIDE
    row_bytes = activation_bytes(hidden=hidden, experts_per_token=experts_per_token, item_bytes=item_bytes)
    small = asked is not None or (fully_resident and not fixed)
    alone = beside if small else max(beside, rows_held(row_bytes))
    return Prefill(beside=alone if fixed else beside, alone=alone, row_bytes=row_bytes, fixed=fixed)


def rows_held(row_bytes: int) -> int:
    """How many rows of `row_bytes` each the bytes for activations hold, which is 256 MiB."""
    return _ACTIVATION_BYTES // row_bytes


def split_slots(
    *,
    budget_bytes: int,
    slot_bytes: int,
    expert_bytes: int,
    experts_per_layer: Sequence[int],
    overhead_bytes: int,
    workers: int = 1,
    waves: int = 0,
) -> SlotPlan:
    """Cut a budget into slots: wave slots first (about 4 %, at least 2 per worker), the rest evenly over the layers.

    Args:
        budget_bytes: the hard limit.
        slot_bytes, expert_bytes: one expert with and without alignment padding.
        experts_per_layer: E of every MoE layer; a layer gets no more slots than experts.
        overhead_bytes: staging and scratch that live in the same budget.
        workers: engines that access the slots together.
        waves: no fewer wave slots than that, where these are less than a quarter of all.

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
    waves = min(count, max(fewest, round(_WAVE_SHARE * count), min(waves, count // 4)))
    layer_slots = _spread(count - waves, experts_per_layer)
    return SlotPlan(
        budget_bytes=budget_bytes,
        slot_bytes=slot_bytes,
        overhead_bytes=overhead_bytes,
        wave_slots=min(count - sum(layer_slots), total),
        layer_slots=layer_slots,
        fully_resident=False,
    )


def lend_reserved(plan: SlotPlan, nbytes: int, experts_per_layer: Sequence[int]) -> SlotPlan:
    """The plan with `nbytes` of what it reserves, and no others, lent to slots of experts, spread over the layers.
    Two pages of every layer are kept: those that its lent slots share with others."""
    lent = plan.lent_slots or (0,) * len(plan.layer_slots)
    own = [slots - more for slots, more in zip(plan.layer_slots, lent, strict=True)]
    room = min(nbytes, plan.reserved_bytes) - 2 * _PAGE * len(own)
    slots = _spread(sum(own) + max(0, room) // plan.slot_bytes, experts_per_layer)
    now = tuple(count - kept for count, kept in zip(slots, own, strict=True))
    assert min(now) >= 0, f"layers have {slots} slots, must have at least {own}"
    overhead = plan.overhead_bytes + (sum(lent) - sum(now)) * plan.slot_bytes
    return replace(plan, layer_slots=slots, lent_slots=now, overhead_bytes=overhead)


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
