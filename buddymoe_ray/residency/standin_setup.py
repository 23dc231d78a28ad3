"""From a calibration to what is resident and who stands in: reads the profile, splits the budget, makes the policy.

Reads headers and tables only; loads no weights. Invariant: full slots, wave slots, records and overhead stay within the
budget, and every expert that is not full has a record where the stand-in needs one.

Legend: L layers, E experts.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from buddymoe_ray.cache import READ_ON_THE_SPOT
from buddymoe_ray.config import STANDINS, EngineConfig
from buddymoe_ray.errors import BudgetError, ConfigError, ProfileError
from buddymoe_ray.models.fingerprint import model_hash
from buddymoe_ray.models.profile import Profile, default_profile_path, load_profile, profile_path
from buddymoe_ray.models.standin_files import standin_layouts, standins_folder, verify_standins
from buddymoe_ray.policy import Measured, MissPolicy, Pricer, choose, split_movable
from buddymoe_ray.residency.calibrations import CalibrationFolder, calibrates
from buddymoe_ray.residency.standin_policy import make_policy, wants_scores
from buddymoe_ray.types import ExpertKey, ExpertLayout, SlotPlan

__all__ = ["NodeBudget", "StandinSetup", "find_profile", "prepare", "prepare_within", "self_made", "serve_without"]

log = logging.getLogger(__name__)

Floats = npt.NDArray[np.float32]

_VERIFIED_BYTES = 256 << 20  # above this, reading every record once more would cost minutes at start
_MOST_WAVES, _WAVE_SHARE = 8, 0.02
_SEEN = 20  # accesses that say something about an expert


@dataclass(frozen=True, kw_only=True)
class StandinSetup:
    """What stands in on one engine, and where.

    `plan` pins the full experts, `kind_of` gives the others' records, `layouts` where those are on disk, `price_of` the
    largest expected loss worth taking at a budget, `access_loss_LE` what one access of each expert's stand-in costs as
    a share of the costliest (None where unknown). `binding` names model and stand-ins for replays. `refusal`, when
    there is one, says why `bounded` requests get `exact` here. `own` is what was measured where an engine calibrated
    itself, None where somebody ran `buddymoe profile`.
    """

    plan: SlotPlan
    kind_of: Mapping[ExpertKey, str]
    layouts: Mapping[str, ExpertLayout]
    policy: MissPolicy
    layers: frozenset[int]
    wants_scores: bool
    price_of: Callable[[float], float]
    binding: str
    refusal: str
    expected_loss: float
    experts: int
    top_k: int
    access_loss_LE: Floats | None
    own: tuple[Measured, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class NodeBudget:
    """What `workers` engines may take together for experts, `overhead_bytes` of it for staging and scratch.

    With `movable` every expert has a record, so that any of them may be moved out later.
    """

    budget_bytes: int
    overhead_bytes: int
    workers: int = 1
    movable: bool = False


def find_profile(config: EngineConfig, folder: Path) -> Path | None:
    """The profile to use: the one named, else the one beside the checkpoint, else what an engine calibrated by itself.

    Without any, `bounded` keeps every budget by being exact (None), and so does `fast` where it is being calibrated.
    Raises ProfileError.
    """
    found = profile_path(config.profile, folder)
    if found is not None:
        return found
    if calibrates(config):
        own = CalibrationFolder.of(config, model_hash(folder))
        return own.profile if own.finished else None
    serve_without(config)
    return None


def self_made(config: EngineConfig, folder: Path, path: Path) -> bool:
    """Whether a profile that `find_profile` found is an engine's own."""
    return config.profile is None and path != default_profile_path(folder)


def serve_without(config: EngineConfig) -> None:
    """There is no profile, and none is made: `bounded` is exact, which is logged; `fast` raises ProfileError."""
    hint = f"hint: run buddymoe profile --model {config.model} --corpus FILES first, or set mode exact"
    if config.mode == "fast":
        raise ProfileError(f"mode is fast, must be exact or bounded for a model without profile. {hint}")
    log.warning("%s has no profile, so no stand-in is known: mode bounded serves exact. %s", config.model, hint)


def prepare(
    config: EngineConfig,
    *,
    folder: Path,
    path: Path,
    layout: ExpertLayout,
    node: NodeBudget,
) -> StandinSetup:
    """Read the profile and split the budget.

    Raises ProfileError (missing, damaged, another model's), BudgetError (nothing fits, with the least that does).
    """
    known = _Known.read(config, folder=folder, path=path, layout=layout)
    split = _split(config, layout, known.profile, known.layouts, known.losses, node)
    kind_of = {} if split.plan.fully_resident else split.kind_of
    return _setup(config, known, replace(split, kind_of=kind_of))


def prepare_within(
    config: EngineConfig, *, folder: Path, path: Path, layout: ExpertLayout, plan: SlotPlan
) -> StandinSetup:
    """The same under a plan that is in force, in the bytes that it reserves: a record for every expert, so that its
    slots may hold any; they are to hold those of largest expected loss. Raises as `prepare`."""
    known = _Known.read(config, folder=folder, path=path, layout=layout)
    names, counts = list(known.layouts), layout.experts_per_layer
    sizes = np.array([known.layouts[name].slot_bytes for name in names], dtype=np.int64)
    least = int(sizes.min()) * sum(counts)
    if least > plan.reserved_bytes:
        raise BudgetError(
            f"memory reserved for stand-ins is {plan.reserved_bytes} bytes, must be at least {least}. "
            "hint: start the service again: it finds its profile"
        )
    loss_OLE = np.stack([known.accesses_LE * known.losses[name] for name in names])
    chosen = choose(bytes_of=sizes, loss_of=loss_OLE, budget_bytes=plan.reserved_bytes, experts_per_layer=counts)
    loss_LE = np.take_along_axis(loss_OLE, np.maximum(chosen.kind_LE, 0)[None], axis=0)[0]
    hot = tuple(
        tuple(sorted(np.argsort(-loss_LE[la, :count], kind="stable")[:slots].tolist()))
        for la, (count, slots) in enumerate(zip(counts, plan.layer_slots, strict=True))
    )
    left = float(chosen.loss - sum(loss_LE[la, list(named)].sum() for la, named in enumerate(hot)))
    kind_of = {ExpertKey(la, e): names[chosen.kind_LE[la, e]] for la, count in enumerate(counts) for e in range(count)}
    return _setup(config, known, _Chosen(plan=replace(plan, pinned=hot), kind_of=kind_of, loss=left))


@dataclass(frozen=True, kw_only=True)
class _Known:
    """What a profile says: records and, by kind, expected losses `[L, E]` of an access. `fingerprint` is of the model
    and of the profile. `own` as in `StandinSetup`."""

    fingerprint: str
    profile: Profile
    layouts: Mapping[str, ExpertLayout]
    losses: Mapping[str, Floats]
    own: tuple[Measured, ...] | None

    @property
    def accesses_LE(self) -> Floats:
        """Squared slot weights of each expert's accesses, per token."""
        profile = self.profile
        return (profile.counts_LE * profile.weight2_LE / max(1, profile.calibration_tokens)).astype(np.float32)

    @classmethod
    def read(cls, config: EngineConfig, *, folder: Path, path: Path, layout: ExpertLayout) -> _Known:
        fingerprint = model_hash(folder)
        profile = load_profile(path, model_hash=fingerprint)
        kinds = STANDINS[config.standin] if config.policy == "ladder" else ()
        # records of an earlier calibration may lie beside those that this profile knows the cost of
        kinds = tuple(kind for kind in kinds if kind in profile.errors) or kinds
        layouts = standin_layouts(standins_folder(path), fingerprint, kinds=kinds, layers=profile.layers)
        if sum(records.total_bytes for records in layouts.values()) <= _VERIFIED_BYTES:
            verify_standins(standins_folder(path))
        if kinds and not layouts:
            raise ProfileError(
                f"{path} has no records of {' or '.join(kinds)}, must have them for standin {config.standin}. "
                "hint: run buddymoe profile again with these kinds"
            )
        _same_shape(path, profile, layout)
        losses = {kind: profile.loss_LE(kind) for kind in (*layouts, "drop")}
        own = CalibrationFolder(path.parent).measured() if self_made(config, folder, path) else None
        # records change with their profile, which knows their errors and buddies
        made = f"{fingerprint}|{hashlib.sha256(path.read_bytes()).hexdigest()}"
        return cls(fingerprint=made, profile=profile, layouts=layouts, losses=losses, own=own)


def _setup(config: EngineConfig, known: _Known, chosen: _Chosen) -> StandinSetup:
    profile, kind_of, layers = known.profile, chosen.kind_of, config.chosen_layers()
    if layers is not None and max(layers) >= profile.layers:
        raise ConfigError(
            f"standin_layers is {config.standin_layers!r}, must be below {profile.layers}. hint: they count MoE layers"
        )
    record_loss_LE = _loss_of_access(known.losses, kind_of)
    return StandinSetup(
        plan=chosen.plan,
        kind_of=kind_of,
        layouts=known.layouts,
        policy=make_policy(config, profile, loss_LE=record_loss_LE, has_record_LE=_has_record(profile, kind_of)),
        layers=frozenset(range(profile.layers)) if layers is None else layers,
        wants_scores=wants_scores(config),
        price_of=_pricer(profile, record_loss_LE, chosen.plan),
        binding=_binding(known.fingerprint, config, kind_of),
        refusal=_refusal(config, profile, made=known.own is not None),
        expected_loss=chosen.loss,
        experts=profile.experts,
        top_k=profile.top_k,
        access_loss_LE=_share_of_worst(_usual_weight2(profile) * record_loss_LE),
        own=known.own,
    )


def _usual_weight2(profile: Profile) -> Floats:
    """Mean squared weight of one access; of experts that calibration hardly saw their layer's: they may be hot one
    day."""
    counts_LE = profile.counts_LE
    layer_L1 = (counts_LE * profile.weight2_LE).sum(axis=1, keepdims=True) / counts_LE.sum(axis=1, keepdims=True)
    return np.where(counts_LE >= _SEEN, profile.weight2_LE, layer_L1).astype(np.float32)


def _share_of_worst(loss_LE: Floats) -> Floats | None:
    """Expected loss of one access as a share of the costliest expert's; None where no expected loss is known."""
    worst = float(loss_LE.max())
    return (loss_LE / worst).astype(np.float32) if np.isfinite(worst) and worst > 0 else None


def _same_shape(path: Path, profile: Profile, layout: ExpertLayout) -> None:
    counts = layout.experts_per_layer
    if (profile.layers, profile.experts) != (len(counts), max(counts)):
        raise ProfileError(
            f"{path} has {profile.layers} layers of {profile.experts} experts, must have {len(counts)} of "
            f"{max(counts)}. hint: run buddymoe profile on this checkpoint"
        )


@dataclass(frozen=True, kw_only=True)
class _Chosen:
    plan: SlotPlan
    kind_of: dict[ExpertKey, str]
    loss: float


def _split(
    config: EngineConfig,
    layout: ExpertLayout,
    profile: Profile,
    layouts: Mapping[str, ExpertLayout],
    losses: Mapping[str, Floats],
    node: NodeBudget,
) -> _Chosen:
    """Full slots and records under the budget: wave slots first, then the split of least expected loss."""
    slot, budget, overhead, workers = layout.slot_bytes, node.budget_bytes, node.overhead_bytes, node.workers
    if budget >= layout.total_bytes:
        return _Chosen(plan=_fully_resident(layout, budget), kind_of={}, loss=0.0)
    least_waves = 1 if layout.expert_bytes <= READ_ON_THE_SPOT else 2  # one is read while the other computes
    waves = max(least_waves * workers, min(_MOST_WAVES * workers, round(_WAVE_SHARE * budget / slot)))
    room = budget - overhead - waves * slot
    accesses_LE = profile.counts_LE * profile.weight2_LE / max(1, profile.calibration_tokens)
    names = ["full", *(list(layouts) or ["none"])]
    record_bytes = [slot, *((layouts[name].slot_bytes for name in names[1:]) if layouts else (0,))]
    # without records every layer needs residents to choose from, so slots go by use alone, not by a layer's energy
    loss_of = [np.zeros_like(accesses_LE), *(accesses_LE * (losses[n] if layouts else 1.0) for n in names[1:])]
    least = min(record_bytes) * sum(layout.experts_per_layer)
    if room < least:
        need = least + overhead + waves * slot
        raise BudgetError(
            f"memory is {budget} bytes, must be at least {need} bytes ({100 * need / layout.total_bytes:.1f} %) for "
            f"standin {config.standin}. hint: raise --memory, profile with fewer bits, or use mode exact"
        )
    split = split_movable if node.movable and layouts else choose
    chosen = split(
        bytes_of=np.array(record_bytes, dtype=np.int64),
        loss_of=np.stack(loss_of),
        budget_bytes=room,
        experts_per_layer=layout.experts_per_layer,
    )
    kind_LE = chosen.kind_LE
    full_LE = kind_LE == 0 if chosen.full_LE is None else chosen.full_LE
    pinned = tuple(
        tuple(e for e in range(count) if full_LE[la, e]) for la, count in enumerate(layout.experts_per_layer)
    )
    kind_of = {
        ExpertKey(la, e): names[kind_LE[la, e]]
        for la, count in enumerate(layout.experts_per_layer)
        for e in range(count)
        if kind_LE[la, e] != 0 and layouts
    }
    record_total = sum(layouts[kind].slot_bytes for kind in kind_of.values())
    plan = SlotPlan(
        budget_bytes=budget,
        slot_bytes=slot,
        overhead_bytes=overhead + record_total,
        wave_slots=waves,
        layer_slots=tuple(len(named) for named in pinned),
        fully_resident=False,
        pinned=pinned,
    )
    used = plan.slots_total * slot + plan.overhead_bytes
    assert used <= budget, f"plan takes {used} bytes, must be at most {budget}"
    return _Chosen(plan=plan, kind_of=kind_of, loss=float(chosen.loss))


def _fully_resident(layout: ExpertLayout, budget: int) -> SlotPlan:
    return SlotPlan(
        budget_bytes=budget,
        slot_bytes=layout.slot_bytes,
        overhead_bytes=0,
        wave_slots=0,
        layer_slots=layout.experts_per_layer,
        fully_resident=True,
    )


def _loss_of_access(losses: Mapping[str, Floats], kind_of: Mapping[ExpertKey, str]) -> Floats:
    """Expected loss of one access per squared slot weight, of the record each expert has; that of dropping it
    elsewhere."""
    table_LE = losses["drop"].copy()
    for key, kind in kind_of.items():
        table_LE[key.layer, key.expert] = losses[kind][key.layer, key.expert]
    return table_LE


def _has_record(profile: Profile, kind_of: Mapping[ExpertKey, str]) -> npt.NDArray[np.bool_]:
    has_LE = np.zeros((profile.layers, profile.experts), dtype=bool)
    for key in kind_of:
        has_LE[key.layer, key.expert] = True
    return has_LE


def _pricer(profile: Profile, loss_LE: Floats, plan: SlotPlan) -> Callable[[float], float]:
    """Expected losses of the calibration's own accesses under this plan, and from them the price at a budget."""
    ids, weights = profile.routes_TLK.astype(np.int64), profile.route_weights_TLK.astype(np.float32)
    resident_LE = np.zeros((profile.layers, profile.experts), dtype=bool)
    for layer, named in enumerate(plan.pinned):
        resident_LE[layer, list(named)] = True
    layer_L1 = np.arange(profile.layers)[:, None]
    loss_TLK = np.where(resident_LE[layer_L1, ids], 0.0, weights**2 * loss_LE[layer_L1, ids])
    loss_TN = loss_TLK.reshape(len(ids), -1)
    return Pricer(loss_TN)


def _binding(fingerprint: str, config: EngineConfig, kind_of: Mapping[ExpertKey, str]) -> str:
    text = "|".join(f"{k.layer}.{k.expert}={kind}" for k, kind in sorted(kind_of.items()))
    return hashlib.sha256(f"{fingerprint}|{config.expert_dtype}|{config.dense_dtype}|{text}".encode()).hexdigest()


def _refusal(config: EngineConfig, profile: Profile, *, made: bool) -> str:
    """Why `bounded` cannot be given here, or nothing. An engine's own calibration recommends nothing: it is on trial,
    and what costs too much is fetched."""
    if not np.isfinite(profile.sensitivity_L).all():
        return "the profile was made with --quick and knows no expected losses; profile again without it"
    if config.standin == "auto" and profile.recommended is None and not made:
        return f"calibration found no stand-in within the budget ({profile.reason})"
    return ""
