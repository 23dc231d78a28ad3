"""The body of an HTTP request, of bounded length, and read so that a long one keeps nobody else waiting; and whether
who sent it is still there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect

from buddymoe_ray.serve.calls import MAX_BODY_BYTES, too_long
from buddymoe_ray.serve.refusals import Refused, coded, too_slow

__all__ = ["Departure", "apart", "check_coding", "whole_body"]

LONG_BYTES = 1 << 16
"""Of 7 MiB in 60,000 messages all streams waited for 4.5 s, and .6 with a thread beside them."""

BODY_SECONDS = 60.0
"""16 MiB at 2.2 Mbit/s. Nothing else ends a body that never comes whole: its socket stayed as long as its client."""

T = TypeVar("T")


def check_coding(request: Request) -> None:
    """Raises Refused where the body is compressed."""
    coding = request.headers.get("content-encoding", "identity")
    if coding.lower() != "identity":
        raise Refused(coded(coding))


async def whole_body(request: Request) -> bytes:
    """All of it. Raises Refused where it is coded, and while it is read when it is too long or too slow."""
    check_coding(request)
    chunks: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                size += len(chunk)
                if size > MAX_BODY_BYTES:
                    raise Refused(too_long())
                chunks.append(chunk)
    except TimeoutError:
        raise Refused(too_slow(BODY_SECONDS)) from None
    return b"".join(chunks)


async def apart(read: Callable[[], T], body: bytes) -> T:
    """What `read` makes of a body: where that is long, in a thread."""
    return await asyncio.to_thread(read) if len(body) > LONG_BYTES else read()


class Departure:
    """Ends what is done for a client that leaves, from when its body was read to the last of its answer.

    One task waits for that: two before a stream's first piece and a group around the others took a tenth of its CPU.
    """

    def __init__(self, request: Request) -> None:
        self._ending: asyncio.Task[Any] | None = None
        self._left = False
        self._waiting = asyncio.ensure_future(_leaves(request))
        self._waiting.add_done_callback(self._end)

    async def awaited(self, made: Coroutine[Any, Any, T]) -> T:
        """What is made for the client. Raises ClientDisconnect when it leaves, and nothing more is made. Whatever it
        raises, that was the last wait."""
        self._ending = task = asyncio.current_task()
        assert task is not None, "a client is answered in a task"
        if self._waiting.done():
            self._end(self._waiting)
        try:
            return await made
        except asyncio.CancelledError:
            self.over()
            if self._left and not task.uncancel():
                raise ClientDisconnect from None
            raise
        except BaseException:
            self.over()
            raise
        finally:
            self._ending = None

    def over(self) -> None:
        """All is made: who leaves now ends nothing."""
        self._ending = None
        self._waiting.cancel()

    def _end(self, waiting: asyncio.Future[None]) -> None:
        if not waiting.cancelled():
            waiting.exception()  # one of the server's: nobody is there, too
            if self._ending is not None and not self._left:
                self._left = True
                self._ending.cancel()


async def _leaves(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
