"""Questions with one right answer each, from a seed: what builtin:tiny learned from, and how `eval --tasks` counts.

Families are small functions over tables; a task is held out by its operands. No torch. Start reading at task.py.
"""

from __future__ import annotations

from buddymoe_ray.tasks.generate import FAMILIES, draw, held_out
from buddymoe_ray.tasks.task import Split, Task

__all__ = ["FAMILIES", "Split", "Task", "draw", "held_out"]
