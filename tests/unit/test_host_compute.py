"""Misses that a GPU's host computes: whose, by whom it pays, to which figures; on the GPU's twin."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from experts_on_disk import make_layout, plan_of

from buddymoe_ray.cache import DiskReader, HostTier, open_private, slot_views
from buddymoe_ray.config import EngineConfig
from buddymoe_ray.device import host as twin
from buddymoe_ray.device import open_device
from buddymoe_ray.engine.llm import LLM
from buddymoe_ray.errors import ConfigError
from buddymoe_ray.kernels import ExpertLayer, ExpertMath, UpcastScratch, combine, expert_forward
from buddymoe_ray.moe import MoEBlock, OneByOne, Phase, StepOutcome, StepState, StepTerms
from buddymoe_ray.policy import HostCost, RowBudgets, expected_misses
from buddymoe_ray.policy.host_compute import host_count
from buddymoe_ray.residency.host_compute import HostExperts
from buddymoe_ray.types import BOUNDED, EXACT, FAST, ExpertKey

D, E, LAYER = 20, 6, 1
MATH = ExpertMath(activate=lambda x: torch.relu(x).square(), gated=False)
SLOW, FAST_LINK = 1.0, 1e-12


class Rig:
    """A block whose slots are apart, above a host that holds all experts; `link` is what a copy takes, in seconds."""

    def __init__(self, folder: Path, link: float, *, experts: int = E, host_slots: int = 3 * E) -> None:
        layout, self.truth = make_layout(folder, experts_per_layer=(E, experts, E))
        layout = replace(layout, tensors=(replace(layout.tensors[0], name="up_proj"), layout.tensors[1]))
        plan = plan_of(layout, 8)
        device, reader = open_device("interpret"), DiskReader(buffer_bytes=8192)
        self.cache = open_private(layout, plan, reader=reader, device=device, host_slots=host_slots)
        for layer in range(3):
            for _ in self.cache.stream(layer, range(layout.experts_per_layer[layer]), protect_residency=True):
                pass
        self.cache.settle_ahead()
        kernels = [ExpertLayer(layout=layout.tensors, fmt=None, math=MATH) for _ in range(3)]
        self.host, self.step = HostExperts(self.cache, kernels, device), StepState()
        self.host.cost.access_seconds = 1e-6
        assert self.cache.host is not None
        self.tier = self.cache.host
        self.tier.copy_seconds = link
        shapes = {t.name: t.shape for t in layout.tensors}
        scratch = UpcastScratch(shapes, stored=torch.bfloat16, compute=torch.float32, device=torch.device("cpu"))
        compute = OneByOne(lambda x, tensors: expert_forward(x, scratch.widen(tensors), MATH))
        self.block = MoEBlock(layer=LAYER, cache=self.cache, compute=compute, step=self.step, standins=None)
        self.layout = layout

    @property
    def absent(self) -> list[int]:
        return np.flatnonzero(~self.cache.resident_mask(LAYER)).tolist()

    def run(
        self, ids: list[list[int]], modes: list[int], record: frozenset[int] = frozenset()
    ) -> tuple[torch.Tensor, StepOutcome]:
        """Rows are of the seed of their number, whoever is beside them."""
        T = len(ids)
        hidden = torch.stack([torch.randn(D, generator=torch.Generator().manual_seed(row)) for row in range(T)])
        zeros = np.zeros(T, np.float32)
        budgets = RowBudgets(mode_T=np.array(modes, np.int8), allowance_T=zeros, price_T=zeros)
        self.step.begin(Phase.DECODE, T, StepTerms(budgets=budgets, record=record), isolate=True)
        self.hidden, self.weights = hidden, torch.full((T, len(ids[0])), 0.5)
        return self.block(hidden, torch.tensor(ids), self.weights), self.step.outcome

    def reference(self, ids: list[list[int]]) -> torch.Tensor:
        """In float32, of the bytes that were written."""
        rows = []
        for row, experts in enumerate(ids):
            for expert in experts:
                data, down = self.truth[ExpertKey(LAYER, expert)], self.layout.tensors[1]
                record = torch.zeros(self.layout.slot_bytes, dtype=torch.uint8)
                first = self.layout.tensors[0].nbytes
                whole = torch.frombuffer(bytearray(data), dtype=torch.uint8)
                record[:first], record[down.offset : down.offset + down.nbytes] = whole[:first], whole[first:]
                tensors = {name: tensor.float() for name, tensor in slot_views(record, self.layout).items()}
                rows.append(expert_forward(self.hidden[row : row + 1], tensors, MATH)[0])
        return combine(torch.stack(rows).view(len(ids), -1, D), self.weights)


@pytest.fixture
def rigs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Rig]]:
    """One beside a slow link and one beside a fast one, as they stay."""
    monkeypatch.setattr(HostCost, "note", lambda self, seconds, accesses: None)
    monkeypatch.setattr(HostTier, "copied", lambda self, slot, seconds: self.release(slot))
    made = {"slow": Rig(tmp_path, SLOW), "fast": Rig(tmp_path, FAST_LINK)}
    for rig in made.values():
        rig.block.peers = rig.host
    yield made
    for rig in made.values():
        rig.cache.check_integrity()
        rig.cache.close()


def test_what_no_row_wants_exactly_is_answered_by_the_host(rigs: dict[str, Rig]) -> None:
    """Of four rows one is exact and one is recorded: what they want is fetched, for all."""
    rig, other = rigs.values()
    a, b, c, d, *_ = rig.absent
    ids, modes, record = [[a, b], [b, c], [c, d], [d, a]], [EXACT, BOUNDED, FAST, BOUNDED], frozenset({3})
    loaded = rig.cache.stats().bytes_loaded_device
    got, outcome = rig.run(ids, modes, record)
    assert outcome.host_T.tolist() == [0, 1, 1, 0] and outcome.fetched_T.tolist() == [2, 1, 1, 2]
    assert rig.cache.stats().bytes_loaded_device - loaded == 3 * rig.layout.expert_bytes, "a, b and d alone"
    torch.testing.assert_close(got, rig.reference(ids), rtol=1e-4, atol=1e-4)
    fetched, theirs = other.run(ids, modes, record)
    assert theirs.fetched_T.tolist() == [2] * 4 and not theirs.host_T.any(), "a fast link"
    assert torch.equal(got[[0, 3]], fetched[[0, 3]]) and not torch.equal(got[[1, 2]], fetched[[1, 2]])


def test_a_row_is_what_it_is_alone_and_takes_no_slot(rigs: dict[str, Rig]) -> None:
    rig = rigs["slow"]
    rig.host._promote = lambda layer, answered: None  # type: ignore[method-assign]
    (a, b, c, *_), before = rig.absent, rig.cache.store.tables.entry.copy()
    loaded = rig.cache.stats().bytes_loaded_device
    ids = [[a, b], [b, c], [c, a]]
    together, outcome = rig.run(ids, [BOUNDED] * 3)
    assert outcome.host_T.tolist() == [2] * 3
    for row in range(3):
        alone, _ = rig.run([[a, b]] * row + [ids[row]], [BOUNDED] * (row + 1))
        assert torch.equal(alone[row], together[row])
    assert np.array_equal(rig.cache.store.tables.entry, before)
    assert rig.cache.stats().bytes_loaded_device == loaded


def test_what_is_used_more_than_a_resident_is_brought_behind_the_answer(
    rigs: dict[str, Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One at a time, and nobody waits: it is resident once its copy is there."""
    rig, arrives, move = rigs["slow"], threading.Event(), twin._move
    monkeypatch.setattr(twin, "_move", lambda target, source: arrives.wait(30) and move(target, source))
    a, b, *_ = rig.absent
    for expert in (a, b, b):
        _, outcome = rig.run([[expert]], [BOUNDED])
    assert outcome.host_T.tolist() == [1], "another one, while the first is on its way"
    waits = rig.cache.store.tables.slot_of[LAYER]
    assert waits[a] >= 0 > waits[b] and a in rig.absent
    arrives.set()
    for _ in range(1000):
        if a in rig.absent:
            time.sleep(0.01)
            rig.cache.glance(LAYER)
    _, outcome = rig.run([[a]], [BOUNDED])
    assert outcome.hits_T.tolist() == [1]


def test_bytes_that_cannot_be_read_are_met_as_by_a_fetch(
    rigs: dict[str, Rig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host had them when it was asked, and has lost them since."""
    rig = rigs["slow"]
    rig.host._promote = lambda layer, answered: None  # type: ignore[method-assign]
    a, b, *_ = rig.absent
    with rig.tier.store.tables.locked():
        rig.tier.store.tables.vacate(int(rig.tier.store.tables.slot_of[LAYER, a]))
    monkeypatch.setattr(HostTier, "holds", lambda self, key: True)
    path = tmp_path / f"layer{LAYER}.bin"
    whole = path.read_bytes()
    path.write_bytes(b"")
    _, outcome = rig.run([[a], [b]], [BOUNDED, BOUNDED])
    assert rig.step.failed is not None and [*rig.step.failed] == [0] and "ends before byte" in rig.step.failed[0]
    assert outcome.host_T.tolist() == [0, 1] and not rig.tier.store.tables.lease.any()
    path.write_bytes(whole)
    got, outcome = rig.run([[a], [b]], [BOUNDED, BOUNDED])
    assert outcome.host_T.tolist() == [1, 1] and not rig.step.failed
    torch.testing.assert_close(got, rig.reference([[a], [b]]), rtol=1e-4, atol=1e-4)


def test_what_is_fetched_beside_never_waits_for_a_slot_that_is_lent(
    rigs: dict[str, Rig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four slots of the host have four experts that are computed there, a fifth comes by one of them."""
    rig = Rig(tmp_path, SLOW, experts=9, host_slots=4)
    rig.block.peers, device = rig.host, rig.cache.store.tables
    for _ in rig.cache.stream(LAYER, [5, 6, 7, 8], protect_residency=True):
        pass
    rig.cache.settle_ahead()
    for slot in device.slot_of[LAYER, 5:].tolist():
        if slot >= 0:
            device.vacate(slot)
    ids = [[5, 6], [7, 8], [rig.absent[0], 5]]
    got, outcome = rig.run(ids, [BOUNDED] * 3)
    assert outcome.host_T.tolist() == [2, 2, 1] and outcome.fetched_T.tolist() == [0, 0, 1]
    torch.testing.assert_close(got, rig.reference(ids), rtol=1e-4, atol=1e-4)
    rig.cache.close()


def test_an_interrupt_gives_host_slots_back(rigs: dict[str, Rig], monkeypatch: pytest.MonkeyPatch) -> None:
    rig = rigs["slow"]
    a, b, *_ = rig.absent

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(MoEBlock, "_run_here", interrupted)
        rig.run([[a], [b]], [BOUNDED, EXACT])
    rig.cache.settle_ahead()  # of what is brought behind the answer
    assert not rig.tier.store.tables.lease.any()


def test_as_many_are_computed_as_are_answered_soonest() -> None:
    """Against all divisions, to the fewest."""
    for accesses in product((1, 2, 5), repeat=3):
        for host, link in product((0.0, 0.25, 1.0, 1.5, 7.0), repeat=2):
            seconds = [max(sum(accesses[:k]) * host, (3 - k) * link) for k in range(4)]
            assert host_count(accesses, host, link) == seconds.index(min(seconds))
    assert host_count((), 1.0, 1.0) == 0


def test_what_does_not_pay_is_tried_for_a_hundredth_of_the_time() -> None:
    cost, tried = HostCost(5.0), 0
    for _ in range(10_000):
        tried += cost.count([1], 1.0)
    assert 10_000 / 100 / 5 - 2 <= tried <= 10_000 / 100 / 5
    for _ in range(60):
        cost.note(0.5, 2)  # it was a bad moment
    assert cost.access_seconds == pytest.approx(0.25, rel=0.05) and cost.count([1, 1], 1.0) == 2


@pytest.mark.parametrize("link", [0.5, 1.0, 3.0])
def test_what_a_plan_expects_is_what_the_twin_comes_to(
    rigs: dict[str, Rig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, link: float
) -> None:
    """Seconds charged for what was computed and fetched in 200 steps of a row, against those expected of its misses."""
    experts, K, rng = 24, 4, np.random.default_rng(0)
    rig = Rig(tmp_path, link, experts=experts, host_slots=2 * E + experts)
    rig.block.peers, rig.host.cost.access_seconds = rig.host, 1.0
    monkeypatch.setattr(HostCost, "count", lambda cost, uses, fetch: host_count(uses, cost.access_seconds, fetch))
    seconds = computed = missed = 0.0
    for _ in range(200):
        _, outcome = rig.run([rng.permutation(experts)[:K].tolist()], [BOUNDED])
        host, fetched = int(outcome.host_T[0]), int(outcome.fetched_T[0])
        seconds, computed, missed = seconds + max(host * 1.0, fetched * link), computed + host, missed + host + fetched
    expected = expected_misses(K, missed / 200 / K, 1.0, link)
    assert expected.missed == pytest.approx(missed / 200) and missed > 200
    assert seconds / 200 == pytest.approx(expected.seconds, rel=0.05)
    assert computed / 200 == pytest.approx(expected.by_host, rel=0.05, abs=0.02)
    rig.cache.close()


def test_exact_engines_refuse_to_be_told_of_it() -> None:
    with pytest.raises(ConfigError, match="host_compute is 'off', must be left out in mode exact"):
        EngineConfig(mode="exact", host_compute="off")
    with pytest.raises(
        ConfigError, match="host_compute is 'on' with host_memory 0 and device cpu, must be beside a GPU"
    ):
        LLM("builtin:tiny", mode="bounded", device="cpu", host_compute="on")
