"""Rounds one matrix to the packed low-bit format with searched scales: every weight to its nearest level, or rings of
weights to the nearest values of a trellis.

Does not know inputs beyond an optional importance of each. Invariant: memory beyond the answer is bounded by one chunk
of rows, with a trellis by a few float32 copies of the matrix. Neighbours: rounding_compensated.py improves on it with
second moments, kernels.lowbit packs the codes.

Legend: N outputs, K inputs, G groups of a row, S inputs in a group, n rows of a chunk, R rows (tokens).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from buddymoe_ray.kernels.lowbit_format import GROUP, STEPS_PER_OCTAVE, LowbitFormat, scales_of, values_of
from buddymoe_ray.kernels.trellis import best_codes
from buddymoe_ray.kernels.trellis_tables import QUAD, SPREAD

__all__ = [
    "FINE_SHARES",
    "PLAIN_SHARES",
    "Rounded",
    "base_for",
    "dequantise_rounded",
    "least_squares",
    "nearest_code",
    "round_nearest",
    "round_plain",
    "scale_of",
    "search_scale",
    "spread_scale",
]

MOST_OCTAVES = 6.0
"""Between the largest and the smallest of 16 scales: groups that are smaller still hardly count."""
CHUNK = 1 << 16  # weights handled at once by the plain path: the temporaries stay in the second-level cache
# Shares of a group's largest |w| that the outermost level is tried at; every try is refitted by least squares.
PLAIN_SHARES = {4: (1.0, 1.07), 8: (1.004,)}
FINE_SHARES = tuple(0.55 + 0.1 * i for i in range(8))


class Rounded(NamedTuple):
    """Codes of one matrix: `q` uint8 [N, K], `code` uint8 [N, G], `base` float32 [1 or 16] (kernels.lowbit_format)."""

    q: Tensor
    code: Tensor
    base: Tensor


def dequantise_rounded(rounded: Rounded, fmt: LowbitFormat) -> Tensor:
    """float32 [N, K] of unpacked codes."""
    scale_NK = scale_of(rounded.code, rounded.base).repeat_interleave(GROUP, dim=1)[:, : rounded.q.shape[1]]
    return values_of(rounded.q, fmt) * scale_NK


def round_plain(W_NK: Tensor, fmt: LowbitFormat) -> Rounded:
    """`round_nearest` with every group's scale <w, w> / <w, u> in place of <w, u> / <u, u>, codes u under the latter.

    The scale of least squared error makes a copy smaller than its matrix, by its relative error, and so are its
    outputs. This one keeps a group's projection on itself: on builtin:tiny 41, 18 and 5 % less divergence at 2, 3 and
    4 bits.
    """
    scale_NG = _searched(W_NK, fmt, None)
    if fmt.trellis:
        q_NK = _in_rings(W_NK, scale_NG, None, fmt)
        groups, levels = (_grouped(part) for part in (W_NK.float(), values_of(q_NK, fmt)))
        kept_NG = torch.linalg.vecdot(groups, groups) / torch.linalg.vecdot(groups, levels).clamp_min(1e-30)
        kept_NG = kept_NG.minimum(2 * scale_NG)  # groups of few inputs may have little of it
        return Rounded(q_NK, nearest_code(kept_NG, base := base_for(kept_NG, fmt)), base)
    _, kept_NG = _coded(W_NK, 1 / scale_NG.clamp_min(1e-30), fmt, kept=True)
    code_NG = nearest_code(kept_NG, base := base_for(kept_NG, fmt))
    q_NK, _ = _coded(W_NK, 1 / least_squares(code_NG, base, scale_NG, kept_NG), fmt)
    return Rounded(q_NK, code_NG, base)


def least_squares(code_NG: Tensor, base: Tensor, scale_NG: Tensor, kept_NG: Tensor) -> Tensor:
    """The scales that codes are taken under: as much smaller than those stored as least squares has them. A step of
    the stored ones is 3 %, which codes of 8 bits must know of."""
    return (scale_of(code_NG, base) * (scale_NG / kept_NG.clamp_min(1e-30))).clamp_min(1e-30)


def round_nearest(W_NK: Tensor, fmt: LowbitFormat, *, importance_K: Tensor | None = None) -> Rounded:
    """The scale per group of least squared error, and the nearest codes under it as it is stored; `importance_K`
    weights the errors of the inputs."""
    scale_NG = _searched(W_NK, fmt, importance_K)
    code_NG = nearest_code(scale_NG, base := base_for(scale_NG, fmt))
    if fmt.trellis:
        return Rounded(_in_rings(W_NK, scale_of(code_NG, base), importance_K, fmt), code_NG, base)
    q_NK, _ = _coded(W_NK, 1 / scale_of(code_NG, base), fmt)
    return Rounded(q_NK, code_NG, base)


def _searched(W_NK: Tensor, fmt: LowbitFormat, importance_K: Tensor | None) -> Tensor:
    """Least-squares scales `[N, G]`, tried at a few shares of a group's largest value. One chunk of rows at a time, so
    memory is bounded by that beside the answer."""
    K = W_NK.shape[1]
    if fmt.trellis:
        square = W_NK.float().square() if importance_K is None else W_NK.float().square() * importance_K
        counts = torch.ones_like(square[:1]) if importance_K is None else importance_K.float().expand(1, -1)
        return spread_scale(_grouped(square), _grouped(counts))
    whole = torch.ones(K, device=W_NK.device) if importance_K is None and K % GROUP else importance_K
    shares = PLAIN_SHARES[fmt.bits] if importance_K is None else FINE_SHARES
    weight = None if whole is None else pad(whole.float(), (0, -K % GROUP)).view(1, -1, GROUP)
    parts = [search_scale(group, fmt, shares, weight) for group in _chunks(W_NK)]
    return torch.cat(parts)


def _coded(W_NK: Tensor, inverse_NG: Tensor, fmt: LowbitFormat, *, kept: bool = False) -> tuple[Tensor, Tensor]:
    """Nearest codes uint8 `[N, K]` under scales of these inverses, and with `kept` the scales `[N, G]` that keep each
    group's projection on itself, else the inverses."""
    codes, scales, at = list[Tensor](), list[Tensor](), 0
    for group in _chunks(W_NK):
        scaled = (group * inverse_NG[at : at + len(group)].unsqueeze(-1)).add_(fmt.levels / 2)
        q = scaled.clamp_(0, fmt.levels - 1).to(torch.uint8)  # truncates: floor here
        if kept:
            dot = torch.linalg.vecdot(group, q.float().sub_((fmt.levels - 1) / 2))
            scales.append(torch.linalg.vecdot(group, group) / dot.clamp_min(1e-30))
        codes.append(q.flatten(1)[:, : W_NK.shape[1]])
        at += len(group)
    return torch.cat(codes).contiguous(), torch.cat(scales) if kept else inverse_NG


def spread_scale(square: Tensor, weight: Tensor) -> Tensor:
    """`[..., S] -> [...]`: scales under which weights of these (weighted) squares spread as trellis tables expect."""
    return (square.sum(dim=-1) / weight.sum(dim=-1).clamp_min(1e-30)).sqrt_().div_(SPREAD)


def _in_rings(W_NK: Tensor, scale_NG: Tensor, importance_K: Tensor | None, fmt: LowbitFormat) -> Tensor:
    """The trellis codes `[N, K]` of least (weighted) squared error under these scales, a few groups at a time."""
    K, parts = W_NK.shape[1], list[Tensor]()
    size = max(1, CHUNK // (GROUP * len(W_NK)))
    for at, scale_Ng in zip(range(0, K, size * GROUP), scale_NG.split(size, dim=1), strict=True):
        span = slice(at, at + size * GROUP)
        counts_k = torch.ones(K, device=W_NK.device)[span] if importance_K is None else importance_K.float()[span]
        scale_kN = scale_Ng.clamp_min(1e-30).T.repeat_interleave(GROUP, dim=0)[: len(counts_k)]
        whole = (0, 0, 0, -len(counts_k) % QUAD)
        x_kN = pad(W_NK[:, span].float().T / scale_kN, whole)
        weight_kN = pad(scale_kN.square() * counts_k[:, None], whole, value=-1.0)
        x_4N, weight_4N = (part.view(-1, QUAD, len(W_NK)) for part in (x_kN, weight_kN))
        parts.append(best_codes(x_4N, weight_4N, fmt.bits).reshape(-1, len(W_NK))[: len(counts_k)])
    return torch.cat(parts).T.contiguous()


def _grouped(W_NK: Tensor) -> Tensor:
    """`[N, K] -> [N, G, S]`, the last group filled up with zeros."""
    return pad(W_NK, (0, -W_NK.shape[1] % GROUP)).view(len(W_NK), -1, GROUP)


def _chunks(W_NK: Tensor) -> Iterator[Tensor]:
    """Some rows at a time as float32 `[n, G, S]`; a last group that is short is filled up with zeros."""
    K = W_NK.shape[1]
    for part in W_NK.split(max(1, CHUNK // K)):
        yield _grouped(part.float())


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


def base_for(scale_NG: Tensor, fmt: LowbitFormat, *, above: float = 0.0) -> Tensor:
    """The base for scales like these, and some that are up to `above` octaves larger.

    16 scales are a geometric series: no finer than those of 256, and no further than MOST_OCTAVES. 15 such steps of one
    length for all matrices would either be coarse or end before their smallest groups.
    """
    largest = scale_NG.amax().clamp_min(1e-30).float() * 2.0**above
    if fmt.scale_bits == 8:
        return largest.view(1)
    octaves = torch.log2(largest / scale_NG.amin().clamp_min(1e-30)).clamp(15 / STEPS_PER_OCTAVE, MOST_OCTAVES)
    return largest * torch.exp2(torch.arange(16, device=scale_NG.device) / -15 * octaves)


def nearest_code(scale: Tensor, base: Tensor) -> Tensor:
    """The nearest scale code in the log domain."""
    per_octave: Tensor | float = STEPS_PER_OCTAVE
    if len(base) > 1:
        per_octave = 15 / torch.log2(base[0] / base[-1])
    steps = torch.log2(base[0] / scale.clamp_min(1e-30)) * per_octave
    return steps.round_().clamp_(0, 255 if len(base) == 1 else 15).to(torch.uint8)


def scale_of(code: Tensor, base: Tensor) -> Tensor:
    """Scales of scale codes."""
    return scales_of(base)[code.long()]
