"""Rounds one matrix so that its outputs change least: error feedback, refitted scales, coordinate descent.

Does not know models, layers or corpora: weights and second moments of their inputs come in, codes go out. Invariant:
each stage keeps or lowers tr((W - Q) H (W - Q)^T), the mean squared output error, and none ends above plain rounding,
as far as some rows tell of all.
Neighbours: kernels.rounding is the start, rounding.py rounds whole experts.

Legend: N outputs, n some of them, K inputs, G groups of a row, S inputs in a group, R rows (tokens).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from buddymoe_ray.kernels.feedback import round_group
from buddymoe_ray.kernels.lowbit_format import BLOCK, GROUP, LowbitFormat, values_of
from buddymoe_ray.kernels.rough_product import rough_product
from buddymoe_ray.kernels.rounding import (
    FINE_SHARES,
    Rounded,
    base_for,
    dequantise_rounded,
    nearest_code,
    round_nearest,
    round_plain,
    scale_of,
    search_scale,
    spread_scale,
)
from buddymoe_ray.kernels.trellis import best_codes, values_of_quads
from buddymoe_ray.kernels.trellis_tables import QUAD, RINGS

__all__ = ["Metric", "moment", "round_in", "unbiased"]

_NEAR = 4 * GROUP
_TRIED_ROWS = 128
"""Of the outputs, about: what their errors say of the whole matrix is right to a few per cent."""


def moment(x_RK: Tensor, weight_R: Tensor | None = None) -> Tensor:
    """The weighted mean of x x^T, float32 [K, K]: the metric in which a matrix's error is the output's."""
    x = x_RK.float() if weight_R is None else x_RK.float() * weight_R.float().unsqueeze(1)
    total = x.shape[0] if weight_R is None else float((weight_R.double() ** 2).sum())
    return x.T @ x / max(total, 1e-30)


@dataclass(frozen=True, kw_only=True)
class Metric:
    """What rounding needs of the second moment of a matrix's inputs, whatever the width: float32 `H_KK`, damped and
    filled up to whole groups, the `order` int64 [K] in which inputs are rounded, the Cholesky factor of the inverse in
    that order (None: H is not positive). `inputs` are those that are there."""

    H_KK: Tensor
    order: Tensor
    factor: Tensor | None
    inputs: int

    @classmethod
    def of(cls, H_KK: Tensor, *, damping: float) -> Metric | None:
        """Of a second moment of any scale; `damping` is the share of the mean diagonal added to the diagonal. None
        where it says nothing."""
        H = H_KK.float()
        inputs, mean = len(H), float(H.diagonal().mean())
        if not (bool(torch.isfinite(H).all()) and mean > 0):
            return None
        H = H + damping * mean * torch.eye(inputs, device=H.device)
        if inputs % GROUP:  # filled up with inputs that are hardly ever there
            H = pad(H, (0, -inputs % GROUP, 0, -inputs % GROUP))
            H.diagonal()[inputs:] = 1e-6 * mean
        order = _order(H)
        return cls(H_KK=H, order=order, factor=_inverse_factor(H[order][:, order]), inputs=inputs)


def round_in(W_NK: Tensor, metric: Metric | None, fmt: LowbitFormat, *, passes: int = 4) -> Rounded:
    """Round float [N, K] so that (W - Q) H (W - Q)^T is small: error feedback, then exact coordinate descent.

    GPTQ (Frantar et al. 2023, algorithm 1) over groups, each group's scale searched on the weights as already
    compensated, errors weighted by 1/diag(chol)^2; then `passes` times: scales refitted by least squares in H, codes
    improved one input at a time (as in QuantEase, Behdin et al. 2023). Plain rounding where some rows say that it is
    better, or nothing is known of the inputs.
    """
    W = W_NK.float()
    if metric is None:
        return round_plain(W, fmt)
    if metric.factor is None:
        return round_nearest(W, fmt, importance_K=metric.H_KK.diagonal()[: metric.inputs])
    H, some_W, activity_K = metric.H_KK, _some(W), metric.H_KK.diagonal()[: metric.inputs]
    ways = (partial(round_nearest, importance_K=activity_K), round_nearest, round_plain)
    starts = [way(some_W, fmt) for way in ways]
    larger = float(torch.log2(W.abs().amax() / some_W.abs().amax().clamp_min(1e-30)).clamp(0, 8))  # what others have
    base = base_for(scale_of(starts[0].code, starts[0].base), fmt, above=0.25 + larger)
    W, some_W = (pad(part, (0, -metric.inputs % GROUP)) for part in (W, some_W))
    best = _feedback(W, metric, fmt, base)
    starts = [best._replace(q=_some(best.q), code=_some(best.code)), *(_filled_up(start, fmt) for start in starts)]
    first = min(range(len(starts)), key=lambda at: float(_row_errors(some_W, starts[at], H, fmt, rough_product).sum()))
    if first:
        best = _filled_up(ways[first - 1](W[:, : metric.inputs], fmt), fmt)
    for turn in range(passes):
        best = _descend(W, _refit(W, best, H, fmt), metric, fmt, turn)
    return best._replace(q=best.q[:, : metric.inputs].contiguous())


def _filled_up(rounded: Rounded, fmt: LowbitFormat) -> Rounded:
    """With codes of inputs that are hardly ever there, up to whole groups; those of a trellis are 0 there."""
    value = 0 if fmt.trellis else fmt.levels // 2
    return rounded._replace(q=pad(rounded.q, (0, -rounded.q.shape[1] % GROUP), value=value))


def _some(rows: Tensor) -> Tensor:
    """At most 255 of them, in whole tiles (the codes of a tile's outputs may be one string), spread evenly; all where
    they are no more than that."""
    tiles = rows.split(BLOCK)
    return torch.cat(tiles[:: max(1, BLOCK * len(tiles) // _TRIED_ROWS)])


def unbiased(rounded: Rounded, W_NK: Tensor, H_KK: Tensor, fmt: LowbitFormat) -> Rounded:
    """With the scale of the matrix at which copy and matrix project alike, <W, Q>_H = <W, W>_H, on some of its rows:
    what errs least is smaller than the matrix by its relative error, and so are its outputs."""
    W_nK = _some(W_NK.float())
    copy = rounded._replace(q=_some(rounded.q), code=_some(rounded.code))
    WH_nK = W_nK @ H_KK.float()
    wanted, found = float((WH_nK * W_nK).sum()), float((WH_nK * dequantise_rounded(copy, fmt)).sum())
    return rounded._replace(base=rounded.base * wanted / found) if 0 < wanted < 2 * found else rounded


def _order(H: Tensor) -> Tensor:
    """Inputs group by group, the most active group first and the most active quad of a group first: int64 [K]."""
    inputs_GqI = torch.arange(len(H), device=H.device).view(-1, GROUP // QUAD, QUAD)
    active_Gq = H.diagonal().view(inputs_GqI.shape).sum(dim=2)
    within_Gq = active_Gq.argsort(dim=1, descending=True, stable=True)
    inputs_GqI = inputs_GqI.gather(1, within_Gq.unsqueeze(2).expand_as(inputs_GqI))
    return inputs_GqI[active_Gq.sum(dim=1).argsort(descending=True, stable=True)].flatten()


def _inverse_factor(H: Tensor) -> Tensor | None:
    """Upper Cholesky factor of H^-1, with more damping while H is not numerically positive; None if it never is."""
    mean = H.diagonal().mean()
    for extra in (0.0, 0.01, 0.1, 1.0):
        # H = R R^T with R upper, the factor of H turned around: then R^-1 is the factor of H^-1
        damped = H + extra * mean * torch.eye(len(H), device=H.device)
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not int(failed):
            return _inverse_upper(lower.flip(0, 1))
    return None


def _inverse_upper(R: Tensor) -> Tensor:
    """Of an upper triangular matrix, in halves: products take most of the time."""
    half = len(R) // 2
    if half <= _NEAR:
        return torch.linalg.solve_triangular(R, torch.eye(len(R), device=R.device), upper=True)
    first, last, inverse = _inverse_upper(R[:half, :half]), _inverse_upper(R[half:, half:]), torch.zeros_like(R)
    inverse[:half, :half], inverse[half:, half:] = first, last
    inverse[:half, half:] = -(first @ R[:half, half:] @ last)
    return inverse


def _feedback(W: Tensor, metric: Metric, fmt: LowbitFormat, base: Tensor) -> Rounded:
    """GPTQ in blocks of one group: round an input, or a quad of a trellis, spread its error over the inputs still to
    come; to those far away the errors of a few groups at once, which reads them less often."""
    (N, K), size, order, U_KK = W.shape, GROUP, metric.order, metric.factor
    assert U_KK is not None, "H must be positive"
    left_KN = W.T[order].contiguous()  # inputs first: the loop runs over contiguous rows
    codes_KN = torch.empty(K, N, dtype=torch.uint8, device=W.device)
    errors_KN, code_NG = torch.empty_like(left_KN), codes_KN.new_empty(N, K // size)
    round_one = round_group if W.device.type == "cpu" else _round_group
    for at in range(0, K, size):
        span, near = slice(at, at + size), -(-(at + size) // _NEAR) * _NEAR
        block, errors, local = left_KN[span], errors_KN[span], U_KK[span, span]
        counts = local.diagonal().pow(-2)
        code = nearest_code(_scale(block, counts, fmt), base)
        code_NG[:, int(order[at]) // size] = code
        scale, there = scale_of(code, base), order[span] < metric.inputs
        codes_KN[span] = round_one(block, scale, torch.where(there, counts, -1.0), local, fmt, errors)
        if at + size < near:
            left_KN[at + size : near].addmm_(U_KK[span, at + size : near].T, errors, alpha=-1)
        else:
            left_KN[near:].sub_(rough_product(U_KK[near - _NEAR : near, near:].T, errors_KN[near - _NEAR : near]))
    return Rounded(codes_KN[order.argsort()].T.contiguous(), code_NG, base)


def _round_group(
    W_SN: Tensor, scale_N: Tensor, counts_S: Tensor, factor_SS: Tensor, fmt: LowbitFormat, errors_SN: Tensor
) -> Tensor:
    """As `kernels.feedback.round_group`: the spec, and what other devices run."""
    codes_SN = torch.empty_like(W_SN, dtype=torch.uint8)
    for some in _steps(fmt):
        codes_SN[some], values = _choose(W_SN[some], scale_N, counts_S[some], fmt)
        errors_SN[some] = _solved(factor_SS[some, some].T, W_SN[some] - values)
        W_SN[some.stop :].addmm_(factor_SS[some, some.stop :].T, errors_SN[some], alpha=-1)
    return codes_SN


def _steps(fmt: LowbitFormat) -> list[slice]:
    """The inputs of a group that are rounded at once."""
    size = QUAD if fmt.trellis else 1
    return [slice(at, at + size) for at in range(0, GROUP, size)]


def _solved(matrix_ss: Tensor, right_sN: Tensor) -> Tensor:
    """Of one input a division: a solver takes longer to call."""
    return right_sN / matrix_ss if len(matrix_ss) == 1 else torch.linalg.solve(matrix_ss, right_sN)


def _scale(block_SN: Tensor, counts_S: Tensor, fmt: LowbitFormat) -> Tensor:
    """The first scales `[N]` of a group."""
    if fmt.trellis:
        return spread_scale(block_SN.T.square() * counts_S, counts_S)
    return search_scale(block_SN.T.unsqueeze(1), fmt, FINE_SHARES, counts_S.view(1, 1, -1))[:, 0]


def _choose(
    target_sN: Tensor,
    scale_N: Tensor,
    counts_s: Tensor,
    fmt: LowbitFormat,
    old_sN: Tensor | None = None,
    turn: int = 0,
) -> tuple[Tensor, Tensor]:
    """Codes (uint8) and what they come to, `[s, N]`, of the least squared error by itself; an input's errors count as
    `counts_s` says, none where it is negative. With `old` trellis codes a ring keeps a state that it has."""
    x_sN = target_sN / scale_N
    if not fmt.trellis:
        codes = x_sN.add_(fmt.levels / 2).floor_().clamp_(0, fmt.levels - 1)
        return codes.to(torch.uint8), (codes - fmt.midpoint).mul_(scale_N)
    weight_sN = counts_s[:, None] * scale_N.square().clamp_min(1e-30)
    codes = best_codes(x_sN, weight_sN, fmt.bits, old_sN, half=turn % 2 == 0)
    return codes, values_of_quads(codes, fmt.bits) * scale_N


def _row_errors(
    W: Tensor,
    rounded: Rounded,
    H: Tensor,
    fmt: LowbitFormat,
    product: Callable[[Tensor, Tensor], Tensor] = torch.matmul,
) -> Tensor:
    E = W - dequantise_rounded(rounded, fmt)
    return (product(E, H) * E).sum(dim=1)


def _refit(W: Tensor, rounded: Rounded, H: Tensor, fmt: LowbitFormat) -> Rounded:
    """Scales by least squares in H with the codes held; rows that snapping to scale codes makes worse stay.

    Row n: minimise |w - sum_g s_g z_g|_H with z_g the centred codes of group g, a [G, G] system per row.
    """
    N, K = W.shape
    groups = rounded.code.shape[1]
    z = values_of(rounded.q, fmt)
    system = torch.empty(N, groups, groups, device=W.device)
    wanted = torch.empty(N, groups, device=W.device)
    for g, span in enumerate(torch.arange(K, device=W.device).view(groups, -1)):
        zH_NK = z[:, span] @ H[span]
        system[:, g] = (zH_NK * z).view(N, groups, -1).sum(dim=2)
        wanted[:, g] = (zH_NK * W).sum(dim=1)
    ridge = 1e-6 * system.diagonal(dim1=1, dim2=2).mean(dim=1).clamp_min(1e-30)
    system += ridge[:, None, None] * torch.eye(groups, device=W.device)
    scale, failed = torch.linalg.solve_ex(system, wanted.unsqueeze(-1))
    old = scale_of(rounded.code, rounded.base)
    fitted = torch.where((failed == 0)[:, None], scale.squeeze(-1), old)
    fitted = torch.where(fitted > 0, fitted, old)
    code = nearest_code(fitted, rounded.base)
    tried = Rounded(rounded.q, code, rounded.base)
    better = _row_errors(W, tried, H, fmt) < _row_errors(W, rounded, H, fmt)
    return tried._replace(code=torch.where(better[:, None], code, rounded.code))


def _descend(W: Tensor, rounded: Rounded, metric: Metric, fmt: LowbitFormat, turn: int) -> Rounded:
    """Each code, or the codes of each quad of a trellis, in turn to better values with all others held: the error never
    rises. Blocked like `_feedback`."""
    K, size, H = W.shape[1], GROUP, metric.H_KK
    value_KN = dequantise_rounded(rounded, fmt).T.contiguous()
    scale_GN = scale_of(rounded.code, rounded.base).T.contiguous()
    codes_KN = rounded.q.T.contiguous()
    gradient_KN = H @ (W.T - value_KN)
    there_K = torch.arange(K, device=W.device) < metric.inputs
    for at in range(0, K, size):
        span = slice(at, at + size)
        scale, local, pull, value = scale_GN[at // size], H[span, span], gradient_KN[span].clone(), value_KN[span]
        before, counts = value.clone(), torch.where(there_K[span], local.diagonal(), -1.0)
        for some in _steps(fmt):
            target = value[some] + _solved(local[some, some], pull[some])
            codes, new = _choose(target, scale, counts[some], fmt, codes_KN[span][some], turn)
            change = new - value[some]
            if fmt.trellis:  # what was chosen knows nothing of how the quad's inputs go together
                better = _better(change, local[some, some], pull[some], fmt)
                codes, change = torch.where(better, codes, codes_KN[span][some]), change.mul_(better)
            codes_KN[span][some] = codes
            value[some] += change
            pull[some.stop :].addmm_(local[some.stop :, some], change, alpha=-1)
        gradient_KN.addmm_(H[:, span], value - before, alpha=-1)
    return rounded._replace(q=codes_KN.T.contiguous())


def _better(change_sN: Tensor, H_ss: Tensor, pull_sN: Tensor, fmt: LowbitFormat) -> Tensor:
    """Of which outputs `[N]` the rings lower the error."""
    rise_N = (change_sN * (H_ss @ change_sN - 2 * pull_sN)).sum(dim=0)
    outputs = RINGS[fmt.bits] // QUAD
    rise_R = pad(rise_N, (0, -len(rise_N) % outputs)).view(-1, outputs).sum(dim=1)
    return (rise_R < 0).repeat_interleave(outputs)[: len(rise_N)]
