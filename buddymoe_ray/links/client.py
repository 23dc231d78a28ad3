"""A worker's peers: ask one to run tokens through experts, or which experts it has.

A persistent connection to each, opened by the first question and again after it was lost; questions are sent without
waiting for earlier ones. Knows neither models nor placement. Invariant: every call ends by its deadline with an answer
that fits the question, with nothing, or with a LinkError: never a hang, never another question's bytes.

Legend: R rows of one expert, D hidden, B bytes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence

from torch import Tensor

from buddymoe_ray.errors import LinkError
from buddymoe_ray.links.address import dial, parse
from buddymoe_ray.links.arrays import ArraySpec, gather
from buddymoe_ray.links.auth import HANDSHAKE_LIMITS, check_secret, greet
from buddymoe_ray.links.breaker import Breaker
from buddymoe_ray.links.messages import CONTENTS, Computation
from buddymoe_ray.links.session import Call, CallResult, Session
from buddymoe_ray.links.stream import FrameStream
from buddymoe_ray.links.wire import FrameLimits

__all__ = ["PeerLink", "PeerLinks", "PendingAnswer"]


class PeerLink:
    """One peer. From any thread.

    Args:
        address: `host:port`.
        secret: the cluster's.
        timeout: seconds to connect, to hand a question to the system, and (unless told otherwise) to be answered.
    """

    def __init__(self, address: str, secret: bytes, *, timeout: float = 1.0) -> None:
        parse(address)
        self.address, self.timeout, self._secret = address, timeout, check_secret(secret)
        self._breaker = Breaker(clock=time.monotonic, probe_seconds=3 * timeout)
        self._dialling = threading.Lock()
        self._session: Session | None = None
        self._closed = False
        self._last_error = ""

    def submit(self, layer: int, expert_rows: Mapping[int, Tensor]) -> PendingAnswer:
        """Send each expert's rows `[R, D]` and return; the tensors may be changed afterwards.

        The peer does not begin with them once the link's timeout has passed.

        Raises:
            LinkError: the breaker is open (at once), the peer cannot be reached, or a dtype may not travel.
        """
        specs, parts = gather(expert_rows)
        question = Computation(layer=layer, patience_ms=int(self.timeout * 1000), specs=specs)
        return PendingAnswer(self, *self._ask(question.header(), parts, specs))

    def contents(self, nbytes: int) -> tuple[Tensor, float]:
        """The peer's table of contents, uint8 of `nbytes`, and the seconds that it took to come.

        Raises:
            LinkError: as `submit`; no answer in time, or one of another length.
        """
        call, session = self._ask(CONTENTS)
        found_B = self.wait(call, session, self.timeout)
        if not isinstance(found_B, Tensor) or found_B.numel() != nbytes:
            raise LinkError(f"the table of contents of {self.address} is another model's, must have {nbytes} bytes")
        return found_B, call.seconds

    def wait(self, call: Call, session: Session, seconds: float) -> CallResult:
        """Wait for a call's outcome. Once the breaker has opened, what has not arrived is not waited for.

        Raises:
            LinkError: there is none in time, or it is an error.
        """
        try:
            return call.outcome.result(max(0.0, seconds) if self._breaker.current(call.ticket) else 0.0)
        except TimeoutError:
            session.abandon(call, LinkError(f"{self.address} did not answer within {seconds:.3g} s"))
            return call.outcome.result()

    def close(self) -> None:
        """End the connection and its thread; what is under way fails. Safe to call twice."""
        self._closed = True
        with self._dialling:
            if self._session is not None:
                self._session.close()

    def _ask(
        self, header: Mapping[str, object], parts: Sequence[memoryview] = (), asked: Sequence[ArraySpec] | None = None
    ) -> tuple[Call, Session]:
        size, most = sum(part.nbytes for part in parts), FrameLimits().max_payload
        if size > most:
            raise LinkError(f"a question moves {size} bytes, must be <= {most}. hint: ask in parts")
        with self._dialling:
            if self._closed:
                raise LinkError(f"the link to {self.address} is closed")
            ticket = self._breaker.enter()
            if ticket is None:
                raise LinkError(f"{self.address} is not asked for a while: {self._last_error}")
            call = Call(ticket, asked)
            try:
                session = self._connected()
            except LinkError as error:
                self._settled(call, error)
                raise
        session.ask(call, header, parts, deadline=time.monotonic() + self.timeout)
        return call, session

    def _connected(self) -> Session:
        """The live connection, opened where there is none; the caller holds `_dialling`."""
        if self._session is not None:
            if self._session.alive:
                return self._session
            self._session.close()
            self._session = None
        deadline = time.monotonic() + self.timeout
        stream = FrameStream(dial(self.address, seconds=self.timeout), limits=HANDSHAKE_LIMITS)
        try:
            greet(stream, self._secret, deadline=deadline)
        except BaseException as error:
            stream.close()
            if isinstance(error, LinkError):
                raise LinkError(f"{self.address}: {error}") from error
            raise
        stream.limits = FrameLimits()
        self._session = Session(stream, name=self.address, settled=self._settled)
        return self._session

    def _settled(self, call: Call, error: LinkError | None) -> None:
        if error is None:
            self._breaker.succeeded(call.ticket)
        else:
            self._last_error = str(error)[:200]
            self._breaker.failed(call.ticket)


class PendingAnswer:
    """A compute question under way."""

    def __init__(self, link: PeerLink, call: Call, session: Session) -> None:
        self._link, self._call, self._session = link, call, session

    @property
    def seconds(self) -> float:
        """From the question until its answer arrived, whenever that was collected; 0 before."""
        return self._call.seconds

    def collect(self, deadline_seconds: float | None = None) -> Mapping[int, Tensor]:
        """Outputs `[R, D]` of those experts that were run, in host memory, in the dtype of the rows sent.

        Empty when the peer was busy. May be called again, with the same outcome.

        Args:
            deadline_seconds: how long to wait from now; the link's timeout where None.

        Raises:
            LinkError: no answer in time, a lost connection, a failed service. A late answer is dropped.
        """
        seconds = self._link.timeout if deadline_seconds is None else deadline_seconds
        rows = self._link.wait(self._call, self._session, seconds)
        assert isinstance(rows, Mapping), "the session gives rows for rows"
        return rows


class PeerLinks:
    """The links of one worker to its peers, by name. From any thread.

    A peer whose address did not change keeps its connection and breaker through an update; one that was dropped answers
    nothing any more. Arguments as those of `PeerLink`.
    """

    def __init__(self, secret: bytes, *, timeout: float = 1.0) -> None:
        self._secret, self._timeout = secret, timeout
        self._lock = threading.Lock()
        self._links: dict[str, PeerLink] = {}
        self._closed = False

    def update(self, addresses: Mapping[str, str]) -> None:
        """Exactly these peers, address by name. Connections are opened by the first question.

        Raises:
            LinkError: an address is none; nothing was changed then.
        """
        with self._lock:
            if self._closed:
                raise LinkError("the links are closed")
            kept = {n: link for n, link in self._links.items() if addresses.get(n) == link.address}
            new = {n: address for n, address in addresses.items() if n not in kept}
            made = {n: PeerLink(address, self._secret, timeout=self._timeout) for n, address in new.items()}
            dropped = [link for n, link in self._links.items() if n not in kept]
            self._links = kept | made
        for link in dropped:
            link.close()

    def get(self, name: str) -> PeerLink:
        """The link to a peer. Raises LinkError when there is none of that name."""
        link = self._links.get(name)
        if link is None:
            raise LinkError(f"peer {name!r} is unknown, must be one of {sorted(self._links)}")
        return link

    def names(self) -> tuple[str, ...]:
        """All peers, sorted."""
        return tuple(sorted(self._links))

    def close(self) -> None:
        """End all links. Safe to call twice."""
        with self._lock:
            self._closed = True
            links, self._links = list(self._links.values()), {}
        for link in links:
            link.close()
