"""An engine's own calibration: has stand-ins made by a process beside it, and takes them over between two steps.

The process (`calibrate.background`) is niced and ends with this one, whatever ends it; it goes on where an earlier one
stopped, and waits for one of another engine. A thread waits for it and reads its records; only the step thread touches
the model. Nothing of a request leaves this process. What is reserved for records has slots of experts in it, but while
the process asks for it and once records are read; again where nothing comes of it. Of a node's slots every engine says
so much, and those that want the memory have it.
Invariant: records, and what the process holds of experts, take what the plan in force reserves and does not lend.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from buddymoe_ray.cache.shared import Lender, SharedStore
from buddymoe_ray.config import EngineConfig
from buddymoe_ray.engine import one_call
from buddymoe_ray.engine.guard import GuardWork
from buddymoe_ray.engine.runner import Runner
from buddymoe_ray.engine.scheduler import Scheduler
from buddymoe_ray.engine.trial import Trial
from buddymoe_ray.errors import CacheError, ProfileError
from buddymoe_ray.models.fingerprint import model_hash
from buddymoe_ray.models.load import LoadedModel
from buddymoe_ray.moe import StepState
from buddymoe_ray.observe import CalibrationSnapshot
from buddymoe_ray.policy import Guard, lend_reserved
from buddymoe_ray.residency.calibrations import (
    ROOM_WANTED,
    CalibrationFolder,
    MakerProgress,
    calibrates,
    maker_bytes,
)
from buddymoe_ray.residency.sharing import Sharing
from buddymoe_ray.residency.standin_records import LateStandins, bring_standins
from buddymoe_ray.residency.standin_setup import StandinSetup
from buddymoe_ray.residency.tier import ExpertTier
from buddymoe_ray.types import SlotPlan

__all__ = ["Calibration", "Checks"]

log = logging.getLogger(__name__)

_MODULE = "buddymoe_ray.calibrate.background"
_TRIES, _LOGGED_SECONDS, _ASKED_AGAIN_SECONDS, _JOINED_SECONDS = 3, 15.0, 1.0, 5.0
_PACKED_PERCENT = 25.0
"""Experts are calibrated as stored: half the memory of packed ones would not hold a copy of each."""


class Checks:
    """Makes what checks stand-ins while they serve."""

    def __init__(self, config: EngineConfig, runner: Runner, scheduler: Scheduler, step: StepState) -> None:
        self._config, self._runner, self._scheduler, self._step = config, runner, scheduler, step

    def open(self, setup: StandinSetup | None) -> tuple[GuardWork | None, Trial | None]:
        """For these stand-ins. Nothing checks where there are none; those of a profile that somebody made are guarded,
        if the config wants that, those of an engine's own are on trial too."""
        config, trial = self._config, None
        if setup is not None and setup.own is not None and not setup.plan.fully_resident:
            trial = Trial(config, setup, self._step, replays=self._runner.packed)
        if setup is None or not config.guard_share:
            return None, trial
        limit = config.budget if config.mode == "bounded" else max(config.budget, 2 * setup.expected_loss)
        guard = Guard(limit=limit)
        share, runner, scheduler = config.guard_share, self._runner, self._scheduler
        return GuardWork(guard=guard, runner=runner, scheduler=scheduler, share=share, trial=trial), trial


class Calibration:
    """Of one engine; without anything to calibrate it says so. `wake` is called, from another thread, once there is
    something to take over."""

    def __init__(
        self, config: EngineConfig, loaded: LoadedModel, experts: ExpertTier, checks: Checks, sharing: Sharing | None
    ) -> None:
        self.wake: Callable[[], None] = lambda: None
        self._config, self._loaded, self._experts, self._sharing = config, loaded, experts, sharing
        self._checks = checks
        self._late: LateStandins | None = None
        self._plan, self._resized = experts.cache.plan, threading.Event()
        self._resize: SlotPlan | None = None
        self._lender: Lender | None = None
        self._thread = threading.Thread(target=self._wait, name="calibration", daemon=True)
        self._process: subprocess.Popen[bytes] | None = None
        self._setup, self._failure, self._closed = experts.setup, "", threading.Event()
        self.guard, self._trial = checks.open(experts.setup)
        self._folder: CalibrationFolder | None = None
        plan = experts.cache.plan
        if experts.setup is None and calibrates(config) and not (plan.reserved_bytes or plan.fully_resident):
            self._failure = "memory is too little for stand-ins of all experts"
        if plan.reserved_bytes:
            self._folder = CalibrationFolder.of(config, model_hash(loaded.folder))
            if any(plan.lent_slots) and isinstance(store := experts.cache.store, SharedStore):
                self._lender = Lender(store.again())
            elif any(plan.lent_slots):
                self._resize = self._lending(self._spare if self._folder.text() else 0)
                self.take_over()
            log.warning(
                "%s has no profile: mode exact serves while stand-ins are made in %s. %.0f MB of the experts' memory "
                "are set aside for them%s. hint: --calibrate off",
                *(config.model, self._folder.path, plan.reserved_bytes / 1e6),
                " and used until then" if any(plan.lent_slots) else "",
            )

    def start(self) -> None:
        """Have made what is missing. What can be taken over later is waited for by a thread."""
        if self._folder is not None:
            self._thread.start()

    @property
    def due(self) -> bool:
        """Whether stand-ins wait to be taken over, or memory to change hands."""
        return self._late is not None or self._resize is not None

    def snapshot(self) -> CalibrationSnapshot:
        """How far it is. From any thread."""
        if self._trial is not None and self._setup is not None:
            trust, refusal = self._trial.trust, self._setup.refusal
            return CalibrationSnapshot(
                state="refused" if refusal else trust.state,
                tokens=trust.tokens,
                percent=100.0,
                record_bytes=sum(records.total_bytes for records in self._setup.layouts.values()),
                factor=trust.factor,
                reason=refusal or ("" if trust.state == "ready" else trust.reason),
            )
        if self._folder is None and not self._failure:
            return CalibrationSnapshot(factor=1.0 if self.guard is None else self.guard.factor)
        made = MakerProgress() if self._folder is None else self._folder.progress()
        return CalibrationSnapshot(
            state="refused" if self._failure else "collecting",
            percent=made.percent,
            record_bytes=made.record_bytes,
            factor=math.inf,
            reason=self._failure or f"stand-ins are being calibrated, {made.percent:.0f} % is done",
        )

    def take_over(self) -> ExpertTier:
        """Let what has arrived answer from the next pass on, and memory go where it is wanted. On the step thread,
        between steps."""
        wanted, self._resize = self._resize, None
        if wanted is not None:
            cache = self._experts.cache
            cache.settle_ahead()
            if Lender(cache.store).lend(sum(wanted.lent_slots), self._closed.is_set):
                cache.plan = wanted
            self._resized.set()
        late, experts = self._late, self._experts
        if late is None:
            return experts
        self._late = None
        try:
            late.settle(experts.cache)
        except CacheError as error:  # whoever needs that expert meets it again
            log.warning("not all experts could be made resident: %s", error)
        for block in experts.blocks:
            block.begin_standing_in(late.standins)
        one_call.renew(self._loaded.model)
        self._setup = late.setup
        self.guard, self._trial = self._checks.open(late.setup)
        nbytes = late.standins.pool.nbytes
        self._experts = replace(experts, setup=late.setup, standin_bytes=nbytes, room=late.room)
        return self._experts

    def close(self) -> None:
        """End the process; what it has made stays. Safe to call twice."""
        self._closed.set()
        self._resized.set()
        if self._process is not None:
            self._process.kill()
        if self._thread.is_alive():
            self._thread.join(_JOINED_SECONDS)
        if self._lender is not None and not self._thread.is_alive():
            self._lender.close()
        late, self._late = self._late, None
        if late is not None and late.room is not None:
            late.room.close()

    def _wait(self) -> None:
        """Until everything is made and read."""
        assert self._folder is not None, "nothing is calibrated"
        try:
            if not self._folder.finished:  # another worker of the node may have, before this one came
                if self._lender is not None:
                    self._lend(self._spare)
                self._run(self._folder)
            self._lend(0)
            if not self._closed.is_set():
                config, loaded, cache = self._config, self._loaded, self._experts.cache
                self._late = bring_standins(config, loaded, cache, self._folder.profile, self._sharing)
                self.wake()
        except Exception as error:
            self._failure = str(error)
            log.warning("stand-ins could not be calibrated: %s", error)
            self._lend(self._plan.reserved_bytes)

    def _lend(self, nbytes: int) -> None:
        """Have so much of what is reserved lent to slots; waits until they have given back what is more."""
        if not any(self._plan.lent_slots):
            return
        cache, plan = self._experts.cache, self._lending(nbytes)
        if self._lender is not None:
            if self._lender.lend(sum(plan.lent_slots), self._closed.is_set):
                cache.plan = plan
            return
        self._resize = plan
        self.wake()
        while sum(cache.plan.lent_slots) > sum(plan.lent_slots) and not self._closed.is_set():
            if not self._resized.wait(_ASKED_AGAIN_SECONDS):
                self._resize = plan  # the step thread may have been taking an earlier one
                self.wake()
            self._resized.clear()

    def _lending(self, nbytes: int) -> SlotPlan:
        return lend_reserved(self._plan, nbytes, self._loaded.layout.experts_per_layer)

    @property
    def _spare(self) -> int:
        """What is reserved and not for whoever calibrates."""
        return self._plan.reserved_bytes - maker_bytes(self._loaded.layout)

    def _run(self, folder: CalibrationFolder) -> None:
        """Have the folder filled. Raises ProfileError with what the process said."""
        for _ in range(_TRIES):
            ours, theirs = socket.socketpair()
            with tempfile.TemporaryFile() as said, ours:
                with theirs:
                    self._process = process = self._spawn(folder, theirs.fileno(), said.fileno())
                if self._closed.is_set():
                    process.kill()
                self._serve(ours, folder)
                status = process.wait()
                if status == 0 or self._closed.is_set():
                    return
                said.seek(0)
                last = said.read().decode(errors="replace").strip().splitlines()[-1:]
            if status > 0:
                break  # it said why; one that was killed may have more luck
        raise ProfileError("".join(last) or f"{_MODULE} ended with status {status}. hint: run buddymoe profile")

    def _serve(self, process: socket.socket, folder: CalibrationFolder) -> None:
        """Give the process the memory that it asks for, and take it back, until it has ended."""
        process.settimeout(_LOGGED_SECONDS)
        while True:
            try:
                asked = process.recv(1)
            except TimeoutError:
                made = folder.progress()
                log.info("calibration: %s, %.0f %%, %.0f MB", made.phase, made.percent, made.record_bytes / 1e6)
                continue
            except ConnectionError:
                return
            if not asked:
                return
            self._lend(0 if asked == ROOM_WANTED else self._spare)
            if asked == ROOM_WANTED:
                with suppress(OSError):
                    process.sendall(ROOM_WANTED)

    def _spawn(self, folder: CalibrationFolder, asks: int, said: int) -> subprocess.Popen[bytes]:
        config, cache, stored = self._config, self._experts.cache, self._loaded.layout
        percent = 100 * cache.plan.budget_bytes / stored.total_bytes
        if config.expert_dtype != "native":
            percent = max(percent, _PACKED_PERCENT)
        command = [
            *(sys.executable, "-m", _MODULE, str(self._loaded.folder), "--into", str(folder.path)),
            *("--memory-percent", f"{percent:.4f}"),
            *("--maker-bytes", str(maker_bytes(stored))),
            *("--record-bytes", str(cache.plan.reserved_bytes)),
        ]
        package = str(Path(__file__).parents[2])
        paths = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
        return subprocess.Popen(
            command,
            stdin=asks,  # it ends when the other end is closed, as by kill -9
            stdout=subprocess.DEVNULL,
            stderr=said,
            env={**os.environ, "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""},
        )
