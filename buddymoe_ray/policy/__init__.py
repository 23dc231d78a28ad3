"""Pure decisions over numbers and arrays: no ray, no torch, no clock, no I/O, no device.

Each returns what was decided and why, for others to do.
"""

from __future__ import annotations

from buddymoe_ray.policy.buddymoe import BuddyMoE, BuddyParams, buddy_lists, normalised_entropy
from buddymoe_ray.policy.calibration import Measured, Trust, may_replay
from buddymoe_ray.policy.guard import Guard, GuardView
from buddymoe_ray.policy.host_compute import ExpectedMisses, HostCost, expected_misses
from buddymoe_ray.policy.ladder import Ladder
from buddymoe_ray.policy.ledger import Ledger, Pricer
from buddymoe_ray.policy.memory import (
    MIN_SLOTS,
    Prefill,
    Staging,
    activation_bytes,
    kv_cache_bytes,
    lend_reserved,
    plan_prefill,
    plan_staging,
    recording_bytes,
    rows_held,
    split_kv,
    split_slots,
    state_slots,
)
from buddymoe_ray.policy.misses import Action, Misses, MissPolicy, Reason, Resolution, RowBudgets
from buddymoe_ray.policy.placement.map import PlacementMap, Step, migration_steps, previous_held, publish
from buddymoe_ray.policy.placement.problem import OPTIONS, NodeLinks, PlacementProblem, Pool, cost_of, option_accesses
from buddymoe_ray.policy.placement.solver import Effort, solve
from buddymoe_ray.policy.prefix_affinity import PrefixAffinity, RouteCandidate, RouteChoice, RouteReason, prefix_blocks
from buddymoe_ray.policy.read_ahead import ReadAheadGain
from buddymoe_ray.policy.split import Split, choose, split_movable
from buddymoe_ray.policy.standins import Buddy, Drop, Own, RandomBuddy, RouterBuddy, Standin, StandinAnswers

__all__ = [
    "MIN_SLOTS",
    "OPTIONS",
    "Action",
    "StandinAnswers",
    "Buddy",
    "BuddyMoE",
    "BuddyParams",
    "Drop",
    "Effort",
    "ExpectedMisses",
    "Guard",
    "GuardView",
    "HostCost",
    "Ladder",
    "Ledger",
    "Measured",
    "MissPolicy",
    "Misses",
    "NodeLinks",
    "Own",
    "PlacementMap",
    "PlacementProblem",
    "Pool",
    "PrefixAffinity",
    "Pricer",
    "RandomBuddy",
    "ReadAheadGain",
    "Reason",
    "Resolution",
    "RouteCandidate",
    "RouteChoice",
    "RouteReason",
    "RouterBuddy",
    "RowBudgets",
    "Split",
    "Staging",
    "Standin",
    "Step",
    "Trust",
    "activation_bytes",
    "buddy_lists",
    "choose",
    "cost_of",
    "expected_misses",
    "kv_cache_bytes",
    "lend_reserved",
    "may_replay",
    "migration_steps",
    "normalised_entropy",
    "Prefill",
    "plan_prefill",
    "plan_staging",
    "recording_bytes",
    "prefix_blocks",
    "previous_held",
    "publish",
    "option_accesses",
    "solve",
    "split_movable",
    "rows_held",
    "split_kv",
    "split_slots",
    "state_slots",
]
