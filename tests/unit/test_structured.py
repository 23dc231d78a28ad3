"""Text that must be of a form: answers validate, neighbours keep their bits, what moves goes on, refusals name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
import torch
from asgi import check_error, openai_client, talking_to
from fakes import LocalWorkers, byte_tokenizer
from pydantic import BaseModel
from schemas import random_schema
from small_tokenizers import bpe, byte_fallback

from buddymoe_ray import LLM
from buddymoe_ray.config import EngineConfig
from buddymoe_ray.engine import structured
from buddymoe_ray.engine.async_engine import AsyncEngine
from buddymoe_ray.engine.engine import Engine
from buddymoe_ray.engine.json_schema import checked_output
from buddymoe_ray.engine.sampler import SamplingState, sample
from buddymoe_ray.engine.structured import Grammars, mask_logits
from buddymoe_ray.errors import BuddyMoEError, RequestError
from buddymoe_ray.serve.worker import Worker
from buddymoe_ray.types import GenerationRequest, Mode, SamplingParams

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
JSON = {"json": SCHEMA}


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("builtin:tiny", memory="50%", mode="bounded", max_running=16) as llm:
        yield llm


def valid(text: str, schema: dict[str, Any] = SCHEMA) -> Any:
    found = json.loads(text)
    jsonschema.Draft202012Validator(schema).validate(found)
    return found


@pytest.mark.parametrize("mode", ["exact", "bounded", "fast"])
def test_answers_of_random_schemas_validate_or_end_by_length(llm: LLM, mode: Mode) -> None:
    offset, ended = {"exact": 0, "bounded": 100, "fast": 200}[mode], 0
    for seed in range(offset, offset + 9):
        schema = random_schema(seed)
        params = SamplingParams(
            temperature=seed % 3 / 1.5, seed=seed, max_tokens=64, structured_outputs={"json": schema}
        )
        for answer in llm.generate(["JSON:", "Anna, 34"], params, mode=mode):
            if answer.finish_reason == "stop":
                valid(answer.text, schema)
                ended += 1
            assert answer.finish_reason in ("stop", "length")
    assert ended > 3


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_a_row_depends_on_nothing_beside_it(llm: LLM, temperature: float) -> None:
    def asked(**fields: Any) -> SamplingParams:
        return SamplingParams(temperature=temperature, seed=4, max_tokens=24, logprobs=2, **fields)

    each = [asked(structured_outputs=JSON), asked(), asked(structured_outputs={"regex": "[0-9]{3}-[a-z]{2,5}"})]
    alone = [llm.generate("Anna is 34", params, mode="exact")[0] for params in each]
    requests = [
        GenerationRequest(
            request_id=f"r{at}", prompt_token_ids=alone[0].prompt_token_ids, sampling=params, mode="exact"
        )
        for at, params in enumerate(each)
    ]
    for request in requests:
        llm.engine.add(request)
    events = llm.engine.drain()
    for request, answer in zip(requests, alone, strict=True):
        own = [event for event in events if event.request_id == request.request_id]
        assert tuple(token for event in own for token in event.token_ids) == answer.token_ids
        assert tuple(entry for event in own for entry in event.logprobs) == answer.logprobs
    assert alone[0].text != alone[1].text and valid(alone[0].text)


def test_log_probabilities_are_the_models_own() -> None:
    logits_BV = torch.randn(3, 259, generator=torch.Generator().manual_seed(1))
    logits_BV[:, ord("b")] = 9.0  # what it wants and may not have
    state = Grammars(byte_tokenizer(), 259).open(checked_output({"regex": "[x-z]+"}), frozenset({257}))
    allowed_RV = logits_BV[[1]]
    mask_logits(allowed_RV, [state])
    assert allowed_RV[0].isfinite().nonzero().flatten().tolist() == [*b"xyz"], "the end may not come first"
    params = SamplingParams(temperature=0.0, logprobs=1)
    states = [SamplingState(params=params, seed=0, token_ids=[1], prompt_length=1) for _ in range(3)]
    chosen = sample(logits_BV, states, ruled=[1], allowed_RV=allowed_RV)
    assert [one.token_id == ord("b") for one in chosen] == [True, False, True]
    assert chosen[1].logprob == pytest.approx(float(logits_BV[1].log_softmax(-1)[chosen[1].token_id]))
    assert chosen[1].top[0][0] == ord("b")
    whole = sample(logits_BV[1:2], states[:1], ruled=[0], allowed_RV=allowed_RV)
    assert whole == chosen[1:2], "alone or not"


def test_ends_come_where_the_text_is_whole_and_nowhere_else(llm: LLM) -> None:
    end = llm.tokenizer.eos_token_id
    for wanted, texts in ((JSON, None), ({"choice": ["no", "nobody"]}, ("no",)), ({"regex": "a{3}b*"}, ("aaa",))):
        params = SamplingParams(temperature=0.0, max_tokens=40, logit_bias={end: 100}, structured_outputs=wanted)
        answer = llm.generate("x", params, mode="exact")[0]
        assert answer.finish_reason == "stop"
        assert answer.text in texts if texts else valid(answer.text)
    params = SamplingParams(ignore_eos=True, max_tokens=40, structured_outputs={"choice": ["naïve ☃", "x"]}, seed=1)
    answer = llm.generate("x", params, mode="exact")[0]
    assert answer.text in ("naïve ☃", "x") and answer.finish_reason == "stop", "nothing may follow: it ends"


def test_cut_anywhere_it_goes_on_within_its_grammar() -> None:
    with LLM("builtin:tiny", memory="30%") as llm:
        params = SamplingParams(temperature=1.0, seed=3, max_tokens=40, structured_outputs=JSON)
        whole = llm.generate("Anna is 34", params)[0]
        for cut in range(1, len(whole.token_ids)):
            request = GenerationRequest(
                request_id=f"r{cut}",
                prompt_token_ids=whole.prompt_token_ids,
                sampling=params,
                resumed_token_ids=whole.token_ids[:cut],
            )
            llm.engine.add(request)
            assert tuple(t for event in llm.engine.drain() for t in event.token_ids) == whole.token_ids[cut:]
        for resumed in ((whole.token_ids[1],), whole.token_ids):
            with pytest.raises(RequestError, match="resumed_token_ids"):
                llm.engine.prepare(
                    GenerationRequest(request_id="r", prompt_token_ids=(1,), sampling=params, resumed_token_ids=resumed)
                )


def test_whose_blocks_are_taken_follows_on() -> None:
    with LLM("builtin:tiny", memory="50%", kv_memory="512KB", max_running=8) as llm:
        params = SamplingParams(
            temperature=1.0, seed=3, max_tokens=100, structured_outputs={"regex": "([a-z]{4}[0-9])+;"}
        )
        alone = [llm.generate(f"{at} words", params)[0].token_ids for at in range(5)]
        assert [answer.token_ids for answer in llm.generate([f"{at} words" for at in range(5)], params)] == alone
        assert llm.engine.snapshot().preemptions > 0


@pytest.mark.parametrize(
    ("wanted", "named"),
    [
        ({"json": {"type": "string", "not": {}}}, "'not' at #,"),
        ({"json": {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}}, "'uniqueItems' at #,"),
        ({"json": {"type": "object", "properties": {"a": {"if": {}}}}}, "'if' at #/properties/a,"),
        ({"json": {"anyOf": [{"type": "object", "patternProperties": {}}]}}, "'patternProperties' at #/anyOf/0,"),
        ({"json": {"$ref": "#/$defs/a", "$defs": {"a": {"oneOf": []}}}}, "'oneOf' at #/$defs/a,"),
        (
            {"json": {"anyOf": [{"type": "null"}], "minLength": 3}},
            "'minLength' at #, must be without, or alone",
        ),
        ({"json": {"minimum": 3}}, "'minimum' at #"),
        ({"json": {"type": "string", "format": "postcode"}}, "format 'postcode' at #"),
        ({"json": {"type": "strin"}}, "type 'strin' at #"),
        ({"json": {"type": "object", "properties": {}, "required": ["a"]}}, "required 'a' at #"),
        ({"json": {"type": "integer", "enum": ["a"]}}, "'a' of another type at #"),
        ({"json": {"$ref": "http://x/y"}}, "$ref 'http://x/y' at #"),
        ({"json": {"$ref": "#/$defs/b"}}, "no grammar (Cannot find field"),
        ({"json": {"type": "string", "pattern": "(?=a)b"}}, "has pattern '(?=a)b' at #"),
        ({"json": {"type": "string", "pattern": 'say "no"'}}, "without '\"' there"),
        ({"json": {"type": "string", "pattern": r"a\\b"}}, "has pattern"),
        ({"json": {"type": "string", "pattern": r"a\nb"}}, "has pattern"),
        ({"json": {"type": "string", "pattern": r"a\u0009b"}}, "has pattern"),
        ({"json": {"type": "string", "pattern": "a^b"}}, "without '^' there"),
        ({"json": {"type": "string", "pattern": "(a$|b)c"}}, "without '$' there"),
        ({"json": {"type": "string", "pattern": "a+", "maxLength": 2}}, "'minLength' or 'maxLength' at #"),
        ({"json": {"type": "string", "format": "date", "minLength": 2}}, "'minLength' or 'maxLength' at #"),
        ({"json": {"type": "integer", "multipleOf": 2000}}, "'multipleOf' at #"),
        ({"json": {"type": "integer", "multipleOf": 2, "minimum": 3}}, "'multipleOf' at #"),
        ({"json": {"type": "number", "multipleOf": 2}}, "'multipleOf' at #"),
        ({"json": {"type": "string", "maxLength": -1}}, "maxLength -1 at #, must be a whole number from 0"),
        ({"json": {"type": "array", "items": {"type": "null"}, "minItems": -1}}, "minItems -1 at #"),
        ({"json": {"anyOf": [{"type": []}]}}, "type [] at #/anyOf/0"),
        ({"json": '{"type"'}, "is no JSON"),
        ({"json": ["a"]}, "must be a JSON schema"),
        ({"regex": "(a"}, "no grammar (Regex parsing error"),
        ({"regex": "a$b"}, "without '$' there"),
        ({"regex": r"\Aa\Z"}, r"without '\\A' there"),
        ({"regex": "[^]a]"}, "without '[^]' there"),
        ({"grammar": "root ::= b"}, "no grammar (EBNF"),
        ({"grammar": "root ::= root"}, "allows no token at all"),
        ({"choice": []}, "a list of texts"),
        ({"choice": ["a"], "regex": "a"}, "exactly one of json, json_object, regex, choice, grammar"),
        ({"whitespace_pattern": " "}, "exactly one of"),
        ({"regex": "|".join(f"[a-z]{{1,{at + 100}}}" for at in range(100))}, "automata of"),
        ({"regex": "a" * 200_000}, "is 200000 characters"),
        (7, "a mapping such as"),
    ],
)
def test_what_cannot_be_enforced_is_refused_by_name(llm: LLM, wanted: Any, named: str) -> None:
    with pytest.raises(RequestError) as caught:
        llm.generate("x", structured_outputs=wanted)
    assert named in str(caught.value) and caught.value.param == "structured_outputs"
    assert not llm.engine.has_work()


@pytest.mark.parametrize(
    "pattern",
    ["[ -~]{1,4}", r"^\d{4}-[01]\d$", r"^a\.\$|(?:b|c)?d$", r"[^a]{2}", r'["\\\n x]{1,3}', r"\u0041\x42+?", r"\(\^\)"],
)
def test_patterns_are_kept_to(llm: LLM, pattern: str) -> None:
    schema = {"type": "string", "pattern": pattern}
    for seed in range(3):
        params = SamplingParams(temperature=2.0, seed=seed, max_tokens=40, structured_outputs={"json": schema})
        answer = llm.generate("x", params, mode="fast")[0]
        assert answer.finish_reason == "length" or valid(answer.text, schema)


def test_a_point_is_no_new_line_in_a_regular_expression() -> None:
    state = Grammars(byte_tokenizer(), 259).open(checked_output({"regex": "a.[.]"}), frozenset({257}))
    state.accept(ord("a"))
    with pytest.raises(BuddyMoEError, match="has no place"):
        state.accept(ord("\n"))
    state.accept(ord("b"))
    state.accept(ord("."))
    assert state.ended


def test_a_schema_nested_too_deeply_is_refused() -> None:
    schema: dict[str, Any] = {"type": "null"}
    for _ in range(70):
        schema = {"type": "array", "items": schema}
    with pytest.raises(RequestError, match="nested deeper than 64"):
        checked_output({"json": schema})


@pytest.mark.parametrize("make", [byte_tokenizer, byte_fallback, bpe])
def test_every_kind_of_vocabulary_spells_what_is_asked_for(make: Any) -> None:
    tokenizer = make()
    grammars = Grammars(tokenizer, len(tokenizer) + 5)
    for seed in range(8):
        state = grammars.open(checked_output({"json": random_schema(seed)}), frozenset())
        generator, text = torch.Generator().manual_seed(seed), b""
        for _ in range(400):
            if state.ended:
                valid(text.decode(), random_schema(seed))
                break
            logits_RV = torch.randn(1, len(tokenizer) + 5, generator=generator)
            mask_logits(logits_RV, [state])
            token = int(logits_RV.argmax())
            state.accept(token)
            text += structured.TokenBytes(tokenizer)(token)
    assert text.startswith(b"{")


def test_what_a_vocabulary_cannot_spell_is_told() -> None:
    grammar = Grammars(byte_tokenizer(), 259).open(checked_output({"choice": ["a"]}), frozenset())
    with pytest.raises(BuddyMoEError, match="no place"):
        grammar.accept(ord("b"))
    with pytest.raises(RequestError, match="a model without tokenizer"):
        Grammars(None, 9).open(checked_output({"choice": ["a"]}), frozenset())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_dead_end_is_no_whole_text(llm: LLM, temperature: float) -> None:
    params = SamplingParams(temperature=temperature, structured_outputs={"grammar": 'root ::= "a" b\nb ::= b'})
    with pytest.raises(BuddyMoEError, match=r"no place|no token may come"):
        llm.generate("x", params)


def test_a_grammar_that_takes_ever_longer_ends_its_request_alone(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structured, "SECONDS_PER_TOKEN", 0.0)
    monkeypatch.setattr(structured, "SECONDS", 0.005)
    ambiguous = SamplingParams(max_tokens=200, structured_outputs={"grammar": 'root ::= root root | "a" | "b"'})
    for at, params in enumerate((ambiguous, SamplingParams(temperature=0.0, max_tokens=20))):
        llm.engine.add(GenerationRequest(request_id=f"r{at}", prompt_token_ids=(5, 6), sampling=params, mode="exact"))
    ends = {event.request_id: event for event in llm.engine.drain() if event.finish_reason is not None}
    assert "the grammar takes more than" in (ends["r0"].error or "") and ends["r1"].finish_reason != "error"


def test_compiled_grammars_are_kept_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    grammars = Grammars(byte_tokenizer(), 259)
    first = grammars._grammar(checked_output(JSON), False)
    assert grammars._grammar(checked_output(JSON), False) is first
    monkeypatch.setattr(structured, "KEPT", 3)
    for at in range(9):
        grammars.open(checked_output({"choice": [str(at)]}), frozenset({1}))
    assert [key[1] for key in grammars._compiled] == ['["6"]', '["7"]', '["8"]']
    monkeypatch.setattr(structured, "KEPT_BYTES", 1)
    grammars.open(checked_output(JSON), frozenset())
    assert len(grammars._compiled) == 1


class Person(BaseModel):
    name: str
    age: int
    friends: list[Person]


async def test_over_http_with_openais_client() -> None:
    engine = AsyncEngine(Engine.from_config(EngineConfig(memory="50%")), model_id="fake")
    worker = Worker(engine)
    asked: dict[str, Any] = {"model": "fake", "max_tokens": 60, "messages": [{"role": "user", "content": "Anna is 34"}]}
    try:
        async with talking_to(LocalWorkers(worker)) as client:
            parsed = await openai_client(client).chat.completions.parse(
                **asked, temperature=0, response_format=Person, extra_body={"logit_bias": {}}
            )
            person = parsed.choices[0].message.parsed
            assert person is not None and person.name
            for fields, kind in (
                ({"response_format": {"type": "json_object"}}, dict),
                ({"structured_outputs": JSON}, dict),
            ):
                reply = await client.post("/v1/chat/completions", json=asked | fields | {"temperature": 0})
                choice = reply.json()["choices"][0]
                assert choice["finish_reason"] == "length" or isinstance(json.loads(choice["message"]["content"]), kind)
            chosen = {"model": "fake", "prompt": "a", "structured_outputs": {"choice": ["yes", "no"]}, "n": 3}
            reply = await client.post("/v1/completions", json=chosen)
            assert {choice["text"] for choice in reply.json()["choices"]} <= {"yes", "no"}
            schema = {"name": "a", "schema": {"type": "object", "dependentRequired": {}}, "strict": True}
            bad = await client.post(
                "/v1/chat/completions",
                json=asked | {"response_format": {"type": "json_schema", "json_schema": schema}},
            )
            assert "'dependentRequired' at #" in check_error(bad, 400, "response_format")
            bad = await client.post("/v1/completions", json=chosen | {"structured_outputs": {"regex": "("}})
            assert "no grammar" in check_error(bad, 400, "structured_outputs")
            for fields in ({"response_format": {"type": "json_schema"}}, {"response_format": {"type": "xml"}}):
                assert (await client.post("/v1/completions", json=chosen | fields)).status_code == 400
    finally:
        worker.close()
