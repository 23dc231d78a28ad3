"""Runs variants of one engine over held-out windows beside the exact engine: those of mode `fast` in one sweep over
each window, others step by step, as many at once as memory allows.

Knows sizes, not what variants mean. What does not fit in this machine beside the fully resident reference is left out,
and said. Neighbour: expected_loss.py asks for variants and reads the results.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from buddymoe_ray.config import EngineConfig, parse_memory
from buddymoe_ray.device import open_device
from buddymoe_ray.engine.evaluate import WINDOW, EvalResult, evaluate_many
from buddymoe_ray.engine.parts import EngineParts
from buddymoe_ray.engine.sweep import Sweep
from buddymoe_ray.errors import BudgetError
from buddymoe_ray.residency.machine import available_memory_bytes

__all__ = ["Bench", "Footprint"]

log = logging.getLogger(__name__)

_ENGINES_AT_ONCE = 16
_USABLE = 0.8
_ENGINE_BYTES = 64 << 20
_SMALL_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes of a model in memory: all routed experts, and everything else of one engine."""

    experts: int
    dense: int

    @property
    def small(self) -> bool:
        """Whether everything that can be measured is: that takes minutes."""
        return self.experts <= _SMALL_BYTES


class Bench:
    """Engines of `config` with the profile at `path`, in mode `fast` unless a variant says otherwise.

    `parts` of an open exact engine of `config` sweep, as long as it is open. `hosted` says whether layers can be had by
    themselves: there is memory for experts behind each engine, or a sweep; else what is fetched comes from the disk.
    """

    def __init__(
        self,
        config: EngineConfig,
        path: Path,
        windows: Sequence[tuple[int, ...]],
        footprint: Footprint,
        progress: Callable[..., Iterable[Any]],
        *,
        parts: EngineParts | None = None,
        free: int | None = None,
    ) -> None:
        self.path, self.windows, self._footprint, self._progress = path, windows, footprint, progress
        reference = footprint.experts + footprint.dense + _ENGINE_BYTES
        usable = int(_USABLE * (_free_bytes(config.device) if free is None else free))
        self._room = usable - reference
        self._sweep = None if parts is None else Sweep(parts, usable)
        hosted = self._room >= 2 * reference
        self.hosted = hosted or parts is not None
        self._config = replace(
            config,
            mode="fast",
            policy="ladder",
            standin_layers=None,
            profile=str(path),
            host_memory="100%" if hosted else "0",
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
        swept = [] if self._sweep is None else [at for at, config in enumerate(configs) if Sweep.covers(config)]
        if self._sweep is not None and swept:
            results = self._sweep.run([configs[at] for at in swept], windows, progress=self._progress, what=what)
            found |= {at: _fitting(result) for at, result in zip(swept, results, strict=True)}
        groups = self._groups({at: config for at, config in enumerate(configs) if at not in set(swept)})
        for group in self._progress(groups, total=len(groups), desc=what):
            results = evaluate_many([configs[at] for at in group], windows, batch=min(64, len(windows)))
            for at, result in zip(group, results, strict=True):
                found[at] = _fitting(result)
        return [found[at] for at in range(len(configs))]

    def _groups(self, configs: Mapping[int, EngineConfig]) -> list[list[int]]:
        """Which to run side by side; those too large for what is left beside the reference are in none."""
        groups: list[list[int]] = []
        held = 0
        for at, config in configs.items():
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


def _fitting(result: EvalResult | BudgetError) -> EvalResult | None:
    return None if isinstance(result, BudgetError) else result


def _free_bytes(name: str) -> int:
    own = open_device(name).free_bytes()
    return available_memory_bytes() if own is None else own
