"""langchain-openai against a running service of `builtin:tiny`: structured output by every method, tools in a loop.

Run by hand, with `pip install langchain-openai==1.4.3`: `buddymoe serve deployments/tiny-cpu.yaml`, then
`python tests/clients/langchain_structured.py [URL] [MODEL]`.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from typing import Any

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

TEXT = "Extract JSON: Anna is 34 and lives in Paris."


class Person(BaseModel):
    """What is read out of a sentence."""

    name: str
    age: int
    city: str


@tool
def get_weather(city: str) -> str:
    """The weather in a city."""
    return f"fine in {city}"


def main(url: str = "http://127.0.0.1:8000/v1", model: str = "builtin:tiny") -> None:
    """Say what each step came to; raise where it is not what it must be."""
    print(f"langchain-openai {version('langchain-openai')}")
    for responses in (False, True):
        chat: Any = ChatOpenAI(
            base_url=url, api_key="none", model=model, temperature=0, max_tokens=60, use_responses_api=responses
        )
        for method in ("json_schema", "function_calling"):
            person = chat.with_structured_output(Person, method=method).invoke(TEXT)
            print(f"{method}, responses {responses}: {person!r}")
            assert isinstance(person, Person), person
            assert method == "function_calling" or person == Person(name="Anna", age=34, city="Paris"), person
        able = chat.bind_tools([get_weather])
        told: list[Any] = [HumanMessage("What is the weather in Rome?")]
        called = able.invoke(told)
        (call,) = called.tool_calls
        assert (call["name"], call["args"]) == ("get_weather", {"city": "Rome"}), called
        told += [called, ToolMessage(get_weather.invoke(call["args"]), tool_call_id=call["id"])]
        answer = able.invoke(told)
        streamed = None
        for chunk in able.stream(told):
            streamed = chunk if streamed is None else streamed + chunk
        print(f"tools, responses {responses}: {call['args']} -> {answer.text!r}, {answer.usage_metadata}")
        assert streamed.text == answer.text and answer.text, (streamed, answer)
    loose: Any = ChatOpenAI(base_url=url, api_key="none", model=model, temperature=0, max_tokens=60)
    print(f"json_mode: {loose.with_structured_output(Person, method='json_mode').invoke(TEXT)!r}")


if __name__ == "__main__":
    main(*sys.argv[1:])
