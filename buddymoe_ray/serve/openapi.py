"""/openapi.json and /docs: every route, what it takes and what it replies.

The schemas of bodies and replies are those of the models that read and write them. Nobody needs a key for either: they
tell what the service is, nothing of who uses it. Knows neither workers nor settings.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response
from pydantic import TypeAdapter

import buddymoe_ray
from buddymoe_ray.serve.batches.records import (
    LONGEST_LIST,
    BatchList,
    BatchObject,
    BatchRequest,
    FileDeleted,
    FileList,
    FileObject,
    UploadForm,
)
from buddymoe_ray.serve.calls import CHAT, COMPLETIONS, MESSAGES, RESPONSES
from buddymoe_ray.serve.dashboard import READ, Dashboard
from buddymoe_ray.serve.health import HEALTH
from buddymoe_ray.serve.openapi_replies import (
    CountForm,
    DetokenizeForm,
    HealthForm,
    MessageErrorForm,
    MessageEvent,
    MessageForm,
    ResponseEvent,
    ResponseForm,
    TokenizeForm,
    VersionForm,
)
from buddymoe_ray.serve.replies import ChatChunk, ChatCompletion, Completion, ErrorEnvelope, ModelCard, ModelList
from buddymoe_ray.serve.wire import ChatRequest, CompletionRequest
from buddymoe_ray.serve.wire_messages import CountRequest, MessagesRequest
from buddymoe_ray.serve.wire_parsing import NEUTRAL, NOTES
from buddymoe_ray.serve.wire_parts import WireBody
from buddymoe_ray.serve.wire_responses import ResponseRequest
from buddymoe_ray.serve.wire_tokens import DetokenizeRequest, TokenizeRequest

__all__ = ["OPERATIONS", "Operation", "allowed_methods", "openapi_document", "schema_routes"]

JSON, SSE, HTML, LINES = "application/json", "text/event-stream", "text/html; charset=utf-8", "application/octet-stream"
UPLOAD = {"encoding": {"expires_after": {"style": "deepObject", "explode": True}}}
TEXT = ("text/plain; version=0.0.4; charset=utf-8", "application/openmetrics-text; version=1.0.0; charset=utf-8")
ASKING = (400, 404, 429, 500, 503, 504)
LOOKING = (500, 503)
BATCHES = (400, 404, 500)
MEANINGS = {
    200: "as asked",
    400: "the request is not usable; `param` names the field",
    401: "the API key is missing or wrong",
    404: "there is no such model, or thing",
    408: "the body took too long to come",
    409: "what it is asked for is not so any more",
    413: "the body is too long, or the disk's share for files is used up",
    415: "the body is compressed",
    429: "too many at once; come back after `Retry-After` seconds",
    500: "a failure that nobody foresaw",
    503: "the service is full, or no worker runs; come back after `Retry-After` seconds",
    504: "the request took longer than the service allows",
}
HELLO = [{"role": "user", "content": "hello"}]
PAGES = (
    ("after", {"type": "string"}, "the id to go on after"),
    ("limit", {"type": "integer", "minimum": 1, "maximum": LONGEST_LIST}, "so many at most; 20 unless told"),
)


@dataclass(frozen=True, kw_only=True)
class Operation:
    """A path and its method. `body` and `reply` are what models describe, `replies` the reply's media types; `events`
    is what a stream's messages hold; `query` has name, schema and meaning of each parameter."""

    path: str
    method: str = "GET"
    summary: str
    body: type[WireBody] | None = None
    upload: bool = False
    reply: Any = None
    replies: tuple[str, ...] = (JSON,)
    events: Any = None
    error: type = ErrorEnvelope
    errors: tuple[int, ...] = ()
    statuses: tuple[int, ...] = (200,)
    query: tuple[tuple[str, dict[str, Any], str], ...] = ()
    open: bool = False
    example: dict[str, Any] | None = None


def _ask(path: str, summary: str, body: type[WireBody], reply: Any, example: dict[str, Any], **more: Any) -> Operation:
    example = {"model": "builtin:tiny", **example}
    return Operation(
        path=path, method="POST", summary=summary, body=body, reply=reply, errors=ASKING, example=example, **more
    )


def _page(path: str, summary: str, *media: str, **more: Any) -> Operation:
    return Operation(path=path, summary=summary, replies=media, open=True, **more)


OPERATIONS = (
    _ask(
        CHAT.path,
        "Answer a conversation",
        ChatRequest,
        ChatCompletion,
        {"messages": HELLO, "max_tokens": 32},
        events=ChatChunk,
    ),
    _ask(
        COMPLETIONS.path,
        "Continue a text",
        CompletionRequest,
        Completion,
        {"prompt": "def add(a, b):"},
        events=Completion,
    ),
    _ask(
        MESSAGES.path,
        "Answer a conversation, as Anthropic's API does",
        MessagesRequest,
        MessageForm,
        {"messages": HELLO, "max_tokens": 32},
        events=MessageEvent,
        error=MessageErrorForm,
    ),
    _ask(
        f"{MESSAGES.path}/count_tokens",
        "Count the tokens of a conversation",
        CountRequest,
        CountForm,
        {"messages": HELLO},
        error=MessageErrorForm,
    ),
    _ask(
        RESPONSES.path,
        "Answer a conversation, as OpenAI's Responses API does; nothing is kept",
        ResponseRequest,
        ResponseForm,
        {"input": "hello", "max_output_tokens": 32},
        events=ResponseEvent,
    ),
    Operation(path="/v1/models", summary="What is served", reply=ModelList, errors=LOOKING),
    Operation(path="/v1/models/{name}", summary="The model of that name", reply=ModelCard, errors=(404, *LOOKING)),
    _ask("/tokenize", "A text or conversation to tokens", TokenizeRequest, TokenizeForm, {"prompt": "hello"}),
    _ask("/detokenize", "Tokens to text", DetokenizeRequest, DetokenizeForm, {"tokens": [1, 2, 3]}),
    Operation(path="/tokenizer_info", summary="What tokenizer_config.json says", reply=dict[str, Any], errors=LOOKING),
    Operation(
        path="/v1/files",
        method="POST",
        summary="Keep a file of requests, for a batch",
        upload=True,
        reply=FileObject,
        errors=BATCHES,
    ),
    Operation(
        path="/v1/files",
        summary="The files that are kept, latest first",
        reply=FileList,
        errors=BATCHES,
        query=(*PAGES, ("order", {"enum": ["asc", "desc"]}, "by age"), ("purpose", {"type": "string"}, "those alone")),
    ),
    Operation(path="/v1/files/{file_id}", summary="What is known of a file", reply=FileObject, errors=BATCHES),
    Operation(
        path="/v1/files/{file_id}",
        method="DELETE",
        summary="Delete a file",
        reply=FileDeleted,
        errors=(*BATCHES, 409),
    ),
    Operation(
        path="/v1/files/{file_id}/content",
        summary="What a file holds",
        replies=(LINES,),
        errors=BATCHES,
    ),
    Operation(
        path="/v1/batches",
        method="POST",
        summary="Answer a file's requests, while nobody else waits",
        body=BatchRequest,
        reply=BatchObject,
        errors=(*BATCHES, 429),
        example={"input_file_id": "file-…", "endpoint": CHAT.path, "completion_window": "24h"},
    ),
    Operation(path="/v1/batches", summary="The batches, latest first", reply=BatchList, errors=BATCHES, query=PAGES),
    Operation(path="/v1/batches/{batch_id}", summary="How far a batch is", reply=BatchObject, errors=BATCHES),
    Operation(
        path="/v1/batches/{batch_id}/cancel",
        method="POST",
        summary="End a batch; what is answered is kept",
        reply=BatchObject,
        errors=(*BATCHES, 409),
    ),
    *(
        Operation(
            path=path,
            summary="Whether every worker is well",
            reply=HealthForm,
            statuses=(200, 503),
            errors=(500,),
            open=True,
        )
        for path in HEALTH
    ),
    Operation(path="/version", summary="Which version this is", reply=VersionForm, errors=(500,), open=True),
    Operation(path="/metrics", summary="Every worker's counters, for Prometheus", replies=TEXT, errors=LOOKING),
    _page("/dashboard", "A page to look at", HTML),
    Operation(path="/dashboard/data", summary="What the page shows", reply=Dashboard, errors=LOOKING),
    Operation(
        path="/dashboard/events",
        summary="The same, an event a second for a while",
        replies=(),
        events=Dashboard,
        errors=LOOKING,
    ),
    _page("/openapi.json", "This schema", JSON),
    _page("/docs", "The same for people", HTML),
)


def allowed_methods(path: str) -> tuple[str, ...]:
    """What may be done with a path; nothing where there is none."""
    found: list[str] = []
    for each in OPERATIONS:
        pattern = re.sub(r"\{(\w+)\}", lambda name: ".+" if name[1] == "name" else "[^/]+", each.path)
        if re.fullmatch(pattern, path):
            found += READ if each.method in READ else (each.method,)
    return tuple(found)


def openapi_document(*, keyed: bool = False) -> dict[str, Any]:
    """The schema, as OpenAPI 3.1 writes it; of a service that asks for a key where `keyed`."""
    kinds = {kind for each in OPERATIONS for kind in (each.body, each.reply, each.events, each.error) if kind}
    kinds |= {UploadForm}
    inputs = [(kind, "serialization" if kind is Dashboard else "validation", TypeAdapter(kind)) for kind in kinds]
    forms, found = TypeAdapter.json_schemas(inputs, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
    schemas = found.get("$defs", {})
    refs = {kind: form for (kind, _), form in forms.items()}
    for body in {each.body for each in OPERATIONS if each.body is not None and each.body.takes_notes}:
        own = schemas[refs[body]["$ref"].rpartition("/")[2]]["properties"]
        own |= {
            name: {"enum": list(values), "description": "Not built; what asks for nothing is understood."}
            for name, values in sorted(NEUTRAL.items())
            if name not in own
        }
        own |= {name: {"description": "Changes nothing."} for name in sorted(NOTES) if name not in own}
    paths: dict[str, dict[str, Any]] = {}
    for each in OPERATIONS:
        written = paths.setdefault(each.path, {})
        written[each.method.lower()] = _operation(each, refs, keyed=keyed)
        if each.method in READ:
            written["head"] = _operation(each, refs, keyed=keyed, head=True)
    return {
        "openapi": "3.1.0",
        "info": {"title": "buddymoe", "version": buddymoe_ray.__version__, "description": _ABOUT},
        "paths": paths,
        "components": {
            "schemas": dict(sorted(schemas.items())),
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
    }


_ABOUT = (
    "OpenAI's and Anthropic's APIs. Where the service has a key, send it as `Authorization: Bearer` or `x-api-key`. "
    "`buddymoe` in a body says how missing experts may be answered; `usage.buddymoe` what that cost. Fields that are "
    "not listed are refused by name; so is what a model, its template or a grammar cannot do, with status 400. "
    "Examples name `builtin:tiny`; GET /v1/models says what is served."
)


def _operation(each: Operation, refs: dict[Any, Any], *, keyed: bool, head: bool = False) -> dict[str, Any]:
    content: dict[str, Any] = {media: {"schema": refs[each.reply] if each.reply else {}} for media in each.replies}
    if each.events is not None:
        content[SSE] = {"schema": _event(refs[each.events])}
    good = {str(status): {"description": MEANINGS[status], "content": content} for status in each.statuses}
    errors = {401, *each.errors} if keyed and not each.open else {*each.errors}
    errors |= {429, 503} if each.method == "POST" else set()  # a key's limits; a service that stops
    errors |= {408, 413, 415} if each.body is not None or each.upload else set()
    failed = {str(status): _failure(status, refs[each.error]) for status in sorted(errors)}
    places = [("path", name, {"type": "string", "minLength": 1}, "") for name in re.findall(r"\{(\w+)\}", each.path)]
    places += [("query", *each) for each in each.query]
    written: dict[str, Any] = {
        "operationId": _name("HEAD" if head else each.method, each.path),
        "summary": each.summary,
        "security": [] if each.open or not keyed else [{"bearer": []}, {"x-api-key": []}],
        "responses": good | failed,
    }
    if head:
        for reply in written["responses"].values():
            reply.pop("content", None)
    if each.method == "POST" and each.reply in (FileObject, BatchObject):
        written["responses"]["200"]["links"] = _links(each.path)
    if places:
        written["parameters"] = [
            {"in": where, "name": name, "required": where == "path", "schema": schema, "description": meaning}
            for where, name, schema, meaning in places
        ]
    if each.body is not None:
        example = {} if each.example is None else {"example": each.example}
        written["requestBody"] = {"required": True, "content": {JSON: {"schema": refs[each.body], **example}}}
    if each.upload:
        written["requestBody"] = {
            "required": True,
            "content": {"multipart/form-data": UPLOAD | {"schema": refs[UploadForm]}},
        }
    return written


def _name(method: str, path: str) -> str:
    return re.sub(r"\W+", "_", f"{method}{path}").strip("_").lower()


def _links(path: str) -> dict[str, Any]:
    """What may be done with a thing that was made, by its id."""
    found = {}
    for each in OPERATIONS:
        parameter = re.match(re.escape(path) + r"/\{(\w+)\}", each.path)
        if parameter is not None:
            name = _name(each.method, each.path)
            found[name] = {"operationId": name, "parameters": {parameter[1]: "$response.body#/id"}}
    made = next((each for each in OPERATIONS if each.body is BatchRequest and path == "/v1/files"), None)
    if made is not None:
        asked = {**(made.example or {}), "input_file_id": "$response.body#/id", "endpoint": COMPLETIONS.path}
        found["batch"] = {"operationId": _name(made.method, made.path), "requestBody": asked}
    return found


def _event(form: dict[str, Any]) -> dict[str, Any]:
    """One message of a stream."""
    data = {"anyOf": [{"type": "string", "contentMediaType": JSON, "contentSchema": form}, {"const": "[DONE]"}]}
    told = "A server-sent event; `data` is a JSON object, or [DONE] at the end of OpenAI's streams."
    named = {"event": {"type": "string"}, "data": data}
    return {"type": "object", "description": told, "properties": named, "required": ["data"]}


def _failure(status: int, form: dict[str, Any]) -> dict[str, Any]:
    headers = {"Retry-After": {"schema": {"type": "string"}}} if status in (429, 503) else {}
    headers |= {"WWW-Authenticate": {"schema": {"type": "string"}}} if status == 401 else {}
    return {"description": MEANINGS[status], "headers": headers, "content": {JSON: {"schema": form}}}


def schema_routes(*, keyed: bool) -> APIRouter:
    """/openapi.json, made once, of a service that asks for a key where `keyed`."""
    router = APIRouter()
    document = json.dumps(openapi_document(keyed=keyed)).encode()

    @router.api_route("/openapi.json", methods=[*READ])
    async def openapi() -> Response:
        return Response(document, media_type=JSON)

    return router
