"""One peer: ask it to run tokens through experts, or for an expert's bytes.

A persistent connection, opened by the first question and again after it was lost; questions are sent without waiting
for earlier ones. Knows neither models nor placement. Invariant: every call ends by its deadline with an answer that
fits the question, with nothing, or with a LinkError: never a hang, never another question's bytes.

Legend: R rows of one expert, D hidden, B bytes.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from buddymoe_ray.errors import LinkError
from buddymoe_ray.links.address import Address
from buddymoe_ray.links.arrays import ArraySpec, gather, view_of
from buddymoe_ray.links.auth import HANDSHAKE_LIMITS, check_secret, greet
from buddymoe_ray.links.breaker import Breaker
from buddymoe_ray.links.channel import Channel
from buddymoe_ray.links.counters import LinkSnapshot
from buddymoe_ray.links.messages import ComputeQuestion, EchoQuestion, Question, ReadQuestion
from buddymoe_ray.links.options import LinkOptions
from buddymoe_ray.links.session import Call, Session
from buddymoe_ray.links.stream import FrameStream

__all__ = ["PeerLink", "PendingAnswer"]


class PeerLink:
    """One peer. From any thread.

    Args:
        address: `host:port` or `unix:/path`.
        secret: the cluster's.
        timeout: seconds to connect, to hand a question to the system, and (unless told otherwise) to be answered.
        clock: the breaker's.
    """

    def __init__(
        self,
        address: str,
        secret: bytes,
        *,
        timeout: float = 1.0,
        options: LinkOptions | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.address, self.timeout, self.options = address, timeout, options or LinkOptions()
        self._parsed, self._secret = Address.parse(address), check_secret(secret)
        self._breaker = Breaker(
            clock=clock,
            backoff_seconds=self.options.backoff_seconds,
            cap_seconds=self.options.cap_seconds,
            probe_seconds=3 * timeout,
        )
        self._numbers = itertools.count()
        self._dialling = threading.Lock()
        self._counting = threading.Lock()
        self._session: Session | None = None
        self._closed = False
        self._last_error = ""
        self._counts = dict.fromkeys(("requests", "answered", "declined", "failed", "refused", "connects"), 0)
        self._bytes = dict.fromkeys(("bytes_out", "bytes_in", "shared_out", "shared_in"), 0)  # of past connections

    def available(self) -> bool:
        """Whether the peer may be asked now; does not touch the socket."""
        return not self._closed and self._breaker.available()

    def connect(self) -> None:
        """Open the connection now, so that no question pays for it.

        Raises:
            LinkError: not reachable in time, another secret, or the breaker is open.
        """
        with self._dialling:
            ticket = self._enter()
            try:
                self._connected()
            except LinkError as error:
                self._breaker.failed(ticket)
                self._note(error)
                raise
            self._breaker.succeeded(ticket)

    def submit(self, layer: int, expert_rows: Mapping[int, Tensor]) -> PendingAnswer:
        """Send each expert's rows `[R, D]` and return; the tensors may be changed afterwards.

        The peer does not begin with them once the link's timeout has passed.

        Raises:
            LinkError: the breaker is open (at once), the peer cannot be reached, or a dtype may not travel.
        """
        specs, parts = gather(expert_rows)
        patience = int(self.timeout * 1000)
        call = self._ask(
            lambda number: ComputeQuestion(number=number, layer=layer, patience_ms=patience, specs=specs), parts, specs
        )
        return PendingAnswer(self, call)

    def fetch(
        self,
        layer: int,
        expert: int,
        segment: int,
        into: memoryview | bytearray,
        *,
        deadline_seconds: float | None = None,
    ) -> bool:
        """Fill `into` with the bytes of an expert's segment.

        Args:
            into: a writable contiguous buffer of exactly the segment's size; undefined unless True is returned.
            deadline_seconds: how long to wait; the link's timeout where None.

        Returns:
            False when the peer has no such bytes.

        Raises:
            LinkError: too late, lost, refused; nothing writes to `into` any more.
        """
        view = memoryview(into).cast("B")
        assert not view.readonly, "fetch needs a writable buffer"
        call = self._ask(
            lambda number: ReadQuestion(number=number, layer=layer, expert=expert, segment=segment, size=view.nbytes),
            into=view,
        )
        self.wait(call, deadline_seconds)
        return not call.declined

    def echo(self, payload: memoryview | bytes, *, deadline_seconds: float | None = None) -> memoryview:
        """The payload, there and back. Raises LinkError as `fetch`."""
        call = self._ask(lambda number: EchoQuestion(number=number), [memoryview(payload).cast("B")])
        self.wait(call, deadline_seconds)
        if call.raw_B is None:
            raise LinkError(f"{self.address} declined an echo")
        return view_of(call.raw_B)

    def wait(self, call: Call, seconds: float | None) -> None:
        """Wait for a call's outcome. Once the breaker has opened, what has not arrived is not waited for.

        Raises:
            LinkError: there is none in time, or it is an error.
        """
        seconds = self.timeout if seconds is None else seconds
        if not call.wait(seconds if self._breaker.current(call.ticket) else 0.0) and call.session is not None:
            call.session.abandon(call, LinkError(f"{self.address} did not answer within {seconds:.3g} s"))
        call.wait(None)
        if call.error is not None:
            raise LinkError(str(call.error)) from call.error

    def snapshot(self) -> LinkSnapshot:
        """What the link has done so far."""
        session = self._session
        with self._counting:
            return LinkSnapshot(
                address=self.address,
                state=self._breaker.state,
                connected=session is not None and session.alive,
                shares_memory=session is not None and session.alive and session.channel.shares_memory,
                times_opened=self._breaker.times_opened,
                last_error=self._last_error,
                **self._counts,
                **{name: count + _moved(session, name) for name, count in self._bytes.items()},
            )

    def close(self) -> None:
        """End the connection and its thread; what is under way fails. Safe to call twice."""
        self._closed = True
        with self._dialling:
            if self._session is not None:
                self._session.close()

    def _ask(
        self,
        question: Callable[[int], Question],
        parts: Sequence[memoryview] = (),
        asked: Sequence[ArraySpec] | None = None,
        into: memoryview | None = None,
    ) -> Call:
        most = self.options.limits.max_payload
        size = sum(part.nbytes for part in parts) if into is None else into.nbytes
        if size > most:
            raise LinkError(f"a question moves {size} bytes, must be <= {most}. hint: ask in parts, or raise the limit")
        with self._dialling:
            call = Call(next(self._numbers), self._enter(), asked=asked, into=into, settled=self._settled)
            self._count("requests")
            try:
                call.session = self._connected()
            except LinkError as error:
                call.settle(error=error)
                raise
        call.session.ask(call, question(call.number).header(), parts)
        return call

    def _enter(self) -> int:
        if self._closed:
            raise LinkError(f"the link to {self.address} is closed")
        ticket = self._breaker.enter()
        if ticket is None:
            self._count("refused")
            raise LinkError(f"{self.address} is not asked for a while: {self._last_error}")
        return ticket

    def _connected(self) -> Session:
        """The live connection, opened where there is none; the caller holds `_dialling`."""
        if self._session is not None and self._session.alive:
            return self._session
        if self._session is not None:
            self._session.close()
            with self._counting:
                for name in self._bytes:
                    self._bytes[name] += _moved(self._session, name)
                self._session = None
        deadline, options = time.monotonic() + self.timeout, self.options
        stream = FrameStream(self._parsed.connect(seconds=self.timeout), limits=HANDSHAKE_LIMITS)
        try:
            share = options.shared_from is not None
            admission = greet(stream, self._secret, deadline=deadline, share=share)
        except BaseException as error:
            stream.close()
            if isinstance(error, LinkError):
                raise LinkError(f"{self.address}: {error}") from error
            raise
        stream.limits = options.limits
        channel = Channel(
            stream,
            shared_from=options.shared_from if admission.shared else None,
            send_seconds=self.timeout,
            frame_seconds=options.frame_seconds,
        )
        self._count("connects")
        self._session = Session(channel, name=self.address)
        return self._session

    def _settled(self, call: Call) -> None:
        if call.error is not None:
            self._breaker.failed(call.ticket)
            self._note(call.error)
            self._count("failed")
        else:
            self._breaker.succeeded(call.ticket)
            self._count("declined" if call.declined else "answered")

    def _note(self, error: LinkError) -> None:
        self._last_error = str(error)[:200]

    def _count(self, name: str) -> None:
        with self._counting:
            self._counts[name] += 1


class PendingAnswer:
    """A compute question under way."""

    def __init__(self, link: PeerLink, call: Call) -> None:
        self._link, self._call = link, call

    def collect(self, deadline_seconds: float | None = None) -> Mapping[int, Tensor]:
        """Outputs `[R, D]` of those experts that were run, in host memory, in the dtype of the rows sent.

        Empty when the peer was busy. May be called again, with the same outcome.

        Args:
            deadline_seconds: how long to wait from now; the link's timeout where None.

        Raises:
            LinkError: no answer in time, a lost connection, a failed service. A late answer is dropped.
        """
        self._link.wait(self._call, deadline_seconds)
        return self._call.rows


def _moved(session: Session | None, name: str) -> int:
    return 0 if session is None else int(getattr(session.channel, name))
