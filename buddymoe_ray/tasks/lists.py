"""Tasks with lists of words or numbers: count, sort, reverse, join, write in capitals."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from buddymoe_ray.tasks.task import Task
from buddymoe_ray.tasks.words import WORDS

__all__ = ["capitals", "count", "join", "reverse", "sort_numbers", "sort_words"]


def _listed(rng: Random, items: Sequence[object]) -> str:
    return rng.choice((", ", " ")).join(map(str, items))


def count(rng: Random) -> Task:
    """How many words a list has, up to nine."""
    words = rng.sample(WORDS, rng.randrange(1, 10))
    asked = rng.choice(
        (
            "How many words: {}",
            "Count: {}",
            "Count the words: {}",
            "How many words are in: {}",
            "How long is the list {}?",
        )
    )
    return Task(
        family="count",
        operands=tuple(words),
        question=asked.format(_listed(rng, words)),
        worked=" ".join(f"{at} {word}" for at, word in enumerate(words, 1)),
        answer=str(len(words)),
    )


def sort_numbers(rng: Random) -> Task:
    """Two to five different numbers below 100 in rising order."""
    numbers = rng.sample(range(100), rng.randrange(2, 6))
    asked = rng.choice(("Sort: {}", "Sort {}", "Sort these numbers: {}", "Put in order: {}"))
    return Task(
        family="sort numbers",
        operands=tuple(numbers),
        question=asked.format(_listed(rng, numbers)),
        answer=", ".join(map(str, sorted(numbers))),
    )


def sort_words(rng: Random) -> Task:
    """Two to five different words by the alphabet."""
    words = rng.sample(WORDS, rng.randrange(2, 6))
    asked = rng.choice(("Sort: {}", "Sort {}", "Sort these words: {}", "Put in order: {}")).format(_listed(rng, words))
    return Task(family="sort words", operands=tuple(words), question=asked, answer=", ".join(sorted(words)))


def reverse(rng: Random) -> Task:
    """Two to six words, last one first."""
    words = rng.sample(WORDS, rng.randrange(2, 7))
    asked = rng.choice(("Reverse: {}", "Reverse {}", "Reverse this list: {}", "Write backwards: {}"))
    return Task(
        family="reverse",
        operands=tuple(words),
        question=asked.format(_listed(rng, words)),
        answer=", ".join(reversed(words)),
    )


def join(rng: Random) -> Task:
    """Two to four words with a sign between them."""
    words, sign = rng.sample(WORDS, rng.randrange(2, 5)), rng.choice("-_./+:")
    asked = rng.choice(("Join with {sign}: {}", "Put {sign} between: {}"))
    return Task(
        family="join",
        operands=(sign, *words),
        question=asked.format(_listed(rng, words), sign=sign),
        answer=sign.join(words),
    )


def capitals(rng: Random) -> Task:
    """Two or three words in capital letters."""
    words = " ".join(rng.sample(WORDS, rng.randrange(2, 4)))
    asked = rng.choice(("Write in capitals: {}", "Upper case: {}", "In capital letters: {}"))
    return Task(family="capitals", operands=(words,), question=asked.format(words), answer=words.upper())
