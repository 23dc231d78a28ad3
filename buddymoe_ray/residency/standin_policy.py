"""From a profile's tables to the policy that answers misses, by the names of `EngineConfig.standin` and `.policy`.

Builds, decides nothing. Neighbours: `standin_setup` calls it, `policy` does the deciding.

Legend: L layers, E experts, H candidates.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from buddymoe_ray.config import EngineConfig
from buddymoe_ray.models.profile import Profile
from buddymoe_ray.policy import (
    Buddy,
    BuddyMoE,
    BuddyParams,
    Drop,
    Ladder,
    MissPolicy,
    Own,
    RandomBuddy,
    RouterBuddy,
    Standin,
    buddy_lists,
)

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

__all__ = ["BUDDY_PARAMS", "TAE_PERCENTILE", "make_policy", "wants_scores"]

BUDDY_PARAMS = BuddyParams()
TAE_PERCENTILE = 15
"""The paper puts tau at the 10th to 20th percentile of the calibration's entropies."""


def wants_scores(config: EngineConfig) -> bool:
    """Whether the policy asks for the router's scores."""
    return config.policy == "buddymoe" or config.standin == "buddy:router"


def make_policy(
    config: EngineConfig,
    profile: Profile,
    *,
    loss_LE: npt.NDArray[np.float32],
    has_record_LE: npt.NDArray[np.bool_],
) -> MissPolicy:
    """The policy of one engine; `loss_LE` is that of each expert's own record. Raises ProfileError: no such table."""
    if config.policy == "buddymoe":
        return _buddymoe(profile)
    if config.standin == "drop":
        return Ladder(Drop(loss_LE=_floats(profile.loss_LE("drop")), renormalise=profile.norm_topk))
    if config.standin.startswith("buddy:") or config.standin == "random":
        nobody = Drop(loss_LE=_floats(profile.loss_LE("drop")), renormalise=profile.norm_topk)
        return Ladder(_buddy(config.standin, profile), fallback=nobody)
    return Ladder(Own(config.standin, loss_LE=_floats(loss_LE), has_LE=has_record_LE))


def _buddy(name: str, profile: Profile) -> Standin:
    loss_LEE = _floats(profile.pair_loss_LEE())
    if name == "random":
        return RandomBuddy(loss_LEE=loss_LEE)
    if name == "buddy:router":
        return RouterBuddy(loss_LEE=loss_LEE, renormalise=profile.norm_topk)
    if name == "buddy:coactivation":
        rank_LEH, _ = _coactive(profile, BuddyParams(alpha=1.1, k_max=profile.experts))
        return Buddy("coactivation", rank_LEH=rank_LEH, loss_LEE=loss_LEE)
    itself = np.eye(profile.experts, dtype=bool)
    error_LEE = np.where(itself, np.inf, profile.pair_error_LEE.astype(np.float32))
    rank_LEH = error_LEE.argsort(axis=2)[:, :, :-1]
    return Buddy("output", rank_LEH=rank_LEH, loss_LEE=loss_LEE, scale_LEE=_floats(profile.pair_scale_LEE))


def _buddymoe(profile: Profile) -> BuddyMoE:
    candidates_LEH, q_LEH = _coactive(profile, BUDDY_PARAMS)
    tau_L = _floats(profile.tae_LP[:, TAE_PERCENTILE])
    loss_LEE = _floats(profile.pair_loss_LEE()) if profile.pair_error_LEE.size else None
    return BuddyMoE(candidates_LEH=candidates_LEH, q_LEH=q_LEH, tau_L=tau_L, params=BUDDY_PARAMS, loss_LEE=loss_LEE)


def _coactive(profile: Profile, params: BuddyParams) -> tuple[Ints, Floats]:
    lists = [buddy_lists(_floats(counts_EE), params) for counts_EE in profile.coactivation_LEE]
    return np.stack([found[0] for found in lists]), np.stack([found[1] for found in lists])


def _floats(array: npt.NDArray[np.floating] | npt.NDArray[np.integer]) -> Floats:
    return np.asarray(array, dtype=np.float32)
