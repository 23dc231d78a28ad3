"""The openai client against a running service of `builtin:tiny`: parsed answers, stream helpers, files and batches.

Run by hand, with `pip install openai==2.54.0` or `3.57.0`: `buddymoe serve deployments/tiny-cpu.yaml`, then
`python tests/clients/openai_batches.py [URL] [MODEL]`.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import openai
from pydantic import BaseModel

ASKED: Any = "Extract JSON: Anna is 34 and lives in Paris."


class Person(BaseModel):
    """What is read out of a sentence."""

    name: str
    age: int
    city: str


ANNA = Person(name="Anna", age=34, city="Paris")


def main(url: str = "http://127.0.0.1:8000/v1", model: str = "builtin:tiny") -> None:
    """Say what each step came to; raise where it is not what it must be."""
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    print(f"openai {openai.__version__}")
    messages: Any = [{"role": "user", "content": ASKED}]
    chat: Any = {"model": model, "messages": messages, "temperature": 0}
    assert client.chat.completions.parse(response_format=Person, **chat).choices[0].message.parsed == ANNA
    with client.chat.completions.stream(response_format=Person, **chat) as stream:
        kinds = {event.type for event in stream}
        assert stream.get_final_completion().choices[0].message.parsed == ANNA
    assert {"chunk", "content.delta", "content.done"} <= kinds, kinds
    respond: Any = {"model": model, "input": ASKED, "temperature": 0, "text_format": Person}
    assert client.responses.parse(**respond).output_parsed == ANNA
    with client.responses.stream(**respond) as events:
        kinds = {event.type for event in events}
        assert events.get_final_response().output_parsed == ANNA
    assert {"response.output_text.delta", "response.completed"} <= kinds, kinds
    print("parse() and stream() of chat and responses: as they must be")
    batches(client, model)


def batches(client: openai.OpenAI, model: str) -> None:
    """A file through a batch, beside the same requests one by one: in `exact`, where no request feels others."""
    exact = {"model": model, "max_tokens": 8, "temperature": 0, "buddymoe": {"mode": "exact"}}
    bodies: Any = [exact | {"prompt": f"{at} + {at} ="} for at in range(20)]
    lines = [
        {"custom_id": str(at), "method": "POST", "url": "/v1/completions", "body": body}
        for at, body in enumerate([*bodies, bodies[0] | {"temperature": 9}])
    ]
    data = "\n".join(map(json.dumps, lines)).encode()
    file = client.files.create(file=("in.jsonl", data), purpose="batch")
    assert client.files.content(file.id).content == data
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
    while batch.status in ("validating", "in_progress", "finalizing"):
        time.sleep(0.1)
        batch = client.batches.retrieve(batch.id)
    print(f"batch: {batch.status}, {batch.request_counts}")
    assert batch.status == "completed" and batch.output_file_id and batch.error_file_id, batch
    answers = [json.loads(each) for each in client.files.content(batch.output_file_id).text.splitlines()]
    for body, answer in zip(bodies, answers, strict=True):
        alone = client.completions.create(model=model, prompt=body["prompt"], extra_body=body).choices[0].text
        assert answer["response"]["body"]["choices"][0]["text"] == alone, (answer, alone)
    [wrong] = client.files.content(batch.error_file_id).text.splitlines()
    assert json.loads(wrong)["response"]["status_code"] == 400, wrong
    for name in (file.id, batch.output_file_id, batch.error_file_id):
        assert client.files.delete(name).deleted
    assert batch.id in [each.id for each in client.batches.list()]


if __name__ == "__main__":
    main(*sys.argv[1:])
