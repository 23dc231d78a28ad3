"""Pure decisions over numbers and tensors: no ray, no clock, no I/O, no device of its own.

Each returns what was decided and why, for others to do.
"""

from buddymoe_ray.policy.buddymoe import BuddyMoE, BuddyParams, buddy_lists, normalised_entropy
from buddymoe_ray.policy.eviction import LRU
from buddymoe_ray.policy.guard import Guard, GuardView
from buddymoe_ray.policy.ladder import Ladder
from buddymoe_ray.policy.ledger import Ledger, Pricer, price_for
from buddymoe_ray.policy.memory import Staging, parse_memory, plan_staging, split_slots
from buddymoe_ray.policy.misses import Action, Misses, MissPolicy, Reason, Resolution, RowBudgets
from buddymoe_ray.policy.split import Split, choose
from buddymoe_ray.policy.standins import Answers, Buddy, Drop, Own, RandomBuddy, RouterBuddy, Standin

__all__ = [
    "LRU",
    "Action",
    "Answers",
    "Buddy",
    "BuddyMoE",
    "BuddyParams",
    "Drop",
    "Guard",
    "GuardView",
    "Ladder",
    "Ledger",
    "MissPolicy",
    "Misses",
    "Own",
    "Pricer",
    "RandomBuddy",
    "Reason",
    "Resolution",
    "RouterBuddy",
    "RowBudgets",
    "Split",
    "Staging",
    "Standin",
    "buddy_lists",
    "choose",
    "normalised_entropy",
    "parse_memory",
    "plan_staging",
    "price_for",
    "split_slots",
]
