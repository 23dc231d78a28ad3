"""Rounds one matrix so that its outputs change least: error feedback, refitted scales, coordinate descent.

Does not know models, layers or corpora: weights and second moments of their inputs come in, codes go out. Invariant:
each stage keeps or lowers tr((W - Q) H (W - Q)^T), the mean squared output error, and none ends above plain rounding,
as far as some rows tell of all.
Neighbours: kernels.rounding is the start, rounding.py rounds whole experts.

Legend: N outputs, n some of them, K inputs, G groups of a row, S inputs in a group, R rows (tokens).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from buddymoe_ray.kernels.lowbit_format import GROUP, LowbitFormat
from buddymoe_ray.kernels.rounding import (
    FINE_SHARES,
    STEPS_PER_OCTAVE,
    Rounded,
    dequantise_rounded,
    nearest_code,
    round_nearest,
    round_plain,
    scale_of,
    search_scale,
)

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
        return _start(W, metric, fmt, by_importance=True)
    H, some_W = metric.H_KK, _some(W)
    starts = [_start(some_W, metric, fmt, by_importance=important) for important in (True, False)]
    larger = float(torch.log2(W.abs().amax() / some_W.abs().amax().clamp_min(1e-30)).clamp(0, 8))  # what others have
    steps = STEPS_PER_OCTAVE // 4 + math.ceil(STEPS_PER_OCTAVE * larger)
    W, some_W = (pad(part, (0, -metric.inputs % GROUP)) for part in (W, some_W))
    best = _feedback(W, metric.factor, metric.order, fmt, starts[0].base * 2 ** (steps / STEPS_PER_OCTAVE))
    starts = [best._replace(q=_some(best.q), code=_some(best.code)), *(_filled_up(start, fmt) for start in starts)]
    first = min(range(3), key=lambda at: float(_row_errors(some_W, starts[at], H, fmt).sum()))
    if first:
        best = _filled_up(_start(W[:, : metric.inputs], metric, fmt, by_importance=first == 1), fmt)
    for _ in range(passes):
        best = _descend(W, _refit(W, best, H, fmt), H, fmt)
    return best._replace(q=best.q[:, : metric.inputs].contiguous())


def _start(W: Tensor, metric: Metric, fmt: LowbitFormat, *, by_importance: bool) -> Rounded:
    """Nearest codes, with scales for the inputs' activity or for none."""
    activity_K = metric.H_KK.diagonal()[: metric.inputs]
    return round_nearest(W, fmt, importance_K=activity_K if by_importance else None)


def _filled_up(rounded: Rounded, fmt: LowbitFormat) -> Rounded:
    """With codes of inputs that are hardly ever there, up to whole groups."""
    return rounded._replace(q=pad(rounded.q, (0, -rounded.q.shape[1] % GROUP), value=fmt.levels // 2))


def _some(rows: Tensor) -> Tensor:
    """At most 255 of them, spread evenly; all where they are no more than that."""
    return rows[:: max(1, len(rows) // _TRIED_ROWS)]


def unbiased(rounded: Rounded, W_NK: Tensor, H_KK: Tensor, fmt: LowbitFormat) -> Rounded:
    """With the scale of the matrix at which copy and matrix project alike, <W, Q>_H = <W, W>_H, on some of its rows:
    what errs least is smaller than the matrix by its relative error, and so are its outputs."""
    W_nK = _some(W_NK.float())
    copy = rounded._replace(q=_some(rounded.q), code=_some(rounded.code))
    WH_nK = W_nK @ H_KK.float()
    wanted, found = float((WH_nK * W_nK).sum()), float((WH_nK * dequantise_rounded(copy, fmt)).sum())
    return rounded._replace(base=rounded.base * wanted / found) if 0 < wanted < 2 * found else rounded


def _order(H: Tensor) -> Tensor:
    """Inputs group by group, the most active group first and the most active input of a group first: int64 [K]."""
    inputs_GS = torch.arange(len(H), device=H.device).view(-1, GROUP)
    active_GS = H.diagonal().view(-1, GROUP)
    inputs_GS = inputs_GS.gather(1, active_GS.argsort(dim=1, descending=True, stable=True))
    return inputs_GS[active_GS.sum(dim=1).argsort(descending=True, stable=True)].flatten()


def _inverse_factor(H: Tensor) -> Tensor | None:
    """Upper Cholesky factor of H^-1, with more damping while H is not numerically positive; None if it never is."""
    mean = H.diagonal().mean()
    for extra in (0.0, 0.01, 0.1, 1.0):
        lower, failed = torch.linalg.cholesky_ex(H + extra * mean * torch.eye(len(H), device=H.device))
        if not int(failed):
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not int(failed):
                return upper
    return None


def _feedback(W: Tensor, U_KK: Tensor, order: Tensor, fmt: LowbitFormat, base: float) -> Rounded:
    """GPTQ in blocks of one group: round an input, spread its error over the inputs still to come; to those far away
    the errors of a few groups at once, which reads them less often."""
    (N, K), size = W.shape, GROUP
    left_KN = W.T[order].contiguous()  # inputs first: the loop runs over contiguous rows
    codes_KN, errors_KN = torch.empty_like(left_KN), torch.empty_like(left_KN)
    code_NG = torch.empty(N, K // size, dtype=torch.uint8, device=W.device)
    centre = (fmt.levels - 1) / 2
    for at in range(0, K, size):
        span, near = slice(at, at + size), -(-(at + size) // _NEAR) * _NEAR
        block, codes, errors = left_KN[span], codes_KN[span], errors_KN[span]
        local = U_KK[span, span]
        weight = local.diagonal().pow(-2).view(1, 1, -1)
        code = nearest_code(search_scale(block.T.unsqueeze(1), fmt, FINE_SHARES, weight), base)
        code_NG[:, int(order[at]) // size] = code[:, 0]
        scale = scale_of(code[:, 0], base)
        inverse = 1 / scale
        steps = local.diagonal().tolist()
        for i in range(size):
            _round_into(codes[i], block[i], inverse, fmt)
            torch.sub(block[i], (codes[i] - centre).mul_(scale), out=errors[i]).div_(steps[i])
            block[i + 1 :].addr_(local[i, i + 1 :], errors[i], alpha=-1)
        if at + size < near:
            left_KN[at + size : near].addmm_(U_KK[span, at + size : near].T, errors, alpha=-1)
        else:
            left_KN[near:].addmm_(U_KK[near - _NEAR : near, near:].T, errors_KN[near - _NEAR : near], alpha=-1)
    q = codes_KN.to(torch.uint8)[order.argsort()].T.contiguous()
    return Rounded(q, code_NG, base)


def _round_into(out: Tensor, value: Tensor, inverse: Tensor, fmt: LowbitFormat) -> None:
    """The nearest codes, as floats, into `out`."""
    torch.mul(value, inverse, out=out).add_(fmt.levels / 2).floor_().clamp_(0, fmt.levels - 1)


def _row_errors(W: Tensor, rounded: Rounded, H: Tensor, fmt: LowbitFormat) -> Tensor:
    E = W - dequantise_rounded(rounded, fmt)
    return ((E @ H) * E).sum(dim=1)


def _refit(W: Tensor, rounded: Rounded, H: Tensor, fmt: LowbitFormat) -> Rounded:
    """Scales by least squares in H with the codes held; rows that snapping to scale codes makes worse stay.

    Row n: minimise |w - sum_g s_g z_g|_H with z_g the centred codes of group g, a [G, G] system per row.
    """
    N, K = W.shape
    groups = rounded.code.shape[1]
    z = rounded.q.float() - (fmt.levels - 1) / 2
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


def _descend(W: Tensor, rounded: Rounded, H: Tensor, fmt: LowbitFormat) -> Rounded:
    """Each code in turn to its best value with all others held: the error never rises. Blocked like `_feedback`."""
    K, size = W.shape[1], GROUP
    value_KN = dequantise_rounded(rounded, fmt).T.contiguous()
    scale_GN = scale_of(rounded.code, rounded.base).T.contiguous()
    codes_KN = torch.empty_like(value_KN)
    gradient_KN = H @ (W.T - value_KN)
    centre = (fmt.levels - 1) / 2
    for at in range(0, K, size):
        span = slice(at, at + size)
        scale, local, pull, value = scale_GN[at // size], H[span, span], gradient_KN[span].clone(), value_KN[span]
        inverse = 1 / scale
        before = value.clone()
        steps = local.diagonal().tolist()
        for i, codes in enumerate(codes_KN[span]):
            _round_into(codes, value[i].add(pull[i], alpha=1 / steps[i]), inverse, fmt)
            new = (codes - centre).mul_(scale)
            pull[i:].addr_(local[i, i:], new - value[i], alpha=-1)
            value[i] = new
        gradient_KN.addmm_(H[:, span], value - before, alpha=-1)
    return rounded._replace(q=codes_KN.to(torch.uint8).T.contiguous())
