"""The words of a miss: numbers that are written to disk, and records that cannot be changed."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from policy_cases import Dice, budgets, only_row

import buddymoe_ray.policy as policy
from buddymoe_ray.policy import Action, Misses, MissPolicy, Reason, Resolution, RowBudgets
from buddymoe_ray.policy.ladder import all_resident


def test_actions_keep_their_numbers() -> None:
    """Replay records and the Triton kernel name actions by number."""
    assert {a.name: a.value for a in Action} == {"HIT": 0, "FETCH": 1, "OWN": 2, "BUDDY": 3, "DROP": 4}


def test_everything_from_own_on_is_a_stand_in() -> None:
    assert [a for a in Action if a >= Action.OWN] == [Action.OWN, Action.BUDDY, Action.DROP]


def test_reasons_are_distinct_and_fit_a_byte() -> None:
    assert len({r.value for r in Reason}) == len(Reason) == 12
    assert all(0 <= r < 128 for r in Reason)
    assert Reason.RESIDENT == 0, "a tensor of zeros says: all resident"


@pytest.mark.parametrize("kind", [RowBudgets, Misses, Resolution])
def test_records_are_frozen_and_take_names_only(kind: type) -> None:
    assert dataclasses.is_dataclass(kind)
    names = [f.name for f in dataclasses.fields(kind)]
    with pytest.raises(TypeError):
        kind(*range(len(names)))
    one = kind(**dict.fromkeys(names))
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(one, names[0], 1)


def test_budgets_by_mode() -> None:
    rows = budgets([0, 1, 2], allowance=0.5, price=0.25)
    assert rows.mode_T.dtype == np.int8
    assert rows.allowance_T.tolist() == [0.0, 0.5, float("inf")]
    assert rows.price_T.tolist() == [0.0, 0.25, float("inf")]


def test_nothing_missing_costs_and_changes_nothing() -> None:
    misses = Dice(0).misses(3, 2, 8, resident=1.0)
    done = all_resident(misses)
    assert done.expert_TK is misses.ids_TK and done.weight_TK is misses.weight_TK
    assert done.action_TK.dtype == done.reason_TK.dtype == np.int8 and done.loss_TK.dtype == np.float32
    for tensor in (done.action_TK, done.reason_TK, done.loss_TK):
        assert tensor.shape == (3, 2) and not tensor.any()


def test_a_row_alone_keeps_its_terms() -> None:
    misses = Dice(1).misses(4, 3, 8)
    alone = only_row(misses, 2)
    assert np.array_equal(alone.ids_TK[0], misses.ids_TK[2]) and alone.rows.mode_T.tolist() == [misses.rows.mode_T[2]]


def test_both_policies_speak_the_protocol() -> None:
    tables = np.zeros((1, 2, 1), np.float32)
    buddymoe = policy.BuddyMoE(
        candidates_LEH=tables.astype(np.int64), q_LEH=tables, tau_L=np.zeros(1, np.float32), params=policy.BuddyParams()
    )
    drop = policy.Drop(loss_LE=np.zeros((1, 2), np.float32), renormalise=False)
    speakers: list[MissPolicy] = [policy.Ladder(drop), buddymoe]
    assert all(callable(speaker.resolve) for speaker in speakers)


def test_public_names_are_the_modules_own() -> None:
    assert sorted(policy.__all__) == sorted(set(policy.__all__))
    for name in policy.__all__:
        thing = getattr(policy, name)
        assert isinstance(thing, tuple | int) or thing.__module__.startswith("buddymoe_ray.policy."), name


def test_the_room_says_what_it_keeps_out() -> None:
    text = " ".join((policy.__doc__ or "").split())
    assert "arrays" in text and "no ray, no torch, no clock, no I/O" in text
