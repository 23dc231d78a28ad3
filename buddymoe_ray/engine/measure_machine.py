"""What this machine computes and reads in a second, with the kernels and engines that serve.

Rates of weights are those of the linear kernels over more of them than caches hold, the overhead of a step and of a
layer that of two engines so small that they compute nothing else; both are kept in the cache folder, by CPU, threads
and versions. Disks differ by folder, and are asked each time: .3 s of direct reads from the model's own shards.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from itertools import cycle
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from buddymoe_ray.cache import DiskReader
from buddymoe_ray.cache.disk import ReadTicket
from buddymoe_ray.config import EngineConfig
from buddymoe_ray.engine.engine import Engine
from buddymoe_ray.engine.measured_file import kept_at, read_kept, write_kept
from buddymoe_ray.kernels import CodedWeight, CpuLinear, PackedMatrix, coded_shapes, pack_plain
from buddymoe_ray.models.expert_dtype import format_of
from buddymoe_ray.models.shape import describe
from buddymoe_ray.models.synth import synth_checkpoint
from buddymoe_ray.observe import progress
from buddymoe_ray.residency.speed import ROWS, MachineSpeed
from buddymoe_ray.types import CodedMatrix, CodeFormat, ExpertPiece, GenerationRequest, SamplingParams

__all__ = ["measure_machine"]

_WIDTH = 2048
_BYTES = 160 << 20  # more than the caches of a socket's core
_FEW = 8
_READ_SECONDS, _IN_FLIGHT, _FLYING_BYTES = 0.1, 4, 64 << 20
_SMALL, _SHALLOW, _DEEP = "qwen3-tiny", 1, 3
_STEPS = 256
_SHORT, _LONG, _PROMPTS = 128, 448, 5
_BROUGHT_SECONDS = 4e-4
"""Of the thread that computes, for each expert that a prompt brings: asking, taking over, a call of its own. Taken from
runs of three shapes, and not measured here."""


def measure_machine(dtypes: Iterable[str], shards: Iterable[Path], *, expert_bytes: int, threads: int) -> MachineSpeed:
    """Measure what is not known yet; seconds per dtype at the first time, else the disk alone."""
    path = kept_at(threads)
    known = read_kept(path)
    rates: dict[str, dict[int, float]] = {
        name: {int(rows): rate for rows, rate in found.items()} for name, found in known.get("weights", {}).items()
    }
    wanted = [name for name in dict.fromkeys(dtypes) if name not in rates]
    measured = progress(wanted, total=len(wanted), desc="measuring this machine, once")
    rates |= {name: _weights_bytes_s(name, threads) for name in measured}
    overhead = known.get("overhead") or _overhead(threads)
    if wanted or "overhead" not in known:
        write_kept(path, {"weights": rates, "overhead": overhead})
    return MachineSpeed(
        weights_bytes_s=rates,
        disk_bytes_s=_disk_bytes_s(list(shards), expert_bytes),
        step_seconds=overhead["step_seconds"],
        layer_seconds=overhead["layer_seconds"],
        token_seconds=overhead["token_seconds"],
        pair_seconds=overhead["pair_seconds"],
        brought_seconds=_BROUGHT_SECONDS,
    )


def _weights_bytes_s(dtype: str, threads: int) -> dict[int, float]:
    """Bytes a second by rows. Of every matrix the best of some passes: what else runs here now is no part of the
    machine."""
    fmt, coded = format_of(dtype), CodeFormat.named(dtype)
    compute = torch.bfloat16 if fmt or coded else getattr(torch, dtype)
    weights: Tensor | PackedMatrix | CodedWeight
    if coded is not None:
        weights = _coded(coded)
    else:
        made = torch.randn(_WIDTH, _WIDTH, generator=torch.Generator().manual_seed(0)).to(compute)
        weights = made if fmt is None else pack_plain(made, fmt)
    each = sum(part.nbytes for part in _parts(weights))
    layers = [CpuLinear(_copied(weights), fmt, compute, None, threads=threads) for _ in range(_BYTES // each)]

    def rate(rows: int) -> float:
        x = torch.ones(rows, _WIDTH, dtype=compute)
        some = layers if rows == 1 else layers[:_FEW]  # more rows hide the caches
        passes = [[_seconds(partial(layer, x), threads) for layer in some] for _ in range(5)]
        return len(some) * each / sum(map(min, zip(*passes, strict=True)))

    return {rows: rate(rows) for rows in ROWS}


def _coded(fmt: CodeFormat) -> CodedWeight:
    """A quantised matrix of any codes."""
    matrix = CodedMatrix(name="weight", format=fmt, parts=1, N=_WIDTH, K=_WIDTH)
    parts = {
        part: torch.full((prod(shape) * getattr(torch, dtype).itemsize,), 0x3B, dtype=torch.uint8)
        .view(getattr(torch, dtype))
        .view(shape)
        for part, (shape, dtype) in coded_shapes(matrix).items()
    }
    return CodedWeight(matrix=matrix, **parts)


def _parts(weights: Tensor | PackedMatrix | CodedWeight) -> list[Tensor]:
    return [weights] if isinstance(weights, Tensor) else [p for p in vars(weights).values() if isinstance(p, Tensor)]


def _copied(weights: Tensor | PackedMatrix | CodedWeight) -> Tensor | PackedMatrix | CodedWeight:
    if isinstance(weights, Tensor):
        return weights.clone()
    made: dict[str, Any] = {name: p.clone() if isinstance(p, Tensor) else p for name, p in vars(weights).items()}
    return type(weights)(**made)


def _overhead(threads: int) -> dict[str, float]:
    """Seconds of a step without layers, of a layer, and of a prompt's token and of what it looks at in a layer: the
    fastest of engines of one and of three small layers, each step of one beside a step of the other, so that a slow
    second is a slow second of both."""
    with ExitStack() as stack:
        engines = [stack.enter_context(_small_engine(layers, threads)) for layers in (_SHALLOW, _DEEP)]
        width = describe(Path(engines[0].config.model)).query_width / _SHALLOW
        short, long = (_per_token(engines, tokens, threads) for tokens in (_SHORT, _LONG))
        for engine in engines:
            _add(engine, (1,) * 16, tokens=_STEPS)
        pairs = [[_seconds(engine.step, threads) for engine in engines] for _ in range(_STEPS)]
    shallow, deep = (min(seconds) for seconds in zip(*pairs, strict=True))
    layer, seen = max(0.0, (deep - shallow) / (_DEEP - _SHALLOW)), max(0.0, (long - short) / (_LONG - _SHORT))
    return {
        "step_seconds": max(0.0, shallow - _SHALLOW * layer),
        "layer_seconds": layer,
        "token_seconds": max(0.0, short - _SHORT * seen),
        "pair_seconds": 2 * seen / width,  # a token looks at half of the prompt
    }


def _per_token(engines: Sequence[Engine], tokens: int, threads: int) -> float:
    """Seconds of one token of a prompt of so many, in one layer."""
    prompts = [[_prompt_seconds(engine, at, tokens, threads) for engine in engines] for at in range(_PROMPTS)]
    shallow, deep = (min(seconds) for seconds in zip(*prompts, strict=True))
    return max(0.0, (deep - shallow) / (_DEEP - _SHALLOW) / tokens)


@contextmanager
def _small_engine(layers: int, threads: int) -> Iterator[Engine]:
    """Of so many layers that compute next to nothing."""
    with tempfile.TemporaryDirectory() as folder:
        model = synth_checkpoint(_SMALL, Path(folder) / "model", layers=layers)
        with closing(
            Engine.from_config(EngineConfig(model=str(model), memory="100%", device="cpu", threads=threads))
        ) as engine:
            yield engine


def _prompt_seconds(engine: Engine, at: int, tokens: int, threads: int) -> float:
    """Of a prompt that is like none before."""
    drawn = random.Random(f"{tokens}-{at}")
    _add(engine, tuple(drawn.choices(range(engine.vocab_size), k=tokens)), tokens=1)
    return _seconds(engine.drain, threads)


def _add(engine: Engine, prompt: tuple[int, ...], *, tokens: int) -> None:
    sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    engine.add(GenerationRequest(request_id="0", prompt_token_ids=prompt, sampling=sampling))


def _disk_bytes_s(shards: list[Path], expert_bytes: int) -> float:
    """Of reads as an engine's: direct, some experts in flight, from the shards that are largest; the best of three
    turns. One at a time a disk gave .67 GB/s where engines got 1.3."""
    reader = DiskReader()
    largest = sorted(shards, key=lambda path: -path.stat().st_size)[:4]
    size = min(expert_bytes, largest[0].stat().st_size)
    places = [(path, at) for path in largest for at in range(0, path.stat().st_size - size + 1, size)]
    random.Random(0).shuffle(places)
    order = cycle(places)
    try:
        return max(_turn_bytes_s(reader, order, size) for _ in range(3))
    finally:
        reader.close()


def _turn_bytes_s(reader: DiskReader, places: Iterator[tuple[Path, int]], size: int) -> float:
    """Of one turn."""
    targets = torch.empty(max(1, min(_IN_FLIGHT, _FLYING_BYTES // size)), size, dtype=torch.uint8).numpy()
    reads, count, began = deque[ReadTicket](), 0, time.perf_counter()
    try:
        while time.perf_counter() - began < _READ_SECONDS:
            if len(reads) == len(targets):
                reads.popleft().wait()
            path, at = next(places)
            piece = ExpertPiece(path=str(path), offset=at, nbytes=size, slot_offset=0)
            reads.append(reader.submit([piece], targets[count % len(targets)]))
            count += 1
        for read in reads:
            read.wait()
        return count * size / (time.perf_counter() - began)
    finally:
        for read in reads:
            read.settle()


def _seconds(function: Callable[[], object], threads: int) -> float:
    """Of one thread those that it ran: on a busy machine a pass of 64 rows is longer than a turn, and rates came out at
    a third."""
    clock = time.thread_time if threads == 1 else time.perf_counter
    began = clock()
    function()
    return clock() - began
