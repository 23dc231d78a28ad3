"""The openai client against a running service of `builtin:tiny`: tools in a loop, streams, parsed answers, responses.

Run by hand: `buddymoe serve deployments/tiny-cpu.yaml`, then `python tests/clients/tools_openai.py [URL] [MODEL]`.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import openai
from pydantic import BaseModel

CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS: Any = [
    {"type": "function", "function": {"name": name, "parameters": CITY, "strict": True}}
    for name in ("get_weather", "find_hotel", "get_news")
]
QUESTIONS = {
    "get_weather": "What is the weather in Rome?",
    "find_hotel": "Find a hotel in Oslo.",
    "get_news": "What is new in Lima?",
}


class Person(BaseModel):
    """What is read out of a sentence."""

    name: str
    age: int
    city: str


def main(url: str = "http://127.0.0.1:8000/v1", model: str = "builtin:tiny") -> None:
    """Say what each step came to; raise where it is not what it must be."""
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    print(f"openai {openai.__version__}")
    for name, question in QUESTIONS.items():
        asked: Any = {"model": model, "tools": TOOLS, "temperature": 0, "max_tokens": 60}
        messages: Any = [{"role": "user", "content": question}]
        message = client.chat.completions.create(messages=messages, **asked).choices[0].message
        assert message.tool_calls, message
        (call,) = message.tool_calls
        assert call.type == "function" and call.function.name == name, call
        messages += [message, {"role": "tool", "tool_call_id": call.id, "content": "fine"}]
        answer = client.chat.completions.create(messages=messages, **asked).choices[0].message.content
        print(f"{name}: {call.function.arguments} -> {answer!r}")
        with client.chat.completions.stream(messages=messages[:1], **asked) as stream:
            kinds = {event.type for event in stream}
            done = stream.get_final_completion().choices[0]
        assert done.finish_reason == "tool_calls" and "tool_calls.function.arguments.done" in kinds, (done, kinds)
        for choice in ("required", {"type": "function", "function": {"name": name}}):
            forced = client.chat.completions.create(messages=messages[:1], tool_choice=choice, **asked).choices[0]
            assert forced.message.tool_calls, forced
            json.loads(forced.message.tool_calls[0].function.arguments)  # type: ignore[union-attr]
        respond(client, model, name, question)
    parsed = client.chat.completions.parse(
        model=model,
        messages=[{"role": "user", "content": "Extract JSON: Anna is 34 and lives in Paris."}],
        response_format=Person,
        temperature=0,
    )
    print(parsed.choices[0].message.parsed)
    assert parsed.choices[0].message.parsed == Person(name="Anna", age=34, city="Paris")


def respond(client: openai.OpenAI, model: str, name: str, question: str) -> None:
    """The same loop over /v1/responses, streamed."""
    tools: Any = [{"type": "function", **tool["function"]} for tool in TOOLS]
    asked: Any = {"model": model, "tools": tools, "temperature": 0, "max_output_tokens": 60}
    told: Any = [{"role": "user", "content": question}]
    with client.responses.stream(input=told, **asked) as stream:
        kinds = [event.type for event in stream]
        (call,) = stream.get_final_response().output
    assert call.type == "function_call" and call.name == name and kinds[-1] == "response.completed", (call, kinds)
    told += [call, {"type": "function_call_output", "call_id": call.call_id, "output": "fine"}]
    with client.responses.stream(input=told, **asked) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        answer = stream.get_final_response()
    print(f"responses, {name}: {call.arguments} -> {text!r}")
    assert answer.status == "completed" and answer.output_text == text, answer


if __name__ == "__main__":
    main(*sys.argv[1:])
