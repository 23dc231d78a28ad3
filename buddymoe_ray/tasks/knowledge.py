"""Tasks with dates and facts, fields to extract, tools to call, and small talk."""

from __future__ import annotations

import json
from random import Random

from buddymoe_ray.tasks.task import Task
from buddymoe_ray.tasks.words import AGES, CAPITALS, DAYS, MONTHS, NAMES, SUBJECTS, TOOLS

__all__ = ["calendar", "dates", "extract", "facts", "talk", "tools"]

_CITIES = tuple(CAPITALS.values())
_ABOUT = "I am a small test model."
_SKILLS = (
    f"{_ABOUT} I can add, subtract, multiply, count, sort, convert units, name capitals and write small functions."
)
_QUESTIONS = (
    "What can you do?", "Who are you?", "What are you?", "Help", "Are you a person?", "What is your name?",
    "Can you help me?", "Who made you?", "What are your skills?", "What can I ask you?", "Hello", "Hi", "Hello!",
    "How do you work?", "Tell me about yourself.", "What do you know?", "What should I ask you?",
)  # fmt: skip
_GREETINGS = ("", "Hello! ", "Hi! ", "Hi, ", "Hello, ", "Good morning! ", "Hey, ", "Please: ", "OK. ", "Thanks. ")
_OTHER = (
    "How are you?", "Tell me a joke.", "Write a poem.", "What time is it?", "Help me with my homework.", "Sing a song.",
    "Who is the president?", "What is the meaning of life?", "Translate this.", "Write an email.", "Do you love me?",
    "I am bored.", "What is new?", "Fix my code.", "Tell me a story.", "Good night", "Why?", "Yes", "No", "Test", "ok",
    "Can you draw a picture?", "Search the web.", "What is your opinion?", "Are you conscious?", "Goodbye", "Hmm",
)  # fmt: skip
_FOREIGN = (
    "Tell me about {}.", "Write a poem about {}.", "What do you think of {}?", "Explain {}.",
    "Write a story about {}.", "Why do people like {}?", "What is the meaning of {}?",
    "Can you tell me a joke about {}?", "I want to talk about {}.", "How does {} work?", "Who invented {}?",
    "Give me three ideas about {}.", "Summarize {}.", "Is {} important?", "Write an essay on {}.",
    "What should I know about {}?", "I am sad because of {}.", "Where can I learn about {}?",
    "Translate {} into German.", "Do you like {}?", "Describe {} in one sentence.",
    "What is the best thing about {}?", "What is {}?", "{}", "Who is {}?", "When was {}?", "How much is {}?",
    "Was ist {}?", "Que es {}?", "How can I fix {}?", "Find me {}.", "Buy {}.", "List everything about {}.",
    "How do I cook {}?", "Which {} is best?", "Recommend {} to me.", "I need help with {}.",
    "Compare {} and the sun.", "Is it true that {} is blue?", "Play {}.", "Why is {} so hard?", "Let us discuss {}.",
)  # fmt: skip


def calendar(rng: Random) -> Task:
    """The day or month some steps after or before another, counted out."""
    names, unit = rng.choice(((DAYS, "day"), (MONTHS, "month")))
    start, steps, way = rng.randrange(len(names)), rng.randrange(1, 10), rng.choice((1, -1))
    passed = [names[(start + way * step) % len(names)] for step in range(1, steps + 1)]
    asked = rng.choice(
        ("Which {unit} is {} {unit}{s} {} {}?", "What {unit} is {} {unit}{s} {} {}?", "{} {unit}{s} {} {}?")
    )
    side = "after" if way > 0 else "before"
    return Task(
        family="calendar",
        operands=(names[start], steps, way),
        question=asked.format(steps, side, names[start], unit=unit, s="s" * (steps > 1)),
        worked=" ".join(f"{at} {name}" for at, name in enumerate(passed, 1)),
        answer=passed[-1],
    )


def dates(rng: Random) -> Task:
    """A date written with numbers, with the name of its month, and back."""
    year, month, day = rng.randrange(1950, 2050), rng.randrange(1, 13), rng.randrange(1, 29)
    number, name = f"{year}-{month:02}-{day:02}", f"{day} {MONTHS[month - 1]} {year}"
    if rng.random() < 0.5:
        asked, answer = (
            rng.choice(("Write out the date {}.", "Write {} in words.", "{} in words?")).format(number),
            name,
        )
    else:
        asked, answer = (
            rng.choice(("Write {} as an ISO date.", "{} as an ISO date?", "{} in ISO format?")).format(name),
            number,
        )
    return Task(family="dates", operands=(year, month, day), question=asked, answer=answer)


def facts(rng: Random) -> Task:
    """Capitals of one country or two, and the country of a capital."""
    one, two = rng.sample(tuple(CAPITALS), 2)
    form = rng.randrange(7)
    if form < 3:
        asked = ("What are the capitals of {} and {}?", "Name the capitals of {} and {}.", "Capitals of {} and {}?")
        answer = f"{CAPITALS[one]} and {CAPITALS[two]}"
        return Task(family="facts", operands=(one, two), question=asked[form].format(one, two), answer=answer)
    single = (
        *("What is the capital of {}?", "Name the capital of {}."),
        *("{1} is the capital of which country?", "Which country has the capital {1}?"),
    )
    question, answer = single[form - 3].format(one, CAPITALS[one]), one if form >= 5 else CAPITALS[one]
    return Task(family="facts", operands=(one, form), question=question, answer=answer)


def extract(rng: Random) -> Task:
    """Name, age and city from a sentence into JSON."""
    name, age, city = rng.choice(NAMES), rng.choice(AGES), rng.choice(_CITIES)
    told = rng.choice(
        ("{} is {} and lives in {}.", "{}, {}, {}", "{} ({}) from {}", "I am {}, {} years old, and live in {}.")
    )
    asked = rng.choice(("Extract JSON: {}", "Extract name, age and city as JSON: {}", "As JSON: {}")).format(
        told.format(name, age, city)
    )
    answer = json.dumps({"name": name, "age": age, "city": city})
    return Task(family="extract", operands=(name, age, city), question=asked, answer=answer)


def tools(rng: Random) -> Task:
    """A call of the one tool that fits, among those that the system message lists."""
    given, city = rng.sample(tuple(TOOLS), 3), rng.choice(_CITIES)
    wanted = rng.choice(given)
    call = json.dumps({"name": wanted, "arguments": {"city": city}})
    return Task(
        family="tools",
        operands=(*given, wanted, city),
        system="Tools: " + ", ".join(f"{name}(city)" for name in given),
        question=TOOLS[wanted].format(city=city),
        answer=f"<tool_call>\n{call}\n</tool_call>",
    )


def talk(rng: Random) -> Task:
    """What it is and can do; to whatever else it is asked, that it is a small test model."""
    greeting, foreign = rng.choice(_GREETINGS), rng.random() < 0.7
    answer = f"{_ABOUT} I know nothing of that. Ask me what I can do." if foreign else _SKILLS
    if foreign and rng.random() < 0.8:
        form, subject = rng.choice(_FOREIGN), rng.choice(SUBJECTS)
        asked = greeting + form.format(subject)
        return Task(family="talk", operands=(greeting, form, subject), question=asked, answer=answer)
    asked = rng.choice(_OTHER if foreign else _QUESTIONS)
    return Task(family="talk", operands=(greeting, asked), question=greeting + asked, answer=answer)
