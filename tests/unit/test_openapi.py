"""/openapi.json says what the service does: its routes and methods, every field that is understood, what it replies."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from asgi import check_error, conforms, messages_of, schema_of, serving
from fakes import LocalWorkers
from jsonschema import Draft202012Validator
from openai.types import batch_create_params, completion_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params
from starlette.routing import Route

from buddymoe_ray.errors import RequestError
from buddymoe_ray.serve import dashboard
from buddymoe_ray.serve.calls import ENDPOINTS, MESSAGES, RESPONSES
from buddymoe_ray.serve.http import HttpSettings, http_app
from buddymoe_ray.serve.openapi import OPERATIONS, Operation, openapi_document
from buddymoe_ray.serve.wire_parsing import NEUTRAL, NOTES, parse_body

DOCUMENT = openapi_document()
BODIES = [each for each in OPERATIONS if each.body is not None]
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
STANDARD = {
    name
    for params in (
        completion_create_params.CompletionCreateParamsBase,
        chat_create_params.CompletionCreateParamsBase,
        response_create_params.ResponseCreateParamsBase,
        batch_create_params.BatchCreateParams,
    )
    for name in get_type_hints(params)
}


def test_the_document_is_whole() -> None:
    text = json.dumps(DOCUMENT)
    for ref in set(re.findall(r'"\$ref": "([^"]+)"', text)):
        assert ref.rpartition("/")[2] in DOCUMENT["components"]["schemas"], ref
    for form in DOCUMENT["components"]["schemas"].values():
        Draft202012Validator.check_schema(form)
    names = [each["operationId"] for path in DOCUMENT["paths"].values() for each in path.values()]
    assert len(set(names)) == len(names)


async def test_it_names_the_routes_and_methods_that_there_are() -> None:
    app = http_app(LocalWorkers(), HttpSettings(model="fake"))
    with warnings.catch_warnings(action="ignore"):  # it wants two names for GET and HEAD
        served = {path: set(methods) for path, methods in app.openapi()["paths"].items()}
    plain = [route for route in app.routes if type(route) is Route]  # which FastAPI does not tell of
    served |= {route.path: {name.lower() for name in route.methods or ()} for route in plain}
    assert served == {path: set(methods) for path, methods in DOCUMENT["paths"].items()}
    async with serving() as client:
        for path, methods in DOCUMENT["paths"].items():
            allowed = {name.upper() for name in methods}
            for method in sorted({*METHODS} - allowed):
                refused = await client.request(method, re.sub(r"{\w+}", "x", path))
                assert refused.status_code == 405 and {*refused.headers["allow"].split(", ")} == allowed, (path, method)


@pytest.mark.parametrize("operation", BODIES, ids=lambda each: each.path)
def test_a_field_is_in_the_schema_or_refused(operation: Operation) -> None:
    """Those of the standards, of all bodies here, and one that nobody knows."""
    assert operation.body is not None
    described = schema_of(operation.body)["properties"].keys()
    names = STANDARD | NOTES | NEUTRAL.keys() | {name for each in BODIES for name in schema_of(each.body)["properties"]}
    unknown = set()
    for name in (*names, "nonsense"):
        try:
            parse_body(json.dumps({**(operation.example or {}), name: None}).encode(), operation.body)
        except RequestError as error:
            unknown |= {name} if error.param == name and "is not a field" in str(error) else set()
    assert unknown == {*names, "nonsense"} - described
    parse_body(json.dumps(operation.example).encode(), operation.body)


async def test_replies_refusals_and_events_are_as_the_schema_says(tmp_path: Path) -> None:
    async with serving(model="builtin:tiny", dashboard_seconds=0.001, files_folder=tmp_path) as client:
        for each in OPERATIONS:
            if each.method == "GET" and "{" not in each.path and each.replies == ("application/json",):
                conforms((await client.get(each.path)).json(), each.path, "get")
        conforms((await client.get("/v1/models/builtin:tiny")).json(), "/v1/models/{name}", "get")
        events = messages_of((await client.get("/dashboard/events")).text)
        conforms(json.loads(events[0]), "/dashboard/events", "get", event=True)
        for each in BODIES:
            if each.path == "/v1/batches":
                continue
            reply = await client.post(each.path, json=each.example)
            assert reply.status_code == 200, reply.text
            conforms(reply.json(), each.path)
            conforms((await client.post(each.path, json={"nonsense": 1})).json(), each.path, status=400)
            if each.events is not None:
                told = (await client.post(each.path, json={**(each.example or {}), "stream": True})).text
                data = [line.removeprefix("data: ") for line in told.splitlines() if line.startswith("data: {")]
                assert len(data) > 5
                for event in data:
                    conforms(json.loads(event), each.path, event=True)
    assert {*ENDPOINTS, MESSAGES.path, RESPONSES.path} <= {each.path for each in BODIES if each.events}


async def test_schema_and_docs_need_no_key_and_load_nothing_else() -> None:
    async with serving(api_key="secret") as client:
        told, page = await client.get("/openapi.json"), await client.get("/docs")
        check_error(await client.get("/v1/files"), 401, code="invalid_api_key")
    keyed = openapi_document(keyed=True)
    assert told.json() == json.loads(json.dumps(keyed)) and "secret" not in told.text
    assert keyed["paths"]["/v1/files"]["get"]["security"] == [{"bearer": []}, {"x-api-key": []}]
    assert "401" in keyed["paths"]["/v1/files"]["get"]["responses"] and not keyed["paths"]["/docs"]["get"]["security"]
    text = Path(dashboard.__file__).with_name("docs.html").read_text()
    assert page.text == text and page.headers["content-security-policy"].startswith("default-src 'none'; script-src ")
    assert not re.findall(r"\bsrc=|https?:|@import|\burl\(|\bstyle=|\bon\w+=", text)
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|Function\(", text)
    assert {*re.findall(r'href="(\w[\w.]*)"', text)} <= {path.lstrip("/") for path in DOCUMENT["paths"]}


def test_a_reply_that_says_more_is_found() -> None:
    told: Any = {"count": 1, "max_model_len": 2, "tokens": [1], "token_strs": None}
    conforms(told, "/tokenize")
    for wrong in (told | {"more": 1}, {"count": 1}, told | {"tokens": ["a"]}):
        with pytest.raises(AssertionError):
            conforms(wrong, "/tokenize")
