"""Score an engine against the exact one on the same text, through the decode path that serves.

Two engines step side by side over the same windows; after each step their logits are compared and dropped, so memory
does not grow with the corpus. Tokens are forced by a chooser, nothing else differs from serving.

Legend: B sequences of a step, V vocabulary, W windows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from buddymoe_ray.cache.shared import FOLDER
from buddymoe_ray.config import EngineConfig
from buddymoe_ray.engine.engine import Engine
from buddymoe_ray.engine.sampler import Sampled
from buddymoe_ray.engine.sequence import Sequence as RunningSequence
from buddymoe_ray.errors import BudgetError, ConfigError
from buddymoe_ray.residency.sharing import Sharing
from buddymoe_ray.types import GenerationRequest, SamplingParams, TokenEvent

__all__ = ["PREFILLED", "WINDOW", "EvalResult", "Totals", "cut_windows", "evaluate_many"]

WINDOW = 256
PREFILLED = 64


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """One evaluation. `ppl*` per token, `*_percent`, `top1_agreement`, `*_rate`, `*_fraction` in per cent, `kl` in
    nats.

    `miss_rate` is of (token, slot) accesses in decode whose expert was not resident; `fetched_fraction` and
    `standin_fraction` of those misses. `dppl_se` is the standard error of `dppl_percent` (paired differences, clustered
    by window), `expected_rise` what the ledger charged per token (nats), `expected_by_kind` for whose answers
    (`lowbit3`), where that is known.
    """

    ppl_exact: float
    ppl: float
    dppl_percent: float
    dppl_se: float
    kl: float
    top1_agreement: float
    miss_rate: float
    fetched_fraction: float
    standin_fraction: float
    expected_rise: float
    tokens: int
    windows: int
    expected_by_kind: Mapping[str, float] = field(default_factory=dict)

    def as_record(self) -> dict[str, Any]:
        """For JSON."""
        return {name: value for name, value in asdict(self).items() if name != "expected_by_kind"}


def cut_windows(ids: Sequence[int], *, tokens: int | None) -> list[tuple[int, ...]]:
    """Windows of 256 tokens, enough for `tokens` scored ones (192 each). Raises ConfigError when too short."""
    wanted = math.inf if tokens is None else math.ceil(tokens / (WINDOW - PREFILLED))
    count = int(min(wanted, len(ids) // WINDOW))
    if count < 1:
        raise ConfigError(f"corpus is {len(ids)} tokens, must be at least {WINDOW}. hint: give more text")
    return [tuple(ids[at * WINDOW : (at + 1) * WINDOW]) for at in range(count)]


def evaluate_many(
    configs: Sequence[EngineConfig],
    windows: Sequence[tuple[int, ...]],
    *,
    batch: int = 32,
    movable: bool = False,
    progress: Callable[..., Iterable[int]] = lambda items, **_: items,
) -> list[EvalResult | BudgetError]:
    """Run `windows` through an engine of each config, all beside one exact engine, in step.

    `movable` keeps a stand-in for every expert, as a service with dynamic placement does, so that any may move; without
    what a service sets aside to compute for other nodes.
    The configs must share model, dtype and expert_dtype: the reference is theirs, fully resident, with dense weights as
    stored. A config whose memory cannot hold its stand-ins has its BudgetError in place of a result.
    """
    exact = configs[0].exactly(memory="100%", dense_dtype="native")
    totals = [Totals() for _ in configs]
    starts = range(0, len(windows), batch)
    with ExitStack() as stack:
        reference, seen_exact = stack.enter_context(_ForcedEngine(exact))
        refused: dict[int, BudgetError] = {}
        others: list[tuple[Engine, _Forced, Totals]] = []
        for at, config in enumerate(configs):
            sharing = None
            if movable:
                folder = Path(stack.enter_context(TemporaryDirectory(dir=FOLDER)))
                sharing = Sharing(workers=1, folder=folder, movable=True)
            try:
                engine, seen = stack.enter_context(_ForcedEngine(config, sharing))
                others.append((engine, seen, totals[at]))
            except BudgetError as error:
                refused[at] = error
        for start in progress(starts, total=len(starts), desc="eval"):
            group = {f"w{start + i}": window for i, window in enumerate(windows[start : start + batch])}
            for engine, seen in ((reference, seen_exact), *((engine, seen) for engine, seen, _ in others)):
                seen.begin(group, engine)
            while reference.has_work() or any(engine.has_work() for engine, _, _ in others):
                reference.step()
                expected = seen_exact.take()
                for engine, seen, total in others:
                    total.count(engine.step())
                    total.compare(expected, seen.take())
    return [refused.get(at) or total.result() for at, total in enumerate(totals)]


class _Forced:
    """A chooser that answers every step with the window's next token and keeps the step's logits."""

    def __init__(self) -> None:
        self._windows: dict[str, tuple[int, ...]] = {}
        self._steps: list[tuple[list[str], Tensor, Tensor]] = []

    def begin(self, windows: dict[str, tuple[int, ...]], engine: Engine) -> None:
        self._windows = windows
        sampling = SamplingParams(temperature=0.0, max_tokens=WINDOW - PREFILLED, ignore_eos=True)
        for name, window in windows.items():
            prompt = tuple(window[:PREFILLED])
            engine.add(GenerationRequest(request_id=name, prompt_token_ids=prompt, sampling=sampling))

    def choose(self, logits_BV: Tensor, sequences: Sequence[RunningSequence]) -> list[Sampled]:
        names = [seq.request_id for seq in sequences]
        targets = [self._windows[seq.request_id][PREFILLED + len(seq.output_ids)] for seq in sequences]
        self._steps.append((names, logits_BV.log_softmax(dim=-1).cpu(), torch.tensor(targets)))
        return [Sampled(token_id=target) for target in targets]

    def take(self) -> list[tuple[list[str], Tensor, Tensor]]:
        steps, self._steps = self._steps, []
        return steps


class _ForcedEngine:
    """Context manager: an engine whose chooser is forced."""

    def __init__(self, config: EngineConfig, sharing: Sharing | None = None) -> None:
        self._chooser = _Forced()
        # engines go in step: none may set a prompt aside by its own clock
        config = replace(config, prefill_chunk=config.prefill_chunk or 2 * WINDOW)
        self._engine = Engine.from_config(config, chooser=self._chooser, text=False, sharing=sharing)

    def __enter__(self) -> tuple[Engine, _Forced]:
        return self._engine, self._chooser

    def __exit__(self, *_: object) -> None:
        self._engine.close()


@dataclass(kw_only=True)
class Totals:
    """Sums over scored tokens."""

    nll_exact: float = 0.0
    nll: float = 0.0
    kl: float = 0.0
    agreed: int = 0
    tokens: int = 0
    hits: int = 0
    fetched: int = 0
    stood_in: int = 0
    expected_rise: float = 0.0
    expected_by_kind: dict[str, float] = field(default_factory=dict)
    rise_by_window: dict[str, float] = field(default_factory=dict)

    def count(self, events: Iterable[TokenEvent]) -> None:
        for event in events:
            assert event.error is None, f"{event.request_id} failed: {event.error}"
            if event.usage is not None:
                self.hits += event.usage.hits
                self.fetched += event.usage.fetched + event.usage.host
                self.stood_in += event.usage.standins.total
                self.expected_rise += event.usage.expected_rise

    def compare(
        self, exact: list[tuple[list[str], Tensor, Tensor]], ours: list[tuple[list[str], Tensor, Tensor]]
    ) -> None:
        assert [s[0] for s in exact] == [s[0] for s in ours], "the two engines scheduled different sequences"
        for (names, exact_BV, target_B), (_, ours_BV, _) in zip(exact, ours, strict=True):
            nll_exact_B = -exact_BV.gather(1, target_B[:, None])[:, 0].double()
            nll_B = -ours_BV.gather(1, target_B[:, None])[:, 0].double()
            self.nll_exact += float(nll_exact_B.sum())
            self.nll += float(nll_B.sum())
            p_BV = exact_BV.exp()
            self.kl += float((p_BV * (exact_BV - ours_BV)).masked_fill(p_BV == 0.0, 0.0).double().sum())
            self.agreed += int((exact_BV.argmax(dim=1) == ours_BV.argmax(dim=1)).sum())
            self.tokens += len(names)
            for name, rise in zip(names, (nll_B - nll_exact_B).tolist(), strict=True):
                self.rise_by_window[name] = self.rise_by_window.get(name, 0.0) + rise

    def result(self) -> EvalResult:
        count, rises = self.tokens, torch.tensor(list(self.rise_by_window.values()), dtype=torch.float64)
        mean = float(rises.sum()) / count
        spread = float(((rises - rises.mean()) ** 2).sum())
        clusters = len(rises)
        error = math.sqrt(spread * clusters / max(1, clusters - 1)) / count
        misses = self.fetched + self.stood_in
        accesses = self.hits + misses
        return EvalResult(
            ppl_exact=math.exp(self.nll_exact / count),
            ppl=math.exp(self.nll / count),
            dppl_percent=100 * math.expm1(mean),
            dppl_se=100 * math.exp(mean) * error,
            kl=self.kl / count,
            top1_agreement=100 * self.agreed / count,
            miss_rate=100 * misses / accesses if accesses else 0.0,
            fetched_fraction=100 * self.fetched / misses if misses else 0.0,
            standin_fraction=100 * self.stood_in / misses if misses else 0.0,
            expected_rise=self.expected_rise / count,
            expected_by_kind={kind: loss / count for kind, loss in self.expected_by_kind.items()},
            tokens=count,
            windows=clusters,
        )
