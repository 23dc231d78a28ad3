"""The client's side of one connection: questions under way, and the thread that matches answers to them by number.

Knows calls, not peers or breakers. Invariants: a call is settled exactly once; after `abandon` returns nothing writes
to the call's buffer any more; an answer that nobody waits for is read and dropped.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from buddymoe_ray.errors import LinkError
from buddymoe_ray.links.arrays import ArraySpec, cut, payload_room, view_of
from buddymoe_ray.links.channel import Channel
from buddymoe_ray.links.messages import Answer, BytesAnswer, Declined, Failed, Reply, parse_reply

__all__ = ["Call", "Session"]


class Call:
    """One question. Settled with `rows` (compute), `raw_B` (bytes without `into`), `declined`, or `error`.

    Args:
        number: of the question; never used twice by a link.
        ticket: the breaker's pass.
        asked: the arrays that were sent to be computed; None for other questions.
        into: where the bytes of the answer go.
        settled: told once, when the outcome is known.
    """

    def __init__(
        self,
        number: int,
        ticket: int,
        *,
        asked: Sequence[ArraySpec] | None = None,
        into: memoryview | None = None,
        settled: Callable[[Call], None],
    ) -> None:
        self.number, self.ticket, self.asked, self.into = number, ticket, asked, into
        self.rows: Mapping[int, Tensor] = {}
        self.raw_B: Tensor | None = None
        self.declined = False
        self.error: LinkError | None = None
        self.session: Session | None = None
        self.file = ""  # the question's payload in shared memory
        self._told = settled
        self._lock, self._done = threading.Lock(), threading.Lock()
        self._done.acquire()
        self.is_settled = False

    def wait(self, seconds: float | None) -> bool:
        """Whether the outcome is known, after at most that long."""
        if self.is_settled:
            return True
        if not self._done.acquire(timeout=-1 if seconds is None else max(0.0, seconds)):
            return self.is_settled
        self._done.release()  # for others who wait
        return True

    def settle(
        self,
        *,
        error: LinkError | None = None,
        declined: bool = False,
        rows: Mapping[int, Tensor] | None = None,
        raw_B: Tensor | None = None,
    ) -> None:
        """Set the outcome, if there is none yet."""
        with self._lock:
            if self.is_settled:
                return
            self.error, self.declined, self.rows, self.raw_B = error, declined, rows or {}, raw_B
            self.is_settled = True
        self._told(self)
        self._done.release()


class Session:
    """Belongs to its reader thread, which ends with the connection."""

    def __init__(self, channel: Channel, *, name: str) -> None:
        self.channel = channel
        self._name = name
        self._lock = threading.Lock()
        self._pending: dict[int, Call] = {}
        self._newest = -1
        self._ended: LinkError | None = None
        self._reader = threading.Thread(target=self._read, name=f"link-{name}", daemon=True)
        self._reader.start()

    @property
    def alive(self) -> bool:
        """Whether questions can still be asked."""
        return self._ended is None

    def ask(self, call: Call, header: Mapping[str, object], parts: Sequence[memoryview]) -> None:
        """Send the question; the call is settled here if that fails. Does not wait for the answer."""
        with self._lock:
            ended = self._ended
            if ended is None:
                self._pending[call.number] = call
                self._newest = max(self._newest, call.number)
        if ended is not None:
            call.settle(error=ended)
            return
        try:
            call.file = self.channel.send(header, parts)
        except LinkError as error:
            self._forget(call)
            call.settle(error=error)

    def abandon(self, call: Call, error: LinkError) -> None:
        """Nobody waits for the call any more: settle it with `error`, unless it was settled just now."""
        if not self._forget(call) and call.into is not None and not call.is_settled:
            self.channel.wake()  # its answer is being written to the caller's buffer: stop that first
            call.wait(None)
        self.channel.withdraw(call.file)
        call.settle(error=error)

    def close(self) -> None:
        """End the connection and the thread; what is under way fails. Safe to call twice."""
        self.channel.wake()
        if threading.current_thread() is not self._reader:
            self._reader.join()

    def _forget(self, call: Call) -> bool:
        with self._lock:
            return self._pending.pop(call.number, None) is not None

    def _read(self) -> None:
        ended = LinkError(f"{self._name} closed the connection")
        try:
            while self._read_one():
                pass
        except LinkError as error:
            ended = error
        finally:
            with self._lock:
                self._ended = ended
                left = list(self._pending.values())
                self._pending.clear()
            self.channel.close()
            for call in left:
                call.settle(error=ended)

    def _read_one(self) -> bool:
        received = self.channel.receive()
        if received is None:
            return False
        frame, name = received
        reply = parse_reply(frame)
        with self._lock:
            call = self._pending.pop(reply.number, None)
            newest = self._newest
        if call is None:
            if reply.number > newest:
                raise LinkError(f"question {reply.number} was answered, must have been asked first")
            self.channel.drop(frame, name)
            return True
        try:
            self._settle(call, reply, frame.nbytes, name)
        except LinkError as error:
            call.settle(error=error)
            raise
        except BaseException:
            call.settle(error=LinkError(f"the answer of {self._name} could not be read"))
            raise
        self.channel.withdraw(call.file)
        return True

    def _settle(self, call: Call, reply: Reply, nbytes: int, name: str) -> None:
        if isinstance(reply, Answer) and call.asked is not None:
            reply.check(call.asked)
            raw_B = self._taken(name, payload_room(nbytes))
            call.settle(rows=cut(reply.specs, raw_B), declined=not reply.specs)
        elif isinstance(reply, BytesAnswer) and call.asked is None:
            if call.into is None:
                call.settle(raw_B=self._taken(name, payload_room(nbytes)))
                return
            if call.into.nbytes != nbytes:
                raise LinkError(f"{self._name} sends {nbytes} bytes, must be the {call.into.nbytes} asked for")
            if not self.channel.take(name, call.into):
                raise LinkError(f"{self._name} took its answer back")
            call.settle()
        elif nbytes or not isinstance(reply, Declined | Failed):
            raise LinkError(
                f"{self._name} answers with {type(reply).__name__} and {nbytes} bytes, must fit the question"
            )
        elif isinstance(reply, Failed):
            call.settle(error=LinkError(f"{self._name} failed: {reply.message}"))
        else:
            call.settle(declined=True)

    def _taken(self, name: str, raw_B: Tensor) -> Tensor:
        if not self.channel.take(name, view_of(raw_B)):
            raise LinkError(f"{self._name} took its answer back")
        return raw_B
