"""The engine as its callers see it: lifecycle, limits, failures that stay with their request, budgets, snapshots."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from families import build_checkpoint

from buddymoe_ray import LLM, EngineConfig, SamplingParams
from buddymoe_ray.engine.engine import Engine
from buddymoe_ray.errors import BudgetError, CheckpointError, ConfigError, RequestError
from buddymoe_ray.models.tiny import path
from buddymoe_ray.types import GenerationRequest

GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)


def request(name: str, *ids: int, sampling: SamplingParams = GREEDY) -> GenerationRequest:
    return GenerationRequest(request_id=name, prompt_token_ids=ids or (5, 6, 7), sampling=sampling)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("qwen3_moe")
    build_checkpoint("qwen3_moe", made)
    return made


@pytest.fixture
def engine(folder: Path):
    made = Engine.from_config(
        EngineConfig(model=str(folder), memory="50%", max_running=2, max_model_len=64, prefill_chunk=4)
    )
    yield made
    made.cache.check_integrity()
    made._scheduler.check_integrity()
    made.close()


def test_every_accepted_request_ends_exactly_once(engine: Engine) -> None:
    for at in range(5):
        engine.add(request(f"r{at}", *range(5, 10 + 3 * at)))
    ends = [event for event in engine.drain() if event.finish_reason is not None]
    assert sorted(event.request_id for event in ends) == [f"r{at}" for at in range(5)]
    assert all(event.usage is not None and event.usage.completion_tokens == 8 for event in ends)
    assert not engine.has_work() and engine.step() == []


def test_usage_counts_every_expert_use_of_decode(engine: Engine) -> None:
    engine.add(request("r"))
    usage = engine.drain()[-1].usage
    assert usage is not None
    # 8 tokens: the first comes from prefill, 7 decode steps of 3 layers with 3 experts each
    assert usage.hits + usage.fetched == 7 * 3 * 3 and usage.fetched > 0


def test_threads_take_turns_and_nothing_is_generated_after_the_end(folder: Path) -> None:
    prompts = [[[5 + at, 6, 7, 8 + at]] * 2 for at in range(4)]
    with LLM(str(folder), memory="50%") as llm, ThreadPoolExecutor(4) as pool:
        alone = [[result.token_ids for result in llm.generate(several, GREEDY)] for several in prompts]
        together = list(pool.map(lambda several: llm.generate(several, GREEDY), prompts))
    assert [[result.token_ids for result in results] for results in together] == alone
    with pytest.raises(RequestError, match="is closed"):
        llm.generate([5])


def test_a_cancelled_request_frees_its_blocks_before_the_next_step(engine: Engine) -> None:
    before = engine.snapshot().free_kv_blocks
    engine.add(request("a"))
    engine.add(request("b"))
    engine.add(request("waits"))
    engine.step()
    engine.cancel("a")
    engine.cancel("waits")
    engine.cancel("never heard of")
    held = before - engine.snapshot().free_kv_blocks
    assert held == 1, "b alone holds a block"
    events = engine.drain()
    assert {e.request_id: e.finish_reason for e in events if e.finish_reason} == {
        "a": "cancelled",
        "waits": "cancelled",
        "b": "length",
    }
    assert engine.snapshot().free_kv_blocks == before


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (request("x", *range(5, 69)), "must be at most 63"),
        (request("x", 5, 160), r"token id 160, must be in \[0, 160\)"),
        (request("x", sampling=SamplingParams(max_tokens=0)), "max_tokens is 0"),
        (request("x", sampling=SamplingParams(stop=("a",))), "without tokenizer"),
    ],
)
def test_bad_requests_are_refused_and_leave_nothing(engine: Engine, made: GenerationRequest, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        engine.add(made)
    assert not engine.has_work()


def test_an_unreadable_expert_fails_its_requests_and_the_engine_goes_on(folder: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    shard = next(copy.glob("*.safetensors"))
    whole = shard.read_bytes()
    engine = Engine.from_config(EngineConfig(model=str(copy), memory="30%", max_model_len=64))
    engine.add(request("first"))
    assert engine.drain()[-1].finish_reason == "length"
    shard.write_bytes(whole[:1000])
    engine.add(request("second", *range(20, 40)))
    last = engine.drain()[-1]
    assert last.finish_reason == "error" and shard.name in (last.error or "") and "hint" in (last.error or "")
    shard.write_bytes(whole)
    engine.add(request("third"))
    assert engine.drain()[-1].finish_reason == "length"
    engine.cache.check_integrity()
    engine.close()


def test_a_repaired_run_gives_the_same_tokens(folder: Path) -> None:
    """What was decoded beside a cancelled or failed request is what is decoded alone."""
    with LLM(str(folder), memory="30%", max_running=3) as llm:
        alone = llm.generate([[5, 6, 7]], max_tokens=12)[0].token_ids
        engine = llm.engine
        engine.add(request("noise", 9, 9, 9, 9))
        engine.add(request("kept", 5, 6, 7, sampling=SamplingParams(temperature=0.0, max_tokens=12)))
        tokens = [t for e in engine.step() + engine.step() for t in e.token_ids if e.request_id == "kept"]
        engine.cancel("noise")
        tokens += [t for e in engine.drain() for t in e.token_ids if e.request_id == "kept"]
        assert tuple(tokens) == alone


def test_sampling_with_a_seed_does_not_depend_on_the_batch(folder: Path) -> None:
    sampling = SamplingParams(temperature=1.0, top_p=0.9, seed=7, max_tokens=16, ignore_eos=True)
    with LLM(str(folder), memory="50%", max_running=4) as llm:
        alone = llm.generate([[5, 6, 7]], sampling)[0].token_ids
        beside = llm.generate([[9, 8], [5, 6, 7], [3, 4, 5, 6, 7, 8]], sampling)[1].token_ids
    assert alone == beside


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"memory": "1%"}, BudgetError, "hint: use --memory"),
        ({"memory": "lots"}, ConfigError, "must be like 25% or 6GiB"),
        ({"max_model_len": 100_000}, ConfigError, "must be at most 256"),
        ({"device": "cuda:7"}, ConfigError, "CUDA devices"),
        ({"mode": "quick"}, ConfigError, "must be exact"),
        ({"threads": 0}, ConfigError, "threads is 0"),
        ({"generation_config": "none"}, ConfigError, "must be left out: generate"),
        ({"kv_memory": "1KiB"}, BudgetError, "raise kv_memory"),
    ],
)
def test_bad_options_are_refused_before_serving(folder: Path, options, error, message) -> None:
    with pytest.raises(error, match=message):
        LLM(str(folder), **options)


def test_a_cache_of_all_that_is_promised_is_enough(folder: Path) -> None:
    with LLM(str(folder), max_running=1, max_model_len=10) as llm:
        assert llm.engine.limits.kv_tokens == 16
        assert len(llm.generate([[5, 6, 7]] * 2, max_tokens=7, ignore_eos=True)[1].token_ids) == 7


def test_unknown_options_and_models_are_refused() -> None:
    with pytest.raises(ConfigError, match="memry"):
        LLM("builtin:tiny", memry="25%")
    with pytest.raises((ConfigError, CheckpointError), match="nowhere"):
        LLM("/nowhere/at/all")


def test_packed_batching_is_refused_where_an_indexer_chooses_keys(tmp_path: Path) -> None:
    build_checkpoint("deepseek_v32", tmp_path)
    with pytest.raises(ConfigError, match="must be 'solo'"):
        LLM(str(tmp_path), batching="packed")


def test_a_small_kv_cache_bounds_the_model_length(folder: Path) -> None:
    with LLM(str(folder), memory="50%", kv_memory="64KiB", max_running=2) as llm:
        limit = llm.engine.limits.max_model_len
        assert limit < 256 and llm.engine.limits.kv_tokens >= limit
        with pytest.raises(RequestError, match=f"limit of {limit}"):
            llm.generate([list(range(5, 5 + 100)) * 2], max_tokens=4)


def test_device_bytes_never_exceed_the_budget(folder: Path) -> None:
    for memory in ("20%", "37%", "80%", "100%"):
        with LLM(str(folder), memory=memory) as llm:
            cache = llm.engine.cache
            held = cache.device_bytes + cache.plan.overhead_bytes
            assert held <= cache.plan.budget_bytes, f"{memory}: {held} of {cache.plan.budget_bytes}"


def test_a_long_prompt_reads_each_missing_expert_once() -> None:
    """However many chunks it would be beside others."""
    with LLM("builtin:tiny", memory="25%") as llm:
        layout, cache = llm.engine.cache.layout, llm.engine.cache
        resident = sum(len(cache.resident(layer)) for layer in range(len(layout.experts_per_layer)))
        missing = (sum(layout.experts_per_layer) - resident) * layout.expert_bytes
        before = cache.stats().bytes_read_disk
        llm.generate([[5 + at % 900 for at in range(1000)]], max_tokens=1)
        assert cache.stats().bytes_read_disk - before <= 1.1 * missing


def test_an_end_token_that_only_the_tokenizer_knows_ends_answers(tmp_path: Path) -> None:
    for file in path().iterdir():
        if file.name not in ("config.json", "generation_config.json"):
            (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").write_text(
        json.dumps(json.loads((path() / "config.json").read_text()) | {"eos_token_id": None})
    )
    engine = Engine.from_config(EngineConfig.from_options(model=str(tmp_path), memory="100%"))
    ids = engine.encode_chat([{"role": "user", "content": "What is 347 + 85?"}])
    engine.add(request("r", *ids, sampling=SamplingParams(temperature=0.0, max_tokens=64)))
    last = engine.drain()[-1]
    engine.close()
    assert (last.finish_reason, last.token_ids) == ("stop", (engine.tokenizer.eos_token_id,))
