"""The client's side of one connection: questions under way, and the thread that matches answers to them by number.

Knows calls, not peers or breakers. Invariants: a call is settled once, by whoever takes it from those under way; an
answer that nobody waits for is read and dropped.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future

from torch import Tensor

from buddymoe_ray.errors import LinkError
from buddymoe_ray.links.arrays import ArraySpec
from buddymoe_ray.links.messages import check_answer, number_of
from buddymoe_ray.links.stream import FrameStream
from buddymoe_ray.links.wire import Frame

__all__ = ["Call", "Session"]

CallResult = Mapping[int, Tensor] | Tensor


class Call:
    """One question. `outcome` will be the rows that were computed, or the bytes of the contents.

    Args:
        ticket: the breaker's pass.
        asked: the arrays that were sent to be computed; None for the contents.
    """

    def __init__(self, ticket: int, asked: Sequence[ArraySpec] | None) -> None:
        self.ticket, self.asked = ticket, asked
        self.outcome: Future[CallResult] = Future()
        self.began = self.seconds = 0.0
        """`seconds`: from when it was sent until the answer had arrived, whenever somebody looked at it."""


class Session:
    """Belongs to its reader thread, which ends with the connection.

    Args:
        settled: told of every call just before its outcome is known, with the error if it is one.
    """

    def __init__(self, stream: FrameStream, *, name: str, settled: Callable[[Call, LinkError | None], None]) -> None:
        self._stream, self._name, self._settled = stream, name, settled
        self._lock = threading.Lock()
        self._pending: dict[int, Call] = {}
        self._asked = 0
        self._ended: LinkError | None = None
        self._reader = threading.Thread(target=self._read, name=f"link-{name}", daemon=True)
        self._reader.start()

    @property
    def alive(self) -> bool:
        """Whether questions can still be asked."""
        return self._ended is None

    def ask(self, call: Call, header: Mapping[str, object], parts: Sequence[memoryview], *, deadline: float) -> None:
        """Send the question; the call is settled here if that fails. Does not wait for the answer."""
        with self._lock:
            number, ended = self._asked, self._ended
            self._asked += 1
            self._pending[number] = call
        call.began = time.perf_counter()
        try:
            if ended is not None:
                raise ended
            self._stream.write({**header, "id": number}, parts, deadline=deadline)
        except LinkError as error:
            self._settle(number, error)

    def abandon(self, call: Call, error: LinkError) -> None:
        """Nobody waits for the call any more: settle it with `error`, unless it was settled just now."""
        with self._lock:
            number = next((number for number, pending in self._pending.items() if pending is call), -1)
        self._settle(number, error)

    def close(self) -> None:
        """End the connection and the thread; what is under way fails. Safe to call twice."""
        self._stream.wake()
        if threading.current_thread() is not self._reader:
            self._reader.join()

    def _settle(self, number: int, outcome: CallResult | LinkError) -> None:
        with self._lock:
            call = self._pending.pop(number, None)
        if call is None:
            return
        call.seconds = time.perf_counter() - call.began
        if isinstance(outcome, LinkError):
            self._settled(call, outcome)
            call.outcome.set_exception(outcome)
        else:
            self._settled(call, None)
            call.outcome.set_result(outcome)

    def _read(self) -> None:
        ended = LinkError(f"{self._name} closed the connection")
        try:
            while (frame := self._stream.read()) is not None:
                self._take(frame)
        except LinkError as error:
            ended = error
        finally:
            with self._lock:
                self._ended = ended
                left = list(self._pending)
            self._stream.close()
            for number in left:
                self._settle(number, ended)

    def _take(self, frame: Frame) -> None:
        number = number_of(frame)
        with self._lock:
            call, asked = self._pending.get(number), self._asked
        if number >= asked:
            raise LinkError(f"question {number} was answered, must have been asked first")
        if call is not None:
            self._settle(number, self._outcome(call, frame))

    def _outcome(self, call: Call, frame: Frame) -> CallResult | LinkError:
        if frame.kind == "answer" and call.asked is not None:
            return check_answer(frame, call.asked)
        if frame.kind == "bytes" and call.asked is None:
            return frame.payload_B
        if frame.kind == "failed" and not frame.payload_B.numel():
            return LinkError(f"{self._name} failed: {frame.field('message', str, most=512)}")
        raise LinkError(f"{self._name} answers with {frame.kind}, must fit the question")
