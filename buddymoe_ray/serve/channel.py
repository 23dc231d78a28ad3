"""A connection on which the ingress asks a worker of its node, beside Serve.

By Serve's gRPC a streamed request of one token takes the ingress 1.6 ms of CPU and the worker, beside its steps, 1.1;
of 200 tokens 5.5 and 4. Here it is .7 and .45, 2.2 and 1.8.

A call is a number, its `Work`, and replies until its end, each a msgpack of both on a socket of this user's: nothing is
unpickled. Knows `Work` and who answers it, neither HTTP nor ray. Invariant: a call ends at both ends of the connection,
whether it is over, left, or the connection is lost; what of one cannot be read ends that one alone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgpack
from pydantic import TypeAdapter

from buddymoe_ray.serve.refusals import failure
from buddymoe_ray.serve.resume import Attempt, WorkerLost
from buddymoe_ray.serve.work import Batch, Refusal, Reply, Work

__all__ = ["Channel", "offer", "socket_folder"]

log = logging.getLogger(__name__)

_WORK = TypeAdapter(Work)
_REPLY: TypeAdapter[Reply] = TypeAdapter(Batch | Refusal)
_GONE = "the worker is gone (its connection ended)"
_READ_BYTES, _MOST_BYTES = 1 << 16, 1 << 30
OFFERED_SECONDS = 30.0


def socket_folder() -> TemporaryDirectory[str]:
    """A folder of this user's alone, for a socket; TMPDIR may be longer than the 107 bytes of a socket's path."""
    return TemporaryDirectory(prefix="buddymoe-", dir="/tmp")


async def offer(answer: Attempt) -> str:
    """A path at which who connects first, of this user and soon, has work answered."""
    folder = socket_folder()

    def withdraw() -> None:
        server.close()
        folder.cleanup()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        waiting.cancel()
        withdraw()
        await _answer_all(answer, reader, writer)

    path = str(Path(folder.name, "worker"))
    server = await asyncio.start_unix_server(connected, path)
    waiting = asyncio.get_running_loop().call_later(OFFERED_SECONDS, withdraw)
    return path


class _Together:
    """Writes a connection: what is written in one turn of the event loop wakes the other end once."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer, self._loop = writer, asyncio.get_running_loop()
        self._held: list[bytes] = []
        self.drain = writer.drain

    def write(self, frame: bytes) -> None:
        if not self._held:
            self._loop.call_soon(self._send)
        self._held.append(frame)

    def close(self) -> None:
        self._send()
        self._writer.close()

    def _send(self) -> None:
        held, self._held = self._held, []
        if held:
            self._writer.write(b"".join(held))


class Channel:
    """The asking end; `open` it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writer, self._numbers = _Together(writer), count()
        self._calls: dict[int, asyncio.Queue[bytes | WorkerLost | None]] = {}
        self._reading = asyncio.create_task(self._read(reader))

    @classmethod
    async def open(cls, path: str) -> Channel:
        """At a path that was offered. Raises OSError."""
        return cls(*await asyncio.open_unix_connection(path))

    @property
    def is_open(self) -> bool:
        """Whether the worker is still there."""
        return not self._reading.done()

    def generate(self, work: Work) -> AsyncGenerator[Reply, None]:
        """An attempt of `resume.resumable`. Raises TypeError or ValueError at once for what msgpack cannot hold."""
        call = next(self._numbers)
        return self._call(call, _packed(call, _WORK.dump_python(work)))

    async def close(self) -> None:
        """End it, and all calls with it."""
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)

    async def _call(self, call: int, packed: bytes) -> AsyncGenerator[Reply, None]:
        if not self.is_open:
            raise WorkerLost(_GONE)
        replies = self._calls[call] = asyncio.Queue()
        self._writer.write(packed)
        try:
            while (reply := await replies.get()) is not None:
                if isinstance(reply, WorkerLost):
                    raise reply
                yield _REPLY.validate_python(_fields(reply))
        finally:
            if self._calls.pop(call, None) is not None and self.is_open:
                self._writer.write(_packed(call, None))

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            async for call, reply in _frames(reader):
                if call in self._calls:  # else it was left
                    replies = self._calls[call] if reply is not None else self._calls.pop(call)
                    replies.put_nowait(reply)
        finally:
            self._writer.close()
            calls, self._calls = self._calls, {}
            for replies in calls.values():
                replies.put_nowait(WorkerLost(_GONE))


async def _answer_all(answer: Attempt, reader: asyncio.StreamReader, connection: asyncio.StreamWriter) -> None:
    calls: dict[int, asyncio.Task[None]] = {}
    writer = _Together(connection)

    async def run(call: int, work: bytes) -> None:
        try:
            async with aclosing(answer(_WORK.validate_python(_fields(work)))) as replies:
                async for reply in replies:
                    writer.write(_packed(call, _REPLY.dump_python(reply)))
                    await writer.drain()
        except ConnectionError:
            log.warning("call %d is left: its ingress is gone", call)
        except Exception:  # whoever waits gets an answer; the log says what it was
            log.exception("call %d failed", call)
            writer.write(_packed(call, _REPLY.dump_python(failure())))

    def begin(call: int, work: bytes) -> None:
        def end(_: object) -> None:
            del calls[call]
            writer.write(_packed(call, None))

        calls[call] = asyncio.create_task(run(call, work))
        calls[call].add_done_callback(end)

    try:
        async for call, work in _frames(reader):
            if work is not None:
                begin(call, work)
            elif call in calls:
                calls[call].cancel()
    finally:
        left = list(calls.values())
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        writer.close()


def _packed(call: int, fields: Any) -> bytes:
    """A frame: the call, and its fields apart, or None at its end."""
    inner = None if fields is None else msgpack.packb(fields, default=list, unicode_errors="surrogatepass")
    packed: bytes = msgpack.packb((call, inner))
    return packed


def _fields(packed: bytes) -> Any:
    return msgpack.unpackb(packed, strict_map_key=False, unicode_errors="surrogatepass")


async def _frames(reader: asyncio.StreamReader) -> AsyncGenerator[tuple[int, bytes | None], None]:
    """What comes, until the connection ends."""
    unpacker = msgpack.Unpacker(max_buffer_size=_MOST_BYTES)
    with suppress(ConnectionError):
        while data := await reader.read(_READ_BYTES):
            unpacker.feed(data)
            for call, packed in unpacker:
                yield call, packed
