"""Frames over one socket: whole ones or an error, by a deadline.

Knows sockets and time, not what a frame asks for. Invariant: a read or write that raises leaves the stream torn, and
its owner closes it; a peer that is silent, slow or gone never holds a thread longer than the deadline.
"""

from __future__ import annotations

import math
import select
import socket
import threading
import time
from collections.abc import Mapping, Sequence

import torch

from buddymoe_ray.errors import LinkError
from buddymoe_ray.links.arrays import view_of
from buddymoe_ray.links.wire import PREFIX_BYTES, Frame, FrameLimits, pack_frame, parse_frame, parse_prefix

__all__ = ["FrameStream"]

FRAME_SECONDS = 30.0
"""How long a frame that has begun may take to arrive."""

_BUFFER_BYTES = 64 << 10
_MOST_PARTS = 1024
"""Linux takes no more buffers in one sendmsg (IOV_MAX)."""


class FrameStream:
    """Frames over a connected stream socket, which belongs to this object.

    One thread reads and closes; any may write. Deadlines are of `time.monotonic`; None waits for ever.
    """

    def __init__(self, sock: socket.socket, *, limits: FrameLimits) -> None:
        sock.setblocking(False)
        self.limits = limits
        self._sock = sock
        self._sending = threading.Lock()
        self._buffer = memoryview(bytearray(_BUFFER_BYTES))
        self._start = self._end = 0
        self._readable, self._writable = select.poll(), select.poll()
        self._readable.register(sock, select.POLLIN)
        self._writable.register(sock, select.POLLOUT)

    def write(self, header: Mapping[str, object], parts: Sequence[memoryview] = (), *, deadline: float) -> None:
        """Send one frame.

        Raises:
            LinkError: not taken in time, gone, closed: the connection is ended then.
        """
        left = [memoryview(pack_frame(header, sum(part.nbytes for part in parts)))]
        left += [part for part in parts if part.nbytes]
        at = 0
        with self._sending:
            try:
                while at < len(left):
                    sent = self._send(left[at : at + _MOST_PARTS], deadline)
                    while at < len(left) and sent >= left[at].nbytes:
                        sent -= left[at].nbytes
                        at += 1
                    if sent:
                        left[at] = left[at][sent:]
            except BaseException:
                self.wake()
                raise

    def read(self, *, deadline: float | None = None, seconds: float = FRAME_SECONDS) -> Frame | None:
        """The next frame.

        Args:
            deadline: until when it must have begun.
            seconds: how long the rest may take from then on.

        Returns:
            None when the peer closed the connection between two frames.

        Raises:
            LinkError: garbage, too long, torn, unknown kind, too late.
        """
        if self._start == self._end:
            _wait(self._readable, deadline)  # there is seldom anything yet
            if not self._fill(deadline):
                return None
        deadline = time.monotonic() + seconds
        prefix = bytearray(PREFIX_BYTES)
        self._take(memoryview(prefix), deadline)
        header_bytes, nbytes = parse_prefix(prefix, self.limits)
        packed = bytearray(header_bytes)
        self._take(memoryview(packed), deadline)
        frame = parse_frame(packed, torch.empty(nbytes, dtype=torch.uint8))
        self._take(view_of(frame.payload_B), deadline)
        return frame

    def wake(self) -> None:
        """End the connection: whoever reads or writes returns at once with an error. From any thread."""
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # the peer was quicker

    def close(self) -> None:
        """End and close. By the reading thread alone; safe to call twice."""
        self.wake()
        with self._sending:
            self._sock.close()

    def _take(self, into: memoryview, deadline: float) -> None:
        at, size = 0, into.nbytes
        while at < size:
            ready = min(self._end - self._start, size - at)
            if ready:
                into[at : at + ready] = self._buffer[self._start : self._start + ready]
                self._start += ready
                at += ready
            elif size - at >= _BUFFER_BYTES:
                at += self._receive(into[at:], deadline)
            elif not self._fill(deadline):
                raise LinkError("the connection was closed in the middle of a frame")

    def _fill(self, deadline: float | None) -> bool:
        try:
            self._start, self._end = 0, 0
            self._end = self._receive(self._buffer, deadline)
        except _Ended:
            return False
        return True

    def _receive(self, into: memoryview, deadline: float | None) -> int:
        while True:
            try:
                count = self._sock.recv_into(into)
            except (BlockingIOError, InterruptedError):
                _wait(self._readable, deadline)
                continue
            except OSError as error:
                raise LinkError(f"the connection was lost: {error}") from error
            if not count:
                raise _Ended("the connection was closed in the middle of a frame")
            return count

    def _send(self, parts: Sequence[memoryview], deadline: float) -> int:
        while True:
            try:
                return self._sock.sendmsg(parts)
            except (BlockingIOError, InterruptedError):
                _wait(self._writable, deadline)
            except OSError as error:
                raise LinkError(f"the connection was lost: {error}") from error


class _Ended(LinkError):
    """The peer closed its end."""


def _wait(poll: select.poll, deadline: float | None) -> None:
    left = None if deadline is None else deadline - time.monotonic()
    if left is not None and left <= 0:
        raise LinkError("the peer was too slow: no byte moved in time")
    poll.poll(None if left is None else math.ceil(left * 1000))
