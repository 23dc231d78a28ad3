"""Trains the codes and scales of all low-bit records together, so that the model's next-token distribution is kept.

Rounding looks at one expert at a time; here the whole model, dense weights frozen, is distilled from its exact self:
gradients pass straight through the rounding (LSQ, Esser et al. 2020; straight-through estimator, Bengio et al. 2013).
Does not know how records are stored or used. Invariant: a record's shapes, names and format do not change, and what
comes back dequantises to exactly the weights of the last step.
Neighbours: rounding.py makes the starting records, tuning_latent.py holds the trainable form of a matrix.
On builtin:tiny 200-240 steps of 8 x 256 tokens take KL per token from .0082 to .0060 at 3 bits; rates of .012 and more
first raise it by half (.011 after 50 steps); .02 from plain rounding ends at .0079.

Legend: B windows of a step, S tokens of a window, T = B S rows, K top-k slots, E experts, D hidden, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice

import torch
from torch import Tensor
from torch.nn import functional

from buddymoe_ray.calibrate.tuning_latent import LatentMatrix
from buddymoe_ray.errors import ConfigError
from buddymoe_ray.kernels.lowbit import LowbitFormat
from buddymoe_ray.kernels.reference import ExpertMath, expert_forward
from buddymoe_ray.models.experts_hook import ExpertsBlock, attach
from buddymoe_ray.models.load import LoadedModel

__all__ = ["TuneSettings", "fits", "tune"]

Weights = Mapping[str, Tensor]
LARGEST_WEIGHTS = 64_000_000


@dataclass(frozen=True, kw_only=True)
class TuneSettings:
    """How long and how fast.

    Args:
        steps: optimiser steps; 0 leaves the records as they are.
        batch: windows of a step.
        rate: Adam's rate for codes, in code units, warmed up and let down by a cosine.
        scale_rate: the same for scale codes (24 an octave).
        full_share: chance that an expert is exact in a step, so that records do not lean on one another's errors.
        seed: order of windows and choice of exact experts.
    """

    steps: int = 300
    batch: int = 8
    rate: float = 0.004
    scale_rate: float = 0.03
    full_share: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 0 or self.batch < 1:
            raise ConfigError(f"steps, batch are {self.steps}, {self.batch}, must be at least 0 and 1")
        if not 0 <= self.full_share < 1:
            raise ConfigError(f"full_share is {self.full_share}, must be in [0, 1)")


def fits(loaded: LoadedModel) -> bool:
    """Whether the model is small enough to be tuned here: latents, gradients and two moments take 16 bytes a weight."""
    per_expert = sum(math.prod(tensor.shape) for tensor in loaded.layout.tensors)
    return per_expert * sum(loaded.layout.experts_per_layer) <= LARGEST_WEIGHTS


def tune(
    loaded: LoadedModel,
    exact: Sequence[Sequence[Weights]],
    records: Sequence[Sequence[Weights]],
    formats: Sequence[Sequence[LowbitFormat]],
    expert_math: ExpertMath,
    windows_WS: Tensor,
    settings: TuneSettings,
    *,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
    report: Callable[[int, float], None] = lambda step, kl: None,
) -> list[list[dict[str, Tensor]]]:
    """Records like `records` with a smaller KL divergence from the exact model on text like `windows_WS`.

    Leaves its own blocks attached to `loaded.experts`: attach others before the model is used again.

    Args:
        loaded: the model with float32 dense weights on its device.
        exact, records: `[layer][expert]`, the weights (`[out, in]`) and their low-bit records.
        formats: the format of each record.
        windows_WS: int64 token ids, one window a row; taken in turn, in an order of the seed's, as often as needed.
        report: called with each step and its mean KL in nats a token.
    """
    assert loaded.compute_dtype == torch.float32, f"compute dtype is {loaded.compute_dtype}, must be float32"
    latent = [
        [_Expert(*parts, expert_math) for parts in zip(*layer, strict=True)]
        for layer in zip(exact, records, formats, strict=True)
    ]
    for parameter in loaded.model.parameters():
        parameter.requires_grad_(False)
    matrices = [matrix for layer in latent for expert in layer for matrix in expert.matrices.values()]
    optimiser = _optimiser(matrices, settings)
    generator = torch.Generator().manual_seed(settings.seed)
    order = torch.randperm(len(windows_WS), generator=generator).tolist()
    rows = cycle(order)
    teacher, student = _Pass(loaded, exact, expert_math), _Pass(loaded, exact, expert_math)
    for step in progress(range(settings.steps)):
        _set_rates(optimiser, step, settings.steps)
        ids_BS = windows_WS[list(islice(rows, settings.batch))].to(loaded.device)
        with torch.no_grad():
            target = teacher.logits(ids_BS).log_softmax(dim=-1)
        student.weights = [
            [exact[la][e] if _chance(settings.full_share, generator) else one.weights() for e, one in enumerate(layer)]
            for la, layer in enumerate(latent)
        ]
        ours = student.logits(ids_BS).log_softmax(dim=-1)
        kl = functional.kl_div(ours, target, log_target=True, reduction="sum") / ids_BS.numel()
        optimiser.zero_grad()
        kl.backward()
        optimiser.step()
        for matrix in matrices:
            matrix.tidy()
        report(step, float(kl.detach()))
    return [[one.record() for one in layer] for layer in latent]


def _chance(share: float, generator: torch.Generator) -> bool:
    return share > 0 and float(torch.rand((), generator=generator)) < share


def _optimiser(matrices: Sequence[LatentMatrix], settings: TuneSettings) -> torch.optim.Adam:
    groups = [
        {"params": [m.level_NK for m in matrices], "lr": settings.rate, "peak": settings.rate},
        {"params": [m.step_NG for m in matrices], "lr": settings.scale_rate, "peak": settings.scale_rate},
    ]
    return torch.optim.Adam(groups, betas=(0.9, 0.98), fused=True)


def _set_rates(optimiser: torch.optim.Adam, step: int, steps: int) -> None:
    """Warm up over a tenth of the steps (20 at most), then down along a cosine."""
    share = min(1.0, (step + 1) / min(20, 1 + steps // 10)) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
    for group in optimiser.param_groups:
        group["lr"] = group["peak"] * share


class _Expert:
    """One expert's trainable matrices beside what is not trained (biases)."""

    def __init__(self, exact: Weights, record: Weights, fmt: LowbitFormat, expert_math: ExpertMath) -> None:
        names = (expert_math.first, "down_proj")
        self.matrices = {name: LatentMatrix(exact[name], record, name, fmt) for name in names}
        self._rest = {name: tensor for name, tensor in record.items() if name in exact}

    def weights(self) -> dict[str, Tensor]:
        """As `expert_forward` takes them, with gradients."""
        return {name: matrix() for name, matrix in self.matrices.items()} | {
            name: tensor.float() for name, tensor in self._rest.items()
        }

    def record(self) -> dict[str, Tensor]:
        made = dict(self._rest)
        for name, matrix in self.matrices.items():
            made |= matrix.packed(name)
        return made


class _Pass:
    """The model with given experts' weights, differentiable: every token by its own experts, no cache."""

    def __init__(self, loaded: LoadedModel, weights: Sequence[Sequence[Weights]], expert_math: ExpertMath) -> None:
        self._loaded, self._math = loaded, expert_math
        self.weights = weights

    def logits(self, ids_BS: Tensor) -> Tensor:
        attach(self._loaded.experts, self._block)
        answer: Tensor = self._loaded.model(ids_BS, use_cache=False).logits
        return answer

    def _block(self, layer: int, _: torch.nn.Module) -> ExpertsBlock:
        def block(hidden_TD: Tensor, ids_TK: Tensor, weight_TK: Tensor) -> Tensor:
            width = ids_TK.shape[1]
            order = ids_TK.flatten().argsort(stable=True)
            ends = ids_TK.flatten().bincount(minlength=len(self.weights[layer])).cumsum(0).tolist()
            x_SD = hidden_TD[order // width]
            parts = []
            for expert, (low, high) in enumerate(zip([0, *ends], ends, strict=False)):
                if high > low:
                    parts.append(expert_forward(x_SD[low:high], self.weights[layer][expert], self._math))
            y_SD = torch.cat(parts) * weight_TK.flatten()[order].unsqueeze(1).to(hidden_TD.dtype)
            return torch.zeros_like(hidden_TD).index_add(0, order // width, y_SD)

        return block
