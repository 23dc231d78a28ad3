"""The calibration from corpus to profile: trace, tables, records, measured expected losses, recommendation.

Calls the other files of this package in order and knows nothing they do not. What was made is written as it is made, so
an interrupted run goes on at the layer where it stopped.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from buddymoe_ray.calibrate.bench import Bench, Footprint
from buddymoe_ray.calibrate.expected_loss import LossOptions, measure_budgets, measure_losses
from buddymoe_ray.calibrate.fitting import Fitting
from buddymoe_ray.calibrate.layers import LayerTables, make_layers
from buddymoe_ray.calibrate.pace import scored_tokens, traced_tokens
from buddymoe_ray.calibrate.tables import make_tables
from buddymoe_ray.calibrate.trace import record_trace
from buddymoe_ray.config import BUDDIES, LOWBIT, RECORD_KINDS, EngineConfig, why_unwritable
from buddymoe_ray.engine.build import build_parts
from buddymoe_ray.engine.evaluate import WINDOW, cut_windows
from buddymoe_ray.engine.parts import EngineParts
from buddymoe_ray.errors import ConfigError, ProfileError
from buddymoe_ray.models.fingerprint import model_hash
from buddymoe_ray.models.profile import NAME, Profile, save_profile
from buddymoe_ray.models.resolve import resolve_model
from buddymoe_ray.models.router_hook import find_routers
from buddymoe_ray.models.standin_files import standins_folder
from buddymoe_ray.residency.calibrations import SELF_MADE

__all__ = ["KINDS", "CalibrationOptions", "calibrate"]

log = logging.getLogger(__name__)

KINDS = (*RECORD_KINDS, "buddy")
_HELD_SHARE, _LEAST_HELD = 0.15, 4
_LEAST_TRACED = 4

Progress = Callable[..., Iterable[Any]]


@dataclass(frozen=True, kw_only=True)
class CalibrationOptions:
    """What to calibrate.

    Args:
        config: the exact engine that runs the corpus; its memory budget holds.
        ids: the corpus as token ids.
        out: the profile to write; records go beside it.
        kinds: stand-ins to make and measure (`KINDS`); `buddy` measures every pair of experts. None is all of them, of
            large models only low-bit copies: no other has been worth its time.
        tokens: most tokens traced; None is as many as say enough (pace.py).
        window: tokens of a traced window; None is 512 or the model's limit.
        compensated: error-compensated rounding of all experts; plain is many times faster. None compensates the worst
            experts first, for `rounding_minutes`.
        rank: of low-rank maps.
        quick: leave out what needs the model to run with stand-ins: the profile then serves `fast` only.
        losses: at which memories and budgets, and on how many held-out tokens, stand-ins are measured.
        free: bytes that may be taken for measurements; None is what this machine has.
    """

    config: EngineConfig
    ids: Sequence[int]
    out: Path
    kinds: tuple[str, ...] | None = None
    tokens: int | None = None
    window: int | None = None
    compensated: bool | None = None
    rounding_minutes: float = 30.0
    rank: int = 8
    quick: bool = False
    losses: LossOptions = field(default_factory=LossOptions)
    free: int | None = None

    def __post_init__(self) -> None:
        kinds = KINDS if self.kinds is None else self.kinds
        if set(kinds) - set(KINDS) or not kinds:
            raise ConfigError(f"kinds are {list(kinds)}, must be of {', '.join(KINDS)}. hint: leave --kinds out")
        if min(1 if self.tokens is None else self.tokens, self.rank) < 1:
            raise ConfigError(
                f"tokens and rank are {self.tokens} and {self.rank}, must be at least 1. hint: leave them out"
            )
        if not self.rounding_minutes >= 0:
            raise ConfigError(f"rounding_minutes is {self.rounding_minutes}, must be at least 0. hint: leave it out")
        if self.window is not None and self.window < 2:
            raise ConfigError(f"window is {self.window}, must be at least 2. hint: leave --window out")
        for name in ("expert_dtype", "dense_dtype"):
            if getattr(self.config, name) != "native":
                raise ConfigError(
                    f"{name} is {getattr(self.config, name)}, must be native to calibrate. "
                    "hint: one profile serves weights of every dtype"
                )


def calibrate(options: CalibrationOptions, *, progress: Progress = lambda items, **_: items) -> Profile:
    """Run it all; the profile is written to `options.out` and returned.

    Raises:
        ProfileError: the corpus is too small, the model is not usable for it, or nothing can be written.
    """
    folder = resolve_model(options.config.model)
    _check_writable(options.out)
    config = options.config.exactly(guard_share=0.0)
    parts = build_parts(config, text=False)
    try:
        _check_ids(options.ids, parts.vocab_size)
        if not options.quick and parts.limits.max_model_len < WINDOW:
            raise ProfileError(
                f"model takes {parts.limits.max_model_len} tokens, must take {WINDOW} to measure expected losses. "
                "hint: --quick makes a profile for mode fast"
            )
        footprint = _footprint(parts)
        options = replace(options, kinds=options.kinds or (KINDS if footprint.small else SELF_MADE))
        tokens = options.tokens or traced_tokens(parts)
        traced, held = _split_corpus(options, parts.limits.max_model_len, tokens)
        profile = _profile(options, parts, model_hash(folder), traced, progress)
        save_profile(profile, options.out)
        if not options.quick:
            windows = cut_windows(held, tokens=options.losses.tokens or scored_tokens(parts))
            sweep = Bench(options.config, options.out, windows, footprint, progress, parts=parts, free=options.free)
            profile = measure_losses(profile, sweep, options.losses.standins or _standins(options), options.losses)
    finally:
        parts.experts.cache.close()
    if not options.quick and _wants_budgets(options, footprint):
        bench = Bench(options.config, options.out, windows, footprint, progress)
        profile = measure_budgets(profile, bench, options.losses)
    return profile


def _profile(
    options: CalibrationOptions,
    parts: EngineParts,
    fingerprint: str,
    windows: list[tuple[int, ...]],
    progress: Progress,
) -> Profile:
    layout, loaded = parts.experts.cache.layout, parts.loaded
    routers = find_routers(loaded.model, loaded.experts, layout.experts_per_layer)
    with record_trace(parts, windows, options.out.parent, progress=progress) as trace:
        tables = make_tables(trace, max(layout.experts_per_layer), routers)
        layers = make_layers(
            parts,
            trace,
            kinds=options.kinds or (),
            folder=standins_folder(options.out),
            model_hash=fingerprint,
            fitting=Fitting(
                compensated=bool(options.compensated or (options.compensated is None and options.rounding_minutes)),
                minutes=math.inf if options.compensated else options.rounding_minutes,
                rank=options.rank,
                fitted_on=_digest(windows)[:16],
            ),
            progress=progress,
        )
        tokens = trace.tokens
    return _assemble(options, parts, fingerprint, tables, layers, tokens)


def _assemble(
    options: CalibrationOptions, parts: EngineParts, fingerprint: str, tables: Any, layers: LayerTables, tokens: int
) -> Profile:
    from buddymoe_ray import __version__

    count = len(parts.experts.cache.layout.experts_per_layer)
    return Profile(
        model_hash=fingerprint,
        model=options.config.model,
        corpus_sha=_digest(options.ids),
        created_by=f"buddymoe_ray {__version__}",
        calibration_tokens=tokens,
        layers=count,
        experts=max(parts.experts.cache.layout.experts_per_layer),
        top_k=parts.loaded.experts_per_token,
        norm_topk=bool(getattr(parts.loaded.config, "norm_topk_prob", parts.loaded.family.model_type == "mixtral")),
        **vars(tables),
        **(vars(layers) | {"errors": {**layers.errors, "drop": layers.energy_LE}}),
        sensitivity_L=np.full(count, np.nan, dtype=np.float32),
        kind_scale={},
        reason="made with --quick: expected losses were not measured" if options.quick else "not measured yet",
    )


def _footprint(parts: EngineParts) -> Footprint:
    dense = sum(p.numel() * p.element_size() for p in parts.loaded.model.parameters() if not p.is_meta)
    return Footprint(experts=parts.experts.cache.layout.total_bytes, dense=dense)


def _wants_budgets(options: CalibrationOptions, footprint: Footprint) -> bool:
    """Whether to measure the budget curve: where asked for, or where engines that go step by step take no hour."""
    budgets = options.losses.budgets
    wanted = footprint.small if budgets is None else bool(budgets)
    if not wanted:
        log.info("no budget curve is measured for %.1f GB of experts. hint: --budgets", footprint.experts / 1e9)
    return wanted


def _check_writable(out: Path) -> None:
    """Raise ProfileError before the work, not after it."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        why = why_unwritable(out)
    except OSError as error:
        why = f"is {out}, must be in a folder that can be written ({error.strerror})"
    if why:
        raise ProfileError(f"--out {why}. hint: choose another, --out FOLDER/{NAME}")


def _check_ids(ids: Sequence[int], vocabulary: int) -> None:
    for edge in (min(ids, default=0), max(ids, default=0)):
        if not 0 <= edge < vocabulary:
            raise ProfileError(
                f"corpus holds token id {edge}, must be from 0 to {vocabulary - 1} for this model. "
                "hint: encode the text with this model's tokenizer"
            )


def _digest(ids: Sequence[int] | Sequence[Sequence[int]]) -> str:
    return hashlib.sha256(np.asarray(ids, dtype=np.int64).tobytes()).hexdigest()


def _split_corpus(
    options: CalibrationOptions, longest: int, tokens: int
) -> tuple[list[tuple[int, ...]], tuple[int, ...]]:
    """Windows to trace, and the ids kept apart from the end of the corpus for measuring."""
    window = min(options.window or 512, longest - 1)
    count = len(options.ids) // window
    least_held = max(_LEAST_HELD, 0 if options.quick else -(-_LEAST_HELD * WINDOW // window))
    least = least_held + _LEAST_TRACED
    if count < least:
        raise ProfileError(
            f"corpus is {len(options.ids)} tokens, must be at least {least * window} ({least} windows of {window}). "
            "hint: give more text"
        )
    held = max(least_held, round(_HELD_SHARE * count))
    traced = min(count - held, max(1, tokens // window))
    # spread over the corpus, so that a cap on tokens does not leave whole files out
    chosen = np.linspace(0, count - held - 1, traced).astype(int)
    windows = [tuple(options.ids[at * window : (at + 1) * window]) for at in chosen]
    return windows, tuple(options.ids[(count - held) * window :])


def _standins(options: CalibrationOptions) -> tuple[str, ...]:
    """Names of `EngineConfig.standin` that the chosen kinds allow to compare."""
    kinds = set(options.kinds or ())
    mixed = ("lowbit",) if len(set(LOWBIT) & kinds) > 1 else ()
    own = sorted(set(RECORD_KINDS) & kinds, key=RECORD_KINDS.index)
    return (*mixed, *own, *(BUDDIES if "buddy" in kinds else ()), "drop")
