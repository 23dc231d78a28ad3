"""Tiles of packed codes against float64, and the same bits from every instruction set.

Instructions that this CPU lacks are replaced in the IR by functions that do what their manual says, so what is written
for a newer CPU is tested on any.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import pytest
import torch
from lowbit_records import base_of, random_codes
from torch import Tensor

from buddymoe_ray.kernels import LowbitFormat, PackedMatrix, dequantise, pack
from buddymoe_ray.kernels.lowbit_tiles import LEVELS, host_level, module_text
from buddymoe_ray.kernels.machine_code import code_folder, native_functions

BITS = [1, 2, 3, 4, 8]
PREFIX = "llvm.x86.avx512."
DPBUSD = """
define internal <{n} x i32> @emulated.vpdpbusd.{width}(<{n} x i32> %sum, <{n} x i32> %u, <{n} x i32> %s) noinline {{
  %u8 = bitcast <{n} x i32> %u to <{bytes} x i8>
  %s8 = bitcast <{n} x i32> %s to <{bytes} x i8>
  %uw = zext <{bytes} x i8> %u8 to <{bytes} x i32>
  %sw = sext <{bytes} x i8> %s8 to <{bytes} x i32>
  %p = mul <{bytes} x i32> %uw, %sw
  %p0 = shufflevector <{bytes} x i32> %p, <{bytes} x i32> %p, <{n} x i32> <{of0}>
  %p1 = shufflevector <{bytes} x i32> %p, <{bytes} x i32> %p, <{n} x i32> <{of1}>
  %p2 = shufflevector <{bytes} x i32> %p, <{bytes} x i32> %p, <{n} x i32> <{of2}>
  %p3 = shufflevector <{bytes} x i32> %p, <{bytes} x i32> %p, <{n} x i32> <{of3}>
  %a = add <{n} x i32> %p0, %p1
  %b = add <{n} x i32> %p2, %p3
  %c = add <{n} x i32> %a, %b
  %d = add <{n} x i32> %sum, %c
  ret <{n} x i32> %d
}}
"""
PERMI2VAR = """
define internal <16 x float> @emulated.vpermi2var.ps.512(<16 x float> %a, <16 x i32> %i, <16 x float> %b) noinline {{
  %table = alloca [32 x float]
  %upper = getelementptr [32 x float], [32 x float]* %table, i32 0, i32 16
  store <16 x float> %a, [32 x float]* %table, align 4
  store <16 x float> %b, float* %upper, align 4
  %j = and <16 x i32> %i, {mask}
{lanes}  ret <16 x float> %v15
}}
"""


LOOKED_UP = """
define internal <64 x i8> @emulated.{name}(<64 x i8> %a, <64 x i8> %b{more}) noinline {{
  %table = alloca [{size} x i8]
  store <64 x i8> %a, [{size} x i8]* %table, align 1
{lanes}  ret <64 x i8> %v63
}}
"""
MULTISHIFT = """
define internal <64 x i8> @emulated.pmultishift.qb.512(<64 x i8> %which, <64 x i8> %bytes) noinline {{
  %q = bitcast <64 x i8> %bytes to <8 x i64>
{lanes}  ret <64 x i8> %v63
}}
"""


def by_lane(*steps: str) -> str:
    """A vector of 64 bytes `%v63`, lane by lane: the steps end with the lane's `%f`."""
    text, last = "", "zeroinitializer"
    for i in range(64):
        for step in (*steps, "%v{i} = insertelement <64 x i8> {last}, i8 %f{i}, i32 {i}"):
            text += f"  {step.format(i=i, last=last, qword=i // 8, begin=16 * (i // 16))}\n"
        last = f"%v{i}"
    return text


def look_up_of_bytes() -> str:
    """`pshufb` within 16 bytes each and `vpermi2b` in 128, and what takes bytes out of qwords."""
    upper = "  %half = getelementptr [128 x i8], [128 x i8]* %table, i32 0, i32 64\n"
    upper += "  store <64 x i8> %c, i8* %half, align 1\n"
    text = ""
    for name, more, size, mask, begin in (
        ("pshuf.b.512", "", 64, 15, "{begin}"),
        ("vpermi2var.qi.512", ", <64 x i8> %c", 128, 127, "0"),
    ):
        lanes = by_lane(
            "%i{i} = extractelement <64 x i8> %b, i32 {i}",
            f"%m{{i}} = and i8 %i{{i}}, {mask}",
            "%z{i} = zext i8 %m{i} to i32",
            f"%j{{i}} = add i32 %z{{i}}, {begin}",
            f"%p{{i}} = getelementptr [{size} x i8], [{size} x i8]* %table, i32 0, i32 %j{{i}}",
            "%f{i} = load i8, i8* %p{i}",
        )
        text += LOOKED_UP.format(name=name, more=more, size=size, lanes=(upper if more else "") + lanes)
    shifted = by_lane(
        "%q{i} = extractelement <8 x i64> %q, i32 {qword}",
        "%i{i} = extractelement <64 x i8> %which, i32 {i}",
        "%w{i} = zext i8 %i{i} to i64",
        "%r{i} = call i64 @llvm.fshr.i64(i64 %q{i}, i64 %q{i}, i64 %w{i})",
        "%f{i} = trunc i64 %r{i} to i8",
    )
    return text + MULTISHIFT.format(lanes=shifted) + "declare i64 @llvm.fshr.i64(i64, i64, i64)\n"


def emulated(text: str) -> str:
    """The module with its AVX-512 instructions done by functions."""
    kept = [line for line in text.splitlines() if not (line.startswith("declare") and PREFIX in line)]
    text = "\n".join(kept).replace(PREFIX, "emulated.")
    for n in (8, 16):
        of = {f"of{i}": ", ".join(f"i32 {4 * lane + i}" for lane in range(n)) for i in range(4)}
        text += DPBUSD.format(n=n, width=32 * n, bytes=4 * n, **of)
    lanes, last = "", "zeroinitializer"
    for i in range(16):
        lanes += f"  %i{i} = extractelement <16 x i32> %j, i32 {i}\n"
        lanes += f"  %p{i} = getelementptr [32 x float], [32 x float]* %table, i32 0, i32 %i{i}\n"
        lanes += f"  %f{i} = load float, float* %p{i}\n"
        lanes += f"  %v{i} = insertelement <16 x float> {last}, float %f{i}, i32 {i}\n"
        last = f"%v{i}"
    mask = "<" + ", ".join(["i32 31"] * 16) + ">"
    return text + PERMI2VAR.format(mask=mask, lanes=lanes) + look_up_of_bytes()


@cache
def functions(bits: int, wide: bool, level: str) -> dict[str, int]:
    if level == "baseline":
        text, baseline = module_text(LowbitFormat(bits=bits), wide=wide, level="plain"), True
    else:
        text, baseline = module_text(LowbitFormat(bits=bits), wide=wide, level=level), False
        if level != host_level():
            text = emulated(text)
    return dict(native_functions(text, ("project", "quantise") if wide else ("project",), baseline=baseline))


def native(address: int, *arguments: int) -> None:
    ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * len(arguments))(address)(*arguments)


def product(packed: PackedMatrix, x_RK: Tensor, bits: int, wide: bool, level: str) -> Tensor:
    """`x @ W.T` for whole tiles, all rows in one call."""
    (A, G, _), made = packed.codes.shape, functions(bits, wide, level)
    rows = torch.zeros(len(x_RK), (72 if wide else 128) * G, dtype=torch.uint8)
    out = torch.full((len(x_RK), 16 * A), float("nan"))
    for row, x in zip(rows, x_RK, strict=True):
        if wide:
            native(made["quantise"], x.data_ptr(), G, row.data_ptr())
        else:
            row.copy_(x.view(torch.uint8))
    pairs = torch.tensor([[row.data_ptr(), y.data_ptr()] for row, y in zip(rows, out, strict=True)])
    places = (packed.codes.data_ptr(), packed.scales.data_ptr(), packed.base.data_ptr())
    native(made["project"], *places, x_RK.shape[1], 16 * A, pairs.data_ptr(), len(x_RK))
    return out


def case(bits: int, R: int, N: int = 48, K: int = 160) -> tuple[PackedMatrix, Tensor, Tensor]:
    """A matrix with scales of every code, rows of very different sizes, and the exact product."""
    rng = torch.Generator().manual_seed(bits)
    q_NK, code_NG = random_codes(N, K, LowbitFormat(bits=bits), rng)
    fmt = LowbitFormat(bits=bits)
    code_NG = torch.randint(0, 1 << fmt.scale_bits, code_NG.shape, generator=rng).to(torch.uint8)
    packed = pack(q_NK, code_NG, base_of(0.3, fmt), fmt)
    x_RK = torch.randn(R, K, generator=rng) * torch.logspace(-6, 6, R).unsqueeze(1)
    x_RK[0, 32:64] = 0.0
    return packed, x_RK, x_RK.double() @ dequantise(packed, LowbitFormat(bits=bits)).double().T


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("wide", [False, True])
def test_products_are_those_of_the_reference(bits: int, wide: bool) -> None:
    """Errors against float64 by row: float32 rows 1e-6, 16-bit rows 1e-4."""
    packed, x_RK, exact_RN = case(bits, 33)
    got_RN = product(packed, x_RK, bits, wide, host_level())
    error_R = (got_RN - exact_RN).norm(dim=1) / exact_RN.norm(dim=1)
    assert float(error_R.max()) < (1e-4 if wide else 1e-6)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("wide", [False, True])
def test_a_row_has_its_bits_alone_and_among_others(bits: int, wide: bool) -> None:
    packed, x_RK, _ = case(bits, 33)
    whole = product(packed, x_RK, bits, wide, host_level())
    for R in (1, 2, 3, 5, 8, 9):
        for at in (0, 33 - R):
            assert torch.equal(product(packed, x_RK[at : at + R], bits, wide, host_level()), whole[at : at + R])


@pytest.mark.parametrize(
    ("bits", "wide"), [(1, True), (2, False), (2, True), (3, False), (3, True), (4, True), (8, True)]
)
@pytest.mark.parametrize("level", [*LEVELS, "baseline"])
def test_every_instruction_set_gives_the_same_bits(bits: int, wide: bool, level: str) -> None:
    if level in ("avx2", "avxvnni") and host_level() == "plain":
        pytest.skip("this CPU has no AVX2")
    packed, x_RK, _ = case(bits, 15)
    assert torch.equal(product(packed, x_RK, bits, wide, level), product(packed, x_RK, bits, wide, host_level()))


def test_what_is_not_finite_makes_its_own_row_nan() -> None:
    for bad in (float("nan"), float("inf"), -float("inf")):
        packed, x_RK, exact_RN = case(4, 5)
        x_RK[2, 70] = bad
        got = product(packed, x_RK, 4, True, host_level())
        assert got.isnan().all(dim=1).tolist() == [False, False, True, False, False]
        torch.testing.assert_close(
            got[3:].double(), exact_RN[3:], rtol=1e-3, atol=1e-3 * float(exact_RN[3:].abs().max())
        )


def test_the_largest_sums_do_not_overflow() -> None:
    """Every code and every activation at its end, in both signs."""
    fmt = LowbitFormat(bits=8)
    for code, sign in ((255, 1.0), (255, -1.0), (0, 1.0), (0, -1.0)):
        q_NK, code_NG = torch.full((16, 64), code, dtype=torch.uint8), torch.zeros(16, 2, dtype=torch.uint8)
        packed, x_RK = pack(q_NK, code_NG, base_of(1.0, fmt), fmt), torch.full((1, 64), 3.0 * sign)
        for level in LEVELS:
            if level == "plain" or host_level() != "plain":
                got = product(packed, x_RK, 8, True, level)
                torch.testing.assert_close(
                    got, torch.full((1, 16), 64 * 3.0 * sign * (code - 127.5)), rtol=1e-6, atol=0
                )


def test_code_that_is_not_whole_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    text = module_text(LowbitFormat(bits=8), wide=False, level=host_level())
    native_functions(text, ("project",))
    (kept,) = (code_folder() or tmp_path).glob("*.o")
    whole = kept.read_bytes()
    for broken in (b"", whole[:20], whole[:-1], whole[:40] + bytes([whole[40] ^ 1]) + whole[41:]):
        kept.write_bytes(broken)
        native_functions(text, ("project",))
        assert kept.read_bytes() == whole
