"""Stand-ins that answer within a decoder layer's one call: when they may, as the policy would have it, to the bit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from policy_cases import Dice

from buddymoe_ray import LLM
from buddymoe_ray.engine import one_call
from buddymoe_ray.engine.attention import ChunkRows, PackedPass
from buddymoe_ray.engine.engine import Engine
from buddymoe_ray.engine.one_call import OneCallLayer
from buddymoe_ray.kernels import DecoderLayer, Routed
from buddymoe_ray.moe.outcome import ANSWER_STANDINS, STANDIN_KINDS, standin_kind
from buddymoe_ray.policy import Action, Misses, RowBudgets
from buddymoe_ray.types import BOUNDED, EXACT, FAST, ExpertKey, GenerationRequest, SamplingParams

PROMPTS = ["def add(a, b):\n", "import os\nimport sys\n", "class Queue:\n    def __init__(self):\n"]
Seen = list[Routed]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """What the calls of layers came to."""
    found, call = Seen(), DecoderLayer.__call__

    def watched(self: DecoderLayer, *args: Any) -> Routed:
        found.append(call(self, *args))
        return found[-1]

    monkeypatch.setattr(DecoderLayer, "__call__", watched)
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
    assert any(routed.stood_in is not None for routed in seen), "nothing was shown"
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
    assert any(routed.stood_in is not None for routed in seen) and any(routed.out is None for routed in seen)
    monkeypatch.setattr(one_call, "attach", lambda *_: 0)
    assert tokens() == once


def test_what_is_recorded_goes_the_policys_way(seen: Seen) -> None:
    """A record names each substitution, which a call does not tell."""
    with LLM("builtin:tiny", memory="25%", mode="fast", guard_share=0.0) as llm:
        [recorded] = llm.generate(PROMPTS[:1], max_tokens=8, temperature=0.0, record=True)
        assert not any(routed.stood_in is not None for routed in seen)
        [free] = llm.generate(PROMPTS[:1], max_tokens=8, temperature=0.0)
    assert any(routed.stood_in is not None for routed in seen)
    assert recorded.token_ids == free.token_ids and recorded.usage.standins == free.usage.standins


@pytest.fixture(scope="module")
def opened() -> Iterator[tuple[list[OneCallLayer], Any]]:
    """Layers with stand-ins, and the policy's."""
    made: list[Any] = []
    attach = one_call.attach
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(one_call, "attach", lambda *args: made.append(args[0]) or attach(*args))  # type: ignore[func-returns-value]
        with LLM("builtin:tiny", memory="50%", mode="bounded", dtype="float32", guard_share=0.0) as llm:
            layers = [m.forward for m in made[0].model.modules() if isinstance(m.forward, OneCallLayer)]
            assert len(layers) == 4 and all(layer.block is not None for layer in layers)
            yield layers, llm.engine._setup.kind_of


@pytest.mark.parametrize("seed", range(40))
def test_a_call_stands_in_where_the_ladder_says_that_all_is_paid(
    seed: int, opened: tuple[list[OneCallLayer], Any]
) -> None:
    """Random residents, modes, allowances and prices, on rows of random numbers."""
    (layers, kind_of), dice = opened, Dice(seed)
    layer = int(dice.rng.integers(0, 4))
    one, T = layers[layer], int(dice.rng.integers(1, 6))
    block, compute = one.block, one._compute
    assert block is not None
    records, standins = block.records, block._standins
    assert records is not None and standins is not None
    chunks = [ChunkRows(row=t, count=1, start=0, blocks=(t,)) for t in range(T)]
    one._paged.current = PackedPass(chunks, decode=True, block_size=16, device=torch.device("cpu"))
    D, d = compute._D, compute._parts.attention.heads[2]
    hidden_TD = torch.from_numpy(dice.rng.standard_normal((T, D)).astype(np.float32))
    turn = (torch.ones(T, d), torch.zeros(T, d))
    at_E = block._cache.glance(layer).at_E.copy()  # type: ignore[union-attr]
    at_E[~dice.coin(len(at_E), share=float(dice.rng.choice([0.3, 0.8, 0.95])))] = -1
    mode_T = dice.rng.choice([(BOUNDED, FAST), (FAST, FAST), (BOUNDED, BOUNDED), (EXACT, FAST)][seed % 4], T)
    scale = float(np.median(records.loss_E)) * 10.0 ** dice.rng.uniform(-3, 2)
    rows = RowBudgets(
        mode_T=mode_T.astype(np.int8),
        allowance_T=np.where(mode_T == FAST, np.inf, np.where(mode_T == EXACT, 0.0, dice.grid(T) * scale)).astype("f4"),
        price_T=np.where(mode_T == FAST, np.inf, np.where(mode_T == EXACT, 0.0, dice.grid(T) * scale)).astype("f4"),
    )
    spans, blocks = one._paged.current.spans_S4, one._paged.current.blocks
    routed = compute(hidden_TD, turn, spans, blocks, at_E, rows)
    ids_TK = routed.ids.numpy()
    misses = Misses(
        layer=layer, ids_TK=ids_TK, weight_TK=routed.weights.numpy(), resident_E=at_E >= 0, score_TE=None, rows=rows
    )
    told = standins._policy.resolve(misses)
    missing_TK = at_E[ids_TK] < 0
    known_TK = records.kind_E[ids_TK] >= 0
    expected = bool(missing_TK.any() and (told.action_TK != Action.FETCH).all() and known_TK[missing_TK].all())
    assert (routed.stood_in is not None) == expected
    assert (routed.out is not None) == (expected or not missing_TK.any())
    if routed.stood_in is not None:
        column = {
            e: ANSWER_STANDINS + STANDIN_KINDS.index(standin_kind(kind_of[ExpertKey(layer, e)]))
            for e in set(ids_TK[missing_TK].tolist())
        }
        assert routed.stood_in.answer_TK.tolist() == [[0 if at_E[e] >= 0 else column[e] for e in r] for r in ids_TK]
        np.testing.assert_array_equal(routed.stood_in.loss_TK, told.loss_TK)


def test_a_loss_that_is_no_number_pays_for_nothing_in_bounded(opened: tuple[list[OneCallLayer], Any]) -> None:
    """A fast row takes any stand-in there is."""
    [one, *_], _ = opened
    assert one.block is not None and one.block.records is not None
    records = one.block.records
    nobody = replace(records, loss_E=np.full_like(records.loss_E, np.nan), kind_E=np.zeros_like(records.kind_E))
    nobody.at_E[:] = records.at_E[records.at_E >= 0][0]
    compute = DecoderLayer(replace(one._compute._parts, standins=nobody), torch.float32)
    chunks = [ChunkRows(row=0, count=1, start=0, blocks=(0,))]
    current = PackedPass(chunks, decode=True, block_size=16, device=torch.device("cpu"))
    D, d, nowhere = compute._D, compute._parts.attention.heads[2], np.full(len(records.kind_E), -1, np.int64)
    for mode, stands_in in ((FAST, True), (BOUNDED, False), (EXACT, False)):
        spend = np.full(1, np.inf, np.float32)
        rows = RowBudgets(mode_T=np.array([mode], np.int8), allowance_T=spend, price_T=spend)
        turn = (torch.ones(1, d), torch.zeros(1, d))
        routed = compute(torch.ones(1, D), turn, current.spans_S4, current.blocks, nowhere, rows)
        assert (routed.stood_in is not None) == stands_in
