"""Tasks with numbers: column by column sums, differences and products; conversions of units.

The columns are written out, lowest digit first, because a model of few layers cannot carry in its head; only the last
line is scored.
"""

from __future__ import annotations

from random import Random

from buddymoe_ray.tasks.task import Task
from buddymoe_ray.tasks.words import UNITS

__all__ = ["add", "convert", "multiply", "subtract"]


def _number(rng: Random) -> int:
    """Up to three digits, each length often."""
    return rng.randrange(10 ** rng.choice((1, 2, 3, 3)))


def _digits(number: int, width: int) -> list[int]:
    return [number // 10**place % 10 for place in range(width)]


def _forms(sign: str, word: str) -> tuple[str, ...]:
    asked = (f"{{}} {sign} {{}}", f"{{}}{sign}{{}}", f"{{}} {word} {{}}")
    return tuple(form.replace("{}", each) for each in asked for form in ("What is {}?", "{} =", "{}", "Calculate {}."))


def add(rng: Random) -> Task:
    """Sums of numbers up to 999."""
    a, b = _number(rng), _number(rng)
    columns, carry = [], 0
    width = max(len(str(a)), len(str(b)))
    for x, y in zip(_digits(a, width), _digits(b, width), strict=True):
        columns.append(f"{x}+{y}+{carry}={x + y + carry}")
        carry = (x + y + carry) // 10
    asked = rng.choice((*_forms("+", "plus"), "Add {} and {}."))
    return Task(family="add", operands=(a, b), question=asked.format(a, b), worked=" ".join(columns), answer=str(a + b))


def subtract(rng: Random) -> Task:
    """Differences of numbers up to 999, none below zero."""
    a, b = sorted((_number(rng), _number(rng)), reverse=True)
    columns, borrow = [], 0
    width = len(str(a))
    for x, y in zip(_digits(a, width), _digits(b, width), strict=True):
        x += 10 * (x < y + borrow)
        columns.append(f"{x}-{y}-{borrow}={x - y - borrow}")
        borrow = int(x >= 10)
    asked = rng.choice((*_forms("-", "minus"), "Take {1} from {0}."))
    return Task(
        family="subtract", operands=(a, b), question=asked.format(a, b), worked=" ".join(columns), answer=str(a - b)
    )


def multiply(rng: Random) -> Task:
    """Products of a number up to 999 and a digit."""
    a, b = _number(rng), rng.randrange(2, 10)
    columns, carry = [], 0
    for x in _digits(a, len(str(a))):
        columns.append(f"{x}*{b}={x * b}+{carry}={x * b + carry}")
        carry = (x * b + carry) // 10
    asked = rng.choice((*_forms("*", "times"), "Multiply {} by {}."))
    return Task(
        family="multiply", operands=(a, b), question=asked.format(a, b), worked=" ".join(columns), answer=str(a * b)
    )


def convert(rng: Random) -> Task:
    """Metric units, by powers of ten, up and down."""
    large, small, factor = rng.choice(UNITS)
    count = rng.randrange(1, 100)
    one, other = f"{count} {large}", f"{count * factor} {small}"
    up = rng.random() < 0.5
    given, unit, wanted = (other, large, one) if up else (one, small, other)
    asked = rng.choice(
        ("Convert {} to {}.", "How much is {} in {}?", "{} in {}?", "What is {} in {}?", "{} to {}")
    ).format(given, unit)
    return Task(family="convert", operands=(count, large, small, up), question=asked, answer=wanted)
