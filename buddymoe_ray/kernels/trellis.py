"""Trellis codes: b bits choose a weight's value together with the bits of the weights beside it.

The codes of a ring of weights are one string of bits, and a weight's value is looked up by the WINDOW bits that end
with its own code, so that every weight has 128 values to choose from, of which its neighbours' choices leave 2 ** b.
On normal weights the mean square error is .291, .083 and .024 for 1, 2 and 3 bits; codes that choose alone leave .364,
.120 and .038 (trellis coded quantisation: Marcellin & Fischer 1990; read by a shift and a table: QTIP, Tseng et al.
2024). A ring begins in its own last bits, and so costs not one bit more.

A ring is four inputs of as many outputs as make it up: those of a quad of a tile (lowbit_format.py). Knows no scales.

Tried and dropped: rings of 32 positions for 1 bit (.307) and 16 for 2 (.093); windows of 8 bits (.292 and .082, for
three more instructions a vector); states that know the errors of the inputs before (nothing more in the answers of
experts, several times as slow).

Legend: R rings, P positions of a ring, b bits of a code, N outputs, K inputs.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from buddymoe_ray.kernels.expert_calls import LINE
from buddymoe_ray.kernels.trellis_tables import DEAR, MIDPOINT, QUAD, RINGS, TABLES, WINDOW

__all__ = ["best_codes", "levels_above", "search_address", "search_room", "values", "values_of_quads", "windows_of"]

_TILE = 16


def windows_of(codes_RP: Tensor, bits: int) -> Tensor:
    """uint8 `[..., P]`: the windows of rings of codes, which index a table."""
    found = torch.zeros_like(codes_RP)
    for back in range(-(-WINDOW // bits)):
        shift, code = WINDOW - bits * (back + 1), codes_RP.roll(back, -1)
        found |= code << shift if shift >= 0 else code >> -shift
    return found


def values_of_quads(codes_4N: Tensor, bits: int) -> Tensor:
    """float32 `[..., 4, N]` of codes uint8 `[..., 4, N]` of quads of inputs: levels above the midpoint."""
    windows = windows_of(_rings(codes_4N, bits), bits)
    found = levels_above(bits, windows.device).index_select(0, windows.flatten().int())
    return _quads(found.view(windows.shape), codes_4N.shape)


def values(q_NK: Tensor, bits: int) -> Tensor:
    """float32 `[N, K]` of a matrix's codes uint8 `[N, K]`, as `values_of_quads`."""
    N, K = q_NK.shape
    quads = pad(q_NK, (0, -K % QUAD)).T.reshape(-1, QUAD, N)
    return values_of_quads(quads, bits).reshape(-1, N)[:K].T.contiguous()


def _rings(quads_4N: Tensor, bits: int, beyond: float = 0) -> Tensor:
    """`[..., 4, N] -> [..., rings, P]`; outputs `beyond` N, up to a whole tile, have that for a value."""
    whole = pad(quads_4N, (0, -quads_4N.shape[-1] % _TILE), value=beyond)
    return whole.transpose(-1, -2).reshape(*whole.shape[:-2], -1, RINGS[bits])


def _quads(rings: Tensor, shape: torch.Size) -> Tensor:
    """The inverse."""
    return rings.reshape(*shape[:-2], -1, QUAD).transpose(-1, -2)[..., : shape[-1]]


@cache
def levels_above(bits: int, device: torch.device) -> Tensor:
    """float32 `[128]`: the values of the windows, before scales."""
    return torch.tensor(list(TABLES[bits]), dtype=torch.float32, device=device) - MIDPOINT


def best_codes(
    x_4N: Tensor, weight_4N: Tensor, bits: int, codes_4N: Tensor | None = None, *, half: bool = False
) -> Tensor:
    """uint8 `[..., 4, N]` codes of quads of inputs, whose values (levels above the midpoint) differ from `x` by the
    least weighted sum of squares; float32 both. Where a weight is negative the code is 0.

    With `codes_4N` rings keep the state that these have at their beginning, or `half` a ring on: then none is worse
    than before. Else the state is that of a search that began half a ring away, and a second one closes the ring.
    """
    x_RP, weight_RP = _rings(x_4N, bits).flatten(0, -2), _rings(weight_4N, bits, -1.0).flatten(0, -2)
    codes_RP = torch.zeros_like(x_RP, dtype=torch.uint8) if codes_4N is None else _rings(codes_4N, bits).flatten(0, -2)
    middle = RINGS[bits] // 2
    turns = [(middle, True), (0, False)] if codes_4N is None else [(middle if half else 0, False)]
    search = _search if x_RP.device.type == "cpu" else _search_in_torch
    return _quads(search(x_RP, weight_RP, bits, codes_RP, turns), x_4N.shape)


def _search(x_RP: Tensor, weight_RP: Tensor, bits: int, codes_RP: Tensor, turns: list[tuple[int, bool]]) -> Tensor:
    """By machine code: for each turn where it begins, and whether in any state."""
    from buddymoe_ray.kernels.trellis_rings import LANES

    R, P = x_RP.shape
    x, weight, codes = (
        pad(part, (0, 0, 0, -R % LANES)).view(-1, LANES, P).transpose(1, 2).contiguous()
        for part in (x_RP, weight_RP, codes_RP)
    )
    room, table = search_room(), levels_above(bits, x.device)
    search = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 8)(search_address(bits))
    places = [part.data_ptr() for part in (x, weight, codes, table)]
    for first, free in turns:
        search(*places, first, int(free), room.data_ptr(), len(x))
    return codes.transpose(1, 2).reshape(-1, P)[:R]


@cache
def search_address(bits: int) -> int:
    """The machine code of trellis_rings.py."""
    from buddymoe_ray.kernels.machine_code import native_functions
    from buddymoe_ray.kernels.trellis_rings import module_text

    return native_functions(module_text(bits), ("search",))["search"]


def search_room() -> Tensor:
    """Its scratch, where a line begins."""
    from buddymoe_ray.kernels.trellis_rings import SCRATCH_BYTES

    room = torch.empty(SCRATCH_BYTES + LINE, dtype=torch.uint8)
    return room[-room.data_ptr() % LINE :]


def _search_in_torch(
    x_RP: Tensor, weight_RP: Tensor, bits: int, codes_RP: Tensor, turns: list[tuple[int, bool]]
) -> Tensor:
    """The spec, and what other devices run."""
    for first, free in turns:
        codes_RP = _turn(x_RP, weight_RP, bits, codes_RP, first, free=free)
    return codes_RP


def _turn(x_RP: Tensor, weight_RP: Tensor, bits: int, codes_RP: Tensor, first: int, *, free: bool) -> Tensor:
    (R, P), S, B = x_RP.shape, 1 << (WINDOW - bits), 1 << bits
    table, start = levels_above(bits, x_RP.device), windows_of(codes_RP, bits)[:, first - 1].long() >> bits
    order = [(first + k) % P for k in range(P)]
    cost, chosen = x_RP.new_zeros(R, S), list[Tensor]()
    if not free:
        cost = torch.full_like(cost, torch.inf).scatter_(1, start[:, None], 0.0)
    for p in order:
        rise = weight_RP[:, p, None].clamp_min(0) * (table - x_RP[:, p, None]) ** 2
        rise[:, 1 << (WINDOW - bits) :] += torch.where(weight_RP[:, p, None] < 0, DEAR, 0.0)
        cost, best = (cost.repeat(1, B) + rise).view(R, S, B).min(dim=2)
        chosen.append(best)
    state, codes = cost.argmin(dim=1) if free else start, torch.empty_like(codes_RP)
    for p, best in zip(reversed(order), reversed(chosen), strict=True):
        window = B * state + best.gather(1, state[:, None]).squeeze(1)
        codes[:, p] = window >> (WINDOW - bits)
        state = window & (S - 1)
    return codes
