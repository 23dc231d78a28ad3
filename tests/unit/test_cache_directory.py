"""The slot tables by themselves: which slot is claimed, in which order, and that a wrong table is noticed."""

from __future__ import annotations

import random

import numpy as np
import pytest

from buddymoe_ray.cache.directory import Directory
from buddymoe_ray.types import ExpertKey, SlotPlan


def directory(*, layers: tuple[int, ...] = (2, 1), waves: int = 2, experts: tuple[int, ...] = (6, 4)) -> Directory:
    plan = SlotPlan(
        budget_bytes=1 << 20,
        slot_bytes=64,
        overhead_bytes=0,
        wave_slots=waves,
        layer_slots=layers,
        fully_resident=False,
    )
    return Directory(plan, experts)


def put(tables: Directory, layer: int, expert: int, *, protect: bool = False) -> int | None:
    slot = tables.claim(layer, protect_residency=protect)
    if slot is not None:
        tables.commit(ExpertKey(layer, expert), slot)
    return slot


def test_own_free_slots_come_first_and_then_the_least_used_gives_way() -> None:
    tables, slots = directory(), []
    for expert in range(4):
        tables.usage.note(0, np.array([expert]))
        slots.append(put(tables, 0, expert))
    assert slots == [0, 1, 0, 1]
    assert tables.slot_of[0] == [-1, -1, 0, 1, -1, -1] and tables.evictions == 2
    assert put(tables, 1, 0) == 2, "another layer's slots are its own"
    tables.check_integrity()


def test_protected_residency_passes_through_wave_slots() -> None:
    tables = directory()
    taken = [put(tables, 0, expert, protect=True) for expert in range(6)]
    assert taken[:2] == [0, 1] and set(taken[2:]) == {3, 4}
    assert tables.slot_of[0][:2] == [0, 1], "the layer's own experts stayed"
    tables.check_integrity()


def test_leased_and_claimed_slots_are_never_claimed() -> None:
    tables = directory()
    for expert in range(4):
        put(tables, 0, expert, protect=True)
    tables.leased.update({0, 1, 3})
    assert tables.claim(0, protect_residency=False) == 4, "the one slot that is not lent"
    assert tables.claim(0, protect_residency=False) is None
    tables.check_integrity()
    tables.abandon(4)
    assert tables.claim(0, protect_residency=True) == 4
    tables.check_integrity()


def test_a_use_keeps_an_expert() -> None:
    tables = directory()
    put(tables, 0, 0)
    put(tables, 0, 1)
    tables.usage.note(0, np.array([0]))
    put(tables, 0, 2)
    assert tables.slot_of[0][0] >= 0 and tables.slot_of[0][1] == -1


def test_commit_refuses_unclaimed_slots_and_experts_already_there() -> None:
    tables = directory()
    with pytest.raises(AssertionError, match="must be claimed"):
        tables.commit(ExpertKey(0, 0), 0)
    put(tables, 0, 0)
    slot = tables.claim(0, protect_residency=False)
    assert slot is not None
    with pytest.raises(AssertionError, match="already in slot"):
        tables.commit(ExpertKey(0, 0), slot)


@pytest.mark.parametrize("layers", [(0, 0), (2, 1), (6, 4)])
def test_random_claims_keep_the_tables_mirrored(layers: tuple[int, int]) -> None:
    tables, rng = directory(layers=layers), random.Random(sum(layers))
    claimed: list[tuple[ExpertKey, int]] = []
    for _ in range(3000):
        layer = rng.randrange(2)
        absent = [e for e, s in enumerate(tables.slot_of[layer]) if s < 0 and ExpertKey(layer, e) not in dict(claimed)]
        if absent and rng.random() < 0.6:
            slot = tables.claim(layer, protect_residency=rng.random() < 0.3)
            if slot is not None:
                assert slot not in tables.leased and slot not in [s for _, s in claimed]
                claimed.append((ExpertKey(layer, rng.choice(absent)), slot))
        elif claimed:
            key, slot = claimed.pop(rng.randrange(len(claimed)))
            tables.commit(key, slot) if rng.random() < 0.8 else tables.abandon(slot)
        held = [slot for slot, key in enumerate(tables.key_of) if key is not None]
        tables.leased.clear()
        tables.leased.update(slot for slot in held if rng.random() < 0.2)
        tables.check_integrity()


def corrupt_forward(tables: Directory) -> None:
    tables.slot_of[0][0] = -1


def corrupt_flag(tables: Directory) -> None:
    tables.resident_E[0][0] = False


def corrupt_free(tables: Directory) -> None:
    tables._free[0].append(0)


def corrupt_lease(tables: Directory) -> None:
    tables.leased.add(4)


@pytest.mark.parametrize("corrupt", [corrupt_forward, corrupt_flag, corrupt_free, corrupt_lease])
def test_a_wrong_table_is_noticed_and_both_sides_are_shown(corrupt) -> None:
    tables = directory()
    put(tables, 0, 0)
    tables.check_integrity()
    corrupt(tables)
    with pytest.raises(AssertionError, match=r"say|held"):
        tables.check_integrity()
