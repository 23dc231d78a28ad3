"""How many tasks a model answers right, beside the exact engine: greedy, all at once, through the engine that serves.

The fully resident exact engine answers first; a difference is of the same tasks, so its error is a paired one. Knows
nothing of how tasks are made.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from buddymoe_ray.config import EngineConfig
from buddymoe_ray.engine.chat import encode_chat
from buddymoe_ray.engine.llm import LLM
from buddymoe_ray.errors import BudgetError
from buddymoe_ray.tasks import Task

__all__ = ["Accuracy", "TaskResult", "evaluate_tasks"]

_ANSWER_TOKENS = 96  # the longest right answer has 70 tokens


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Right answers in per cent; `difference` in points to the exact engine's, and its standard error, paired."""

    tasks: int
    accuracy: float
    accuracy_exact: float
    difference: float
    difference_se: float

    @classmethod
    def of(cls, right: Sequence[bool], right_exact: Sequence[bool]) -> Accuracy:
        """From the same tasks' marks, in the same order."""
        count = len(right)
        changes = [int(ours) - int(exact) for ours, exact in zip(right, right_exact, strict=True)]
        mean = sum(changes) / count
        variance = sum((change - mean) ** 2 for change in changes) / max(1, count - 1)
        return cls(
            tasks=count,
            accuracy=100 * sum(right) / count,
            accuracy_exact=100 * sum(right_exact) / count,
            difference=100 * mean,
            difference_se=100 * math.sqrt(variance / count),
        )


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """One engine's accuracy, in all and by family; `miss_rate` and `fetched_fraction` in per cent, of decode."""

    total: Accuracy
    families: dict[str, Accuracy]
    miss_rate: float
    fetched_fraction: float

    def as_record(self) -> dict[str, Any]:
        """For JSON."""
        used = {"miss_rate": self.miss_rate, "fetched_fraction": self.fetched_fraction}
        return asdict(self.total) | used | {"by_task": {name: asdict(found) for name, found in self.families.items()}}


def evaluate_tasks(configs: Sequence[EngineConfig], tasks: Sequence[Task]) -> list[TaskResult | BudgetError]:
    """Let an engine of each config answer `tasks`, after the exact one.

    The configs share model, dtype and expert_dtype. One whose memory cannot hold its stand-ins has its BudgetError in
    place of a result. Raises RequestError where the model has no chat template.
    """
    expected = _Marks.of(configs[0].exactly(memory="100%", dense_dtype="native"), tasks)
    results: list[TaskResult | BudgetError] = []
    for config in configs:
        try:
            results.append(_Marks.of(config, tasks).beside(expected, tasks))
        except BudgetError as error:
            results.append(error)
    return results


@dataclass(frozen=True, kw_only=True)
class _Marks:
    """Which tasks an engine answered right, and what it missed and fetched."""

    right: list[bool]
    hits: int
    fetched: int
    stood_in: int

    @classmethod
    def of(cls, config: EngineConfig, tasks: Sequence[Task]) -> _Marks:
        with LLM(**asdict(config)) as llm:
            prompts = [encode_chat(llm.tokenizer, task.messages) for task in tasks]
            results = llm.generate(prompts, max_tokens=_ANSWER_TOKENS)
        used = [result.usage for result in results]
        return cls(
            right=[task.is_right(result.text) for task, result in zip(tasks, results, strict=True)],
            hits=sum(usage.hits for usage in used),
            fetched=sum(usage.fetched + usage.host for usage in used),
            stood_in=sum(usage.standins.total for usage in used),
        )

    def beside(self, exact: _Marks, tasks: Sequence[Task]) -> TaskResult:
        marks: dict[str, tuple[list[bool], list[bool]]] = {}
        for task, right, right_exact in zip(tasks, self.right, exact.right, strict=True):
            ours, theirs = marks.setdefault(task.family, ([], []))
            ours.append(right)
            theirs.append(right_exact)
        misses = self.fetched + self.stood_in
        return TaskResult(
            total=Accuracy.of(self.right, exact.right),
            families={family: Accuracy.of(*both) for family, both in marks.items()},
            miss_rate=100 * misses / max(1, self.hits + misses),
            fetched_fraction=100 * self.fetched / max(1, misses),
        )
