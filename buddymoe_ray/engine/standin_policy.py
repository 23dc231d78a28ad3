"""From a profile's tables to the policy that answers misses, by the names of `EngineConfig.standin` and `.policy`.

Builds, decides nothing. Neighbours: `standin_setup` calls it, `policy` does the deciding.

Legend: L layers, E experts, H candidates.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

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
    harm_LE: npt.NDArray[np.float32],
    has_record_LE: npt.NDArray[np.bool_],
    device: torch.device,
) -> MissPolicy:
    """The policy of one engine; `harm_LE` is that of each expert's own record. Raises ProfileError: no such table."""
    if config.policy == "buddymoe":
        return _buddymoe(profile, device)
    if config.standin == "drop":
        harm = _tensor(profile.harm_LE("drop"), device)
        return Ladder(Drop(harm_LE=harm, renormalise=profile.norm_topk))
    if config.standin.startswith("buddy:") or config.standin == "random":
        nobody = Drop(harm_LE=_tensor(profile.harm_LE("drop"), device), renormalise=profile.norm_topk)
        return Ladder(_buddy(config.standin, profile, device), fallback=nobody)
    has_LE = torch.from_numpy(has_record_LE).to(device)
    return Ladder(Own(config.standin, harm_LE=_tensor(harm_LE, device), has_LE=has_LE))


def _buddy(name: str, profile: Profile, device: torch.device) -> Standin:
    harm_LEE = _tensor(profile.pair_harm_LEE(), device)
    if name == "random":
        return RandomBuddy(harm_LEE=harm_LEE)
    if name == "buddy:router":
        return RouterBuddy(harm_LEE=harm_LEE, renormalise=profile.norm_topk)
    if name == "buddy:coactivation":
        rank_LEH, _ = _coactive(profile, BuddyParams(alpha=1.1, k_max=profile.experts), device)
        return Buddy("coactivation", rank_LEH=rank_LEH, harm_LEE=harm_LEE)
    itself = np.eye(profile.experts, dtype=bool)
    error_LEE = np.where(itself, np.inf, profile.pair_error_LEE.astype(np.float32))
    rank_LEH = torch.from_numpy(error_LEE.argsort(axis=2)[:, :, :-1].copy()).to(device)
    scale_LEE = _tensor(profile.pair_scale_LEE, device)
    return Buddy("output", rank_LEH=rank_LEH, harm_LEE=harm_LEE, scale_LEE=scale_LEE)


def _buddymoe(profile: Profile, device: torch.device) -> BuddyMoE:
    candidates_LEH, q_LEH = _coactive(profile, BUDDY_PARAMS, device)
    tau_L = _tensor(profile.tae_LP[:, TAE_PERCENTILE], device)
    harm_LEE = _tensor(profile.pair_harm_LEE(), device) if profile.pair_error_LEE.size else None
    return BuddyMoE(candidates_LEH=candidates_LEH, q_LEH=q_LEH, tau_L=tau_L, params=BUDDY_PARAMS, harm_LEE=harm_LEE)


def _coactive(profile: Profile, params: BuddyParams, device: torch.device) -> tuple[Tensor, Tensor]:
    lists = [buddy_lists(_tensor(counts_EE, torch.device("cpu")), params) for counts_EE in profile.coactivation_LEE]
    return torch.stack([found[0] for found in lists]).to(device), torch.stack([found[1] for found in lists]).to(device)


def _tensor(array: npt.NDArray[np.floating] | npt.NDArray[np.integer], device: torch.device) -> Tensor:
    return torch.from_numpy(np.asarray(array, dtype=np.float32).copy()).to(device)
