"""LRU against a list kept in order of use."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from buddymoe_ray.policy import LRU

operations = st.lists(st.tuples(st.sampled_from(["touch", "forget", "victim"]), st.integers(0, 7)), max_size=60)


@given(operations)
def test_lru_is_a_list_in_order_of_use(steps: list[tuple[str, int]]) -> None:
    lru, model = LRU(), list[int]()
    for what, slot in steps:
        if what == "victim":
            assert lru.victim(lambda s, kept=slot: s != kept) == next((s for s in model if s != slot), None)
            continue
        if slot in model:
            model.remove(slot)
        if what == "touch":
            lru.touch(slot)
            model.append(slot)
        else:
            lru.forget(slot)
        assert len(lru) == len(model) and all((s in lru) == (s in model) for s in range(8))
    assert lru.victim(lambda s: True) == (model[0] if model else None)


def test_choosing_a_victim_changes_nothing() -> None:
    lru = LRU()
    lru.touch(1)
    lru.touch(2)
    assert lru.victim(lambda s: True) == lru.victim(lambda s: True) == 1
    assert lru.victim(lambda s: False) is None and len(lru) == 2
