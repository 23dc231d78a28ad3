"""/dashboard: the page, and what it shows as JSON, once or as one event a second.

The page is `dashboard.html` beside this file, served to anybody: it holds no data. It asks for the key, and reads
/dashboard/events with it. Read-only; workers are asked while somebody looks, at most once in `seconds` for all who do.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
from base64 import b64encode
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import Response, StreamingResponse
from pydantic_core import to_json

from buddymoe_ray.serve.recent import Recent
from buddymoe_ray.serve.tenants import Tenants
from buddymoe_ray.serve.work import WorkerReport, Workers
from buddymoe_ray.types import Mode

__all__ = ["READ", "Dashboard", "dashboard_routes", "page_routes"]

READ = ("GET", "HEAD")
EVENTS = 15
"""In one reply; the page then asks again. A stream without end would hold up a replica that is to stop."""


@dataclass(frozen=True, kw_only=True)
class Dashboard:
    """What the page is told: `seconds` since 1970, the service's own mode and budget, and all that workers count."""

    seconds: float
    model: str
    mode: Mode
    budget: float
    workers: tuple[WorkerReport, ...]

    def to_json(self) -> bytes:
        """Bytes as base64url, numbers that are none as null."""
        return to_json(self, bytes_mode="base64", inf_nan_mode="null")


def page_routes(name: str) -> APIRouter:
    """The page of that name alone, under a policy that lets nothing run or be loaded but what is in it."""
    router = APIRouter()
    page = Path(__file__).with_name(f"{name}.html").read_bytes()
    headers = {
        "Content-Security-Policy": "; ".join(
            (
                "default-src 'none'",
                *(f"{kind}-src '{_hash_of(tag, page)}'" for kind, tag in (("script", b"script"), ("style", b"style"))),
                "connect-src 'self'",
                *(f"{what} 'none'" for what in ("base-uri", "form-action", "frame-ancestors")),
            )
        ),
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-cache",
    }

    @router.api_route(f"/{name}", methods=[*READ])
    async def whole() -> Response:
        return Response(page, media_type="text/html; charset=utf-8", headers=headers)

    return router


def dashboard_routes(
    workers: Workers, tenants: Tenants, *, model: str, mode: Mode, budget: float, seconds: float
) -> APIRouter:
    """What the page shows. It tells what all tenants do, so the caller guards it with the key. Who watches keeps no
    service from its end."""
    router = APIRouter()

    async def ask() -> bytes:
        reports = await workers.reports(experts=True)
        ordered = tuple(sorted(reports, key=lambda report: report.replica))
        return Dashboard(seconds=time.time(), model=model, mode=mode, budget=budget, workers=ordered).to_json()

    last = Recent(ask, seconds)

    @router.api_route("/dashboard/data", methods=[*READ])
    async def data() -> Response:
        return Response(await last.get(), media_type="application/json", headers={"Cache-Control": "no-store"})

    @router.api_route("/dashboard/events", methods=[*READ])
    async def events(request: Request) -> Response:
        async def told(count: int) -> AsyncIterator[bytes]:
            for _ in range(count):
                yield b"data: %b\n\n" % await last.get()
                await asyncio.sleep(seconds)
                if tenants.closed and not tenants.running:
                    return

        body = told(0 if request.method == "HEAD" else EVENTS)
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(body, media_type="text/event-stream", headers=headers)

    return router


def _hash_of(tag: bytes, page: bytes) -> str:
    """How a policy names the page's one inline element of a kind (CSP level 2, 4.2.5)."""
    [content] = re.findall(rb"<%b>(.*?)</%b>" % (tag, tag), page, re.DOTALL)
    return f"sha256-{b64encode(hashlib.sha256(content).digest()).decode()}"
