"""Generated tasks: answers are right, splits never meet whatever the seed or phrasing, and marks are paired."""

from __future__ import annotations

import ast
import datetime
import itertools
import json
import operator
import re
from dataclasses import replace
from random import Random

import pytest

from buddymoe_ray.cli import main
from buddymoe_ray.config import EngineConfig
from buddymoe_ray.engine.accuracy import Accuracy, TaskResult, evaluate_tasks
from buddymoe_ray.tasks import FAMILIES, Task, draw, held_out
from buddymoe_ray.tasks.words import CAPITALS, DAYS, MONTHS, UNITS

OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


def drawn(family: str, count: int = 200) -> list[Task]:
    rng = Random(5)
    return [draw(rng, family, "train") for _ in range(count)]


def computed(term: str) -> int:
    first, *rest = re.split(r"([-+*])", term)
    value = int(first)
    for sign, number in zip(rest[::2], rest[1::2], strict=True):
        value = OPERATIONS[sign](value, int(number))
    return value


@pytest.mark.parametrize("family", FAMILIES)
def test_splits_do_not_meet_and_no_phrasing_moves_a_task(family: str) -> None:
    train = {task.operands for seed in range(3) for task in drawn(family, 300)}
    held = {draw(Random(seed), family, "heldout").operands for seed in range(100)}
    assert held and train and not held & train
    for task in drawn(family, 20):
        assert task.family == family and task.split == "train"
        assert replace(task, question="Said otherwise: " + task.question, answer="?").split == "train"


def test_held_out_tasks_are_different_balanced_and_always_the_same() -> None:
    tasks = list(held_out(510))
    assert tasks == list(held_out(510)) and tasks[:100] == list(held_out(100))
    assert tasks != list(held_out(510, seed=1))
    assert len({(task.family, task.operands) for task in tasks}) == len(tasks) == 510
    assert {task.split for task in tasks} == {"heldout"}
    assert {task.family for task in tasks} == set(FAMILIES)
    few = [task for task in held_out(4000) if task.family == "calendar"]
    assert 20 < len(few) < 60, "a small family ends, the others go on"


@pytest.mark.parametrize("family", ["add", "subtract", "multiply"])
def test_arithmetic_is_right_column_by_column(family: str) -> None:
    for task in drawn(family):
        numbers = [int(number) for number in re.findall(r"\d+", task.question)]
        a, b = reversed(numbers) if task.question.startswith("Take") else numbers
        sign = {"add": "+", "subtract": "-", "multiply": "*"}[family]
        assert (a, b) == task.operands and int(task.answer) == OPERATIONS[sign](a, b) >= 0
        digits = ""
        for column in task.worked.split():
            terms = column.split("=")  # of products: 6*7=42+2=44, the carry added to what stands before it
            for before, after in itertools.pairwise(terms):
                assert computed(before) == int(after.partition("+")[0]), task
            digits = terms[-1][-1] + digits
        assert task.answer.endswith(digits.lstrip("0") or "0")


def test_lists_units_and_dates_are_right() -> None:
    for task in drawn("count"):
        assert task.worked.split()[-2:] == [task.answer, task.operands[-1]] and int(task.answer) == len(task.operands)
    for family in ("sort numbers", "sort words"):
        for task in drawn(family):
            assert task.answer == ", ".join(map(str, sorted(task.operands, key=lambda item: item)))  # type: ignore[type-var]
    for task in drawn("reverse"):
        assert task.answer.split(", ") == list(reversed(task.operands))
    for task in drawn("join"):
        assert tuple(task.answer.split(str(task.operands[0]))) == task.operands[1:]
    factors = {(large, small): factor for large, small, factor in UNITS}
    for task in drawn("convert"):
        (given, unit), (said, other) = re.findall(r"(\d+) ([a-z]+)", task.question)[0], task.answer.split()
        pair = (unit, other) if (unit, other) in factors else (other, unit)
        assert max(int(given), int(said)) == factors[pair] * min(int(given), int(said))
    for task in drawn("dates"):
        written = max(task.question, task.answer, key=lambda text: bool(re.search(r"\d-\d", text)))
        iso = re.search(r"\d{4}-\d\d-\d\d", written)
        assert iso and datetime.date.fromisoformat(iso[0]) == datetime.date(*task.operands)  # type: ignore[arg-type]
        assert MONTHS[int(task.operands[1]) - 1] in task.question + task.answer
    for task in drawn("calendar"):
        start, steps, way = task.operands
        names = DAYS if start in DAYS else MONTHS
        assert task.answer == names[(names.index(start) + int(steps) * int(way)) % len(names)]  # type: ignore[arg-type]
        assert ("after" if way == 1 else "before") in task.question


def test_facts_fields_calls_and_functions_are_right() -> None:
    for task in drawn("facts"):
        said = task.question + " " + task.answer
        asked = [country for country in CAPITALS if country in said]
        assert asked and all(CAPITALS[country] in said for country in asked)
    for task in drawn("extract"):
        assert tuple(json.loads(task.answer).values()) == task.operands
    for task in drawn("tools"):
        call = json.loads(task.answer.removeprefix("<tool_call>\n").removesuffix("\n</tool_call>"))
        assert call["name"] in task.system and call["arguments"]["city"] in task.question
        assert [message["role"] for message in task.messages] == ["system", "user"]
    for task in drawn("functions", 50):
        (function,) = ast.parse(task.answer.removeprefix("```python\n").removesuffix("\n```")).body
        assert isinstance(function, ast.FunctionDef) and ast.get_docstring(function) in task.question
        assert f"`{function.name}({function.args.args[0].arg})`" in task.question


def test_a_mark_is_exact_and_of_worked_answers_the_last_line_counts() -> None:
    plain = Task(family="f", operands=(1,), question="?", answer="a\nb")
    assert plain.is_right(" a\nb\n") and not plain.is_right("b") and not plain.is_right("A\nb")
    worked = replace(plain, answer="12", worked="2+0=2 1=1")
    assert worked.is_right(worked.taught) and worked.is_right("12") and worked.is_right("wrong\n12 ")
    assert not worked.is_right("12\nwrong") and not worked.is_right("112")


def test_the_difference_is_paired() -> None:
    """Of four tasks one is lost and none won: the error is that of the differences (0, 0, 0, -1)."""
    found = Accuracy.of([True, False, False, True], [True, False, True, True])
    assert (found.accuracy, found.accuracy_exact, found.difference) == (50.0, 75.0, -25.0)
    assert found.difference_se == pytest.approx(25.0)
    same = Accuracy.of([True, False], [True, False])
    assert same.difference == same.difference_se == 0.0


def test_exact_answers_at_a_quarter_are_those_of_the_resident_model() -> None:
    tasks = list(held_out(2 * len(FAMILIES)))
    config = EngineConfig(memory="25%", guard_share=0.0, max_running=17)
    (result,) = evaluate_tasks([config], tasks)
    assert isinstance(result, TaskResult) and result.total.tasks == len(tasks)
    assert result.total.difference == result.total.difference_se == 0.0
    assert result.total.accuracy > 75, "the shipped model answers"
    assert set(result.families) == set(FAMILIES)
    assert result.miss_rate > 0 and result.fetched_fraction == 100


def test_eval_prints_tasks_as_a_record_and_as_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["eval", "--tasks", "17", "--mode", "fast", "--batch", "17"]
    assert main([*arguments, "--json"]) == 0
    (record,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert record["tasks"] == 17 and record["mode"] == "fast" and set(record["by_task"]) == set(FAMILIES)
    assert record["difference"] == pytest.approx(record["accuracy"] - record["accuracy_exact"])
    assert main([*arguments, "--memory", "50%,1%"]) == 1
    said = capsys.readouterr().out
    assert "sort numbers" in said and "exact %" in said and said.count("mode fast") == 1 and "memory 1%: " in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "0"], "--tasks is 0, must be at least 1"),
        (["--tasks", "--tokens", "9"], "must go with --corpus"),
        (["--tasks", "--placement", "dynamic"], "must go with --corpus"),
        (["--tasks", "--corpus", "x"], "not allowed with"),
        ([], "one of the arguments --corpus --tasks is required"),
    ],
)
def test_options_that_do_not_fit_tasks_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = main(["eval", *arguments])
    except SystemExit as stop:
        status = int(stop.code or 0)
    assert status != 0 and message in capsys.readouterr().err
