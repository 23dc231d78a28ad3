"""Measure one engine: prefill and decode speed, latencies, bytes read, stalls, hit rate.

Drives the Engine that serves, step by step, with all requests of a batch handed over at once. Figures that do not
depend on the clock (bytes, hit rate) stand beside those that do. Knows nothing of printing.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from buddymoe_ray.config import EngineConfig
from buddymoe_ray.engine.engine import Engine
from buddymoe_ray.engine.measure_beside import Beside, run_beside
from buddymoe_ray.errors import ConfigError
from buddymoe_ray.observe import EngineSnapshot, peak_rss_bytes, process_read_bytes
from buddymoe_ray.residency.sharing import Sharing
from buddymoe_ray.types import GenerationRequest, SamplingParams, Usage

__all__ = ["Measurement", "BenchLoad", "measure"]


@dataclass(frozen=True, kw_only=True)
class BenchLoad:
    """`batch` requests of `prompt_tokens` random or given ids, `new_tokens` each, `reps` times over. With 2 `turns`
    every prompt comes once more, with its answer appended, for one token. With `beside` the requests also decode beside
    a prompt of so many tokens. With a `temperature` tokens are drawn: random weights repeat themselves else."""

    batch: int
    prompt_tokens: int
    new_tokens: int
    reps: int
    ids: tuple[int, ...] = ()
    seed: int = 0
    turns: int = 1
    beside: int = 0
    temperature: float = 0.0

    def check(self, limit: int) -> None:
        """That a model of so many tokens can do it. Raises ConfigError."""
        turns = self.prompt_tokens + (self.turns > 1) * self.new_tokens
        for name, tokens in (("prompt_tokens", turns), ("beside", self.beside)):
            if tokens >= limit:
                raise ConfigError(
                    f"{name} is {getattr(self, name)}, must be below the model's {limit} tokens"
                    f"{' with the answer' * (tokens > getattr(self, name))}. hint: lower it, or raise max_model_len"
                )

    def sampling(self, new_tokens: int) -> SamplingParams:
        """The same for every engine."""
        return SamplingParams(temperature=self.temperature, seed=self.seed, max_tokens=new_tokens, ignore_eos=True)

    def prompts(self, rep: int, vocab_size: int) -> list[tuple[int, ...]]:
        """Different prompts for every repetition, the same for every engine."""
        return self._drawn(f"{self.seed}-{rep}", vocab_size, self.batch, self.prompt_tokens)

    def long_prompts(self, rep: int, vocab_size: int) -> list[tuple[int, ...]]:
        """Three of `beside` tokens."""
        return self._drawn(f"{self.seed}-{rep}-beside", vocab_size, 3, self.beside)

    def _drawn(self, seed: str, vocab_size: int, count: int, tokens: int) -> list[tuple[int, ...]]:
        rng = random.Random(seed)
        if not self.ids:
            return [tuple(rng.randrange(vocab_size) for _ in range(tokens)) for _ in range(count)]
        starts = [rng.randrange(max(1, len(self.ids) - tokens)) for _ in range(count)]
        return [self.ids[start : start + tokens] for start in starts]


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Medians over repetitions; experts are `expert_bytes` in all, in `expert_format` (those served in int8 and int4
    are packed in uint8); `decode_tok_s_spread` is (max - min) / median.

    `bytes_read_per_token` counts what decode steps asked of the disk (alignment included); `process_read_bytes` is the
    kernel's count for the whole process, loading included. `read_ahead_bytes_per_token` were begun on a guess, of which
    the share `read_ahead_right` was asked for (None: none was). `ttft_second_turn_ms` and `cached_tokens` (of a prompt,
    the mean) are of the second turn, None without one. `beside_..` are of a long prompt and of those who decode
    meanwhile, each beside the other and alone; None without one.
    """

    decode_tok_s: float
    decode_tok_s_spread: float
    prefill_tok_s: float
    ttft_ms: float
    p99_itl_ms: float
    expert_format: str
    expert_bytes: int
    peak_rss_bytes: int
    bytes_read_per_token: float
    prefill_bytes_read: float
    total_bytes_read: int
    process_read_bytes: int | None
    hit_rate: float
    standin_rate: float
    expected_rise: float
    stall_ms_per_token: float
    load_seconds: float
    ttft_second_turn_ms: float | None
    cached_tokens: float | None
    read_ahead_bytes_per_token: float
    read_ahead_right: float | None
    beside_ttft_ms: float | None
    beside_ttft_alone_ms: float | None
    beside_p99_itl_ms: float | None
    beside_p99_itl_alone_ms: float | None

    def as_record(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(kw_only=True)
class _Rep:
    prefill_seconds: float
    decode_seconds: float
    prompt_tokens: int
    decoded: int
    ttfts: list[float]
    gaps: list[float]
    prefill_bytes: int
    decode_bytes: int
    stall_seconds: float
    ahead_useful: int
    ahead_wasted: int
    usages: list[Usage]
    answered: list[tuple[int, ...]]  # prompts with their answers


def measure(
    config: EngineConfig,
    workload: BenchLoad,
    *,
    sharing: Sharing | None = None,
    gate: Callable[[], object] = lambda: None,
) -> Measurement:
    """Build the engine, run one short warm-up and `reps` repetitions, close it.

    `sharing` says with whom it shares its experts; `gate` is called before every repetition and before closing, so that
    engines side by side begin together.
    """
    started = time.perf_counter()
    engine = Engine.from_config(config, sharing=sharing)
    load_seconds = time.perf_counter() - started
    try:
        workload.check(engine.limits.max_model_len)
        few, many, one = (workload.sampling(count) for count in (2, workload.new_tokens, 1))
        _run(engine, workload.prompts(-1, engine.vocab_size), few, tag="warm")
        reps, seconds, besides = list[_Rep](), list[_Rep](), list[Beside]()
        for r in range(workload.reps):
            gate()
            prompts = workload.prompts(r, engine.vocab_size)
            reps.append(_run(engine, prompts, many, tag=f"r{r}"))
            if workload.turns > 1:
                seconds.append(_run(engine, reps[-1].answered, one, tag=f"r{r}-again"))
            if workload.beside:
                besides.append(run_beside(engine, prompts, workload.long_prompts(r, engine.vocab_size)))
        gate()
        return _summarise(reps, seconds, engine, load_seconds, _beside(besides))
    finally:
        engine.close()


def _run(engine: Engine, prompts: Sequence[tuple[int, ...]], sampling: SamplingParams, *, tag: str) -> _Rep:
    for at, prompt in enumerate(prompts):
        engine.add(GenerationRequest(request_id=f"{tag}-{at}", prompt_token_ids=prompt, sampling=sampling))
    begin, before = time.perf_counter(), engine.snapshot()
    last: dict[str, float] = {}
    texts = {f"{tag}-{at}": list(prompt) for at, prompt in enumerate(prompts)}
    ttfts, gaps, usages = list[float](), list[float](), list[Usage]()
    boundary: tuple[float, EngineSnapshot, int] | None = None
    tokens = 0
    while engine.has_work():
        events = engine.step()
        now = time.perf_counter()
        for event in events:
            tokens += len(event.token_ids)
            texts[event.request_id] += event.token_ids
            (gaps if event.request_id in last else ttfts).append(now - last.get(event.request_id, begin))
            last[event.request_id] = now
            if event.usage is not None:
                usages.append(event.usage)
        if boundary is None and len(ttfts) == len(prompts):
            boundary = (now, engine.snapshot(), tokens)
    assert boundary is not None, "no request produced a token"
    end, after = time.perf_counter(), engine.snapshot()
    return _Rep(
        prefill_seconds=boundary[0] - begin,
        decode_seconds=end - boundary[0],
        prompt_tokens=sum(map(len, prompts)),
        decoded=tokens - boundary[2],
        ttfts=ttfts,
        gaps=gaps,
        prefill_bytes=boundary[1].bytes_read_disk - before.bytes_read_disk,
        decode_bytes=after.bytes_read_disk - boundary[1].bytes_read_disk,
        stall_seconds=after.stall_seconds - boundary[1].stall_seconds,
        ahead_useful=after.read_ahead_useful_bytes - boundary[1].read_ahead_useful_bytes,
        ahead_wasted=after.read_ahead_wasted_bytes - boundary[1].read_ahead_wasted_bytes,
        usages=usages,
        answered=[tuple(text) for text in texts.values()],
    )


def _beside(found: list[Beside]) -> dict[str, float | None]:
    """Medians of first tokens, and the 99th of a hundred gaps."""
    return {
        "beside_ttft_ms": _milliseconds([each.prompt for each in found], 0.5),
        "beside_ttft_alone_ms": _milliseconds([each.prompt_alone for each in found], 0.5),
        "beside_p99_itl_ms": _milliseconds([gap for each in found for gap in each.gaps], 0.99),
        "beside_p99_itl_alone_ms": _milliseconds([gap for each in found for gap in each.gaps_alone], 0.99),
    }


def _milliseconds(seconds: list[float], share: float) -> float | None:
    return 1e3 * sorted(seconds)[min(len(seconds) - 1, int(share * len(seconds)))] if seconds else None


def _summarise(
    reps: list[_Rep],
    seconds: list[_Rep],
    engine: Engine,
    load_seconds: float,
    beside: dict[str, float | None],
) -> Measurement:
    end, layout = engine.snapshot(), engine.cache.layout
    speeds = [rep.decoded / rep.decode_seconds for rep in reps if rep.decoded]
    gaps = [gap for rep in reps for gap in rep.gaps]
    decoded = max(1, sum(rep.decoded for rep in reps))
    usages = [usage for rep in reps for usage in rep.usages]
    hits, fetched = sum(u.hits for u in usages), sum(u.fetched + u.peer + u.host for u in usages)
    stood_in = sum(u.standins.total for u in usages)
    accesses = hits + fetched + stood_in
    median = statistics.median(speeds) if speeds else 0.0
    useful, wasted = sum(rep.ahead_useful for rep in reps), sum(rep.ahead_wasted for rep in reps)
    return Measurement(
        decode_tok_s=median,
        decode_tok_s_spread=(max(speeds) - min(speeds)) / median if speeds else 0.0,
        prefill_tok_s=statistics.median(rep.prompt_tokens / rep.prefill_seconds for rep in reps),
        ttft_ms=1e3 * statistics.median(t for rep in reps for t in rep.ttfts),
        p99_itl_ms=_milliseconds(gaps, 0.99) or 0.0,
        expert_format=layout.stored_as,
        expert_bytes=layout.total_bytes,
        peak_rss_bytes=peak_rss_bytes(),
        bytes_read_per_token=sum(rep.decode_bytes for rep in reps) / decoded,
        prefill_bytes_read=statistics.median(rep.prefill_bytes for rep in reps),
        total_bytes_read=end.bytes_read_disk,
        process_read_bytes=process_read_bytes(),
        hit_rate=100 * hits / accesses if accesses else 100.0,
        standin_rate=100 * stood_in / accesses if accesses else 0.0,
        expected_rise=sum(u.expected_rise for u in usages) / decoded,
        stall_ms_per_token=1e3 * sum(rep.stall_seconds for rep in reps) / decoded,
        load_seconds=load_seconds,
        ttft_second_turn_ms=1e3 * statistics.median(t for r in seconds for t in r.ttfts) if seconds else None,
        cached_tokens=statistics.fmean(u.cached_tokens for r in seconds for u in r.usages) if seconds else None,
        read_ahead_bytes_per_token=(useful + wasted) / decoded,
        read_ahead_right=useful / (useful + wasted) if useful + wasted else None,
        **beside,
    )
