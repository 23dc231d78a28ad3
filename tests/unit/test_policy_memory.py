"""Budgets in, slots out: forms of writing, hard limits, even spread, the minimum and its message."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from buddymoe_ray.config import parse_memory
from buddymoe_ray.errors import BudgetError, ConfigError
from buddymoe_ray.policy import plan_staging, split_kv, split_slots, state_slots


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("50%", 500),
        ("100%", 1000),
        ("12.5 %", 125),
        ("0", 0),
        ("1234", 1234),
        ("2KiB", 2048),
        ("2kb", 2000),
        ("1.5GiB", 3 * 2**29),
        ("6GB", 6 * 10**9),
        ("7 MiB", 7 << 20),
        ("1b", 1),
    ],
)
def test_parse_memory(text: str, expected: int) -> None:
    assert parse_memory(text, total_expert_bytes=1000) == expected


@pytest.mark.parametrize("text", ["", "x", "-5%", "5 %%", "5 furlongs", "GiB", "1e9", "5%GiB"])
def test_parse_memory_refuses(text: str) -> None:
    with pytest.raises(ConfigError, match="must be like 25% or 6GiB"):
        parse_memory(text, total_expert_bytes=1000)


@given(
    slots=st.integers(0, 400),
    experts=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    overhead=st.integers(0, 5000),
    pad=st.integers(0, 3),
    waves=st.integers(0, 8),
)
def test_split_slots_never_exceeds_the_budget(
    slots: int, experts: list[int], overhead: int, pad: int, waves: int
) -> None:
    slot, budget = 1024, slots * 1024 + 500
    expert = slot - 64 * pad
    try:
        plan = split_slots(
            budget_bytes=budget,
            slot_bytes=slot,
            expert_bytes=expert,
            experts_per_layer=experts,
            overhead_bytes=overhead,
            waves=waves,
        )
    except BudgetError as error:
        assert budget < 2 * slot + overhead
        assert str(2 * slot + overhead) in str(error) and "hint" in str(error)
        return
    assert all(0 <= have <= most for have, most in zip(plan.layer_slots, experts, strict=True))
    if plan.fully_resident:
        assert plan.layer_slots == tuple(experts) and budget >= sum(experts) * expert
        return
    assert plan.slots_total * slot + plan.overhead_bytes <= budget
    assert plan.wave_slots >= min(max(2, min(waves, plan.slots_total // 4)), sum(experts))
    uncapped = [have for have, most in zip(plan.layer_slots, experts, strict=True) if have < most]
    assert not uncapped or max(uncapped) - min(uncapped) <= 1


def test_the_minimum_it_names_is_enough() -> None:
    sizes = {"slot_bytes": 1000, "expert_bytes": 1000, "experts_per_layer": [50, 50], "overhead_bytes": 300}
    with pytest.raises(BudgetError, match="2300 bytes") as refused:
        split_slots(budget_bytes=2299, **sizes)
    assert split_slots(budget_bytes=2300, **sizes).slots_total == 2
    percent = str(refused.value).split("--memory ")[1].rstrip("%")
    assert split_slots(budget_bytes=int(float(percent) * 1000), **sizes).slots_total >= 2


@given(piece=st.integers(1, 50 << 20), budget=st.integers(20_000, 1 << 33))
def test_staging_is_a_few_per_cent(piece: int, budget: int) -> None:
    staging = plan_staging(largest_read=piece, budget_bytes=budget)
    assert staging.buffer_bytes % 4096 == 0 and 1 <= staging.depth <= 4
    assert staging.nbytes <= max(4096, 0.06 * budget)
    if budget > 1 << 30:
        assert staging.depth == 4


@given(
    nbytes=st.integers(0, 10**6),
    most=st.integers(1, 40),
    sequence=st.integers(1, 10**4),
    state=st.integers(0, 10**4),
)
def test_states_and_tokens_share_a_cache(nbytes: int, most: int, sequence: int, state: int) -> None:
    split = split_kv(nbytes, max_running=most, sequence=sequence, state=state)
    assert split.states == state_slots(split.running) * state and 0 <= split.running <= most
    if nbytes >= most * sequence + state_slots(most) * state or not state:
        assert split.running == most and split.tokens == nbytes - split.states
    elif split.running:
        assert split.states <= nbytes // 2 and split.tokens == nbytes - split.states
    if split.running < most:
        assert state_slots(split.running + 1) * state > nbytes // 2 - 1
