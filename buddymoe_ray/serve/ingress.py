"""The ingress replica: the HTTP app over the worker deployment's handle.

A plain class; `app` wraps it for Ray Serve, which calls `__serve_build_asgi_app__` after the constructor. Reads the API
key where it runs. Holds no weights and no tokenizer: prompts are rendered by the workers.
"""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from ray.exceptions import RayError
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from buddymoe_ray.serve.args import ServeArgs
from buddymoe_ray.serve.handles import ReplicaWorkers
from buddymoe_ray.serve.http import HttpSettings, http_app
from buddymoe_ray.serve.listening import Address, bind, listening
from buddymoe_ray.serve.resume import ResumeLimits
from buddymoe_ray.serve.tenants import Tenants

__all__ = ["Departures", "Ingress"]


class Departures:
    """ASGI middleware: Serve raises one of ray's errors where a client left, which ASGI says by a message.

    Untranslated it would be logged as a failure of the app, with its traceback.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def received() -> Message:
            try:
                return await receive()
            except RayError:
                return {"type": "http.disconnect"}

        await self._app(scope, received, send)


class Ingress:
    """HTTP in front of `workers`, behind Serve's proxy or listening at an address of its own; there a `lone` worker is
    asked on a channel."""

    def __init__(
        self, args: ServeArgs, workers: DeploymentHandle[Any], address: Address | None = None, lone: bool = False
    ) -> None:
        limits = ResumeLimits(
            moves=args.max_moves,
            wait_seconds=args.request_timeout_seconds,
            retry_after_seconds=args.retry_after_seconds,
        )
        reached = ReplicaWorkers(
            workers,
            retry_after_seconds=args.retry_after_seconds,
            num_gpus=args.num_gpus,
            lone=lone and address is not None,
        )
        settings = HttpSettings(
            model=args.served_name,
            path=args.model,
            flush_seconds=args.flush_ms / 1000,
            request_timeout_seconds=args.request_timeout_seconds,
            limits=limits,
            binding=args.binding(),
            queue_seconds=math.inf if args.queue_seconds is None else args.queue_seconds,
            default_max_tokens=args.default_max_tokens,
            api_key=args.api_key(),
            api_keys=args.api_keys,
            cors_origins=args.cors_origins,
            mode=args.mode,
            budget=args.budget,
            files_folder=args.files_folder(),
            files_bytes=args.files_mb * 10**6,
        )

        logging.getLogger("buddymoe_ray").parent = logging.getLogger("ray.serve")  # what Serve keeps of a replica
        self._app = http_app(reached, settings)
        self._app.add_middleware(Departures)
        if address is not None:
            self._listen(address)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._app

    def _listen(self, address: Address) -> None:
        bound, app, whole = bind(address), self._app, self._app.router.lifespan_context

        @asynccontextmanager
        async def lifespan(_: object) -> AsyncGenerator[None, None]:
            async with whole(app), listening(bound, app, prefix=address.prefix):
                yield

        app.router.lifespan_context = lifespan

    async def drain(self, seconds: float) -> int:
        """Refuse what is new from now on, until all requests have ended or the time is over: how many it ended."""
        tenants: Tenants = self._app.state.tenants
        return await tenants.close(seconds)
