"""The body of an HTTP request, of bounded length."""

from __future__ import annotations

from fastapi import Request

from buddymoe_ray.serve.calls import MAX_BODY_BYTES, too_long
from buddymoe_ray.serve.refusals import Refused

__all__ = ["whole_body"]


async def whole_body(request: Request) -> bytes:
    """All of it. Raises Refused while it is read when it is too long."""
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > MAX_BODY_BYTES:
            raise Refused(too_long())
        chunks.append(chunk)
    return b"".join(chunks)
