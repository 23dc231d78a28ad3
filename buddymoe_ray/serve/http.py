"""The HTTP side: OpenAI's and Anthropic's routes as a FastAPI app over `Workers`, with their envelopes for failures.

Knows neither ray nor engines, so tests drive it in process. On the token path: bytes → `calls` → `Workers` →
`streaming`.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.routing import Route

from buddymoe_ray.config import EngineConfig
from buddymoe_ray.engine.answers import prepare_reading
from buddymoe_ray.errors import CapacityError, RequestError
from buddymoe_ray.serve.access import admit
from buddymoe_ray.serve.batches.job import LineService
from buddymoe_ray.serve.batches.routes import batch_routes
from buddymoe_ray.serve.batches.runner import BatchRunner
from buddymoe_ray.serve.batches.store import FileStore
from buddymoe_ray.serve.calls import (
    CHAT,
    COMPLETIONS,
    MESSAGES,
    RESPONSES,
    Endpoint,
    ModelNames,
    open_call,
)
from buddymoe_ray.serve.dashboard import READ, dashboard_routes, page_routes
from buddymoe_ray.serve.health import health_routes
from buddymoe_ray.serve.keys import KeyRing
from buddymoe_ray.serve.metrics import exposition
from buddymoe_ray.serve.openapi import allowed_methods, schema_routes
from buddymoe_ray.serve.reading_bodies import Departure, apart, whole_body
from buddymoe_ray.serve.refusals import (
    Refused,
    envelope,
    failure,
    in_words,
    in_words_of,
    message_error,
    refusal_of,
    timed_out,
)
from buddymoe_ray.serve.replies import ModelCard, ModelList
from buddymoe_ray.serve.resume import ResumeLimits, WorkerLost, resumable
from buddymoe_ray.serve.streaming import Answer, EventStream
from buddymoe_ray.serve.tenants import RATE_HEADERS, Foreseen, Tenant, Tenants
from buddymoe_ray.serve.wire_messages import parse_count
from buddymoe_ray.serve.wire_parsing import parse_body
from buddymoe_ray.serve.wire_tokens import DetokenizeRequest, TokenizeRequest, tokenize_reply
from buddymoe_ray.serve.work import Refusal, Spelling, Work, Workers
from buddymoe_ray.types import Mode

__all__ = ["HttpSettings", "http_app"]

log = logging.getLogger(__name__)

ABSENT = {
    **dict.fromkeys(
        ("/v1/embeddings", "/embed", "/pooling", "/v1/rerank", "/rerank", "/v1/score", "/score"), "embedding"
    ),
    **dict.fromkeys(("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/fine_tuning"), "LoRA"),
    **{"/v1/images": "making images", "/v1/audio": "audio", "/v1/moderations": "moderation"},
}
"""Paths of other services of the kind, and what they would do."""


@dataclass(frozen=True, kw_only=True)
class HttpSettings:
    """What the routes need to know. `path` is the model as it was given, which clients may ask for too. Without
    `api_key`, which is never logged (repr hides it), and `api_keys`, a file of named ones, everyone is served.

    What moves to another worker goes on where `binding` is the same. A request that names no limit may come to
    `default_max_tokens`; one that would wait longer than `queue_seconds` to begin is refused. `cors_origins` are the
    origins whose pages may call the service from a browser; `*` is any. What /health says may be `health_seconds` old.
    Who watches /dashboard is told `mode`, `budget` and, every `dashboard_seconds`, the rest. Files and batches are kept
    in `files_folder`, at most `files_bytes`; without one they are refused.
    """

    model: str
    path: str = ""
    flush_seconds: float = 0.025
    request_timeout_seconds: float = 600
    limits: ResumeLimits = field(default_factory=ResumeLimits)
    health_seconds: float = 1.0
    binding: str = ""
    queue_seconds: float = math.inf
    default_max_tokens: int = 1024
    api_key: str | None = None
    api_keys: str | None = None
    cors_origins: tuple[str, ...] = ()
    mode: Mode = "exact"
    budget: float = EngineConfig.budget
    dashboard_seconds: float = 1.0
    files_folder: Path | None = None
    files_bytes: int = 10**9

    @property
    def names(self) -> ModelNames:
        """What clients may call the model."""
        return ModelNames(model=self.model, path=self.path)

    def __repr__(self) -> str:
        return f"HttpSettings(model={self.model!r}, api_key={'set' if self.api_key else None})"


def http_app(workers: Workers, settings: HttpSettings) -> FastAPI:
    """The service's routes over `workers`; `app.state.tenants` are its `Tenants`."""
    prepare_reading()
    ring = KeyRing(settings.api_key, settings.api_keys)
    tenants = Tenants(ring)
    lines = LineService(
        workers=workers,
        tenants=tenants,
        names=settings.names,
        limits=settings.limits,
        seconds=settings.request_timeout_seconds,
        default_max_tokens=settings.default_max_tokens,
        binding=settings.binding,
    )
    runner = BatchRunner(FileStore(settings.files_folder, quota=settings.files_bytes), lines)
    app = FastAPI(title="buddymoe", openapi_url=None, redirect_slashes=False, lifespan=runner.lifespan)
    app.state.tenants = tenants
    check = _key_check(tenants, settings.limits.retry_after_seconds)
    guarded = [Depends(check)]
    app.router.routes += _call_routes(workers, settings, tenants)  # first: routes are tried in turn
    app.include_router(_model_routes(workers, settings), dependencies=guarded)
    app.include_router(health_routes(workers, tenants, check, seconds=settings.health_seconds))
    for page in ("dashboard", "docs"):
        app.include_router(page_routes(page))
    app.include_router(schema_routes(keyed=not ring.open))
    app.include_router(batch_routes(runner, model=settings.model), dependencies=guarded)
    watch = dashboard_routes(
        workers,
        tenants,
        model=settings.model,
        mode=settings.mode,
        budget=settings.budget,
        seconds=settings.dashboard_seconds,
    )
    app.include_router(watch, dependencies=guarded)
    app.include_router(_metrics_routes(workers, settings, tenants), dependencies=guarded)
    app.include_router(_token_routes(workers, settings), dependencies=guarded)
    app.add_exception_handler(Refused, _on_refused)
    app.add_exception_handler(RequestError, _on_request_error)
    app.add_exception_handler(CapacityError, _on_capacity_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(ClientDisconnect, _on_departure)
    app.add_exception_handler(Exception, _on_error)
    if settings.cors_origins:  # outermost, so that a preflight, which carries no key, is answered
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=[*READ, "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["Retry-After", *RATE_HEADERS],
        )
    return app


def _metrics_routes(workers: Workers, settings: HttpSettings, tenants: Tenants) -> APIRouter:
    router = APIRouter()

    @router.api_route("/metrics", methods=[*READ])
    async def metrics(request: Request) -> Response:
        """Every worker's counters for Prometheus. They tell what all tenants do, so the key guards them."""
        accept = request.headers.get("accept", "")
        counters = tenants.counters(request.state.tenant)
        text, media_type = exposition(settings.model, await workers.reports(experts=True), counters, accept=accept)
        return Response(text, media_type=media_type)

    return router


def _model_routes(workers: Workers, settings: HttpSettings) -> APIRouter:
    router = APIRouter(prefix="/v1")
    started = int(time.time())

    async def card() -> ModelCard:
        info = await workers.info()
        return ModelCard(
            id=settings.model,
            object="model",
            created=started,
            owned_by="buddymoe",
            max_model_len=info.max_model_len,
            sampling_defaults=dict(info.sampling_defaults),
        )

    @router.api_route("/models", methods=[*READ])
    async def models() -> Response:
        return _json(ModelList(object="list", data=[await card()]).to_json())

    @router.api_route("/models/{name:path}", methods=[*READ])
    async def model(name: str) -> Response:
        settings.names.check(name)
        return _json((await card()).to_json())

    return router


def _token_routes(workers: Workers, settings: HttpSettings) -> APIRouter:
    """For clients that count tokens, or have no tokenizer of their own: vLLM's, and Anthropic's count."""
    router = APIRouter()

    async def spelled(work: Work, model: str | None, words: Mapping[str, str] | None = None) -> Spelling:
        if model is not None:
            settings.names.check(model)
        try:
            async with asyncio.timeout(settings.request_timeout_seconds), aclosing(workers.generate(work)) as replies:
                reply = await anext(replies)
        except TimeoutError:
            raise Refused(timed_out(settings.request_timeout_seconds)) from None
        except WorkerLost as error:
            raise CapacityError(f"{error}. hint: retry") from error
        if isinstance(reply, Refusal):
            raise Refused(in_words_of(reply, words or {}))
        return reply.spelled[0]

    @router.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        asked = parse_body(await whole_body(request), TokenizeRequest)
        found = await spelled(asked.work(f"tokens-{uuid.uuid4().hex}"), asked.model)
        length = (await workers.info()).max_model_len
        return JSONResponse(tokenize_reply(found, max_model_len=length, names=asked.return_token_strs))

    @router.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        asked = parse_body(await whole_body(request), DetokenizeRequest)
        return JSONResponse({"prompt": (await spelled(asked.work(f"text-{uuid.uuid4().hex}"), asked.model)).text})

    @router.post("/v1/messages/count_tokens")
    async def count_tokens(request: Request) -> Response:
        body = await whole_body(request)
        asked = await apart(partial(parse_count, body), body)
        with in_words(MESSAGES.words):
            work = replace(asked.work(f"count-{uuid.uuid4().hex}", flush_seconds=0.0), spells_only=True)
        return JSONResponse({"input_tokens": len((await spelled(work, asked.model, MESSAGES.words)).token_ids)})

    @router.api_route("/tokenizer_info", methods=[*READ])
    async def tokenizer_info() -> Response:
        return JSONResponse(dict((await workers.info()).tokenizer))

    return router


def _call_routes(workers: Workers, settings: HttpSettings, tenants: Tenants) -> list[Route]:
    """What asks for work. Plain routes: what FastAPI does beside took a tenth of a stream's CPU here."""
    check = _key_check(tenants, settings.limits.retry_after_seconds)

    def route(endpoint: Endpoint) -> Route:
        async def call(request: Request) -> Response:
            await check(request)
            return await _answer(endpoint, request, workers, settings)

        return Route(endpoint.path, call, methods=["POST"])

    return [route(endpoint) for endpoint in (CHAT, COMPLETIONS, MESSAGES, RESPONSES)]


async def _answer(endpoint: Endpoint, request: Request, workers: Workers, settings: HttpSettings) -> Response:
    tenant: Tenant = request.state.tenant
    body = await whole_body(request)
    opened = partial(open_call, endpoint, body, settings.names, flush_seconds=settings.flush_seconds)
    call = await apart(partial(opened, unique=uuid.uuid4().hex, created=int(time.time())), body)
    seconds = min(call.work.timeout or math.inf, settings.request_timeout_seconds)
    work = tenant.own(replace(call.work, begin_within=min(seconds, settings.queue_seconds), binding=settings.binding))
    visit = tenant.begin(Foreseen.of(work, body, default_max_tokens=settings.default_max_tokens))
    if isinstance(visit, Refusal):
        raise Refused(visit)
    answer = Answer(
        replies=visit.metered(resumable(work, workers.generate, settings.limits, seconds=seconds), work),
        renderer=call.renderer,
        n=work.n,
        choices=work.choices,
        usage_so_far=call.body.usage_so_far,
    )
    departure = Departure(request)
    making: Coroutine[Any, Any, AsyncGenerator[bytes, None] | bytes | Refusal]
    making = answer.events() if call.body.stream else answer.whole()
    made = await departure.awaited(making)
    if not isinstance(made, bytes | Refusal):
        return EventStream(answer, made, tenant.headers(), departure)
    departure.over()
    if isinstance(made, Refusal):
        raise Refused(in_words_of(made, endpoint.words))
    response = _json(made, headers=tenant.headers())
    response.background = BackgroundTask(answer.drain)
    return response


def _key_check(tenants: Tenants, retry_after_seconds: int) -> Callable[[Request], Awaitable[None]]:
    async def check(request: Request) -> None:
        if (refusal := admit(request, tenants, retry_after_seconds=retry_after_seconds)) is not None:
            raise Refused(refusal)

    return check


def _json(body: bytes, *, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(body, status_code=status, media_type="application/json", headers=headers)


def _refused(request: Request, refusal: Refusal) -> Response:
    """An error as the API that was called writes it."""
    write = message_error if request.scope["path"].startswith(MESSAGES.path) else envelope
    tenant: Tenant | None = getattr(request.state, "tenant", None)
    response = _json(write(refusal), status=refusal.status, headers=tenant.headers() if tenant else None)
    if refusal.retry_after_seconds is not None:
        response.headers["Retry-After"] = str(refusal.retry_after_seconds)
    if refusal.status in (408, 413):  # what still comes of the body is for nobody
        response.headers["Connection"] = "close"
    if refusal.status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    return response


async def _on_refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused), f"handler of Refused got {error!r}"
    return _refused(request, error.refusal)


async def _on_request_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError), f"handler of RequestError got {error!r}"
    return _refused(request, refusal_of(error))


async def _on_capacity_error(request: Request, error: Exception) -> Response:
    """No worker runs, or none answers."""
    refusal = Refusal(status=503, kind="server_error", code="unavailable", message=str(error), retry_after_seconds=2)
    return _refused(request, refusal)


async def _on_http_error(request: Request, error: Exception) -> Response:
    """Unknown paths and methods, in the same envelope."""
    assert isinstance(error, HTTPException), f"handler of HTTPException got {error!r}"
    path, headers = request.scope["path"], dict(error.headers or {})
    message = f"{request.method} {path}: {error.detail}"
    what = next((what for known, what in ABSENT.items() if path.startswith(known)), None)
    if what is not None and error.status_code == 404:
        message = f"{path} is not here: {what} is not supported by this service. hint: GET /v1/models"
    if error.status_code == 405:  # the framework names the methods of one route alone
        headers["Allow"] = ", ".join(allowed_methods(path)) or headers.get("Allow", "")
    response = _refused(request, Refusal(status=error.status_code, message=message))
    response.headers.update(headers)
    return response


async def _on_departure(request: Request, error: Exception) -> Response:
    """The client left before its body was read: nobody reads this, and Serve logs the status."""
    return Response(status_code=499)


async def _on_error(request: Request, error: Exception) -> Response:
    log.error("%s failed", request.scope["path"], exc_info=error)
    return _refused(request, failure())
