"""A store with one row: it takes no lock of the system's, mends what was interrupted, and notices a wrong table."""

from __future__ import annotations

import fcntl
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from experts_on_disk import make_layout
from test_cache_stream import access, open_cache

from buddymoe_ray.cache.private_store import PrivateStore
from buddymoe_ray.cache.shared.tables import READY, SharedTables
from buddymoe_ray.types import ExpertKey


def test_a_cache_of_ones_own_takes_no_lock_and_a_glance_has_no_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "fcntl", lambda *_: pytest.fail("a lock is taken, and nobody else is there"))
    layout, truth = make_layout(tmp_path)
    with open_cache(layout, 8) as cache:
        access(cache, truth, 0, [0, 3, 4, 5], False)
        glance = cache.glance(0)
        assert glance is not None and glance.words_2E is None
        ids = np.array([[expert for expert in (0, 3, 4, 5) if glance.at_E[expert] >= 0]])
        hits = cache.stats().hits
        glance.used(ids)
        assert cache.stats().hits == hits + ids.size and cache.glance(0) is glance
        access(cache, truth, 0, [1], False)
        assert cache.glance(0) is not glance, "something moved"
        assert cache.store.tables.pid.size == 1 and not cache.store.tables.lease.any()


def filled(folder: Path) -> SharedTables:
    layout, _ = make_layout(folder)
    tables = PrivateStore.of_waves(layout, 4).tables
    for expert in range(3):
        [(_, slot)] = tables.claim([ExpertKey(0, expert)], protect=False, kept=np.zeros(4, bool))
        tables.commit([slot])
        tables.release([slot])
    return tables


def test_a_change_that_was_interrupted_is_mended_by_the_next(tmp_path: Path) -> None:
    tables = filled(tmp_path)
    with pytest.raises(KeyboardInterrupt), tables.locked():
        tables.key_layer[0] = -1  # as `vacate` begins
        raise KeyboardInterrupt
    tables.check_integrity()
    assert tables.slot_of[0].tolist()[:3] == [-1, 1, 2] and not tables.entry[0, 0]


def lost_forward(tables: SharedTables) -> None:
    tables.slot_of[0, 0] = -1


def lost_entry(tables: SharedTables) -> None:
    tables.entry[0, 1] = 0


def ready_without_an_expert(tables: SharedTables) -> None:
    tables.state[3], tables.key_layer[3], tables.key_expert[3] = READY, 0, 2


@pytest.mark.parametrize("corrupt", [lost_forward, lost_entry, ready_without_an_expert])
def test_a_wrong_table_is_noticed_and_both_sides_are_shown(
    tmp_path: Path, corrupt: Callable[[SharedTables], None]
) -> None:
    tables = filled(tmp_path)
    tables.check_integrity()
    corrupt(tables)
    with pytest.raises(AssertionError, match="say"):
        tables.check_integrity()
