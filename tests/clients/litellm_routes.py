"""litellm against a running service of `builtin:tiny`: chat, streams, tools, text, responses and messages by its names.

Run by hand, with `pip install litellm==1.110.2`: `buddymoe serve deployments/tiny-cpu.yaml`, then
`python tests/clients/litellm_routes.py [URL] [MODEL]`.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from typing import Any

import litellm
from pydantic import BaseModel

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": CITY}}]
WEATHER = [{"role": "user", "content": "What is the weather in Rome?"}]
EXTRACT = [{"role": "user", "content": "Extract JSON: Anna is 34 and lives in Paris."}]


class Person(BaseModel):
    """What is read out of a sentence."""

    name: str
    age: int
    city: str


def main(url: str = "http://127.0.0.1:8000", model: str = "builtin:tiny") -> None:
    """Say what each step came to; raise where it is not what it must be."""
    print(f"litellm {version('litellm')}")
    ask: Any = litellm.completion
    for provider in ("openai", "hosted_vllm"):
        asked: Any = {"model": f"{provider}/{model}", "api_base": f"{url}/v1", "api_key": "none"}
        asked |= {"temperature": 0, "max_tokens": 60}
        called = ask(messages=WEATHER, tools=TOOLS, **asked).choices[0].message
        (call,) = called.tool_calls
        assert json.loads(call.function.arguments) == {"city": "Rome"}, called
        result = {"role": "tool", "tool_call_id": call.id, "content": "fine"}
        told = [*WEATHER, called.model_dump(exclude_none=True), result]
        answer = ask(messages=told, tools=TOOLS, **asked).choices[0].message.content
        chunks = [*ask(messages=told, tools=TOOLS, stream=True, stream_options={"include_usage": True}, **asked)]
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert streamed == answer and any(getattr(chunk, "usage", None) for chunk in chunks), (streamed, answer)
        parsed = Person.model_validate_json(
            ask(messages=EXTRACT, response_format=Person, **asked).choices[0].message.content
        )
        print(f"{provider}: {call.function.arguments} -> {answer!r}; {parsed!r}")
        assert parsed == Person(name="Anna", age=34, city="Paris")
    text: Any = litellm.text_completion(
        model=f"text-completion-openai/{model}", api_base=f"{url}/v1", api_key="none", prompt="def add(a, b):",
        max_tokens=16, temperature=0,
    )  # fmt: skip
    print(f"text: {text.choices[0].text!r}")
    responded: Any = litellm.responses(
        model=f"openai/{model}", api_base=f"{url}/v1", api_key="none", input="7 + 5", max_output_tokens=30
    )
    print(f"responses: {responded.output[0].content[0].text!r}, {responded.usage.total_tokens} tokens")
    claude: Any = {"model": f"anthropic/{model}", "api_base": url, "api_key": "none", "max_tokens": 60}
    said = ask(messages=WEATHER, tools=TOOLS, temperature=0, **claude).choices[0].message
    print(f"anthropic: {said.tool_calls[0].function.arguments}")
    assert json.loads(said.tool_calls[0].function.arguments) == {"city": "Rome"}, said


if __name__ == "__main__":
    main(*sys.argv[1:])
