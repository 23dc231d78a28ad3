"""One MoE layer against the plain formula: any budget, both phases, any routing, to the last bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from experts_on_disk import make_layout, plan_of

from buddymoe_ray.cache import DiskReader, Glance, open_private
from buddymoe_ray.errors import CacheError
from buddymoe_ray.kernels import ExpertMath, UpcastScratch, combine, expert_forward
from buddymoe_ray.moe import MoEBlock, OneByOne, Phase, StepState
from buddymoe_ray.moe.outcome import StepOutcome
from buddymoe_ray.types import ExpertLayout

D, E, K = 20, 6, 3
MATH = ExpertMath(activate=torch.relu)


class Opened:
    """A block over a cache of `slots` slots, with its step state."""

    def __init__(self, layout: ExpertLayout, slots: int) -> None:
        plan = plan_of(layout, slots)
        self.cache = open_private(layout, plan, reader=DiskReader(buffer_bytes=8192))
        self.step = StepState()
        shapes = {t.name: t.shape for t in layout.tensors}
        # gate_up_proj is stored in bfloat16, down_proj in float32; the scratch widens both to float32
        scratch = UpcastScratch(shapes, stored=torch.bfloat16, compute=torch.float32, device=torch.device("cpu"))
        self.block = MoEBlock(
            layer=1,
            cache=self.cache,
            compute=OneByOne(lambda x, tensors: expert_forward(x, scratch.widen(tensors), MATH)),
            step=self.step,
            standins=None,
        )


def routing(tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(E, generator=rng)[:K] for _ in range(tokens)])
    return torch.randn(tokens, D, generator=rng), ids, torch.rand(tokens, K, generator=rng)


@pytest.mark.parametrize("tokens", [1, 2, 9, 40])
def test_every_budget_and_phase_gives_the_same_bits(tmp_path: Path, tokens: int) -> None:
    layout, _ = make_layout(tmp_path)
    hidden, ids, weights = routing(tokens, seed=tokens)
    answers = []
    for slots in (2, 3, 7, 12, 18):
        opened = Opened(layout, slots)
        for phase in (Phase.PREFILL, Phase.DECODE, Phase.DECODE):
            opened.step.begin(phase, tokens)
            answers.append(opened.block(hidden, ids, weights))
        opened.cache.check_integrity()
        opened.cache.close()
    assert all(torch.equal(answers[0], other) for other in answers[1:])


def test_it_is_the_formula(tmp_path: Path) -> None:
    layout, _ = make_layout(tmp_path)
    opened = Opened(layout, 18)
    hidden, ids, weights = routing(7, seed=1)
    opened.step.begin(Phase.PREFILL, 7)
    got = opened.block(hidden, ids, weights)
    experts = {}
    for leases in opened.cache.stream(1, range(E), protect_residency=False):
        for lease in leases:
            experts[lease.key.expert] = {name: t.float().clone() for name, t in lease.tensors().items()}
    y = torch.stack(
        [
            torch.stack([expert_forward(hidden[t : t + 1], experts[e], MATH)[0] for e in row])
            for t, row in enumerate(ids.tolist())
        ]
    )
    torch.testing.assert_close(got, combine(y, weights))
    opened.cache.close()


def test_what_moved_while_it_was_computed_is_computed_again(tmp_path: Path) -> None:
    """The first try of every layer is spoilt: its rows are garbage, and the cache says that they do not count."""
    layout, _ = make_layout(tmp_path)
    opened = Opened(layout, 18)
    hidden, ids, weights = routing(4, seed=5)
    opened.step.begin(Phase.DECODE, 4)
    expected = opened.block(hidden, ids, weights)
    tried = []

    class Spoilt(OneByOne):
        def resident(self, hidden_TD, ids_TK, at_E, y_ND):  # type: ignore[no-untyped-def]
            tried.append(at_E[ids_TK])
            y_ND.fill_(float("nan"))
            return True

    opened.block._compute = Spoilt(opened.block._compute._compute)
    word = np.zeros(1, np.int64)
    moved = np.tile([[word.ctypes.data], [1]], E)  # seen was 1, found is 0
    opened.cache.glance = lambda *_: Glance(np.arange(E), tried.append, moved)  # type: ignore[method-assign]
    opened.step.begin(Phase.DECODE, 4)
    assert torch.equal(opened.block(hidden, ids, weights), expected)
    assert len(tried) == 1 and opened.step.outcome.hits_T.tolist() == [K] * 4
    opened.cache.close()


def test_hits_are_counted_as_the_step_found_them(tmp_path: Path) -> None:
    layout, _ = make_layout(tmp_path)
    opened = Opened(layout, 18)
    hidden, ids, weights = routing(4, seed=2)
    opened.step.begin(Phase.DECODE, 4)
    opened.block(hidden, ids, weights)
    assert opened.step.outcome.hits_T.tolist() == [0] * 4 and opened.step.outcome.fetched_T.tolist() == [K] * 4
    opened.step.begin(Phase.DECODE, 4)
    opened.block(hidden, ids, weights)
    assert opened.step.outcome.hits_T.tolist() == [K] * 4
    opened.cache.close()


class Everything:
    """Peers that have all experts; they note which are asked for, and answer nothing."""

    exact = True

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def able(self, layer: int, accesses_of: Mapping[int, int]) -> Sequence[int]:
        self.asked.append(list(accesses_of))
        return list(accesses_of)

    def ask(self, layer: int, rows_of: Mapping[int, torch.Tensor]) -> Everything:
        self.answers = {expert: torch.zeros_like(rows) for expert, rows in rows_of.items()}
        return self

    def collect(self) -> Mapping[int, torch.Tensor]:
        return self.answers


def test_a_hit_that_has_to_go_meanwhile_is_not_asked_for_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout, _ = make_layout(tmp_path)
    opened, peers = Opened(layout, 18), Everything()
    opened.block.peers = peers
    hidden, ids, weights = routing(4, seed=2)
    ids[:] = torch.tensor([0, 1, 2])
    for _ in opened.cache.stream(1, [0, 1], protect_residency=False):
        pass
    resident_E, counted = opened.cache.resident_mask(1), StepOutcome.count_exact

    def count_and_lose(outcome: StepOutcome, hit_TK: np.ndarray) -> None:  # type: ignore[type-arg]
        counted(outcome, hit_TK)
        resident_E[:] = False  # as when another worker, or a mover, evicts them

    monkeypatch.setattr(StepOutcome, "count_exact", count_and_lose)
    opened.step.begin(Phase.DECODE, 4)
    opened.block(hidden, ids, weights)
    outcome = opened.step.outcome
    assert peers.asked == [[2]]
    assert (outcome.hits_T.tolist(), outcome.fetched_T.tolist(), outcome.peer_T.tolist()) == ([2] * 4, [0] * 4, [1] * 4)
    opened.cache.close()


def test_probing_loads_nothing(tmp_path: Path) -> None:
    layout, _ = make_layout(tmp_path)
    opened = Opened(layout, 7)
    hidden, ids, weights = routing(1, seed=3)
    opened.step.begin(Phase.PROBE, 1)
    assert not opened.block(hidden, ids, weights).any() and opened.cache.stats().misses == 0
    opened.cache.close()


def test_a_failed_read_leaves_the_layer_usable(tmp_path: Path) -> None:
    layout, _ = make_layout(tmp_path)
    opened = Opened(layout, 3)
    path = tmp_path / "layer1.bin"
    whole = path.read_bytes()
    path.write_bytes(b"")
    hidden, ids, weights = routing(5, seed=4)
    opened.step.begin(Phase.DECODE, 5)
    with pytest.raises(CacheError):
        opened.block(hidden, ids, weights)
    opened.cache.check_integrity()
    path.write_bytes(whole)
    opened.step.begin(Phase.DECODE, 5)
    assert opened.block(hidden, ids, weights).isfinite().all()
    opened.cache.close()
