"""An Engine for asyncio: one background thread steps it, each request is a coroutine that lasts until it has ended.

Knows threads and event loops, not HTTP or Ray. Invariant: only the step thread touches the engine; others hand it
commands through a queue that it empties before every step, so a cancelled request is gone one step later. Events are
told on the step thread: to wake an event loop for each costs more than a small model's token.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from buddymoe_ray.engine.engine import Engine
from buddymoe_ray.engine.parts import EngineLimits
from buddymoe_ray.engine.sequence import Sequence
from buddymoe_ray.errors import BuddyMoEError, CapacityError
from buddymoe_ray.observe import EngineSnapshot, ExpertMap
from buddymoe_ray.types import GenerationRequest, TokenEvent

__all__ = ["AsyncEngine"]

log = logging.getLogger(__name__)

QUICK_TOKENS = 1024


@dataclass(frozen=True)
class _Stream:
    """One request that runs: who takes its events, and the loop on which its end is waited for."""

    tell: Callable[[TokenEvent], None]
    loop: asyncio.AbstractEventLoop
    ended: asyncio.Future[None]

    def end(self, error: BaseException | None = None) -> None:
        """From any thread."""

        def run() -> None:
            if self.ended.done():  # whoever waited has left
                return
            if error is None:
                self.ended.set_result(None)
            else:
                self.ended.set_exception(error)

        try:
            self.loop.call_soon_threadsafe(run)
        except RuntimeError:  # the loop is closed: its client is gone, and the request with it
            log.debug("nobody is told how a request ended: its event loop is closed")


class AsyncEngine:
    """`engine` belongs to this object from now on; `model_id` is the name it is served under."""

    def __init__(self, engine: Engine, *, model_id: str | None = None) -> None:
        self._engine = engine
        self.model_id = model_id or engine.config.model
        self.tokenizer: Any = engine.tokenizer
        self.limits: EngineLimits = engine.limits
        self.sampling_defaults: Mapping[str, Any] = engine.sampling_defaults
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._streams: dict[str, _Stream] = {}
        self._inbox_lock = threading.Lock()  # nothing is queued after the failure is known
        self._failure: BuddyMoEError | None = None
        self._closed = False
        engine.calibration.wake = self._wake  # an idle engine takes over, too
        engine.cache.call_when_asked(self._wake)
        self._thread = threading.Thread(target=self._loop, name="engine-step", daemon=True)
        self._thread.start()

    async def run(self, request: GenerationRequest, tell: Callable[[TokenEvent], None]) -> None:
        """Run a request to its end; cancelling this cancels it. `tell` takes its events as they come, the last with its
        finish_reason, on the step thread: it must be quick and raise nothing.

        Raises:
            RequestError: the request is not usable (too long, bad parameter), before the first event.
            CapacityError: the engine is closed or its step thread died.
        """
        self._raise_if_dead()
        prepare = partial(self._engine.prepare, request)
        seq = prepare() if _is_quick(request) else await asyncio.to_thread(prepare)
        loop = asyncio.get_running_loop()
        stream = _Stream(tell, loop, loop.create_future())
        self._submit(lambda: self._add(seq, stream))
        try:
            await stream.ended
        except asyncio.CancelledError:
            self._submit_quietly(lambda: self._cancel(request.request_id, stream))
            raise

    def snapshot(self) -> EngineSnapshot:
        """Counters of the engine, read without stopping it."""
        return self._engine.snapshot()

    def expert_map(self) -> ExpertMap:
        """Where the experts are, read without stopping it."""
        return self._engine.expert_map()

    @property
    def link_address(self) -> str:
        """Where the engine computes for other nodes' workers; empty when it does not."""
        return self._engine.link_address

    def link(self) -> None:
        """Listen for other nodes' workers, once. From any thread. Raises LinkError, CacheError."""
        self._engine.link()

    def link_seconds(self) -> dict[str, float]:
        """How long each peer takes to answer, by name."""
        return self._engine.link_seconds()

    def set_peers(self, peers: Mapping[str, str]) -> None:
        """From now on these other nodes' workers, name to address, may be asked. From any thread."""
        self._engine.set_peers(peers)

    async def check_health(self) -> None:
        """Raises CapacityError when the step thread is dead."""
        self._raise_if_dead()

    def close(self) -> None:
        """Stop stepping, fail what is unfinished, free memory. Safe to call twice."""
        if not self._closed:
            self._closed = True
            self._commands.put(None)
            self._thread.join(timeout=30)
            self._fail_all(
                CapacityError("engine is closed, must be running. hint: send the request to another replica")
            )
            self._engine.close()

    def _submit(self, command: Callable[[], None]) -> None:
        with self._inbox_lock:
            self._raise_if_dead()
            self._commands.put(command)

    def _submit_quietly(self, command: Callable[[], None]) -> None:
        with self._inbox_lock:
            if self._failure is None:
                self._commands.put(command)

    def _wake(self) -> None:
        self._submit_quietly(lambda: None)

    def _raise_if_dead(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _add(self, seq: Sequence, stream: _Stream) -> None:
        try:
            self._raise_if_dead()
            self._engine.admit(seq)
        except Exception as error:  # whatever is wrong with one request is told to its caller, and the others go on
            stream.end(error)
        else:
            self._streams[seq.request_id] = stream

    def _cancel(self, request_id: str, stream: _Stream) -> None:
        if self._streams.get(request_id) is not stream:  # it ended, or never began as the name was another's
            return
        del self._streams[request_id]
        if self._failure is None:
            self._engine.cancel(request_id)
            self._deliver(self._engine.take_events())  # now: the name may be another's before the next step

    def _loop(self) -> None:
        try:
            while self._run_commands():
                self._deliver(self._engine.step())
        except BaseException as error:  # the thread ends here; every waiting client must learn of it
            log.exception("the engine's step thread died")
            self._fail_all(CapacityError(f"engine is stopped by {error!r}, must be running. hint: restart the replica"))

    def _run_commands(self) -> bool:
        """Run queued commands; wait for one when there is no work. False asks the thread to end."""
        while True:
            try:
                command = self._commands.get(block=not self._engine.has_work())
            except queue.Empty:
                return True
            if command is None:
                return False
            command()

    def _deliver(self, events: Iterable[TokenEvent]) -> None:
        for event in events:
            stream = self._streams.get(event.request_id)
            if stream is not None:
                stream.tell(event)
                if event.finish_reason is not None:
                    self._streams.pop(event.request_id).end()

    def _fail_all(self, error: BuddyMoEError) -> None:
        """Refuse everything from now on and tell every waiting client, those still in the queue included."""
        with self._inbox_lock:
            self._failure = self._failure or error
        while not self._commands.empty():
            command = self._commands.get()
            if command is not None:
                command()
        streams, self._streams = list(self._streams.values()), {}
        for stream in streams:
            stream.end(error)


def _is_quick(request: GenerationRequest) -> bool:
    """Whether it is prepared while a thread would only be woken, and have its turn beside the step's; what takes long
    must hold up neither event loop nor steps."""
    taken_in = len(request.prompt_token_ids) + len(request.resumed_token_ids)
    return taken_in < QUICK_TOKENS and request.replay is None and request.sampling.structured_outputs is None
