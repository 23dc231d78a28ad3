"""Draws tasks of every family, of one split, from a seed.

The same (split, seed) gives the same tasks on every machine. Held-out tasks are all different; those to learn from
come again, as often as chance has it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from random import Random

from buddymoe_ray.tasks.code import functions
from buddymoe_ray.tasks.knowledge import calendar, dates, extract, facts, talk, tools
from buddymoe_ray.tasks.lists import capitals, count, join, reverse, sort_numbers, sort_words
from buddymoe_ray.tasks.numbers import add, convert, multiply, subtract
from buddymoe_ray.tasks.task import Split, Task

__all__ = ["FAMILIES", "draw", "held_out"]

FAMILIES: dict[str, Callable[[Random], Task]] = {
    "add": add,
    "subtract": subtract,
    "multiply": multiply,
    "convert": convert,
    "count": count,
    "sort numbers": sort_numbers,
    "sort words": sort_words,
    "reverse": reverse,
    "join": join,
    "capitals": capitals,
    "calendar": calendar,
    "dates": dates,
    "facts": facts,
    "extract": extract,
    "tools": tools,
    "functions": functions,
    "talk": talk,
}
_DRAWS = 1000


def draw(rng: Random, family: str, split: Split) -> Task:
    """A task of one family and one split."""
    while (task := FAMILIES[family](rng)).split != split:
        pass
    return task


def held_out(number: int, *, seed: int = 0) -> Iterator[Task]:
    """`number` different held-out tasks, the families in turn; a family that has no more of them is passed over."""
    return islice(_in_turn([_different(family, seed) for family in FAMILIES]), number)


def _in_turn(left: list[Iterator[Task]]) -> Iterator[Task]:
    while left:
        for source in tuple(left):
            if (task := next(source, None)) is None:
                left.remove(source)
            else:
                yield task


def _different(family: str, seed: int) -> Iterator[Task]:
    """Held-out tasks with operands not seen before, until many draws in a row bring none."""
    rng, seen, vain = Random(f"{seed}/{family}"), set[tuple[str | int, ...]](), 0
    while vain < _DRAWS:
        task = draw(rng, family, "heldout")
        vain = vain + 1 if task.operands in seen else 0
        if not vain:
            seen.add(task.operands)
            yield task
