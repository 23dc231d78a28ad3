"""Runs variants of one engine over held-out windows beside the exact engine, as many at once as memory allows.

Knows sizes, not what variants mean. What does not fit in this machine beside the fully resident reference is left out,
and said. Neighbour: expected_loss.py asks for variants and reads the results.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from buddymoe_ray.config import EngineConfig, parse_memory
from buddymoe_ray.engine.evaluate import WINDOW, EvalResult, evaluate_many
from buddymoe_ray.errors import BudgetError
from buddymoe_ray.residency.machine import available_memory_bytes, pick_device

__all__ = ["Bench", "Footprint"]

log = logging.getLogger(__name__)

_ENGINES_AT_ONCE = 16
_USABLE = 0.8
_ENGINE_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes of a model in memory: all routed experts, and everything else of one engine."""

    experts: int
    dense: int


class Bench:
    """Engines of `config` with the profile at `path`, in mode `fast` unless a variant says otherwise.

    `hosted` says whether there is memory for experts behind each engine; else what is fetched comes from the disk.
    """

    def __init__(
        self,
        config: EngineConfig,
        path: Path,
        windows: Sequence[tuple[int, ...]],
        footprint: Footprint,
        progress: Callable[..., Iterable[Any]],
        *,
        free: int | None = None,
    ) -> None:
        self.path, self.windows, self._footprint, self._progress = path, windows, footprint, progress
        reference = footprint.experts + footprint.dense + _ENGINE_BYTES
        self._room = int(_USABLE * (_free_bytes(config.device) if free is None else free)) - reference
        self.hosted = self._room >= 2 * reference
        self._config = replace(
            config,
            mode="fast",
            policy="ladder",
            standin_layers=None,
            profile=str(path),
            host_memory="100%" if self.hosted else "0",
            max_model_len=WINDOW,
            guard_share=0.0,
        )

    def run(self, variants: Sequence[Mapping[str, Any]], what: str, *, every: int = 1) -> list[EvalResult | None]:
        """A result per variant (changes of the config), None where memory cannot hold it.

        `every` takes one of so many windows.
        """
        windows = self.windows[::every]
        configs = [replace(self._config, max_running=min(64, len(windows)), **variant) for variant in variants]
        found: dict[int, EvalResult | None] = dict.fromkeys(range(len(configs)))
        groups = self._groups(configs)
        for group in self._progress(groups, total=len(groups), desc=what):
            results = evaluate_many([configs[at] for at in group], windows, batch=min(64, len(windows)))
            for at, result in zip(group, results, strict=True):
                found[at] = None if isinstance(result, BudgetError) else result
        return [found[at] for at in range(len(configs))]

    def _groups(self, configs: Sequence[EngineConfig]) -> list[list[int]]:
        """Which to run side by side; those too large for what is left beside the reference are in none."""
        groups: list[list[int]] = []
        held = 0
        for at, config in enumerate(configs):
            need = self._bytes(config)
            if need > self._room:
                log.warning(
                    "%s at %s takes %.1f GB beside the exact engine, %.1f are left: not measured. "
                    "hint: calibrate on a machine with more memory, or measure at less with --at",
                    *(config.standin, config.memory, need / 1e9, max(0, self._room) / 1e9),
                )
                continue
            if not groups or held + need > self._room or len(groups[-1]) == _ENGINES_AT_ONCE:
                groups.append([])
                held = 0
            groups[-1].append(at)
            held += need
        return groups

    def _bytes(self, config: EngineConfig) -> int:
        experts = self._footprint.experts
        held = parse_memory(config.memory, total_expert_bytes=experts) + (experts if self.hosted else 0)
        return held + self._footprint.dense + _ENGINE_BYTES


def _free_bytes(name: str) -> int:
    device = pick_device(name)
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else available_memory_bytes()
