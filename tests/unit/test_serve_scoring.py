"""What a text is worth to the model: `echo` with log probabilities, as lm-eval asks; tokens, as vLLM spells them."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import httpx
import pytest
from asgi import check_error, messages_of, openai_client, serving, talking_to
from fakes import FakeEngine, FakeLimits, LocalWorkers

from buddymoe_ray import LLM
from buddymoe_ray.config import EngineConfig
from buddymoe_ray.engine.async_engine import AsyncEngine
from buddymoe_ray.engine.engine import Engine
from buddymoe_ray.errors import RequestError
from buddymoe_ray.serve.resume import WorkerLost
from buddymoe_ray.serve.work import Batch, Reply, Work
from buddymoe_ray.serve.worker import Worker
from buddymoe_ray.types import Mode, SamplingParams, TokenLogprob

LONG = "def add(a, b):\n    return a + b\n" * 9  # more tokens than one piece of scoring has
TEXTS = [LONG, "x", "naïve = 'ü☃'", "import os\n"]
PATH = "/v1/completions"


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("builtin:tiny", memory="50%", mode="bounded") as llm:
        yield llm


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    engine = AsyncEngine(Engine.from_config(EngineConfig(memory="40%", seed=1)), model_id="fake")
    yield Worker(engine)
    engine.close()


def scored(llm: LLM, texts: list[str], mode: Mode = "fast") -> list[tuple[TokenLogprob | None, ...]]:
    answers = llm.generate(texts, SamplingParams(prompt_logprobs=1, max_tokens=0), mode=mode)
    assert all(len(answer.prompt_logprobs) == len(answer.prompt_token_ids) for answer in answers)
    return [answer.prompt_logprobs for answer in answers]


def forced(llm: LLM, ids: tuple[int, ...]) -> list[float]:
    """The engine's own log probabilities of a text, teacher-forced."""
    blocks = llm.engine._scheduler.borrow(len(ids))
    assert blocks is not None
    found: list[float] = []
    for start, logits_TV in llm.engine._runner.score(ids, blocks):
        targets = ids[start + 1 : start + 1 + len(logits_TV)]
        found += logits_TV.log_softmax(-1)[range(len(targets)), targets].tolist()
    llm.engine._scheduler.give_back(blocks)
    return found


def test_prompts_are_scored_as_if_each_token_had_been_forced(llm: LLM) -> None:
    ids = [tuple(llm.tokenizer.encode(text)) for text in TEXTS]
    assert len(ids[0]) > 80
    for entries, tokens in zip(scored(llm, TEXTS), ids, strict=True):
        assert entries[0] is None
        assert [entry.token_id for entry in entries[1:] if entry] == list(tokens[1:])
        assert [entry.logprob for entry in entries[1:] if entry] == pytest.approx(forced(llm, tokens), abs=1e-4)
        assert all(entry.logprob in dict(entry.top).values() for entry in entries[1:] if entry)


def test_what_is_generated_is_scored_as_it_was_chosen(llm: LLM) -> None:
    answer = llm.generate("import os\n", SamplingParams(temperature=0.0, max_tokens=20, logprobs=1), mode="exact")[0]
    whole = [*answer.prompt_token_ids, *answer.token_ids]
    again = llm.generate([whole], SamplingParams(prompt_logprobs=1, max_tokens=0))[0].prompt_logprobs
    own = [entry.logprob for entry in answer.logprobs]
    assert [entry.logprob for entry in again[-len(own) :] if entry] == pytest.approx(own, abs=1e-4)


def test_scoring_changes_nothing_beside_it_and_reuses_nothing(llm: LLM) -> None:
    plain = [answer.token_ids for answer in llm.generate(TEXTS, max_tokens=8, mode="exact")]
    alone = [scored(llm, [text])[0] for text in TEXTS]  # each beginning was computed before
    assert scored(llm, TEXTS) == alone
    both = llm.generate(TEXTS, SamplingParams(temperature=0.0, max_tokens=8, prompt_logprobs=1), mode="exact")
    assert [answer.token_ids for answer in both] == plain
    assert [answer.prompt_logprobs for answer in both] == alone
    assert all(answer.usage.cached_tokens == 0 for answer in both)
    for wrong in ({"max_tokens": 0}, {"prompt_logprobs": 21}, {"max_tokens": -1, "prompt_logprobs": 1}):
        with pytest.raises(RequestError):
            llm.generate("x", SamplingParams(**wrong))


def test_a_model_that_computes_prompts_whole_scores_them_too(llm: LLM) -> None:
    with LLM("builtin:tiny", memory="50%", batching="solo") as solo:
        for entries, expected in zip(scored(solo, TEXTS, "exact"), scored(llm, TEXTS), strict=True):
            assert [e.logprob for e in entries[1:] if e] == pytest.approx(
                [e.logprob for e in expected[1:] if e], abs=1e-3
            )


async def post(client: httpx.AsyncClient, **fields: Any) -> list[dict[str, Any]]:
    body = {"model": "fake", "echo": True, "max_tokens": 1, "temperature": 0, "logprobs": 1} | fields
    reply = await client.post(PATH, json=body)
    assert reply.status_code == 200, reply.text
    choices: list[dict[str, Any]] = reply.json()["choices"]
    return choices


async def test_loglikelihoods_as_lm_eval_asks_for_them(worker: Worker, llm: LLM) -> None:
    ids = [tuple(llm.tokenizer.encode(text)) for text in (TEXTS[0], TEXTS[3])]
    async with talking_to(LocalWorkers(worker)) as client:
        for prompt in ([TEXTS[0], TEXTS[3]], [list(tokens) for tokens in ids]):
            for most in (0, 1):
                for choice, tokens in zip(await post(client, prompt=prompt, max_tokens=most), ids, strict=True):
                    told = choice["logprobs"]
                    assert len(told["token_logprobs"]) == len(told["top_logprobs"]) == len(tokens) + most
                    assert told["token_logprobs"][0] is told["top_logprobs"][0] is None
                    values = told["token_logprobs"][1 : len(tokens)]
                    assert values == pytest.approx(forced(llm, tokens), abs=1e-4)
                    tops = told["top_logprobs"][1 : len(tokens)]
                    best = [value == max(top.values()) for value, top in zip(values, tops, strict=True)]
                    assert not all(best) and any(best) == (tokens is ids[0])
                    assert choice["finish_reason"] == "length"


async def test_an_echo_is_the_prompt_and_tokens_begin_where_they_do(worker: Worker) -> None:
    async with talking_to(LocalWorkers(worker)) as client:
        (plain,) = await post(client, prompt=TEXTS[2], echo=False, max_tokens=5)
        (choice,) = await post(client, prompt=TEXTS[2], max_tokens=5)
        assert choice["text"] == TEXTS[2] + plain["text"]
        told, own = choice["logprobs"], plain["logprobs"]
        shift = len(TEXTS[2])
        assert told["text_offset"][-5:] == [offset + shift for offset in own["text_offset"]]
        assert told["token_logprobs"][-5:] == own["token_logprobs"]
        ends = [*told["text_offset"][1:], len(choice["text"])]
        for at, (token, end) in enumerate(zip(told["tokens"], ends, strict=True)):
            assert "\ufffd" in token or choice["text"][told["text_offset"][at] : end] == token
        for fields in ({"logprobs": None}, {"logprobs": None, "max_tokens": 0}, {"n": 2, "temperature": 1.0}):
            for bare in await post(client, prompt=TEXTS[2], **fields):
                assert bare["text"].startswith(TEXTS[2])
        openai = openai_client(client)
        again = await openai.completions.create(model="fake", prompt=TEXTS[2], echo=True, max_tokens=0, logprobs=0)
        assert again.choices[0].text == TEXTS[2] and again.usage is not None
        assert again.usage.completion_tokens == 0


async def test_a_stream_that_moves_echoes_once(worker: Worker) -> None:
    class Mortal(LocalWorkers):
        async def generate(self, work: Work) -> AsyncGenerator[Reply, None]:
            async for reply in worker.generate(work):
                yield reply
                if isinstance(reply, Batch) and reply.deltas and not work.resume:
                    raise WorkerLost("it died")

    async with talking_to(LocalWorkers(worker)) as client:
        (whole,) = await post(client, prompt=LONG, max_tokens=8)
    async with talking_to(Mortal(worker)) as client:
        body = {"model": "fake", "prompt": LONG, "echo": True, "max_tokens": 8, "temperature": 0, "logprobs": 1}
        reply = await client.post(PATH, json=body | {"stream": True})
    chunks = [json.loads(message)["choices"][0] for message in messages_of(reply.text)[:-1]]
    assert "".join(chunk["text"] for chunk in chunks) == whole["text"]
    for name in ("tokens", "token_logprobs", "text_offset"):
        assert [item for chunk in chunks for item in chunk["logprobs"][name]] == whole["logprobs"][name]


async def test_tokens_and_texts_in_vllms_shapes(worker: Worker, llm: LLM) -> None:
    ids = llm.tokenizer.encode(TEXTS[2])
    async with talking_to(LocalWorkers(worker)) as client:
        told = (await client.post("/tokenize", json={"model": "fake", "prompt": TEXTS[2]})).json()
        assert told == {
            "count": len(ids), "max_model_len": worker.info().max_model_len, "tokens": ids, "token_strs": None,
        }  # fmt: skip
        named = await client.post("/tokenize", json={"prompt": "a b", "return_token_strs": True})
        assert named.json()["token_strs"] == llm.tokenizer.convert_ids_to_tokens(named.json()["tokens"])
        assert (await client.post("/detokenize", json={"tokens": ids})).json() == {"prompt": TEXTS[2]}
        chat = {"messages": [{"role": "user", "content": "hi"}]}
        text = (await client.post("/detokenize", json={"tokens": (await tokens(client, **chat))})).json()["prompt"]
        assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
        assert text.startswith(await spelled(client, **chat, add_generation_prompt=False))
        tool = {"type": "function", "function": {"name": "f"}}
        assert "Tools: f()" in await spelled(client, **chat, tools=[tool])
        info = (await client.get("/tokenizer_info")).json()
        assert info["eos_token"] == "<|im_end|>" and "im_start" in info["chat_template"] and info["tokenizer_class"]
        long = await client.post("/tokenize", json={"prompt": "x y " * 3000})
        assert long.json()["count"] > worker.info().max_model_len
        for path, body, param in (
            ("/tokenize", {"prompt": "a", "messages": chat["messages"]}, "prompt"),
            ("/tokenize", {}, "prompt"),
            ("/tokenize", {"prompt": 3}, "prompt"),
            ("/detokenize", {"tokens": []}, "tokens"),
            ("/detokenize", {"tokens": [99999]}, "tokens"),
            ("/detokenize", {"tokens": ["a"]}, "tokens[0]"),
        ):
            check_error(await client.post(path, json=body), 400, param)
        check_error(await client.post("/tokenize", json={"model": "q", "prompt": ""}), 404, "model", "model_not_found")


async def tokens(client: httpx.AsyncClient, **body: Any) -> list[int]:
    found: list[int] = (await client.post("/tokenize", json=body)).json()["tokens"]
    return found


async def spelled(client: httpx.AsyncClient, **body: Any) -> str:
    reply = await client.post("/detokenize", json={"tokens": await tokens(client, **body)})
    return str(reply.json()["prompt"])


async def test_what_others_serve_is_refused_by_name() -> None:
    async with serving(FakeEngine(limits=FakeLimits()), api_key="k") as client:
        for path in ("/tokenize", "/detokenize"):
            assert (await client.post(path, json={"prompt": "a"})).status_code == 401
        assert (await client.get("/tokenizer_info")).status_code == 401
        client.headers["Authorization"] = "Bearer k"
        for path, what in (
            ("embeddings", "embedding"),
            ("load_lora_adapter", "LoRA"),
            ("images/generations", "images"),
        ):
            message = check_error(await client.post(f"/v1/{path}", json={}), 404)
            assert what in message and "not supported" in message
        image = [{"type": "image_url", "image_url": {"url": "data:"}}]
        chat = {"model": "fake", "messages": [{"role": "user", "content": image}]}
        bad = await client.post("/v1/chat/completions", json=chat)
        assert "images" in check_error(bad, 400, "messages[0].content")
        bad = await client.post(PATH, json={"model": "fake", "prompt": "a", "max_tokens": 0})
        assert "without echo" in check_error(bad, 400, "max_tokens")
        bad = await client.post(PATH, json={"model": "fake", "prompt": [2**32], "echo": True})
        assert "token id 4294967296" in check_error(bad, 400, "prompt"), "more than a tokenizer can read"
        check_error(await client.post("/detokenize", json={"tokens": [2**32]}), 400, "tokens")
        check_error(await client.post("/v1/chat/completions", json=chat | {"echo": True}), 400, "echo")
