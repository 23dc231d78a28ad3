"""The server's side of one connection: a thread that reads questions, and one that computes for it.

The reader answers echoes and reads itself and turns away what the gate does not admit, while the other computes. A
peer that does not read its answers holds up only its own two threads. Knows one peer. Invariant: every question is
answered once, or the connection ends; what was admitted leaves the gate, what was lent is given back.
"""

from __future__ import annotations

import logging
import queue
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from buddymoe_ray.errors import LinkError
from buddymoe_ray.links.arrays import cut, gather, payload_room, view_of
from buddymoe_ray.links.auth import HANDSHAKE_LIMITS, admit
from buddymoe_ray.links.channel import Channel
from buddymoe_ray.links.counters import Tally
from buddymoe_ray.links.gate import Gate
from buddymoe_ray.links.messages import (
    Answer,
    BytesAnswer,
    ComputeQuestion,
    Declined,
    EchoQuestion,
    Failed,
    ReadQuestion,
    parse_question,
)
from buddymoe_ray.links.options import ServerOptions
from buddymoe_ray.links.service import ExpertService
from buddymoe_ray.links.stream import FrameStream
from buddymoe_ray.links.wire import Frame

__all__ = ["Guest", "House"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class House:
    """What all connections of a server share."""

    service: ExpertService
    secret: bytes
    options: ServerOptions
    gate: Gate
    tally: Tally


@dataclass(frozen=True)
class _Task:
    question: ComputeQuestion
    rows: Mapping[int, Tensor]
    deadline: float


class Guest:
    """One connection, from handshake to end; its threads start with it and end with it."""

    def __init__(self, sock: socket.socket, house: House) -> None:
        self._house = house
        self._stream = FrameStream(sock, limits=HANDSHAKE_LIMITS)
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._computer: threading.Thread | None = None
        self._ended = self._cut = False
        self._reader = threading.Thread(target=self._run, name="link-guest", daemon=True)
        self._reader.start()

    @property
    def done(self) -> bool:
        """Whether the connection and its threads are at an end."""
        return not self._reader.is_alive()

    def wake(self) -> None:
        """End the connection, wherever it is; not the peer's fault."""
        self._ended = self._cut = True
        self._stream.wake()

    def join(self, seconds: float) -> bool:
        """Whether its threads ended within that time."""
        self._reader.join(max(0.0, seconds))
        return not self._reader.is_alive()

    def _run(self) -> None:
        try:
            self._serve()
        except LinkError as error:
            self._blame(error)
        except Exception:
            log.exception("a peer was cut off by a fault of this server")
        finally:
            self._stream.wake()
            self._stream.close()

    def _serve(self) -> None:
        options = self._house.options
        deadline = time.monotonic() + options.handshake_seconds
        share = options.shared_from is not None
        admission = admit(self._stream, self._house.secret, deadline=deadline, share=share)
        if admission is None:
            self._house.tally.add("wrong_secret")
            log.warning("a peer with another cluster secret was refused")
            return
        self._stream.limits = options.limits
        channel = Channel(
            self._stream,
            shared_from=options.shared_from if admission.shared else None,
            send_seconds=options.send_seconds,
            frame_seconds=options.frame_seconds,
        )
        try:
            while self._answer_one(channel):
                pass
        finally:
            self._ended = True
            channel.wake()
            self._tasks.put(None)
            if self._computer is not None:
                self._computer.join()
            channel.close()

    def _answer_one(self, channel: Channel) -> bool:
        received = channel.receive()
        if received is None:
            return False
        frame, name = received
        question = parse_question(frame)
        if isinstance(question, ComputeQuestion):
            self._queue(channel, question, frame, name)
        elif isinstance(question, EchoQuestion):
            payload_B = payload_room(frame.nbytes)
            if channel.take(name, view_of(payload_B)):
                self._house.tally.add("echoed")
                channel.send(BytesAnswer(number=question.number).header(), [view_of(payload_B)])
            else:
                self._decline(channel, question.number, "withdrawn")
        elif frame.nbytes:
            raise LinkError(f"a read has {frame.nbytes} bytes of payload, must have none")
        else:
            self._read(channel, question)
        return True

    def _queue(self, channel: Channel, question: ComputeQuestion, frame: Frame, name: str) -> None:
        if not self._house.gate.admit(self):
            channel.drop(frame, name)
            self._decline(channel, question.number, "busy")
            return
        queued = False
        try:
            payload_B = payload_room(frame.nbytes)
            there = channel.take(name, view_of(payload_B))
            if there:
                deadline = time.monotonic() + question.patience_ms / 1000
                task = _Task(question, cut(question.specs, payload_B), deadline)
                self._start_computer(channel)
                self._tasks.put(task)
                queued = True
        finally:
            if not queued:
                self._house.gate.leave(self)
        if not there:
            self._decline(channel, question.number, "withdrawn")

    def _start_computer(self, channel: Channel) -> None:
        if self._computer is None:
            run = threading.Thread(target=self._compute_all, args=[channel], name="link-compute", daemon=True)
            run.start()
            self._computer = run

    def _compute_all(self, channel: Channel) -> None:
        """Until the connection ends; what is still queued then only leaves the gate."""
        while (task := self._tasks.get()) is not None:
            try:
                if not self._ended:
                    self._compute(channel, task)
            except LinkError as error:
                if not self._ended:
                    self._blame(error)
                channel.wake()  # the reader ends the connection
            except Exception:
                log.exception("a peer was cut off by a fault of this server")
                channel.wake()
            finally:
                self._house.gate.leave(self)

    def _compute(self, channel: Channel, task: _Task) -> None:
        question, rows = task.question, task.rows
        try:
            with self._house.gate.turn(deadline=task.deadline) as mine:
                outputs = self._house.service.compute(question.layer, rows) if mine and not self._ended else {}
            specs, parts = gather(outputs)
            declined = tuple(sorted(set(rows) - set(outputs)))
            answer = Answer(number=question.number, specs=specs, declined=declined)
            answer.check(question.specs)
        except Exception as error:
            self._fail(channel, question.number, error)
            return
        if mine:
            self._house.tally.add("computed")
            channel.send(answer.header(), parts)
        else:
            self._decline(channel, question.number, "late")

    def _read(self, channel: Channel, question: ReadQuestion) -> None:
        where = (question.layer, question.expert, question.segment)
        try:
            found = self._house.service.read(*where)
        except Exception as error:
            self._fail(channel, question.number, error)
            return
        if found is None:
            self._decline(channel, question.number, "absent")
            return
        try:
            if found.nbytes != question.size:
                self._decline(channel, question.number, "absent")
                return
            self._house.tally.add("read")
            channel.send(BytesAnswer(number=question.number).header(), [found.cast("B")])
        finally:
            self._house.service.release(*where)

    def _blame(self, error: LinkError) -> None:
        if not self._cut:
            self._cut = True
            self._house.tally.add("bad_peers")
            log.info("a peer was cut off: %s", error)

    def _decline(self, channel: Channel, number: int, reason: str) -> None:
        self._house.tally.add("declined")
        channel.send(Declined(number=number, reason=reason).header())

    def _fail(self, channel: Channel, number: int, error: Exception) -> None:
        self._house.tally.add("failed")
        log.error("a peer's question failed", exc_info=error)
        channel.send(Failed(number=number, message=f"{type(error).__name__}: {error}").header())
