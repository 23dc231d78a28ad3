"""`python -m buddymoe_ray.calibrate.background FOLDER --into CACHE`: a calibration that nobody has to ask for.

An engine without profile starts it. The model writes texts (with its experts in int4, so that hardly anything is read),
is calibrated on them as `buddymoe profile` does it, and texts that nothing was fitted on tell what the stand-ins really
cost. Niced; ends when its standard input does, and asks the engine there for the memory of records while it holds some.
One process at a time fills a folder, under a lock that goes with it; what is finished stays, by kind and layer.

Tried on builtin:tiny at 25 % of memory, budget .003, held-out code: plain rounding where compensated takes half a
minute: 25 % of misses fetched instead of 9. Texts of temperature 1 instead of .8: losses expected a third too high
instead of a quarter too low, and 9 % fetched instead of .1; what is too low is found on the first requests.
"""

from __future__ import annotations

import argparse
import logging
import os
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from buddymoe_ray.cache.shared.locks import TABLES_BYTE, FileLocks
from buddymoe_ray.calibrate.expected_loss import LossOptions
from buddymoe_ray.calibrate.pace import traced_tokens
from buddymoe_ray.calibrate.run import CalibrationOptions, calibrate
from buddymoe_ray.config import EngineConfig
from buddymoe_ray.engine.build import build_parts
from buddymoe_ray.engine.engine import Engine
from buddymoe_ray.engine.evaluate import WINDOW
from buddymoe_ray.engine.sweep import Sweep
from buddymoe_ray.errors import BuddyMoEError, BudgetError, CacheError
from buddymoe_ray.models.shape import describe
from buddymoe_ray.models.standin_files import standins_folder
from buddymoe_ray.policy import Measured
from buddymoe_ray.residency.calibrations import (
    ROOM_SPARE,
    ROOM_WANTED,
    SELF_MADE,
    CalibrationFolder,
    MakerProgress,
)
from buddymoe_ray.residency.machine import available_memory_bytes
from buddymoe_ray.types import GenerationRequest, SamplingParams, TokenEvent

__all__ = ["fill", "main"]

log = logging.getLogger(__name__)

_TEMPERATURE = 0.8
_LEAST_TEXTS, _MOST_TEXTS, _SIDE_BY_SIDE = 20, 116, 32
_CHECKED_TEXTS, _FEW_CHECKED = 24, 12
"""Of a small model, of a larger one. A text may cost five times what is expected: of 48 texts of builtin:tiny (25 %)
every fifth dozen puts the bound above the 2.0 that is trusted, no two dozen do, for 1.3 CPU-seconds more of 33; of a
6.7 GB model a dozen takes 100 of 400."""
_TRACED_WINDOW = 2 * WINDOW
"""Two texts: every pass reads all experts once."""
_ROUNDING_MINUTES = 3.0
_USABLE = 0.8  # of what `Bench` is told is free
_OTHER_BYTES = 512 << 20
_SMALL_BYTES, _FEW_SCORED = 1 << 30, 384
"""Of larger models so many tokens are scored: each of their layers reads all experts, once for every text."""
_PHASES = {"text": 15, "trace": 12, "stand-ins": 35, "sensitivity": 20, "comparison": 6, "check": 12}
"""Their shares of the whole, in per cent."""
_FIRST_WITH_RECORDS = "sensitivity"


def main(argv: Sequence[str] | None = None) -> int:
    """Fill the folder, or wait until another process has."""
    parser = argparse.ArgumentParser(prog="buddymoe_ray.calibrate.background")
    parser.add_argument("model", help="checkpoint folder")
    parser.add_argument("--into", required=True, type=Path, help="folder of this calibration")
    parser.add_argument("--memory-percent", required=True, type=float, help="memory whose mix of stand-ins is measured")
    parser.add_argument("--maker-bytes", required=True, type=int, help="most bytes of experts in memory")
    parser.add_argument("--record-bytes", required=True, type=int, help="most bytes of experts and stand-ins together")
    args = parser.parse_args(argv)
    os.nice(10)
    starter, folder = _Starter(), CalibrationFolder(args.into)
    locks = FileLocks(os.open(folder.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    try:
        with locks.locked(TABLES_BYTE):
            if not folder.finished:
                fill(folder, args.model, args.memory_percent, args.maker_bytes, args.record_bytes, starter)
    except BuddyMoEError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def fill(
    folder: CalibrationFolder,
    model: str,
    memory_percent: float,
    maker_bytes: int,
    record_bytes: int,
    starter: _Starter | None = None,
) -> None:
    """Make all of it; where nobody else uses the `record_bytes` there is no `starter` to ask for them. Raises
    ProfileError, BudgetError, CheckpointError."""
    told, shape = _Told(folder, starter), describe(Path(model))
    need, free = shape.dense_bytes + record_bytes + _OTHER_BYTES, available_memory_bytes()
    if need > free:
        raise BudgetError(
            f"memory available is {free} bytes, must be at least {need} to calibrate {model} beside the service. "
            "hint: free some, or run buddymoe profile elsewhere"
        )
    small = shape.total_expert_bytes <= _SMALL_BYTES
    texts, held = folder.text(), _CHECKED_TEXTS if small else _FEW_CHECKED
    if not texts:
        if starter is not None:
            starter.take_room()
        texts = _written(model, record_bytes, held, told.count)
        folder.write_text(texts)
    if starter is not None:
        starter.spare_room()
    checked, fitted = texts[:held], texts[held:]
    longest = min(_TRACED_WINDOW + 1, shape.max_positions)
    config = EngineConfig(model=model, memory=str(maker_bytes), device="cpu", max_model_len=longest, max_running=2)
    left = record_bytes - maker_bytes
    calibrate(
        CalibrationOptions(
            config=config,
            ids=[token for text in fitted for token in text],
            out=folder.profile,
            kinds=SELF_MADE,
            window=_TRACED_WINDOW,
            rounding_minutes=_ROUNDING_MINUTES,
            losses=LossOptions(
                memories=(memory_percent,),
                budgets=(),
                tokens=None if small else _FEW_SCORED,
                standins=("lowbit",),
            ),
            free=int(left / _USABLE),
        ),
        progress=told.count,
    )
    folder.write_measured(_checked(config, folder, checked, memory_percent, left, told.count))
    told.say("done", 100.0)


def _written(model: str, nbytes: int, held: int, progress: Callable[..., Iterable[Any]]) -> list[list[int]]:
    """Texts of `WINDOW` tokens, each begun with any token; a few more or less, as they are written side by side. So
    many more than are calibrated on as are `held` back."""
    config = EngineConfig(
        model=model, memory=str(nbytes), device="cpu", max_model_len=WINDOW, max_running=_SIDE_BY_SIDE
    )
    try:
        parts = build_parts(replace(config, expert_dtype="int4"), text=False)
    except BuddyMoEError as error:
        log.warning("%s writes with its experts as stored: %s", model, error)
        parts = build_parts(config, text=False)
    count = held + max(_LEAST_TEXTS, min(_MOST_TEXTS, traced_tokens(parts) // WINDOW))
    count = round(count / _SIDE_BY_SIDE) * _SIDE_BY_SIDE or count
    firsts = np.random.default_rng(0).integers(0, parts.vocab_size, count).tolist()
    engine, texts = Engine(parts), {str(at): [first] for at, first in enumerate(firsts)}
    sampling = SamplingParams(temperature=_TEMPERATURE, max_tokens=WINDOW - 1, ignore_eos=True)
    try:
        for name in progress(list(texts), total=count, desc="text"):
            engine.add(GenerationRequest(request_id=name, prompt_token_ids=tuple(texts[name]), sampling=sampling))
            while engine.snapshot().running + engine.snapshot().waiting >= _SIDE_BY_SIDE:
                _take(engine.step(), texts)
        _take(engine.drain(), texts)
    finally:
        engine.close()
    return list(texts.values())


def _take(events: Iterable[TokenEvent], texts: Mapping[str, list[int]]) -> None:
    for event in events:
        if event.error is not None:
            raise CacheError(f"no text could be written: {event.error}")
        texts[event.request_id] += event.token_ids


def _checked(
    config: EngineConfig,
    folder: CalibrationFolder,
    texts: Sequence[Sequence[int]],
    memory_percent: float,
    nbytes: int,
    progress: Callable[..., Iterable[Any]],
) -> list[Measured]:
    """What stand-ins cost on each text, with nothing fetched."""
    parts = build_parts(config, text=False)
    try:
        sweep = Sweep(parts, nbytes)
        served = EngineConfig(
            model=config.model,
            memory=f"{memory_percent}%",
            mode="fast",
            profile=str(folder.profile),
            device="cpu",
            max_model_len=WINDOW,
        )
        rows = list[Measured]()
        for text in progress(texts, total=len(texts), desc="check"):
            [found] = sweep.run([served], [tuple(text)], progress=lambda items, **_: items, what="")
            if isinstance(found, BuddyMoEError):
                raise found
            rows.append(
                Measured(tokens=found.tokens, kl=found.kl * found.tokens, predicted=found.expected_rise * found.tokens)
            )
        return rows
    finally:
        parts.experts.close()


class _Told:
    """Writes how far it all is into the folder, at most once a second, and asks the `starter` for the memory of
    records before there are any in memory."""

    def __init__(self, folder: CalibrationFolder, starter: _Starter | None) -> None:
        self._folder, self._starter, self._then = folder, starter, 0.0

    def count(self, items: Iterable[Any], *, total: int, desc: str) -> Iterator[Any]:
        """The items, counted."""
        if desc == _FIRST_WITH_RECORDS and self._starter is not None:
            self._starter.take_room()
        return self._counted(items, total, desc)

    def _counted(self, items: Iterable[Any], total: int, desc: str) -> Iterator[Any]:
        before = sum(share for name, share in _PHASES.items() if list(_PHASES).index(name) < list(_PHASES).index(desc))
        for at, item in enumerate(items):
            self.say(desc, before + _PHASES[desc] * at / max(1, total))
            yield item

    def say(self, phase: str, percent: float) -> None:
        """Write it down."""
        now = time.monotonic()
        if now - self._then >= 1 or percent >= 100:
            self._then = now
            records = standins_folder(self._folder.profile)
            nbytes = sum(path.stat().st_size for path in records.glob("*.safetensors")) if records.is_dir() else 0
            self._folder.write_progress(MakerProgress(percent=percent, phase=phase, record_bytes=nbytes))


class _Starter:
    """Whoever started this holds the other end of standard input; an engine's is a socket."""

    def __init__(self) -> None:
        self._given, self._asks = threading.Event(), stat.S_ISSOCK(os.fstat(0).st_mode)
        threading.Thread(target=self._listen, daemon=True).start()

    def take_room(self) -> None:
        """Have the engine give up what it has there."""
        if self._asks:
            self._given.clear()
            os.write(0, ROOM_WANTED)
            self._given.wait()

    def spare_room(self) -> None:
        """Let the engine have it."""
        if self._asks:
            os.write(0, ROOM_SPARE)

    def _listen(self) -> None:
        while os.read(0, 1):
            self._given.set()
        os._exit(3)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
