"""instructor against a running service of `builtin:tiny`: answers as models by every mode that an OpenAI service has.

Run by hand, with `pip install instructor==1.17.0`: `buddymoe serve deployments/tiny-cpu.yaml`, then
`python tests/clients/instructor_parsed.py [URL] [MODEL]`.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from typing import Any

import instructor
import openai
from pydantic import BaseModel

MESSAGES: Any = [{"role": "user", "content": "Extract JSON: Anna is 34 and lives in Paris."}]


class Person(BaseModel):
    """What is read out of a sentence."""

    name: str
    age: int
    city: str


def main(url: str = "http://127.0.0.1:8000/v1", model: str = "builtin:tiny") -> None:
    """Say what each step came to; raise where it is not what it must be."""
    print(f"instructor {version('instructor')}, openai {openai.__version__}")
    raw = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    for mode in (instructor.Mode.TOOLS, instructor.Mode.TOOLS_STRICT, instructor.Mode.JSON_SCHEMA):
        client = instructor.from_openai(raw, mode=mode)
        asked: Any = {"model": model, "messages": MESSAGES, "temperature": 0, "max_tokens": 80, "max_retries": 1}
        person = client.chat.completions.create(response_model=Person, **asked)
        print(f"{mode}: {person!r}")
        assert isinstance(person, Person)
        *_, last = client.chat.completions.create_partial(response_model=Person, **asked)
        print(f"{mode}, streamed (the tool is called otherwise then, and the small model minds): {last!r}")
        assert None not in last.model_dump().values(), last


if __name__ == "__main__":
    main(*sys.argv[1:])
