"""Stand-ins that answer within a decoder layer's one call: when they may, as the policy would have it, to the bit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from policy_cases import Dice

from buddymoe_ray import LLM
from buddymoe_ray.engine import one_call
from buddymoe_ray.engine.attention import ChunkRows, PackedPass
from buddymoe_ray.engine.engine import Engine
from buddymoe_ray.engine.one_call import OneCallLayer, OneCallLayers
from buddymoe_ray.kernels import DecoderLayer, DecoderLayers, Routed, Tallies
from buddymoe_ray.moe import Phase, StepState, StepTerms
from buddymoe_ray.moe.outcome import ANSWER_STANDINS
from buddymoe_ray.policy import Action, RowBudgets
from buddymoe_ray.types import BOUNDED, EXACT, FAST, GenerationRequest, SamplingParams

PROMPTS = ["def add(a, b):\n", "import os\nimport sys\n", "class Queue:\n    def __init__(self):\n"]
Seen = list[tuple[Routed, int, bool]]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """What calls came to that had tallies to write: of how many layers, and whether stand-ins answered."""
    found, call = Seen(), DecoderLayers.__call__

    def watched(self: DecoderLayers, *args: Any) -> Routed:
        routed = call(self, *args)
        if len(args) > 4:
            tallies: Tallies = args[5]
            stood_in = (tallies.accesses[routed.done] > tallies.accesses[0])[:, ANSWER_STANDINS:].any()
            found.append((routed, len(args[4][0]), bool(stood_in)))
        return routed

    monkeypatch.setattr(DecoderLayers, "__call__", watched)
    return found


def answered(**options: Any) -> list[Any]:
    """Tokens with the logarithms of their probabilities, and what they cost."""
    with LLM("builtin:tiny", guard_share=0.0, **options) as llm:
        results = llm.generate(PROMPTS, max_tokens=24, temperature=0.0, logprobs=0)
    return [([(item.token_id, item.logprob) for item in result.logprobs], result.usage) for result in results]


@pytest.mark.parametrize(
    "options",
    [
        {"memory": "25%", "mode": "fast"},
        {"memory": "50%", "mode": "bounded"},
        {"memory": "50%", "mode": "bounded", "budget": 0.001},
        {"memory": "50%", "mode": "fast", "standin": "lowbit", "dtype": "bfloat16"},
        {"memory": "50%", "mode": "bounded", "expert_dtype": "int8"},
    ],
    ids=str,
)
def test_tokens_and_costs_are_those_of_the_policys_path(
    options: dict[str, Any], seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = answered(**options)
    assert any(stood_in and routed.done > 1 for routed, _, stood_in in seen), "nothing was shown"
    monkeypatch.setattr(one_call, "attach", lambda *_: 0)
    assert answered(**options) == once


def test_rows_of_other_modes_beside_them(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact, bounded and fast requests, all in one batch: what an exact row misses is brought, for all."""

    def tokens() -> list[tuple[list[int], Any]]:
        with LLM("builtin:tiny", memory="50%", mode="bounded", guard_share=0.0) as llm:
            engine: Engine = llm.engine
            for at, mode in enumerate(("exact", "bounded", "fast", "fast")):
                ids = tuple(5 + (7 * at + 3 * i) % 200 for i in range(9 + at))
                sampling = SamplingParams(temperature=0.0, max_tokens=20 + 10 * at)
                engine.add(GenerationRequest(request_id=str(at), prompt_token_ids=ids, sampling=sampling, mode=mode))  # type: ignore[arg-type]
            found: dict[str, tuple[list[int], Any]] = {str(at): ([], None) for at in range(4)}
            for event in engine.drain():
                found[event.request_id] = (found[event.request_id][0] + list(event.token_ids), event.usage)
            return list(found.values())

    once = tokens()
    assert any(stood_in for *_, stood_in in seen) and any(routed.done < layers for routed, layers, _ in seen)
    monkeypatch.setattr(one_call, "attach", lambda *_: 0)
    assert tokens() == once


def test_what_is_recorded_goes_the_policys_way(seen: Seen) -> None:
    """A record names each substitution, which a call does not tell."""
    with LLM("builtin:tiny", memory="25%", mode="fast", guard_share=0.0) as llm:
        [recorded] = llm.generate(PROMPTS[:1], max_tokens=8, temperature=0.0, record=True)
        assert seen and not any(stood_in for *_, stood_in in seen)
        [free] = llm.generate(PROMPTS[:1], max_tokens=8, temperature=0.0)
    assert any(stood_in for *_, stood_in in seen)
    assert recorded.token_ids == free.token_ids and recorded.usage.standins == free.usage.standins


@pytest.fixture(scope="module")
def opened() -> Iterator[OneCallLayers]:
    """Layers with stand-ins."""
    made: list[Any] = []
    attach = one_call.attach
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(one_call, "attach", lambda *args: made.append(args[0]) or attach(*args))  # type: ignore[func-returns-value]
        with LLM("builtin:tiny", memory="50%", mode="bounded", dtype="float32", guard_share=0.0):
            layers = [m.forward for m in made[0].model.modules() if isinstance(m.forward, OneCallLayer)]
            assert [layer.at for layer in layers] == [0, 1, 2, 3] and len({id(layer.layers) for layer in layers}) == 1
            yield layers[0].layers


class Case:
    """A call on rows of random numbers: random residents, modes, allowances and prices."""

    def __init__(self, one: OneCallLayers, seed: int) -> None:
        dice, stretch, compute = Dice(seed), one.stretch, one.compute
        assert stretch is not None
        self.one, self.first = one, int(dice.rng.integers(0, 4))
        self.T, self.blocks = int(dice.rng.integers(1, 6)), stretch.blocks[self.first :]
        self.N = len(self.blocks)
        chunks = [ChunkRows(row=t, count=1, start=0, blocks=(t,)) for t in range(self.T)]
        self.current = PackedPass(chunks, decode=True, block_size=16, device=torch.device("cpu"))
        D, d = compute.layers[0].D, compute.layers[0].parts.attention.heads[2]
        self.hidden_1TD = torch.from_numpy(dice.rng.standard_normal((1, self.T, D)).astype(np.float32))
        self.turn = (torch.ones(1, self.T, d), torch.zeros(1, self.T, d))
        share = float(dice.rng.choice([0.3, 0.8, 0.95]))
        self.at_NE = [block._cache.glance(block.layer).at_E.copy() for block in self.blocks]  # type: ignore[union-attr]
        for at_E in self.at_NE:
            at_E[~dice.coin(len(at_E), share=share)] = -1
        mode_T = dice.rng.choice([(BOUNDED, FAST), (FAST, FAST), (BOUNDED, BOUNDED), (EXACT, FAST)][seed % 4], self.T)
        assert self.blocks[0].records is not None
        scale = float(np.median(self.blocks[0].records.loss_E)) * 10.0 ** dice.rng.uniform(-3, 2)
        free_T = np.where(mode_T == FAST, np.inf, 0.0)
        allowance_T, price_T = (np.where(mode_T == BOUNDED, scale * dice.grid(self.T), free_T) for _ in range(2))
        self.rows = RowBudgets(
            mode_T=mode_T.astype(np.int8), allowance_T=allowance_T.astype("f4"), price_T=price_T.astype("f4")
        )

    def step(self) -> StepState:
        step = StepState()
        step.begin(Phase.DECODE, self.T, StepTerms(budgets=self.rows))
        return step

    def call(self, n: int, layers: int, hidden_1TD: torch.Tensor, step: StepState) -> tuple[Routed, Tallies]:
        """From the n-th of the case's layers on."""
        places, tallies = [at_E.ctypes.data for at_E in self.at_NE[n : n + layers]], step.tallies(layers)
        paged = (self.current.spans_S4, self.current.blocks)
        return self.one.compute(
            self.first + n, hidden_1TD, self.turn, paged, (places, [0] * layers, [0] * layers), tallies
        ), tallies


def state(step: StepState) -> list[list[str]]:
    """What was counted and charged, and what is left."""
    assert step.budgets is not None
    arrays = (step.outcome.accesses_TA, step.outcome.loss_T, step.budgets.allowance_T)
    return [[str(item) for item in array.ravel()] for array in arrays]


@pytest.mark.parametrize("seed", range(60))
def test_a_call_goes_as_far_as_the_ladder_says_that_all_is_paid(seed: int, opened: OneCallLayers) -> None:
    """Layer by layer, of what the layers before have left; and counts and charges what the policy's path does."""
    case = Case(opened, seed)
    step, told = case.step(), case.step()
    routed, tallies = case.call(0, case.N, case.hidden_1TD, step)
    for n, (block, at_E) in enumerate(zip(case.blocks, case.at_NE, strict=True)):
        records, standins, ids_TK = block.records, block._standins, routed.ids[n]
        assert records is not None and standins is not None
        resolution = standins.resolve(block.layer, ids_TK, routed.weights[n], at_E >= 0, told)
        missing_TK = at_E[ids_TK] < 0
        paid = (resolution.action_TK != Action.FETCH).all() and (records.kind_E[ids_TK[missing_TK]] >= 0).all()
        assert (routed.done > n) == bool(paid)
        if not paid:
            break
        standins.book(block.layer, resolution, told)
    step.take(tallies, routed.done)
    assert state(step) == state(told)


@pytest.mark.parametrize("seed", range(20))
def test_layers_together_come_to_what_they_do_one_by_one(seed: int, opened: OneCallLayers) -> None:
    case = Case(opened, seed)
    together, step, hidden_1TD = case.call(0, case.N, case.hidden_1TD, case.step())[0], case.step(), case.hidden_1TD
    for n in range(case.N):
        alone, tallies = case.call(n, 1, hidden_1TD, step)
        assert alone.done == (together.done > n)
        parts = ("attended", "normed", "weights", *(("out",) if alone.done else ()))
        assert all(torch.equal(getattr(alone, name)[0], getattr(together, name)[n]) for name in parts)
        assert (alone.ids[0] == together.ids[n]).all()
        if not alone.done:
            return
        step.take(tallies, 1)
        hidden_1TD = alone.out


def test_one_rows_allowance_that_ends_in_the_middle_of_the_layers_stops_all(opened: OneCallLayers) -> None:
    case = next(case for case in map(partial(Case, opened), range(200)) if case.N == 4 and case.T == 3)
    for block, at_E in zip(case.blocks, case.at_NE, strict=True):
        at_E[:] = block._cache.glance(block.layer).at_E  # type: ignore[union-attr]
    endless = np.full(3, np.inf, np.float32)
    modes = np.array([BOUNDED, FAST, BOUNDED], np.int8)
    case.rows = RowBudgets(mode_T=modes, allowance_T=endless, price_T=endless)
    routed, tallies = case.call(0, 4, case.hidden_1TD, case.step())
    assert routed.done == 4 and (tallies.losses[4] > tallies.losses[2]).all() and (tallies.losses[1] > 0).all()
    enough = np.array([1.0, np.inf, tallies.losses[2, 2] * np.float32(1.001)], np.float32)
    case.rows = RowBudgets(mode_T=modes, allowance_T=enough, price_T=endless)
    step = case.step()
    routed, tallies = case.call(0, 4, case.hidden_1TD, step)
    assert routed.done == 2
    step.take(tallies, routed.done)
    assert step.budgets is not None and 0 <= step.budgets.allowance_T[2] < enough[2] * 0.01
    assert case.call(2, 2, routed.out[1:2], step)[0].done == 0, "the next call knows"


@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 15, 16, 31, 64, 128])
def test_expected_losses_are_added_as_numpy_does(n: int) -> None:
    from buddymoe_ray.kernels import decoder_numba

    loss_TK = np.random.default_rng(n).random((50, n), np.float32) ** 4
    assert [decoder_numba._sum(row) for row in loss_TK] == loss_TK.sum(axis=1).tolist()


def test_a_loss_that_is_no_number_pays_for_nothing_in_bounded(opened: OneCallLayers) -> None:
    """A fast row takes any stand-in there is."""
    first, stretch = opened.compute.layers[0], opened.stretch
    assert stretch is not None and stretch.blocks[0].records is not None
    records = stretch.blocks[0].records
    nobody = replace(records, loss_E=np.full_like(records.loss_E, np.nan), kind_E=np.zeros_like(records.kind_E))
    nobody.at_E[:] = records.at_E[records.at_E >= 0][0]
    compute = DecoderLayers([DecoderLayer(replace(first.parts, standins=nobody), torch.float32)])
    chunks = [ChunkRows(row=0, count=1, start=0, blocks=(0,))]
    current = PackedPass(chunks, decode=True, block_size=16, device=torch.device("cpu"))
    D, d, nowhere = first.D, first.parts.attention.heads[2], np.full(len(records.kind_E), -1, np.int64)
    for mode, stands_in in ((FAST, True), (BOUNDED, False), (EXACT, False)):
        spend, step = np.full(1, np.inf, np.float32), StepState()
        rows = RowBudgets(mode_T=np.array([mode], np.int8), allowance_T=spend, price_T=spend)
        step.begin(Phase.DECODE, 1, StepTerms(budgets=rows))
        turn, paged = (torch.ones(1, 1, d), torch.zeros(1, 1, d)), (current.spans_S4, current.blocks)
        routed = compute(0, torch.ones(1, 1, D), turn, paged, ([nowhere.ctypes.data], [0], [0]), step.tallies(1))
        assert routed.done == stands_in
