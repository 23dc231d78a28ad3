"""What anybody may ask without a key: whether every worker is well, and which version this is. Names and meanings are
vLLM's; what is wrong is told to those who may use the service."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

import buddymoe_ray
from buddymoe_ray.observe import CalibrationSnapshot
from buddymoe_ray.serve.dashboard import READ
from buddymoe_ray.serve.recent import Recent
from buddymoe_ray.serve.refusals import Refused
from buddymoe_ray.serve.tenants import STOPPING, Tenants
from buddymoe_ray.serve.work import Workers

__all__ = ["HEALTH", "health_routes"]

HEALTH = ("/health", "/ping")


def health_routes(
    workers: Workers, tenants: Tenants, check: Callable[[Request], Awaitable[None]], *, seconds: float
) -> APIRouter:
    """`check` raises Refused for who may not use the service; what is said of workers may be `seconds` old."""
    router = APIRouter()
    last = Recent(partial(_health_of, workers), seconds)

    async def health(request: Request) -> Response:
        """200 when every worker is well, else 503."""
        problems, calibration = await last.get()
        problems = [*problems, STOPPING] if tenants.closed else problems
        body: dict[str, object] = {"status": "unhealthy" if problems else "ok"}
        with suppress(Refused):
            await check(request)
            body["problems"] = problems
            if calibration.state != "none":
                names = ("state", "tokens", "percent", "record_bytes", "reason")
                body["calibration"] = {name: getattr(calibration, name) for name in names}
        return Response(json.dumps(body), 503 if problems else 200, media_type="application/json")

    for path in HEALTH:
        router.add_api_route(path, health, methods=[*READ])

    @router.api_route("/version", methods=[*READ])
    async def version() -> Response:
        return JSONResponse({"version": buddymoe_ray.__version__})

    return router


async def _health_of(workers: Workers) -> tuple[list[str], CalibrationSnapshot]:
    """What is wrong with any worker, and the calibration of the one that is least far with it."""
    problems = [problem for problem in await workers.health() if problem is not None]
    if problems:
        return problems, CalibrationSnapshot()  # who does not answer is not asked again
    found = [report.snapshot.calibration for report in await workers.reports()]
    return [], min(found, key=lambda one: (one.state != "collecting", one.percent), default=CalibrationSnapshot())
