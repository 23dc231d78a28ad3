"""What a long prompt costs those who decode beside it, and what they cost it. Drives the engine that serves."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from buddymoe_ray.engine.engine import Engine
from buddymoe_ray.types import GenerationRequest, SamplingParams

__all__ = ["Beside", "run_beside"]

_ALONE_TOKENS = 48
_ENDLESS = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Beside:
    """Seconds to the prompt's first token, and between the tokens of the streams: alone, and while both go on."""

    prompt_alone: float
    prompt: float
    gaps_alone: list[float]
    gaps: list[float]


def run_beside(engine: Engine, streams: Sequence[tuple[int, ...]], prompts: Sequence[tuple[int, ...]]) -> Beside:
    """Decode `streams` and compute the middle one of three `prompts` beside them, the others before and after alone:
    the machine's speed changes meanwhile. Prompts must differ, lest one be found in the cache."""
    before = _first_token(engine, "before", prompts[0])
    clock = _Gaps(engine)
    for at, ids in enumerate(streams):
        room = engine.limits.max_model_len - len(ids)
        engine.add(_request(f"stream-{at}", ids, min(_ENDLESS, room)))
    for _ in clock.steps(until=_ALONE_TOKENS):
        pass
    alone, clock.gaps = clock.gaps, []
    began = time.perf_counter()
    engine.add(_request("prompt", prompts[1], 1))
    ended = next(now for now, ids in clock.steps() if "prompt" in ids) - began
    for at in range(len(streams)):
        engine.cancel(f"stream-{at}")
    engine.drain()
    after = _first_token(engine, "after", prompts[2])
    return Beside(prompt_alone=(before + after) / 2, prompt=ended, gaps_alone=alone, gaps=clock.gaps)


class _Gaps:
    """Steps of an engine, with the time between the tokens of its streams."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._last = engine, dict[str, float]()
        self.gaps: list[float] = []

    def steps(self, *, until: int | None = None) -> Iterator[tuple[float, set[str]]]:
        """When each step ended and whose tokens it brought, until every stream has so many more, if that is said."""
        told = dict[str, int]()
        while self._engine.has_work() and (until is None or not told or min(told.values()) < until):
            events = self._engine.step()
            now, ids = time.perf_counter(), {event.request_id for event in events if event.token_ids}
            for name in ids:
                if name in self._last:
                    self.gaps.append(now - self._last[name])
                self._last[name], told[name] = now, told.get(name, 0) + 1
            yield now, ids


def _first_token(engine: Engine, name: str, ids: tuple[int, ...]) -> float:
    began = time.perf_counter()
    engine.add(_request(name, ids, 1))
    engine.drain()
    return time.perf_counter() - began


def _request(name: str, ids: tuple[int, ...], tokens: int) -> GenerationRequest:
    sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    return GenerationRequest(request_id=name, prompt_token_ids=ids, sampling=sampling)
