"""One low-bit matrix as trainable numbers: real-valued levels and scale steps that are rounded on every use.

Does not know losses, models or optimisers. Invariant: `forward()` equals `dequantise(packed(), fmt)` to a
rounding of float32, so nothing is lost when training ends.
Neighbour: tuning.py trains many of them at once.

Legend: N outputs, K inputs, G groups of a row.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from buddymoe_ray.kernels.lowbit import LowbitFormat, PackedMatrix, pack, unpack

__all__ = ["LatentMatrix"]

STEPS_PER_OCTAVE = 24
LARGEST_CODE = 255
HEADROOM = 12  # scale steps that a scale may grow beyond the record's base: half an octave
INSIDE = 0.45  # how near to its code's edge the exact weight may pull the start


class LatentMatrix(nn.Module):
    """Starts at the record's codes, each leaning to the exact weight's side within its level.

    `level_NK` is the weight in units of its scale, `step_NG` the scale code before rounding.
    """

    def __init__(self, exact_NK: Tensor, record: Mapping[str, Tensor], name: str, fmt: LowbitFormat) -> None:
        super().__init__()
        packed = PackedMatrix(**{part: record[f"{name}.{part}"] for part in ("codes", "scales", "base")})
        q_NK, code_NG = unpack(packed, fmt)
        self._fmt, self._centre = fmt, (fmt.levels - 1) / 2
        self._base = float(packed.base) * 2 ** (HEADROOM / STEPS_PER_OCTAVE)
        self.step_NG = nn.Parameter((code_NG.float() + HEADROOM).clamp_(max=LARGEST_CODE))
        scale_NG = self._base * torch.exp2(self.step_NG.detach() / -STEPS_PER_OCTAVE)
        level = q_NK.float() - self._centre
        wanted = (exact_NK.float().view(*scale_NG.shape, -1) / scale_NG.unsqueeze(-1)).view_as(level)
        self.level_NK = nn.Parameter(level + (wanted - level).clamp_(-INSIDE, INSIDE))

    def forward(self) -> Tensor:
        """The dequantised matrix, float32 [N, K]; gradients pass through rounding and clipping as if neither were."""
        step = _through(self.step_NG, LARGEST_CODE)
        scale_NG1 = (self._base * torch.exp2(step / -STEPS_PER_OCTAVE)).unsqueeze(-1)
        level = _through(self.level_NK + self._centre, self._fmt.levels - 1) - self._centre
        return (level.view(*step.shape, -1) * scale_NG1).view_as(self.level_NK)

    @torch.no_grad()
    def tidy(self) -> None:
        """After an optimiser step: nothing drifts so far beyond the last level that it could not come back."""
        self.level_NK.clamp_(-self._centre - INSIDE, self._centre + INSIDE)
        self.step_NG.clamp_(-INSIDE, LARGEST_CODE + INSIDE)

    @torch.no_grad()
    def packed(self, name: str) -> dict[str, Tensor]:
        """The record's tensors of this matrix."""
        q = (self.level_NK + self._centre).clamp(0, self._fmt.levels - 1).round().to(torch.uint8)
        code = self.step_NG.clamp(0, LARGEST_CODE).round().to(torch.uint8)
        made = pack(q, code, self._base, self._fmt)
        return {f"{name}.codes": made.codes, f"{name}.scales": made.scales, f"{name}.base": made.base}


def _through(value: Tensor, largest: int) -> Tensor:
    """Rounded and clipped to 0 .. largest forward, the identity backward."""
    return value + (value.round().clamp(0, largest) - value).detach()
