"""A MoE layer in decode with stand-ins: who answers each access, what is counted, charged, recorded and repeated."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from experts_on_disk import make_layout
from torch import Tensor

from buddymoe_ray.cache import DiskReader, StandinPool, open_private
from buddymoe_ray.device import open_device
from buddymoe_ray.kernels import ExpertMath, UpcastScratch, combine, expert_forward
from buddymoe_ray.moe import MoEBlock, OneByOne, Overlay, Phase, Standins, StepState, StepTerms, record_computes
from buddymoe_ray.policy import Action, Misses, Reason, Resolution, RowBudgets
from buddymoe_ray.types import ExpertKey, ExpertLayout, ExpertPiece, SlotPlan, SlotTensor

D, E, K, LAYER = 20, 6, 3, 1
MATH = ExpertMath(activate=torch.relu)
HOW: dict[str, Any] = {"threads": 1, "device": open_device("cpu"), "dtype": torch.float32}
PINNED = ((0, 1), (0, 1), (0, 1))


class Scripted:
    """A policy that answers as it is told: `action[expert]` for misses, `buddy[expert]` where a buddy answers."""

    def __init__(self, action: dict[int, Action], buddy: dict[int, int] | None = None, loss: float = 0.25) -> None:
        self.action, self.buddy, self.loss, self.seen = action, buddy or {}, loss, list[Misses]()

    def resolve(self, misses: Misses) -> Resolution:
        self.seen.append(misses)
        action, expert, weight = np.zeros_like(misses.ids_TK), misses.ids_TK.copy(), misses.weight_TK.copy()
        for t, row in enumerate(misses.ids_TK.tolist()):
            for k, e in enumerate(row):
                if bool(misses.resident_E[e]):
                    continue
                exact = int(misses.rows.mode_T[t]) == 0
                action[t, k] = Action.FETCH if exact else self.action[e]
                if action[t, k] == Action.BUDDY:
                    expert[t, k], weight[t, k] = self.buddy[e], weight[t, k] * 0.5
                if action[t, k] == Action.DROP:
                    weight[t, k] = 0
        loss = (action >= Action.OWN).astype(np.float32) * np.float32(self.loss)
        reason = np.full(action.shape, Reason.SUBSTITUTED, np.int8)
        return Resolution(
            action_TK=action.astype(np.int8), expert_TK=expert, weight_TK=weight, loss_TK=loss, reason_TK=reason
        )


class Opened:
    """A layer whose experts 0 and 1 are pinned; experts 2 to 5 have mean vectors as records."""

    def __init__(self, tmp_path: Path, policy: Scripted, layers: frozenset[int] = frozenset({LAYER})) -> None:
        self.layout, _ = make_layout(tmp_path)
        plan = SlotPlan(
            budget_bytes=8 * self.layout.slot_bytes,
            slot_bytes=self.layout.slot_bytes,
            overhead_bytes=0,
            wave_slots=2,
            layer_slots=(2, 2, 2),
            fully_resident=False,
            pinned=PINNED,
        )
        self.cache = open_private(self.layout, plan, reader=DiskReader(buffer_bytes=8192))
        self.cache.warm()
        self.means, records = mean_records(tmp_path)
        kind_of = {ExpertKey(la, e): "mean" for la in range(3) for e in range(2, 6)}
        pool = StandinPool({"mean": records}, kind_of, torch.device("cpu"))
        reader = DiskReader(buffer_bytes=8192)
        pool.load(reader)
        reader.close()
        self.step = StepState()
        compute = {"mean": record_computes("mean", records, [MATH] * 3, **HOW)}
        standins = Standins(policy=policy, pool=pool, compute=compute, experts_per_layer=(E, E, E), layers=layers)
        shapes = {t.name: t.shape for t in self.layout.tensors}
        scratch = UpcastScratch(shapes, stored=torch.bfloat16, compute=torch.float32, device=torch.device("cpu"))
        self.block = MoEBlock(
            layer=LAYER,
            cache=self.cache,
            compute=OneByOne(lambda x, tensors: expert_forward(x, scratch.widen(tensors), MATH)),
            step=self.step,
            standins=standins,
        )

    def truth(self) -> dict[int, dict[str, Tensor]]:
        found = {}
        for leases in self.cache.stream(LAYER, range(E), protect_residency=True):
            for lease in leases:
                found[lease.key.expert] = {name: t.float().clone() for name, t in lease.tensors().items()}
        return found


def mean_records(folder: Path) -> tuple[Tensor, ExpertLayout]:
    means = torch.randn(3, E, D)
    path = folder / "means.bin"
    path.write_bytes(means.numpy().tobytes())
    tensor = SlotTensor(name="bias", shape=(D,), dtype="float32", offset=0, nbytes=D * 4)
    pieces = {
        ExpertKey(la, e): (ExpertPiece(path=str(path), offset=(la * E + e) * D * 4, nbytes=D * 4, slot_offset=0),)
        for la in range(3)
        for e in range(E)
    }
    layout = ExpertLayout(
        tensors=(tensor,), slot_bytes=128, expert_bytes=80, layers=3, experts_per_layer=(E, E, E), pieces=pieces
    )
    return means, layout


def terms(modes: list[int], **more: object) -> StepTerms:
    spend = np.full(len(modes), 10.0, np.float32)
    budgets = RowBudgets(mode_T=np.array(modes, np.int8), allowance_T=spend, price_T=spend.copy())
    return StepTerms(budgets=budgets, **more)  # type: ignore[arg-type]


HIDDEN = torch.randn(2, D, generator=torch.Generator().manual_seed(3))
IDS = torch.tensor([[0, 2, 4], [3, 1, 5]])
WEIGHTS = torch.tensor([[0.5, 0.3, 0.2], [0.4, 0.4, 0.2]])
ALL_OWN = dict.fromkeys(range(2, 6), Action.OWN)


def formula(opened: Opened, answers: list[list[object]]) -> Tensor:
    """`answers[t][k]`: an expert's number, or a vector; already weighted parts are summed in slot order."""
    truth = opened.truth()
    rows = []
    for t, row in enumerate(answers):
        parts = [a if isinstance(a, Tensor) else expert_forward(HIDDEN[t : t + 1], truth[int(a)], MATH)[0] for a in row]  # type: ignore[call-overload]
        rows.append(torch.stack(parts))
    return torch.stack(rows)


def test_records_answer_what_is_missing_and_nothing_is_read(tmp_path: Path) -> None:
    opened = Opened(tmp_path, Scripted(ALL_OWN))
    read = opened.cache.stats().bytes_read_disk
    opened.step.begin(Phase.DECODE, 2, terms([2, 2]))
    got = opened.block(HIDDEN, IDS, WEIGHTS)
    assert opened.cache.stats().bytes_read_disk == read
    m = opened.means[LAYER]
    torch.testing.assert_close(got, combine(formula(opened, [[0, m[2], m[4]], [m[3], 1, m[5]]]), WEIGHTS))
    outcome = opened.step.outcome
    assert outcome.hits_T.tolist() == [1, 1] and outcome.fetched_T.tolist() == [0, 0]
    assert outcome.standins_TS.tolist() == [[0, 0, 0, 2, 0]] * 2 and outcome.loss_T.tolist() == [0.5, 0.5]
    assert opened.step.budgets is not None and opened.step.budgets.allowance_T.tolist() == [9.5, 9.5]
    opened.cache.close()


def test_buddies_and_drops(tmp_path: Path) -> None:
    policy = Scripted({2: Action.BUDDY, 4: Action.DROP, 3: Action.BUDDY, 5: Action.DROP}, {2: 1, 3: 0})
    opened = Opened(tmp_path, policy)
    opened.step.begin(Phase.DECODE, 2, terms([2, 2]))
    got = opened.block(HIDDEN, IDS, WEIGHTS)
    weights = torch.tensor([[0.5, 0.15, 0.0], [0.2, 0.4, 0.0]])
    torch.testing.assert_close(got, combine(formula(opened, [[0, 1, 0], [0, 1, 0]]), weights))
    assert opened.step.outcome.standins_TS.tolist() == [[0, 0, 1, 0, 1]] * 2
    opened.cache.close()


def test_an_exact_row_beside_a_fast_one_gets_the_experts_themselves(tmp_path: Path) -> None:
    opened = Opened(tmp_path, Scripted(ALL_OWN))
    opened.step.begin(Phase.DECODE, 2, terms([0, 2]))
    got = opened.block(HIDDEN, IDS, WEIGHTS)
    m = opened.means[LAYER]
    torch.testing.assert_close(got, combine(formula(opened, [[0, 2, 4], [m[3], 1, m[5]]]), WEIGHTS))
    assert opened.step.outcome.fetched_T.tolist() == [2, 0]
    opened.cache.check_integrity()
    opened.cache.close()


def test_prefill_and_other_layers_are_exact(tmp_path: Path) -> None:
    for phase, layers in ((Phase.PREFILL, frozenset({LAYER})), (Phase.DECODE, frozenset({0}))):
        opened = Opened(tmp_path, Scripted(ALL_OWN), layers)
        opened.step.begin(phase, 2, terms([2, 2]))
        got = opened.block(HIDDEN, IDS, WEIGHTS)
        torch.testing.assert_close(got, combine(formula(opened, [[0, 2, 4], [3, 1, 5]]), WEIGHTS))
        assert opened.step.outcome.standins_TS.sum() == 0
        opened.cache.close()


def test_pinned_experts_stay_whatever_passes_through(tmp_path: Path) -> None:
    opened = Opened(tmp_path, Scripted(ALL_OWN))
    for _ in range(3):
        opened.step.begin(Phase.DECODE, 2, terms([0, 0]))
        opened.block(HIDDEN, IDS, WEIGHTS)
        assert {0, 1} <= opened.cache.resident(LAYER) and len(opened.cache.resident(LAYER)) <= 4
        opened.cache.check_integrity()
    opened.cache.close()


def test_a_recorded_pass_repeats_elsewhere_to_the_bit(tmp_path: Path) -> None:
    policy = Scripted({2: Action.BUDDY, 4: Action.OWN, 3: Action.OWN, 5: Action.DROP}, {2: 1})
    opened = Opened(tmp_path, policy)
    opened.step.begin(Phase.DECODE, 2, terms([2, 2], record=frozenset({0, 1})))
    first = opened.block(HIDDEN, IDS, WEIGHTS)
    accesses = [(row, u) for row, of_row in opened.step.outcome.substitutions.items() for u in of_row]
    assert [(row, u.slot, u.kind) for row, u in accesses] == [
        (0, 1, "buddy"),
        (0, 2, "mean"),
        (1, 0, "mean"),
        (1, 2, "drop"),
    ]
    overlay = Overlay(
        row_N=np.array([row for row, _ in accesses]),
        slot_N=np.array([u.slot for _, u in accesses]),
        action_N=np.array([u.action for _, u in accesses], np.int8),
        expert_N=np.array([u.expert for _, u in accesses]),
        weight_N=np.array([u.weight for _, u in accesses], np.float32),
    )
    opened.step.begin(Phase.DECODE, 2, terms([0, 0], overlays={LAYER: overlay}))
    assert torch.equal(opened.block(HIDDEN, IDS, WEIGHTS), first)
    assert opened.step.outcome.loss_T.tolist() == [0.0, 0.0], "a replay is charged nothing"
    mine = overlay.row_N == 1
    alone = Overlay(**{f.name: getattr(overlay, f.name)[mine] for f in fields(Overlay)} | {"row_N": np.zeros(2, int)})
    opened.step.begin(Phase.DECODE, 1, terms([0], overlays={LAYER: alone}))
    torch.testing.assert_close(opened.block(HIDDEN[1:], IDS[1:], WEIGHTS[1:]), first[1:])
    opened.cache.close()


def test_rows_alone_come_to_the_same_outcome(tmp_path: Path) -> None:
    opened = Opened(tmp_path, Scripted(ALL_OWN))
    opened.step.begin(Phase.DECODE, 2, terms([2, 2], record=frozenset({1})))
    opened.block(HIDDEN, IDS, WEIGHTS)
    together = opened.step.outcome
    for row in range(2):
        opened.step.begin(Phase.DECODE, 1, terms([2], record=frozenset({0} if row else ())))
        opened.block(HIDDEN[row : row + 1], IDS[row : row + 1], WEIGHTS[row : row + 1])
        alone = opened.step.outcome
        for name in ("accesses_TA", "loss_T"):
            assert np.array_equal(getattr(alone, name)[0], getattr(together, name)[row]), name
        assert alone.substitutions.get(0) == together.substitutions.get(row)
    opened.cache.close()


def test_what_moved_away_is_decided_again_and_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a neighbour may do in a shared store: expert 1 goes between the decision and the lease."""
    policy = Scripted(ALL_OWN | {1: Action.DROP})
    opened = Opened(tmp_path, policy)
    gone = iter([[1], []])
    holding = opened.cache.holding

    def hold(layer: int, experts: list[int]) -> AbstractContextManager[Sequence[int]]:
        lost = next(gone)
        return holding(layer, [expert for expert in experts if expert not in lost])

    monkeypatch.setattr(opened.cache, "holding", hold)
    opened.step.begin(Phase.DECODE, 2, terms([2, 2]))
    got = opened.block(HIDDEN, IDS, WEIGHTS)
    m = opened.means[LAYER]
    weights = torch.tensor([[0.5, 0.3, 0.2], [0.4, 0.0, 0.2]])
    torch.testing.assert_close(got, combine(formula(opened, [[0, m[2], m[4]], [m[3], 0, m[5]]]), weights))
    assert [bool(seen.resident_E[1]) for seen in policy.seen] == [True, False]
    assert opened.step.outcome.hits_T.tolist() == [1, 0] and opened.step.outcome.loss_T.tolist() == [0.5, 0.75]
    opened.cache.close()


def test_an_unknown_record_kind_is_refused() -> None:
    from buddymoe_ray.errors import ProfileError

    with pytest.raises(ProfileError, match="record kind is 'fourier'"):
        record_computes("fourier", None, [], **HOW)  # type: ignore[arg-type]
