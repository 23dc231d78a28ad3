"""Rounds one matrix to the packed low-bit format with searched scales, every weight to its nearest level.

Does not know inputs beyond an optional importance of each. Invariant: memory beyond the answer is bounded by one chunk
of rows. Neighbours: rounding_compensated.py improves on it with second moments, kernels.lowbit packs the codes.

Legend: N outputs, K inputs, G groups of a row, S inputs in a group, n rows of a chunk, R rows (tokens).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from buddymoe_ray.kernels.lowbit_format import GROUP, LowbitFormat

__all__ = ["FINE_SHARES", "Rounded", "dequantise_rounded", "nearest_code", "round_plain", "scale_of", "search_scale"]

STEPS_PER_OCTAVE = 24
LARGEST_CODE = 255
CHUNK = 1 << 16  # weights handled at once by the plain path: the temporaries stay in the second-level cache
# Shares of a group's largest |w| that the outermost level is tried at; every try is refitted by least squares.
PLAIN_SHARES = {2: (0.85, 1.05), 3: (0.95, 1.1), 4: (1.0, 1.07), 8: (1.004,)}
FINE_SHARES = tuple(0.5 + 0.06 * i for i in range(15))


class Rounded(NamedTuple):
    """Codes of one matrix: `q` uint8 [N, K], `code` uint8 [N, G], `base` (see kernels.lowbit_format)."""

    q: Tensor
    code: Tensor
    base: float


def dequantise_rounded(rounded: Rounded, fmt: LowbitFormat) -> Tensor:
    """float32 [N, K] of unpacked codes."""
    scale_NK = scale_of(rounded.code, rounded.base).repeat_interleave(GROUP, dim=1)[:, : rounded.q.shape[1]]
    return (rounded.q.float() - (fmt.levels - 1) / 2) * scale_NK


def round_plain(W_NK: Tensor, fmt: LowbitFormat, *, importance_K: Tensor | None = None) -> Rounded:
    """Nearest codes under a searched scale per group; `importance_K` weights the squared errors of the inputs.

    Scales are tried at a few shares of the group's largest value and refitted by least squares. One pass over chunks
    of rows, so memory is bounded by one chunk beside the answer. Where K is no multiple of 32 the last group is filled
    up with inputs of no importance.
    """
    N, K = W_NK.shape
    if K % GROUP:
        importance = torch.ones(K, device=W_NK.device) if importance_K is None else importance_K
        whole = round_plain(pad(W_NK, (0, -K % GROUP)), fmt, importance_K=pad(importance, (0, -K % GROUP)))
        return whole._replace(q=whole.q[:, :K].contiguous())
    size = GROUP
    rows = max(1, CHUNK // K)
    shares = PLAIN_SHARES[fmt.bits] if importance_K is None else FINE_SHARES
    scale_NG = W_NK.new_empty(N, K // size, dtype=torch.float32)
    weight = None if importance_K is None else importance_K.float().view(1, -1, size)
    for at in range(0, N, rows):
        group = W_NK[at : at + rows].float().view(-1, K // size, size)
        scale_NG[at : at + rows] = search_scale(group, fmt, shares, weight)
    code_NG, base = _encode(scale_NG)
    inverse_NG = 1 / scale_of(code_NG, base)
    q_NK = W_NK.new_empty(N, K, dtype=torch.uint8)
    for at in range(0, N, rows):
        group = W_NK[at : at + rows].float().view(-1, K // size, size)
        scaled = (group * inverse_NG[at : at + rows].unsqueeze(-1)).add_(fmt.levels / 2)
        q_NK[at : at + rows] = scaled.clamp_(0, fmt.levels - 1).view(-1, K).to(torch.uint8)  # truncates: floor here
    return Rounded(q_NK, code_NG, base)


def search_scale(group: Tensor, fmt: LowbitFormat, shares: tuple[float, ...], weight: Tensor | None) -> Tensor:
    """`[n, G, S] -> [n, G]`: the least-squares scale of the best try.

    With levels u >= 1/2 of |w|, the best scale is <w, u> / <u, u> and lowers the squared error by <w, u>^2 / <u, u>.
    """
    size = group.abs()
    largest = size.amax(dim=-1, keepdim=True).clamp_min_(1e-30)
    weighted = size if weight is None else size * weight
    gain = torch.full_like(largest[..., 0], -1.0)
    scale = torch.zeros_like(gain)
    top = fmt.levels / 2
    for share in shares:
        u = (size * (top / share / largest)).clamp_max_(top - 0.5).floor_().add_(0.5)
        dot = torch.linalg.vecdot(weighted, u)
        norm = torch.linalg.vecdot(u if weight is None else u * weight, u).clamp_min_(1e-30)
        better = (found := dot * dot / norm) > gain
        gain = torch.where(better, found, gain)
        scale = torch.where(better, dot / norm, scale)
    return scale


def _encode(scale_NG: Tensor) -> tuple[Tensor, float]:
    base = float(scale_NG.amax().clamp_min(1e-30))
    return nearest_code(scale_NG, base), base


def nearest_code(scale: Tensor, base: float) -> Tensor:
    """The nearest scale code in the log domain."""
    steps = torch.log2(base / scale.clamp_min(1e-30)) * STEPS_PER_OCTAVE
    return steps.round_().clamp_(0, LARGEST_CODE).to(torch.uint8)


def scale_of(code: Tensor, base: float) -> Tensor:
    """Scales of scale codes."""
    return base * torch.exp2(code.float() / -STEPS_PER_OCTAVE)
