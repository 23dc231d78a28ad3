"""The anthropic client against a running service of `builtin:tiny`: tools in a loop, streams, counts, errors.

Run by hand: `buddymoe serve deployments/tiny-cpu.yaml`, then
`python tests/clients/anthropic_messages.py [URL] [MODEL]`.
"""

from __future__ import annotations

import sys
from typing import Any

import anthropic

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS: Any = [{"name": name, "input_schema": CITY} for name in ("get_weather", "find_hotel", "get_news")]
QUESTIONS = {
    "get_weather": "What is the weather in Rome?",
    "find_hotel": "Find a hotel in Oslo.",
    "get_news": "What is new in Lima?",
}


def main(url: str = "http://127.0.0.1:8000", model: str = "builtin:tiny") -> None:
    """Say what each step came to; raise where it is not what it must be."""
    client = anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)
    print(f"anthropic {anthropic.__version__}")
    for name, question in QUESTIONS.items():
        asked: Any = {"model": model, "tools": TOOLS, "max_tokens": 60, "extra_body": {"temperature": 0}}
        messages: Any = [{"role": "user", "content": question}]
        told = client.messages.create(messages=messages, **asked)
        (call,) = told.content
        assert call.type == "tool_use" and call.name == name and told.stop_reason == "tool_use", told
        with client.messages.stream(messages=messages, **asked) as stream:
            kinds = {event.type for event in stream}
            done = stream.get_final_message()
        assert {"input_json", "content_block_stop", "message_stop"} <= kinds, kinds
        (streamed,) = done.content
        assert streamed.type == "tool_use" and (streamed.name, streamed.input) == (name, call.input), done
        result = {"type": "tool_result", "tool_use_id": call.id, "content": "fine"}
        messages += [{"role": "assistant", "content": told.content}, {"role": "user", "content": [result]}]
        count = client.messages.count_tokens(model=model, tools=TOOLS, messages=messages).input_tokens
        with client.messages.stream(messages=messages, **asked) as stream:
            text = "".join(stream.text_stream)
            done = stream.get_final_message()
        used = done.usage.input_tokens + (done.usage.cache_read_input_tokens or 0)
        print(f"{name}: {call.input} -> {text!r} ({done.stop_reason}, {used} + {done.usage.output_tokens} tokens)")
        assert done.stop_reason == "end_turn" and used == count, (done, count)
        for choice in ({"type": "any"}, {"type": "tool", "name": name}):
            forced: Any = client.messages.create(messages=messages[:1], tool_choice=choice, **asked)
            assert [block.type for block in forced.content] == ["tool_use"], forced
    image: Any = {"type": "image", "source": {"type": "url", "url": "http://x/y.png"}}
    try:
        client.messages.create(model=model, max_tokens=5, messages=[{"role": "user", "content": [image]}])
    except anthropic.BadRequestError as error:
        print(error.message)
        assert error.type == "invalid_request_error"
    else:
        raise AssertionError("an image was accepted")


if __name__ == "__main__":
    main(*sys.argv[1:])
