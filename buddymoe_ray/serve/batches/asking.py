"""What the routes of files and of batches have in common: whose a request is, and what of theirs it asks for."""

from __future__ import annotations

import asyncio
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import Response
from pydantic import BaseModel

from buddymoe_ray.errors import RequestError
from buddymoe_ray.serve.batches.records import LONGEST_LIST, BatchObject, FileObject
from buddymoe_ray.serve.batches.store import FileStore
from buddymoe_ray.serve.tenants import Tenant
from buddymoe_ray.serve.work import Refusal

__all__ = ["conflict", "every", "owner_of", "page", "said", "the"]

Record = TypeVar("Record", FileObject, BatchObject)


def owner_of(request: Request) -> str:
    """Whose request it is: the name of the key it brings, where keys have names."""
    tenant: Tenant = request.state.tenant
    return tenant.name


async def the(store: FileStore, kind: type[Record], name: str, request: Request) -> Record:
    """The caller's file or batch of that name. Raises Refused when there is none."""
    store.check()
    return await asyncio.to_thread(store.find, kind, name, owner_of(request))


async def every(store: FileStore, kind: type[Record], request: Request) -> list[Record]:
    """All the caller's files or batches, the latest first."""
    store.check()
    return await asyncio.to_thread(store.records, kind, owner_of(request))


def page(found: list[Record], request: Request) -> dict[str, Any]:
    """Some of the records, as the query says. Raises RequestError naming its parameter."""
    after, limit = request.query_params.get("after"), request.query_params.get("limit", "20")
    if not (limit.isascii() and limit.isdigit() and len(limit) < 6 and 1 <= int(limit) <= LONGEST_LIST):
        raise RequestError(
            f"limit is {limit!r:.80}, must be an integer from 1 to {LONGEST_LIST}. hint: leave it out", param="limit"
        )
    ids = [each.id for each in found]
    if after is not None and after not in ids:
        raise RequestError(f"after is {after!r:.80}, must be the id of one. hint: begin without it", param="after")
    begin = 0 if after is None else ids.index(after) + 1
    data = found[begin : begin + int(limit)]
    return {
        "data": data,
        "first_id": data[0].id if data else None,
        "last_id": data[-1].id if data else None,
        "has_more": begin + len(data) < len(found),
    }


def conflict(message: str) -> Refusal:
    """What is asked for does not go with the state it is in."""
    return Refusal(status=409, message=message, code="conflict")


def said(record: BaseModel) -> Response:
    """A record as a reply."""
    return Response(record.model_dump_json(), media_type="application/json")
