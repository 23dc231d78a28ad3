"""Rounds one matrix so that its outputs change least: error feedback, refitted scales, coordinate descent.

Does not know models, layers or corpora: weights and second moments of their inputs come in, codes go out. Invariant:
each stage keeps or lowers tr((W - Q) H (W - Q)^T), the mean squared output error, and none ends above plain rounding.
Neighbours: kernels.rounding is the start, rounding.py rounds whole experts.

Legend: N outputs, K inputs, G groups of a row, S inputs in a group, n rows of a chunk, R rows (tokens).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from buddymoe_ray.kernels.lowbit_format import GROUP, LowbitFormat
from buddymoe_ray.kernels.rounding import (
    FINE_SHARES,
    Rounded,
    dequantise_rounded,
    nearest_code,
    round_nearest,
    round_plain,
    scale_of,
    search_scale,
)

__all__ = ["moment", "round_compensated", "unbiased", "weighted_error"]


def moment(x_RK: Tensor, weight_R: Tensor | None = None) -> Tensor:
    """The weighted mean of x x^T, float32 [K, K]: the metric in which a matrix's error is the output's."""
    x = x_RK.float() if weight_R is None else x_RK.float() * weight_R.float().unsqueeze(1)
    total = x.shape[0] if weight_R is None else float((weight_R.double() ** 2).sum())
    return x.T @ x / max(total, 1e-30)


def weighted_error(W_NK: Tensor, rounded: Rounded, H_KK: Tensor, fmt: LowbitFormat) -> float:
    """tr(E H E^T): the mean squared norm of the output error on inputs whose second moment is H."""
    E = W_NK.float() - dequantise_rounded(rounded, fmt)
    return float(((E @ H_KK.float()) * E).sum())


def round_compensated(
    W_NK: Tensor,
    H_KK: Tensor,
    fmt: LowbitFormat,
    *,
    damping: float = 0.01,
    by_activity: bool = True,
    passes: int = 4,
) -> Rounded:
    """Round so that (W - Q) H (W - Q)^T is small: error feedback, then exact coordinate descent.

    GPTQ (Frantar et al. 2023, algorithm 1) over groups, the most active first (`by_activity`), each group's scale
    searched on the weights as already compensated, errors weighted by 1/diag(chol)^2; then `passes` times: scales
    refitted by least squares in H, codes improved one input at a time (as in QuantEase, Behdin et al. 2023).

    Args:
        W_NK: float [N, K].
        H_KK: second moment of the inputs [K, K], any scale.
        damping: share of the mean diagonal added to the diagonal.
    """
    W = W_NK.float()
    H = H_KK.float()
    K, mean = len(H), float(H.diagonal().mean())
    if not (bool(torch.isfinite(H).all()) and mean > 0):
        return round_plain(W, fmt)
    H = H + damping * mean * torch.eye(K, device=H.device)
    unweighted = round_nearest(W, fmt)
    if K % GROUP:
        unweighted = unweighted._replace(q=pad(unweighted.q, (0, -K % GROUP), value=fmt.levels // 2))
        W, H = _filled_up(W, H, 1e-6 * mean)
    plain = round_nearest(W, fmt, importance_K=H.diagonal())
    order = _order(H, by_activity)
    factor = _inverse_factor(H[order][:, order])
    if factor is None:
        return plain._replace(q=plain.q[:, :K].contiguous())
    starts = [plain, unweighted, _feedback(W, factor, order, fmt, plain.base * 2**0.25)]
    best = min(reversed(starts), key=lambda start: float(_row_errors(W, start, H, fmt).sum()))
    for _ in range(passes):
        best = _descend(W, _refit(W, best, H, fmt), H, fmt)
    return best._replace(q=best.q[:, :K].contiguous())


def unbiased(rounded: Rounded, W_NK: Tensor, H_KK: Tensor, fmt: LowbitFormat) -> Rounded:
    """With the scale of the matrix at which copy and matrix project alike, <W, Q>_H = <W, W>_H: what errs least is
    smaller than the matrix by its relative error, and so are its outputs."""
    WH_NK = W_NK.float() @ H_KK.float()
    wanted, found = float((WH_NK * W_NK).sum()), float((WH_NK * dequantise_rounded(rounded, fmt)).sum())
    return rounded._replace(base=rounded.base * wanted / found) if 0 < wanted < 2 * found else rounded


def _filled_up(W: Tensor, H: Tensor, moment: float) -> tuple[Tensor, Tensor]:
    """With inputs that are hardly ever there and have no weight, up to whole groups."""
    more = -len(H) % GROUP
    filled = pad(H, (0, more, 0, more))
    filled.diagonal()[-more:] = moment
    return pad(W, (0, more)), filled


def _order(H: Tensor, by_activity: bool) -> Tensor:
    """Inputs group by group, the most active group first and the most active input of a group first: int64 [K]."""
    inputs_GS = torch.arange(len(H), device=H.device).view(-1, GROUP)
    if not by_activity:
        return inputs_GS.flatten()
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
    """GPTQ in blocks of one group: round an input, spread its error over the inputs still to come."""
    (N, K), size = W.shape, GROUP
    left_KN = W.T[order].contiguous()  # inputs first: the loop runs over contiguous rows
    codes_KN = torch.empty_like(left_KN)
    code_NG = torch.empty(N, K // size, dtype=torch.uint8, device=W.device)
    centre = (fmt.levels - 1) / 2
    for at in range(0, K, size):
        block, codes, U = left_KN[at : at + size], codes_KN[at : at + size], U_KK[at : at + size]
        local = U[:, at : at + size]
        weight = local.diagonal().pow(-2).view(1, 1, -1)
        code = nearest_code(search_scale(block.T.unsqueeze(1), fmt, FINE_SHARES, weight), base)
        code_NG[:, int(order[at]) // size] = code[:, 0]
        scale = scale_of(code[:, 0], base)
        inverse = 1 / scale
        errors = torch.empty_like(block)
        steps = local.diagonal().tolist()
        for i in range(size):
            _round_into(codes[i], block[i], inverse, fmt)
            torch.sub(block[i], (codes[i] - centre).mul_(scale), out=errors[i]).div_(steps[i])
            block[i + 1 :].addr_(local[i, i + 1 :], errors[i], alpha=-1)
        left_KN[at + size :].addmm_(U[:, at + size :].T, errors, alpha=-1)
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
