"""/v1/batches over a runner, and /v1/files over its store. Knows neither workers nor disks."""

from __future__ import annotations

import asyncio
import secrets
import time

from fastapi import APIRouter, Request
from fastapi.responses import Response

from buddymoe_ray.errors import RequestError
from buddymoe_ray.serve.batches.asking import conflict, every, owner_of, page, said, the
from buddymoe_ray.serve.batches.file_routes import file_routes
from buddymoe_ray.serve.batches.records import (
    WINDOW_SECONDS,
    BatchList,
    BatchObject,
    BatchRequest,
    FileObject,
)
from buddymoe_ray.serve.batches.runner import BatchRunner
from buddymoe_ray.serve.calls import ENDPOINTS
from buddymoe_ray.serve.dashboard import READ
from buddymoe_ray.serve.reading_bodies import whole_body
from buddymoe_ray.serve.refusals import Refused
from buddymoe_ray.serve.wire_parsing import parse_body
from buddymoe_ray.serve.work import Refusal

__all__ = ["MOST_UNFINISHED", "batch_routes"]

MOST_UNFINISHED = 32


def batch_routes(runner: BatchRunner, *, model: str) -> APIRouter:
    """What a caller keeps is seen by callers of the same name alone: that of their key."""
    router, store = APIRouter(), runner.store
    router.include_router(file_routes(store))

    @router.post("/v1/batches")
    async def create(request: Request) -> Response:
        store.check()
        asked = parse_body(await whole_body(request), BatchRequest)
        if asked.endpoint not in ENDPOINTS:
            message = f"endpoint is {asked.endpoint!r:.80}, must be {' or '.join(ENDPOINTS)}. hint: see /docs"
            raise RequestError(message, param="endpoint")
        source = await the(store, FileObject, asked.input_file_id, request)
        if source.purpose != "batch":
            raise RequestError(f"{source.id} is of purpose {source.purpose}, must be batch", param="input_file_id")
        running = [each for each in await asyncio.to_thread(store.records, BatchObject, None) if not each.finished]
        if len(running) >= MOST_UNFINISHED:
            raise Refused(_busy())
        now = int(time.time())
        batch = BatchObject(
            id=f"batch_{secrets.token_hex(16)}",
            endpoint=asked.endpoint,
            model=model,
            input_file_id=source.id,
            created_at=now,
            expires_at=now + WINDOW_SECONDS,
            metadata=asked.metadata,
            output_expires_after=asked.output_expires_after,
        )
        await asyncio.to_thread(store.begin, batch, owner_of(request))
        runner.job(batch, owner_of(request))
        return said(batch)

    @router.api_route("/v1/batches", methods=[*READ])
    async def batches(request: Request) -> Response:
        found = [runner.now(each) for each in await every(store, BatchObject, request)]
        return said(BatchList(**page(found, request)))

    @router.api_route("/v1/batches/{batch_id}", methods=[*READ])
    async def batch(request: Request, batch_id: str) -> Response:
        return said(runner.now(await the(store, BatchObject, batch_id, request)))

    @router.post("/v1/batches/{batch_id}/cancel")
    async def cancel(request: Request, batch_id: str) -> Response:
        found = runner.now(await the(store, BatchObject, batch_id, request))
        if found.status in ("validating", "in_progress"):
            job = runner.job(found, owner_of(request))
            await job.cancel()
            found = job.batch
        elif found.status not in ("cancelling", "cancelled"):
            raise Refused(conflict(f"{found.id} is {found.status}, must be in_progress. hint: nothing is left to do"))
        return said(found)

    return router


def _busy() -> Refusal:
    message = f"{MOST_UNFINISHED} batches run or wait. hint: retry when one has ended"
    return Refusal(status=429, message=message, kind="rate_limit_error", code="batches_full", retry_after_seconds=60)
