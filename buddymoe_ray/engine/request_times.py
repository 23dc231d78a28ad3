"""How long requests took and how large they were, as histograms: from when they were admitted to their last token.

Fed by the engine's thread, read from any. The bounds are vLLM's, whose dashboards know them. Knows no scheduler.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from buddymoe_ray.engine.sequence import Sequence
from buddymoe_ray.observe import HistogramSnapshot, RequestsSnapshot
from buddymoe_ray.types import TokenEvent

__all__ = ["RequestTimes"]

_TTFT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
_ITL = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_WHOLE = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
_TOKENS = tuple(float(step * 10**power) for power in range(6) for step in (1, 2, 5))


class _Histogram:
    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds, self._counts, self._total = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._total += value

    def snapshot(self) -> HistogramSnapshot:
        return HistogramSnapshot(bounds=self._bounds, counts=tuple(self._counts), total=self._total)


@dataclass(kw_only=True)
class _Times:
    """When a request arrived, was begun, gave its first and its newest token (seconds of the clock)."""

    arrived: float
    begun: float | None = None
    first: float | None = None
    newest: float = 0.0


class RequestTimes:
    """Of one engine's requests."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock, self._live = clock, dict[str, _Times]()
        self._generated, self._ended = 0, dict.fromkeys(("stop", "length", "cancelled", "error"), 0)
        self._ttft, self._itl = _Histogram(_TTFT), _Histogram(_ITL)
        self._per_token = _Histogram(_ITL)
        self._whole, self._queue, self._prefill, self._decode, self._computing = (_Histogram(_WHOLE) for _ in range(5))
        self._prompt, self._output, self._most = (_Histogram(_TOKENS) for _ in range(3))

    def arrived(self, seq: Sequence) -> None:
        """It was admitted."""
        self._live[seq.request_id] = _Times(arrived=self._clock())

    def begun(self, sequences: Iterable[Sequence]) -> None:
        """A step computes something of them; of each only the first counts."""
        for seq in sequences:
            times = self._live.get(seq.request_id)
            if times is not None and times.begun is None:
                times.begun = self._clock()
                self._queue.add(times.begun - times.arrived)

    def told(self, seq: Sequence, event: TokenEvent) -> None:
        """It gave tokens, or ended."""
        now, times = self._clock(), self._live.get(seq.request_id)
        if times is None:
            return
        if event.token_ids:
            self._generated += len(event.token_ids)
            if times.first is None:
                times.first = now
                self._ttft.add(now - times.arrived)
            else:
                self._itl.add(now - times.newest)
            times.newest = now
        if event.finish_reason is not None:
            del self._live[seq.request_id]
            self._ended[event.finish_reason] += 1
            self._end(seq, times, now)

    def forget(self) -> None:
        """All requests are gone, untold."""
        self._live.clear()

    def snapshot(self) -> RequestsSnapshot:
        """What was counted so far."""
        return RequestsSnapshot(
            generated_tokens=self._generated,
            ended=dict(self._ended),
            ttft_seconds=self._ttft.snapshot(),
            itl_seconds=self._itl.snapshot(),
            per_token_seconds=self._per_token.snapshot(),
            whole_seconds=self._whole.snapshot(),
            queue_seconds=self._queue.snapshot(),
            prefill_seconds=self._prefill.snapshot(),
            decode_seconds=self._decode.snapshot(),
            computing_seconds=self._computing.snapshot(),
            prompt_tokens=self._prompt.snapshot(),
            output_tokens=self._output.snapshot(),
            most_tokens=self._most.snapshot(),
        )

    def _end(self, seq: Sequence, times: _Times, now: float) -> None:
        self._whole.add(now - times.arrived)
        self._prompt.add(seq.prompt_length)
        self._output.add(made := seq.num_output - seq.num_resumed)
        self._most.add(seq.max_tokens)
        if times.begun is not None and times.first is not None:
            self._prefill.add(times.first - times.begun)
            self._decode.add(times.newest - times.first)
            self._computing.add(times.newest - times.begun)
            if made > 1:
                self._per_token.add((times.newest - times.first) / (made - 1))
