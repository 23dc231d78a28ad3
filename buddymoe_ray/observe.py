"""What is measured while serving, as plain records; exporters live above.

Knows neither torch nor ray. `EngineSnapshot` is read by the service's health page, the bench and the tests.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from buddymoe_ray.types import CalibrationState, CalibrationUsage, GuardState, StandinAccesses

__all__ = [
    "CalibrationSnapshot",
    "EngineSnapshot",
    "ExpertMap",
    "GuardSnapshot",
    "HistogramSnapshot",
    "PlacementSnapshot",
    "RequestsSnapshot",
    "peak_rss_bytes",
    "process_read_bytes",
    "progress",
    "smoothed",
]

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class GuardSnapshot:
    """What the guard has seen. Means are per token, in nats, over the latest `sampled_tokens`, `predicted` is before it
    is multiplied with `factor`, as what is charged now is; `reason` says why it tripped or is off."""

    state: GuardState = "off"
    measured_kl: float = 0.0
    measured_se: float = 0.0
    predicted: float = 0.0
    factor: float = 1.0
    sampled_tokens: int = 0
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class CalibrationSnapshot:
    """How far an engine's own calibration is: `percent` of the work in the background, `record_bytes` on the disk,
    stand-ins measured on `tokens`. What they are said to cost is multiplied by `factor` before it is charged (the
    guard's, where nothing is on trial); inf while they may not answer, and `reason` says why."""

    state: CalibrationState = "none"
    tokens: int = 0
    percent: float = 0.0
    record_bytes: int = 0
    factor: float = 1.0
    reason: str = ""

    @property
    def usage(self) -> CalibrationUsage:
        """What a request is told."""
        return CalibrationUsage(state=self.state, tokens=self.tokens)


@dataclass(frozen=True, kw_only=True)
class HistogramSnapshot:
    """How many values were at most each of the `bounds`, and above the one before; the last count is of all above.
    `total` is their sum."""

    bounds: tuple[float, ...] = ()
    counts: tuple[int, ...] = (0,)
    total: float = 0.0


@dataclass(frozen=True, kw_only=True)
class RequestsSnapshot:
    """What requests took. `ended` counts them by finish reason; TTFT and `whole_seconds` count from admission, which
    `queue_seconds` end and `prefill_seconds` and `computing_seconds` begin at the first step; `per_token_seconds` are a
    request's mean, `most_tokens` what it allowed."""

    generated_tokens: int = 0
    ended: Mapping[str, int] = field(default_factory=dict)
    ttft_seconds: HistogramSnapshot = HistogramSnapshot()
    itl_seconds: HistogramSnapshot = HistogramSnapshot()
    per_token_seconds: HistogramSnapshot = HistogramSnapshot()
    whole_seconds: HistogramSnapshot = HistogramSnapshot()
    queue_seconds: HistogramSnapshot = HistogramSnapshot()
    prefill_seconds: HistogramSnapshot = HistogramSnapshot()
    decode_seconds: HistogramSnapshot = HistogramSnapshot()
    computing_seconds: HistogramSnapshot = HistogramSnapshot()
    prompt_tokens: HistogramSnapshot = HistogramSnapshot()
    output_tokens: HistogramSnapshot = HistogramSnapshot()
    most_tokens: HistogramSnapshot = HistogramSnapshot()


@dataclass(frozen=True, kw_only=True)
class EngineSnapshot:
    """State of one engine at one moment; counters are cumulative since start.

    `hits` and `misses` count (layer, expert) lookups of the cache, `bytes_read_disk` what the disk was asked for
    (alignment included), `stall_seconds` the time the model waited for experts; `peer_slot_reads` are misses that were
    copied from the slots of another GPU of the node, `peer_helped_reads` of them read there for a prompt of this one's,
    `peer_taken_back` were to be read there, and were read here. `access_hits`, `access_peer`, `access_host`,
    `access_fetched` and `standins` count (token, slot) accesses of decode steps, `expected_rise` the nats charged for
    stand-ins. `residency` is the share of the routed experts that are in device slots (the node's, where shared).
    `read_ahead_useful_bytes` and `.._wasted_bytes` are of experts whose reading was begun on a guess that turned out
    right, or not. Of the `prompt_tokens` of requests begun, `cached_tokens` were found, not computed; `preemptions`
    counts how often a request's KV blocks went to an older one, for it to be computed again. `link_bytes` went to and
    came from workers of other nodes that computed missing experts.
    """

    running: int
    waiting: int
    free_kv_blocks: int
    total_kv_blocks: int
    steps: int
    hits: int
    misses: int
    bytes_loaded_device: int
    bytes_read_disk: int
    stall_seconds: float
    peer_slot_reads: int = 0
    peer_helped_reads: int = 0
    peer_taken_back: int = 0
    access_hits: int = 0
    access_peer: int = 0
    access_host: int = 0
    access_fetched: int = 0
    standins: StandinAccesses = field(default_factory=StandinAccesses)
    expected_rise: float = 0.0
    residency: float = 0.0
    preemptions: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    read_ahead_useful_bytes: int = 0
    read_ahead_wasted_bytes: int = 0
    guard: GuardSnapshot = field(default_factory=GuardSnapshot)
    calibration: CalibrationSnapshot = field(default_factory=CalibrationSnapshot)
    requests: RequestsSnapshot = field(default_factory=RequestsSnapshot)
    link_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class PlacementSnapshot:
    """Which map of the placement a worker's node follows, and how long ago the placement last said so: while that is
    away the last map stands, and ages."""

    epoch: int
    age_seconds: float


@dataclass(frozen=True, kw_only=True)
class ExpertMap:
    """Where an engine's experts are and how much each is used: a byte per expert, layer by layer.

    Bit 0: in a slot; bit 1: has a stand-in record in memory; bit 2: in the host tier; from bit 3 on the rounded 31 *
    sqrt(share), of the layer's latest steps those that asked for it (an access counts half after 32 steps; 0 where
    nothing is ever evicted).
    """

    experts_per_layer: tuple[int, ...]
    cells: bytes


class _Bar:
    """The process's one bar: what is open, and what earlier phases have counted."""

    open: Any = None
    done: int = 0


def progress(items: Iterable[T], *, total: int, desc: str) -> Iterable[T]:
    """The items, counted by one bar on stderr while a person watches; the phases of a command go on in the same bar."""
    watched = sys.stderr.isatty() and multiprocessing.parent_process() is None
    return _counted(items, total, desc) if watched else items


def _counted(items: Iterable[T], total: int, desc: str) -> Iterator[T]:
    from tqdm import tqdm  # late: nobody watches most processes

    outer = _Bar.open
    bar: Any = outer or tqdm(initial=_Bar.done, total=_Bar.done, leave=False, file=sys.stderr)
    bar.total += total
    bar.set_description(desc)
    _Bar.open = bar
    try:
        for item in items:
            yield item
            bar.update()
    finally:
        if outer is None:
            _Bar.done, _Bar.open = bar.n, None
            bar.close()


def smoothed(before: float, now: float, share: float) -> float:
    """A running mean in which what is measured `now` has this share; the first one alone, where `before` is 0."""
    return before + (share if before else 1.0) * (now - before)


def peak_rss_bytes() -> int:
    """Highest resident set of this process (bytes), from the kernel's own count."""
    return _status_field("VmHWM") * 1024


def process_read_bytes() -> int | None:
    """Bytes this process made the kernel fetch from storage, or None where the kernel does not say."""
    try:
        with open("/proc/self/io") as lines:
            return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))
    except (OSError, StopIteration):
        return None


def _status_field(name: str) -> int:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(name))
