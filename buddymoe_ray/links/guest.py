"""The server's side of one connection: a thread that reads questions, and one that computes for it.

The reader tells the contents itself and turns away what does not fit, while the other computes. A peer that does not
read its answers holds up only its own two threads. Knows one peer. Invariant: every question is answered once, or the
connection ends; what was admitted leaves its place.
"""

from __future__ import annotations

import logging
import queue
import socket
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from buddymoe_ray.errors import LinkError
from buddymoe_ray.links.arrays import cut, gather
from buddymoe_ray.links.auth import HANDSHAKE_LIMITS, admit
from buddymoe_ray.links.messages import Computation, answer_of, failure_of, number_of, parse_question
from buddymoe_ray.links.stream import FrameStream
from buddymoe_ray.links.wire import FrameLimits

__all__ = ["ExpertService", "Guest", "House", "Places"]

log = logging.getLogger(__name__)

HANDSHAKE_SECONDS = 2.0
SEND_SECONDS = 5.0
"""How long a peer may take to accept an answer, or is cut off."""

_PLACES = 9


class ExpertService(Protocol):
    """What a worker does for its peers: the seam between links and whoever has the experts.

    Called from several threads of the server; modes of torch that belong to a thread are the service's to set.
    """

    def compute(self, layer: int, expert_rows: Mapping[int, Tensor]) -> Mapping[int, Tensor]:
        """Exact outputs `[R, D]` for rows `[R, D]` in host memory, in their dtype; experts it cannot run are left out.

        The outputs are the server's from then on: nothing may write to them again.
        """

    def contents(self) -> bytes:
        """Which experts can be computed now, in a form that both ends know."""


class Places:
    """Room for questions: one computes, some wait, no peer has more than half; what does not fit is declined at once.

    The worker's own steps come first, and one peer that does not take its answers leaves room for others.
    """

    def __init__(self, total: int = _PLACES) -> None:
        self.turn = threading.Lock()
        self._total = total
        self._lock = threading.Lock()
        self._of: Counter[object] = Counter()

    def admit(self, peer: object) -> bool:
        """Take a place, or say at once that there is none."""
        with self._lock:
            if self._of.total() >= self._total or self._of[peer] >= (self._total + 1) // 2:
                return False
            self._of[peer] += 1
            return True

    def leave(self, peer: object) -> None:
        """Give a place back."""
        with self._lock:
            self._of[peer] -= 1
            if not self._of[peer]:
                del self._of[peer]


@dataclass(frozen=True, kw_only=True)
class House:
    """What all connections of a server share."""

    service: ExpertService
    secret: bytes
    places: Places = field(default_factory=Places)


@dataclass(frozen=True, kw_only=True)
class _Task:
    number: int
    question: Computation
    rows: Mapping[int, Tensor]
    deadline: float


class Guest:
    """One connection, from handshake to end; its threads start with it and end with it."""

    def __init__(self, sock: socket.socket, house: House) -> None:
        self._house = house
        self._stream = FrameStream(sock, limits=HANDSHAKE_LIMITS)
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._computer: threading.Thread | None = None
        self._ended = False
        self._reader = threading.Thread(target=self._run, name="link-guest", daemon=True)
        self._reader.start()

    @property
    def done(self) -> bool:
        """Whether the connection and its threads are at an end."""
        return not self._reader.is_alive()

    def wake(self) -> None:
        """End the connection, wherever it is; not the peer's fault."""
        self._ended = True
        self._stream.wake()

    def join(self, seconds: float) -> bool:
        """Whether its threads ended within that time."""
        self._reader.join(max(0.0, seconds))
        return self.done

    def _run(self) -> None:
        try:
            if not admit(self._stream, self._house.secret, deadline=time.monotonic() + HANDSHAKE_SECONDS):
                log.warning("a peer with another cluster secret was refused")
                return
            self._stream.limits = FrameLimits()
            while self._answer_one():
                pass
        except Exception as error:
            self._blame(error)
        finally:
            self.wake()
            if self._computer is not None:
                self._tasks.put(None)
                self._computer.join()
            self._stream.close()

    def _answer_one(self) -> bool:
        frame = self._stream.read()
        if frame is None:
            return False
        number, question = number_of(frame), parse_question(frame)
        if question is None:
            try:
                found = self._house.service.contents()
            except Exception as error:
                self._fail(number, error)
            else:
                self._say(number, {"kind": "bytes"}, [memoryview(found)])
            return True
        rows = cut(question.specs, frame.payload_B)
        if self._house.places.admit(self):
            deadline = time.monotonic() + question.patience_ms / 1000
            self._tasks.put(_Task(number=number, question=question, rows=rows, deadline=deadline))
            if self._computer is None:
                computer = threading.Thread(target=self._compute_all, name="link-compute", daemon=True)
                computer.start()
                self._computer = computer
        else:
            self._say(number, answer_of((), ()))
        return True

    def _compute_all(self) -> None:
        """Until the connection ends; what is still queued then only leaves its place."""
        while (task := self._tasks.get()) is not None:
            try:
                if not self._ended:
                    self._compute(task)
            except Exception as error:
                self._blame(error)
                self._stream.wake()  # the reader ends the connection
            finally:
                self._house.places.leave(self)

    def _compute(self, task: _Task) -> None:
        turn = self._house.places.turn
        outputs: Mapping[int, Tensor] = {}
        try:
            if turn.acquire(timeout=max(0.0, task.deadline - time.monotonic())):
                try:
                    if not self._ended and time.monotonic() < task.deadline:  # else nobody waits for it any more
                        outputs = self._house.service.compute(task.question.layer, task.rows)
                finally:
                    turn.release()
            specs, parts = gather(outputs)
            header = answer_of(specs, task.question.specs)
        except Exception as error:
            self._fail(task.number, error)
        else:
            self._say(task.number, header, parts)

    def _blame(self, error: Exception) -> None:
        if not self._ended:
            fault = not isinstance(error, LinkError)
            log.log(logging.ERROR if fault else logging.INFO, "a peer was cut off: %s", error, exc_info=fault)

    def _fail(self, number: int, error: Exception) -> None:
        log.error("a peer's question failed", exc_info=error)
        self._say(number, failure_of(error))

    def _say(self, number: int, header: Mapping[str, object], parts: list[memoryview] | None = None) -> None:
        self._stream.write({**header, "id": number}, parts or (), deadline=time.monotonic() + SEND_SECONDS)
