"""/v1/files over a store. Knows neither workers nor disks. Uploads are read to a temporary file first."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response, StreamingResponse
from starlette.datastructures import UploadFile
from starlette.types import Message

from buddymoe_ray.errors import ConfigError, RequestError
from buddymoe_ray.serve.batches.asking import conflict, every, owner_of, page, said, the
from buddymoe_ray.serve.batches.lines import BatchInput, LineError
from buddymoe_ray.serve.batches.records import (
    BatchObject,
    ExpiresAfter,
    FileDeleted,
    FileList,
    FileObject,
    UploadForm,
)
from buddymoe_ray.serve.batches.store import FileStore, no_room
from buddymoe_ray.serve.dashboard import READ
from buddymoe_ray.serve.reading_bodies import check_coding
from buddymoe_ray.serve.refusals import Refused, too_slow
from buddymoe_ray.serve.wire_parsing import checked
from buddymoe_ray.serve.work import Refusal

__all__ = ["MAX_UPLOAD_BYTES", "MOST_LINES", "file_routes"]

MAX_UPLOAD_BYTES = 200 << 20
MOST_LINES = 50_000
MOST_UPLOADS, UPLOAD_SECONDS = 4, 600.0
EXPIRY = {f"expires_after[{name}]": name for name in ExpiresAfter.model_fields}


def file_routes(store: FileStore) -> APIRouter:
    """What a caller keeps is seen by callers of the same name alone: that of their key."""
    router = APIRouter(prefix="/v1/files")
    uploads = asyncio.Semaphore(MOST_UPLOADS)

    @router.post("")
    async def upload(request: Request) -> Response:
        store.check()
        check_coding(request)
        try:
            async with uploads, Request(request.scope, _bounded(request)).form(max_files=1, max_fields=8) as form:
                file, owner, expiry = _checked_form(form), owner_of(request), _expiry(form)
                name = (file.filename or "")[-200:]
                made = await asyncio.to_thread(partial(store.add, file.file, filename=name, owner=owner, expiry=expiry))
        except OSError as error:  # of the temporary file
            raise Refused(no_room(str(error.strerror))) from error
        try:
            await asyncio.to_thread(_check_lines, store, made)
        except BaseException:
            store.delete(made.id)
            raise
        return said(made)

    @router.api_route("", methods=[*READ])
    async def files(request: Request) -> Response:
        found = await every(store, FileObject, request)
        purpose, order = request.query_params.get("purpose"), request.query_params.get("order", "desc")
        if order not in ("asc", "desc"):
            raise RequestError(f"order is {order!r:.80}, must be asc or desc. hint: check its spelling", param="order")
        found = [each for each in found if purpose in (None, each.purpose)]
        return said(FileList(**page(found if order == "desc" else found[::-1], request)))

    @router.api_route("/{file_id}", methods=[*READ])
    async def file(request: Request, file_id: str) -> Response:
        return said(await the(store, FileObject, file_id, request))

    @router.delete("/{file_id}")
    async def delete(request: Request, file_id: str) -> Response:
        found = await the(store, FileObject, file_id, request)
        used = [each for each in await every(store, BatchObject, request) if not each.finished]
        if any(each.input_file_id == found.id for each in used):
            raise Refused(conflict(f"{found.id} is the input of a batch that runs, must be free. hint: cancel that"))
        await asyncio.to_thread(store.delete, found.id)
        return said(FileDeleted(id=found.id))

    @router.api_route("/{file_id}/content", methods=[*READ])
    async def content(request: Request, file_id: str) -> Response:
        found = await the(store, FileObject, file_id, request)
        pieces = _pieces(store.data(found.id)) if request.method == "GET" else iter(())
        headers = {"Content-Length": str(found.bytes)}
        return StreamingResponse(pieces, media_type="application/octet-stream", headers=headers)

    return router


def _pieces(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while piece := file.read(1 << 18):
            yield piece


def _bounded(request: Request) -> Callable[[], Awaitable[Message]]:
    """What comes of an upload. Raises Refused when it is too long or too slow: others wait for its end."""
    size, end = 0, asyncio.get_running_loop().time() + UPLOAD_SECONDS

    async def receive() -> Message:
        nonlocal size
        try:
            async with asyncio.timeout_at(end):
                message = await request.receive()
        except TimeoutError:
            raise Refused(too_slow(UPLOAD_SECONDS)) from None
        size += len(message.get("body", b""))
        if size > MAX_UPLOAD_BYTES:
            reason = f"the upload is too long, must be at most {MAX_UPLOAD_BYTES} bytes. hint: make two files of it"
            raise Refused(Refusal(status=413, message=reason, param="file"))
        return message

    return receive


def _checked_form(form: Any) -> UploadFile:
    """The file of an upload. Raises RequestError naming the field."""
    for name in form:
        if name not in ("file", "purpose", *EXPIRY) or len(form.getlist(name)) > 1:
            raise RequestError(
                f"{name:.80} is no field of an upload, or twice, must be file, purpose or {' or '.join(EXPIRY)}",
                param=name,
            )
    if form.get("purpose") != "batch":
        given = form.get("purpose")
        raise RequestError(
            f"purpose is {given!r:.80}, must be 'batch'. hint: other files are not used", param="purpose"
        )
    if not isinstance(form.get("file"), UploadFile):
        raise RequestError(
            "file is missing, must be a file of JSON lines. hint: send multipart/form-data", param="file"
        )
    file: UploadFile = form["file"]
    return file


def _expiry(form: Any) -> ExpiresAfter | None:
    """Until when the file is to be kept. Raises RequestError naming the field."""
    given = {field: form[name] for name, field in EXPIRY.items() if name in form}
    if not given:
        return None
    seconds = given.get("seconds")
    if isinstance(seconds, str) and seconds.isascii() and seconds.isdigit():
        given["seconds"] = int(seconds[:10])
    return checked({"purpose": "batch", "file": None, "expires_after": given}, UploadForm).expires_after


def _check_lines(store: FileStore, file: FileObject) -> None:
    """Whether every line is a request. Raises RequestError naming the first that is none."""
    try:
        source = BatchInput(store.data(file.id))
    except ConfigError as error:
        raise RequestError(str(error), param="file") from None
    try:
        if not 1 <= len(source) <= MOST_LINES:
            raise RequestError(
                f"file has {len(source)} requests, must have 1 to {MOST_LINES}. hint: make several files", param="file"
            )
        for at in range(len(source)):
            line = source.read(at)
            if isinstance(line, LineError):
                raise RequestError(f"file is not usable: {line.message}", param="file")
    finally:
        source.close()
