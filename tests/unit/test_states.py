"""Layers that carry a state from token to token: rows of several sequences in one call, states in slots of a pool.

That tokens are those of transformers, prompts in pieces and resumed too, is `test_family_switches`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build_checkpoint
from torch import Tensor

from buddymoe_ray import LLM
from buddymoe_ray.config import EngineConfig
from buddymoe_ray.engine.build import build_parts
from buddymoe_ray.engine.engine import Engine
from buddymoe_ray.engine.runner import PackedRunner
from buddymoe_ray.engine.states import StatePool
from buddymoe_ray.errors import BudgetError, ConfigError
from buddymoe_ray.models.families import CARRYING
from buddymoe_ray.models.recurrent import RowStates
from buddymoe_ray.models.shape import describe
from buddymoe_ray.policy import state_slots
from buddymoe_ray.residency.plan import make_plan
from buddymoe_ray.types import GenerationRequest, SamplingParams

NEW, KEPT = 10, 6
PROMPTS = [[5 + (7 * i + 3 * j) % 90 for j in range(n)] for i, n in enumerate((23, 3, 41, 1, 17, 30, 9))]
SIZES: dict[str, dict[str, Any]] = {
    "kimi_linear": {"linear_num_heads": 8},  # of seven rows more than the vectors that torch takes at once
    "lfm2_moe": {"intermediate_size": 128},  # of whole vectors, as releases' dense layers are
    "qwen3_next": {"linear_num_value_heads": 8},
}


def states_of(engine: Engine) -> StatePool:
    runner = engine._runner
    assert isinstance(runner, PackedRunner) and runner._states is not None
    return runner._states


def request(name: str, prompt: list[int], new: int = NEW) -> GenerationRequest:
    sampling = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True)
    return GenerationRequest(request_id=name, prompt_token_ids=tuple(prompt), sampling=sampling)


def again(engine: Engine, texts: list[list[tuple[int, float]]]) -> list[list[tuple[int, float]]]:
    """Tokens and log probabilities after the first `KEPT`, which each request brings."""
    for at, text in enumerate(texts):
        have = tuple(token for token, _ in text[:KEPT])
        sampling = SamplingParams(temperature=0.0, max_tokens=NEW, logprobs=0)
        engine.add(
            GenerationRequest(
                request_id=str(at), prompt_token_ids=tuple(PROMPTS[at]), sampling=sampling, resumed_token_ids=have
            )
        )
    found: list[list[tuple[int, float]]] = [[] for _ in texts]
    for event in engine.drain():
        assert event.error is None, event.error
        found[int(event.request_id)] += [(item.token_id, float(item.logprob or 0)) for item in event.logprobs]
    return found


def tokens_of(engine: Engine, prompts: list[list[int]]) -> list[list[int]]:
    """What each prompt is answered with, all side by side."""
    for at, prompt in enumerate(prompts):
        engine.add(request(str(at), prompt))
    found: list[list[int]] = [[] for _ in prompts]
    for event in engine.drain():
        assert event.error is None, event.error
        found[int(event.request_id)] += event.token_ids
    states_of(engine).check_integrity()
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_checkpoint("qwen3_next", tmp_path_factory.mktemp("qwen3_next"))


@pytest.mark.parametrize(
    ("family", "dtype"),
    [(name, "float32") for name in sorted(CARRYING)] + [("nemotron_h", "bfloat16"), ("qwen3_next", "bfloat16")],
)
def test_rows_share_a_call_and_keep_their_bits(
    family: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In any company and at every budget, and where what was generated is resumed."""
    build_checkpoint(family, tmp_path, eos_token_id=None, **SIZES.get(family, {}))
    rows, read = set[int](), StatePool._read

    def counted(pool: StatePool, layer: int, slots: slice | Tensor) -> RowStates:
        states = read(pool, layer, slots)
        rows.update(len(part) for part in (states.conv, states.recurrent) if part is not None)
        return states

    monkeypatch.setattr(StatePool, "_read", counted)
    seen = []
    for count, memory in ((1, "100%"), (2, "50%"), (7, "100%"), (7, "40%")):
        sizes: dict[str, Any] = {"max_running": count, "max_model_len": 64, "prefill_chunk": 16}
        with LLM(str(tmp_path), memory=memory, dtype=dtype, **sizes) as llm:
            results = llm.generate(PROMPTS[: max(3, count)], max_tokens=NEW, logprobs=0)
            states_of(llm.engine).check_integrity()
            seen.append([[(item.token_id, item.logprob) for item in result.logprobs] for result in results[:3]])
            assert max(rows) == count, f"{sorted(rows)} sequences in a call, must be up to {count}"
            if count == 7:
                assert again(llm.engine, seen[0]) == [bits[KEPT:] for bits in seen[0]]
    assert all(bits == seen[0] for bits in seen)


def test_a_pass_that_failed_half_way_has_changed_no_state(folder: Path) -> None:
    """Its rows are computed again in halves, from the states that were there before."""
    config = EngineConfig(model=str(folder), memory="50%", max_running=4, max_model_len=64)
    parts = build_parts(config, text=False)
    engine, prompts = Engine(parts), PROMPTS[:4]
    try:
        expected = tokens_of(engine, prompts)
        mixer = [m for name, m in parts.loaded.model.named_modules() if name.endswith("linear_attn")][-1]
        pool, failed, own = states_of(engine), list[int](), mixer.forward

        def gives_up(*, hidden_states: Tensor, **more: Any) -> Any:
            rows = hidden_states.shape[1]
            if pool._batch is not None and rows > 1 and len(failed) < 6:
                failed.append(rows)
                raise RuntimeError("the last of the layers gave up")
            return own(hidden_states=hidden_states, **more)

        mixer.forward = gives_up  # type: ignore[method-assign]
        assert tokens_of(engine, prompts) == expected
        assert failed == [4, 2, 2] * 2, f"passes of {failed} rows failed"
    finally:
        engine.close()


@pytest.mark.parametrize("family", ["bailing_hybrid", "lfm2_moe", "zaya"])
def test_a_preempted_text_is_computed_again_to_the_same_bits(family: str, tmp_path: Path) -> None:
    """Prompt and what was generated. From whom blocks are taken, the states are taken too."""
    build_checkpoint(family, tmp_path, eos_token_id=None, **SIZES.get(family, {}))
    shape, seen, preempted = describe(tmp_path), [], []
    for blocks in (25, 9):
        held = state_slots(5) * shape.state_bytes + blocks * 16 * shape.kv_bytes_per_token
        sizes: dict[str, Any] = {"max_running": 5, "max_model_len": 80, "prefill_chunk": 16, "kv_memory": str(held)}
        with LLM(str(tmp_path), memory="50%", **sizes) as llm:
            assert llm.engine.limits.max_running == 5 and llm.engine.limits.kv_tokens == 16 * blocks
            results = llm.generate(PROMPTS[:5], max_tokens=37, logprobs=0)
            states_of(llm.engine).check_integrity()
            preempted.append(llm.engine.snapshot().preemptions)
        seen.append([[(item.token_id, item.logprob) for item in result.logprobs] for result in results])
    assert seen[0] == seen[1] and preempted[0] == 0 < preempted[1]


def test_slots_are_free_when_requests_end_however_they_do(folder: Path) -> None:
    config = EngineConfig(model=str(folder), memory="50%", max_running=3, max_model_len=64)
    engine = Engine.from_config(config, text=False)
    try:
        expected = tokens_of(engine, PROMPTS[:3])
        pool = states_of(engine)
        for cancelled in range(3):
            for at, prompt in enumerate(PROMPTS[:3]):
                engine.add(request(str(at), prompt))
            events = [event for _ in range(4) for event in engine.step()]
            engine.cancel(str(cancelled))
            assert len(pool._at) == 2
            pool.check_integrity()
            events += engine.drain()
            for at in {0, 1, 2} - {cancelled}:
                assert [t for e in events if e.request_id == str(at) for t in e.token_ids] == expected[at]
            assert not pool._at
        engine.add(request("interrupted", PROMPTS[0]))
        engine.step()
        assert len(pool._at) == 1
        engine.reset()
        pool.check_integrity()
        assert not pool._at and tokens_of(engine, PROMPTS[:3]) == expected
    finally:
        engine.close()


def test_texts_are_scored_in_pieces_beside_others(folder: Path) -> None:
    """Each piece goes on from the state that the one before left, and nothing is kept after the last."""
    parts = build_parts(EngineConfig(model=str(folder), memory="50%", max_running=2, max_model_len=64), text=False)
    engine, text = Engine(parts), PROMPTS[2]
    try:
        score: Callable[..., Any] = parts.runner.score
        blocks = parts.scheduler.borrow(len(text)) or []
        [(_, whole)] = score(text, blocks)
        expected, found = tokens_of(engine, PROMPTS[:2]), []
        for at in range(2):
            engine.add(request(str(at), PROMPTS[at]))
        events = []
        for _, piece in score(text, blocks, chunk=8):
            found.append(piece)
            events += engine.step()
        torch.testing.assert_close(torch.cat(found), whole, atol=2e-4, rtol=1e-3)
        assert len(states_of(engine)._at) == 2
        abandoned = score(text, blocks, chunk=8)
        next(abandoned)
        abandoned.close()
        events += engine.drain()
        for at in range(2):
            assert [t for e in events if e.request_id == str(at) for t in e.token_ids] == expected[at]
        assert not states_of(engine)._at
        states_of(engine).check_integrity()
    finally:
        engine.close()


def test_states_are_in_the_plan_and_within_the_memory(folder: Path) -> None:
    shape, prompts = describe(folder), [PROMPTS[at] * 2 for at in (2, 5, 0)]
    states = state_slots(3) * shape.state_bytes
    held = states + 12 * 16 * shape.kv_bytes_per_token  # for prompts and answers of 6, 5 and 4 blocks
    options: dict[str, Any] = {"memory": "50%", "max_running": 3, "max_model_len": 128}
    with LLM(str(folder), kv_memory=str(held), **options) as llm:
        engine = llm.engine
        parts = [part for layer in states_of(engine)._parts_S.values() for part in layer if part is not None]
        assert sum(part.nbytes for part in parts) == states > 0
        assert engine.limits.kv_tokens == 12 * 16
        found = tokens_of(engine, prompts * 2)
        assert found[:3] == found[3:]
    config = EngineConfig(model=str(folder), kv_memory=str(held), **options)
    planned = make_plan(config, folder, gpus=[])
    assert planned.batching == "packed" and planned.state_bytes == shape.state_bytes
    assert (planned.devices[0].kv_tokens, planned.devices[0].kv_cache_bytes) == (12 * 16, held)
    few = {**options, "max_running": 9, "kv_memory": str(2 * state_slots(2) * shape.state_bytes)}
    with LLM(str(folder), **few) as llm:
        assert llm.engine.limits.max_running == 2  # so that their states are half of it
        assert tokens_of(llm.engine, prompts) == found[:3]
        engine = llm.engine
    device = make_plan(EngineConfig(model=str(folder), **few), folder, gpus=[]).devices[0]
    assert (device.max_running, device.kv_tokens // 16) == (2, engine.limits.kv_tokens // 16)
    short = EngineConfig(model=str(folder), **{**options, "kv_memory": str(7 * shape.state_bytes)})
    for refused in (lambda: make_plan(short, folder, gpus=[]), lambda: build_parts(short, text=False)):
        with pytest.raises(BudgetError, match="states"):
            refused()


def test_nothing_is_shared_where_a_state_would_be_missing(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"prefix_cache is 'on', must be auto or off .* layers carry a state"):
        LLM(str(folder), prefix_cache="on")
    with LLM(str(folder), memory="50%", max_model_len=64) as llm:
        assert [llm.generate([PROMPTS[2]], max_tokens=4)[0].usage.cached_tokens for _ in range(2)] == [0, 0]
