"""Tasks that ask for a small Python function by its docstring."""

from __future__ import annotations

from random import Random

from buddymoe_ray.tasks.task import Task
from buddymoe_ray.tasks.words import WORDS

__all__ = ["functions"]

_KINDS = (
    ("Return {x} plus {n}.", "{x} + {n}"),
    ("Return {x} minus {n}.", "{x} - {n}"),
    ("Return {x} times {n}.", "{x} * {n}"),
    ("Return whether {x} is greater than {n}.", "{x} > {n}"),
    ("Return whether {x} is equal to {n}.", "{x} == {n}"),
    ("Return the first {n} items of {x}.", "{x}[:{n}]"),
    ("Return the last {n} items of {x}.", "{x}[-{n}:]"),
    ("Return {x} divided by {n}.", "{x} / {n}"),
    ("Return the length of {x} plus {n}.", "len({x}) + {n}"),
    ("Return item {n} of {x}.", "{x}[{n}]"),
)


def functions(rng: Random) -> Task:
    """A function of one argument and one constant."""
    (said, expression), name, x = (
        rng.choice(_KINDS),
        rng.choice(WORDS),
        rng.choice(("x", "n", "value", "data", "items")),
    )
    n = rng.randrange(1, 100)
    said, body = said.format(x=x, n=n), expression.format(x=x, n=n)
    return Task(
        family="functions",
        operands=(name, body),
        question=f"Write a Python function `{name}({x})`: {said}",
        answer=f'```python\ndef {name}({x}):\n    """{said}"""\n    return {body}\n```',
    )
