"""KV blocks that are taken as texts grow, given up to older ones, and shared by texts that begin alike: no token
changes, nobody starves, and what a stand-in had a part in is nobody else's."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from families import build_checkpoint

from buddymoe_ray import LLM
from buddymoe_ray.engine.engine import Engine
from buddymoe_ray.engine.sampler import Sampled
from buddymoe_ray.engine.scheduler import Scheduler
from buddymoe_ray.engine.sequence import Sequence
from buddymoe_ray.errors import ConfigError, RequestError
from buddymoe_ray.policy import Prefill
from buddymoe_ray.types import GenerationRequest, SamplingParams, TokenEvent

Bits = list[list[tuple[int, float]]]
PROMPTS = [f"def function_{n}(a, b):\n    return" for n in range(24)]


class Memory:
    """What the KV cache would hold: for each position of a block, all the text up to there."""

    def __init__(self, pool: Scheduler, block_size: int) -> None:
        self.pool, self.block_size = pool, block_size
        self.kept: dict[tuple[int, int], tuple[int, ...]] = {}

    def place(self, seq: Sequence, at: int) -> tuple[int, int]:
        return seq.blocks[at // self.block_size], at % self.block_size

    def compute(self, seq: Sequence, start: int, end: int) -> None:
        ids = tuple(seq.token_ids(0, end))
        for at in range(start):
            assert self.kept[self.place(seq, at)] == ids[: at + 1], f"{seq.request_id} reads another's token {at}"
        for at in range(start, end):
            self.kept[self.place(seq, at)] = ids[: at + 1]
        seq.advance(end - start)
        self.pool.remember(seq)
        if seq.prompt_computed and seq.append(Sampled(token_id=len(ids) % 3)).finish_reason is not None:
            self.pool.finish(seq)


@pytest.mark.parametrize("reuses", [True, False])
@pytest.mark.parametrize("seed", range(8))
def test_everybody_reads_the_own_text_and_ends(seed: int, reuses: bool) -> None:
    """Random texts of few tokens, cancelled at random, in a cache that holds a few of them."""
    rng = random.Random(seed)
    tenants = "aaab" if seed % 2 else " "
    blocks, size = rng.choice([(7, 4), (12, 2), (30, 4)])
    pool = Scheduler(
        num_blocks=blocks,
        block_size=size,
        max_running=6,
        prefill=Prefill(beside=rng.choice([3, 16]), alone=16),
        grows=True,
        reuses=reuses,
    )
    memory, live, ended, begun = Memory(pool, size), dict[str, Sequence](), 0, 0
    for _ in range(4000):
        if begun < 60 and rng.random() < 0.4:
            prompt = tuple(rng.randrange(2) for _ in range(rng.randint(1, 11)))
            sampling = SamplingParams(max_tokens=rng.randint(1, 12))
            asked = GenerationRequest(request_id=str(begun), prompt_token_ids=prompt, sampling=sampling)
            asked = replace(asked, tenant=rng.choice(tenants))
            begun += 1
            try:
                pool.add(seq := Sequence(asked, max_model_len=100))
            except RequestError:
                ended += 1  # it could never be admitted
            else:
                live[seq.request_id] = seq
        if live and rng.random() < 0.02:
            seq = live[rng.choice(list(live))]
            assert pool.cancel(seq.request_id) is seq
            seq.finish("cancelled")
            pool.finish(seq)
        plan = pool.schedule()
        for chunk in plan.prefill:
            memory.compute(chunk.seq, chunk.start, chunk.end)
        for seq in plan.decode:
            memory.compute(seq, seq.num_computed, seq.num_computed + 1)
        pool.check_integrity()
        done = [name for name, seq in live.items() if seq.finished]
        ended += len(done)
        for name in done:
            del live[name]
        if begun == 60 and not live:
            break
    assert ended == 60 and pool.free_blocks == blocks, f"{ended} of 60 ended"


def test_the_youngest_gives_way_and_comes_back_first() -> None:
    pool = Scheduler(num_blocks=6, block_size=2, max_running=8, prefill=Prefill(beside=64, alone=64), grows=True)
    memory = Memory(pool, 2)
    old, young, later = (
        Sequence(
            GenerationRequest(request_id=name, prompt_token_ids=(1, 2, 3), sampling=SamplingParams(max_tokens=8)),
            max_model_len=99,
        )
        for name in ("old", "young", "later")
    )
    for seq in (old, young, later):
        pool.add(seq)
    order = []
    while pool.has_work():
        plan = pool.schedule()
        order += [chunk.seq.request_id for chunk in plan.prefill]
        for chunk in plan.prefill:
            memory.compute(chunk.seq, chunk.start, chunk.end)
        for seq in plan.decode:
            memory.compute(seq, seq.num_computed, seq.num_computed + 1)
    assert order == ["old", "young", "young", "later"] and pool.preemptions == 1


def test_what_keeps_an_account_by_step_is_never_preempted() -> None:
    """Nor begun before there is room for all of it."""
    with LLM("builtin:tiny", memory="50%", mode="fast", kv_memory="1200KiB", guard_share=0.0) as llm:
        alone = [llm.generate(prompt, max_tokens=70, record=True)[0] for prompt in PROMPTS[:4]]
        together = llm.generate(PROMPTS[:4], max_tokens=70, record=True)
        snapshot = llm.engine.snapshot()
    assert [result.token_ids for result in together] == [result.token_ids for result in alone]
    assert snapshot.preemptions == 0


def bits(model: str | Path, prompts: list[Any], *, tokens: int = 12, **options: Any) -> Bits:
    with LLM(str(model), **{"memory": "50%", "max_model_len": 128, **options}) as llm:
        found = [r for prompt in prompts for r in llm.generate([prompt], max_tokens=tokens, logprobs=0)]
        llm.engine._scheduler.check_integrity()
        assert (llm.engine.snapshot().cached_tokens > 0) == (options.get("prefix_cache") != "off")
    return [[(item.token_id, item.logprob) for item in result.logprobs] for result in found]


@pytest.mark.parametrize(
    ("family", "form"),
    [
        *((name, {}) for name in ("mixtral", "deepseek_v3", "flex_olmo", "glm4_moe", "ernie4_5_moe", "minimax_m2")),
        ("olmoe", {"dtype": "bfloat16"}),
        ("qwen3_moe", {"expert_dtype": "int4", "dense_dtype": "int8"}),
        ("qwen2_moe", {"dtype": "bfloat16", "threads": 2}),
    ],
)
def test_a_shared_beginning_changes_no_bit(family: str, form: dict[str, Any], tmp_path: Path) -> None:
    """Prompts that continue others, and a conversation that continues its own answers."""
    build_checkpoint(family, tmp_path)
    base = [5 + (7 * i) % 90 for i in range(70)]
    prompts = [base[:40], base[:52], base[:16] + base[30:60], base, base[:40]]
    whole = bits(tmp_path, prompts, prefix_cache="off", **form)
    assert bits(tmp_path, prompts, **form) == whole
    turn = prompts[0] + [token for token, _ in whole[0]]
    conversation = [prompts[0], turn + base[50:57]]
    assert bits(tmp_path, conversation, **form) == bits(tmp_path, conversation, prefix_cache="off", **form)


def test_where_bits_could_change_nothing_is_shared_unless_it_is_asked_for(tmp_path: Path) -> None:
    """gpt_oss's experts are torch's, whose products of many rows have other bits than those of few."""
    build_checkpoint("gpt_oss", tmp_path)
    prompt = [5 + (7 * i) % 90 for i in range(70)]
    cached, tokens = [], []
    for prefix_cache in ("auto", "on"):
        with LLM(str(tmp_path), memory="50%", prefix_cache=prefix_cache) as llm:
            results = [llm.generate([prompt], max_tokens=4)[0] for _ in range(2)]
        cached.append([result.usage.cached_tokens for result in results])
        tokens.append({result.token_ids for result in results})
    assert cached == [[0, 0], [0, 64]] and tokens[0] == tokens[1]
    with pytest.raises(ConfigError, match="prefix_cache is 'on', must be auto or off where batching is solo"):
        LLM(str(tmp_path), batching="solo", prefix_cache="on")


def test_a_second_turn_computes_what_is_new() -> None:
    with LLM("builtin:tiny", memory="25%") as llm:
        prompt = llm.engine.encode(PROMPTS[0] * 20)
        [first] = llm.generate([prompt], max_tokens=40, ignore_eos=True)
        before = llm.engine.snapshot()
        [second] = llm.generate([[*prompt, *first.token_ids, 5, 6, 7]], max_tokens=4)
        after = llm.engine.snapshot()
    known = first.usage.prompt_tokens + first.usage.completion_tokens - 1  # the last token was never computed
    assert first.usage.cached_tokens == 0 and known - 16 < second.usage.cached_tokens <= known
    assert after.cached_tokens - before.cached_tokens == second.usage.cached_tokens
    assert after.prompt_tokens - before.prompt_tokens == second.usage.prompt_tokens


@pytest.mark.parametrize("prefix_cache", ["auto", "off"])
def test_conversations_in_a_third_of_the_cache_they_need(prefix_cache: str) -> None:
    """All end with the tokens that they have with room for all."""

    def tokens(kv_memory: str) -> tuple[list[tuple[int, ...]], Any]:
        with LLM("builtin:tiny", memory="100%", max_running=16, kv_memory=kv_memory, prefix_cache=prefix_cache) as llm:
            results = llm.generate(PROMPTS, max_tokens=60, temperature=0.0, ignore_eos=True)
            llm.engine._scheduler.check_integrity()
            seen, usages = llm.engine.snapshot(), [result.usage for result in results]
            assert seen.prompt_tokens == sum(usage.prompt_tokens for usage in usages), "each counts once"
            assert seen.cached_tokens == sum(usage.cached_tokens for usage in usages)
            return [result.token_ids for result in results], seen

    roomy, unhurried = tokens("auto")
    assert unhurried.preemptions == 0
    tight, seen = tokens("1900KiB")
    assert tight == roomy and seen.preemptions > 0 and seen.free_kv_blocks == seen.total_kv_blocks
    assert seen.total_kv_blocks * 3 <= 16 * 5, "16 texts of 75 tokens need 5 blocks each"


def test_exact_requests_never_see_what_a_stand_in_touched() -> None:
    """A fast answer, continued exactly: of it the prompt alone is shared."""
    with LLM("builtin:tiny", memory="25%", mode="fast", guard_share=0.0) as llm:
        [fast] = llm.generate([PROMPTS[0] * 6], max_tokens=60, ignore_eos=True)
        assert fast.usage.standins.total > 0
        text = PROMPTS[0] * 6 + fast.text
        [exact] = llm.generate([text], max_tokens=20, mode="exact")
        [again] = llm.generate([text], max_tokens=20, mode="fast")
        [recorded] = llm.generate([PROMPTS[1] * 6], max_tokens=60, ignore_eos=True, record=True)
        llm.generate([PROMPTS[1] * 6], max_tokens=60, ignore_eos=True, replay=recorded.usage.record)
        [after] = llm.generate([PROMPTS[1] * 6 + recorded.text], max_tokens=20, mode="exact")
    assert 0 < exact.usage.cached_tokens <= fast.usage.prompt_tokens
    assert 0 < after.usage.cached_tokens <= recorded.usage.prompt_tokens, "a replay runs as exact, and is not"
    assert again.usage.cached_tokens > fast.usage.prompt_tokens, "its prompt was computed exactly for the other"
    with LLM("builtin:tiny", memory="25%") as llm:
        [alone] = llm.generate([text], max_tokens=20)
    assert exact.token_ids == alone.token_ids


def told(engine: Engine, text: str, **more: Any) -> list[TokenEvent]:
    ids = tuple(engine.encode(text))
    engine.add(GenerationRequest(request_id="x", prompt_token_ids=ids, **more))
    return engine.drain()


def test_only_the_same_salt_shares() -> None:
    with LLM("builtin:tiny") as llm:
        found = [llm.generate(PROMPTS[0] * 6, cache_salt=salt)[0] for salt in ("", "one", "two", "one")]
        with pytest.raises(RequestError, match="cache_salt is"):
            llm.generate(PROMPTS[0], cache_salt=5)
    cached = [result.usage.cached_tokens for result in found]
    assert cached[:3] == [0, 0, 0] and cached[3] > 0


def test_a_failing_request_leaves_what_others_share_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever finds out whether the engine is broken computes on a block of its own."""
    with LLM("builtin:tiny", memory="100%") as llm:
        sampling = SamplingParams(max_tokens=20, temperature=0.0, logprobs=0)
        whole = told(llm.engine, PROMPTS[0] * 6, sampling=sampling)
        runner, prefill = llm.engine._runner, llm.engine._runner.prefill

        def broken(chunks: Any) -> Any:
            if chunks[0].seq.request_id != "probe":
                raise ValueError("it cannot be computed")
            return prefill(chunks)

        monkeypatch.setattr(runner, "prefill", broken)
        [failed] = told(llm.engine, PROMPTS[0] * 6, sampling=sampling)
        assert failed.error is not None and "internal error" in failed.error
        monkeypatch.undo()
        after = told(llm.engine, PROMPTS[0] * 6, sampling=sampling)
        llm.engine._scheduler.check_integrity()
    assert after[-1].usage is not None and after[-1].usage.cached_tokens > 0
    assert [event.logprobs for event in after] == [event.logprobs for event in whole]


def test_another_tenant_has_its_turn_and_no_token_changes() -> None:
    """Two places, six requests of one tenant, then one of another: it does not wait for any of them to end."""
    sampling = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
    with LLM("builtin:tiny", memory="50%", max_running=2) as llm:
        alone = [each.token_ids for each in llm.generate(PROMPTS[:7], max_tokens=40, temperature=0.0, ignore_eos=True)]
        prompts = [tuple(llm.engine.encode(text)) for text in PROMPTS[:7]]
        made: dict[str, list[int]] = {}
        order: list[str] = []

        def add(at: int, tenant: str) -> None:
            asked = GenerationRequest(request_id=str(at), prompt_token_ids=prompts[at], sampling=sampling)
            llm.engine.add(replace(asked, tenant=tenant))

        for at in range(6):
            add(at, "many")
        for step in range(1000):
            if step == 10:
                add(6, "one")
            for event in llm.engine.step():
                made.setdefault(event.request_id, []).extend(event.token_ids)
                order += [event.request_id] if event.finish_reason else []
            if step > 10 and not llm.engine.has_work():
                break
        assert llm.engine.snapshot().preemptions == 1 and order.index("6") <= 2, order
        assert [tuple(made[str(at)]) for at in range(7)] == alone
