"""One authenticated connection: whole messages in and out, big payloads by shared memory where both ends see it.

A header that names a shared file says `shared` and `size`; the frame's own payload is empty then. Knows neither
questions nor answers. Invariant: after an error nothing more is sent or believed; the files it sent and nobody opened
are gone when it closes.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping, Sequence

from buddymoe_ray.errors import LinkError
from buddymoe_ray.links.shared_files import Mailbox, open_file, read_file
from buddymoe_ray.links.stream import FrameStream
from buddymoe_ray.links.wire import Frame

__all__ = ["Channel"]


class Channel:
    """Belongs to one reading thread, which closes it; any thread may send.

    Args:
        stream: authenticated.
        shared_from: payloads of as many bytes go by shared memory; None where the ends do not share any.
        send_seconds: how long the peer may take to accept a frame.
        frame_seconds: how long a frame that has begun may take to arrive.
    """

    def __init__(
        self, stream: FrameStream, *, shared_from: int | None, send_seconds: float, frame_seconds: float
    ) -> None:
        self._stream, self._send_seconds, self._frame_seconds = stream, send_seconds, frame_seconds
        self._mailbox = None if shared_from is None else Mailbox(least_bytes=max(1, shared_from))
        self._sending = threading.Lock()
        self._closed = False
        self.shares_memory = shared_from is not None
        self.shared_in = self.shared_out = 0

    @property
    def bytes_in(self) -> int:
        """Bytes received over the socket."""
        return self._stream.bytes_in

    @property
    def bytes_out(self) -> int:
        """Bytes sent over the socket."""
        return self._stream.bytes_out

    def send(self, header: Mapping[str, object], parts: Sequence[memoryview] = ()) -> str:
        """Send one message; returns the name of its shared file, empty where the socket carried it.

        Raises:
            LinkError: too slow, gone, closed: the connection is ended; or too long: nothing was sent.
        """
        size = sum(part.nbytes for part in parts)
        if size > self._stream.limits.max_payload:
            raise LinkError(
                f"a message has {size} bytes, must be <= {self._stream.limits.max_payload}. hint: send less"
            )
        name = (self._mailbox.post(parts) if self._mailbox is not None else None) or ""
        if name:
            header, parts = {**header, "shared": name, "size": size}, ()
        with self._sending:
            if self._closed:
                raise LinkError("the connection is closed")
            try:
                self._stream.write(header, parts, deadline=time.monotonic() + self._send_seconds)
            except BaseException:
                self.wake()
                raise
            self.shared_out += size if name else 0
        return name

    def receive(self) -> tuple[Frame, str] | None:
        """Wait for the next message: its header, with the payload's size, and the name of its shared file.

        Its payload must be taken or dropped before the next. None when the peer closed the connection.
        """
        frame = self._stream.read(deadline=None, seconds=self._frame_seconds)
        if frame is None or "shared" not in frame.header:
            return None if frame is None else (frame, "")
        name, size = frame.text("shared"), frame.whole("size", most=self._stream.limits.max_payload)
        if self._mailbox is None or frame.nbytes or not name:
            raise LinkError("a frame names a shared file, must not on this connection")
        return Frame(kind=frame.kind, header=frame.header, nbytes=size), name

    def take(self, name: str, into: memoryview) -> bool:
        """Fill `into`, of the payload's size. False when the peer has withdrawn it meanwhile."""
        if name:
            taken = read_file(name, into)
            self.shared_in += into.nbytes if taken else 0
            return taken
        self._stream.take(into, deadline=time.monotonic() + self._frame_seconds)
        return True

    def drop(self, frame: Frame, name: str) -> None:
        """Do without the payload."""
        if not name:
            self._stream.skip(frame.nbytes, deadline=time.monotonic() + self._frame_seconds)
            return
        fd = open_file(name, frame.nbytes)
        if fd is not None:
            os.close(fd)

    def withdraw(self, name: str) -> None:
        """Take back a shared file that the peer has not opened."""
        if self._mailbox is not None and name:
            self._mailbox.withdraw(name)

    def wake(self) -> None:
        """End the connection: whoever reads or sends returns at once. From any thread."""
        self._stream.wake()

    def close(self) -> None:
        """End and close. By the reading thread alone; safe to call twice."""
        self.wake()
        with self._sending:
            self._closed = True
            self._stream.close()
        if self._mailbox is not None:
            self._mailbox.close()
