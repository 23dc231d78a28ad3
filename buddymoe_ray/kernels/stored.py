"""Products with matrices as they are stored: which dtypes this CPU multiplies in machine code, and with which of it.

Rows of an engine that computes in bfloat16 are rounded to it where they are not of it yet, as between the modules of
transformers; then an AVX-512 CPU with bfloat16 products multiplies them as they are (stored_dots.py), and others to
the same bits (stored_tiles.py).
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from functools import cache

import torch

from buddymoe_ray.kernels.expert_calls import ITEM_BYTES, PANEL, Product

__all__ = ["stored_functions", "stored_product", "widens"]

_OUTPUTS = 8192
"""Of a matrix at once, at most, where it has so many equal parts: 32 rows of 50,304 outputs, 6.4 MB that were new
pages in every step, took 2,350 page faults."""


@cache
def widens(weights: str | torch.dtype) -> bool:
    """Whether this CPU multiplies weights stored in a dtype in machine code."""
    import llvmlite.binding as llvm

    name = _name(weights)
    if platform.machine() in ("aarch64", "arm64"):
        return name in ITEM_BYTES
    has = llvm.get_host_cpu_features()
    return name in ITEM_BYTES and bool(has.get("fma")) and (name != "float16" or bool(has.get("f16c")))


def stored_product(
    place: int, shape: tuple[int, int], weights: str | torch.dtype, rows: torch.dtype, bias: tuple[int, int] = (0, 0)
) -> Product:
    """A matrix [N, K] as it is stored, in the dtype `weights`, for an engine whose `rows` are of that dtype; `bias` is
    a place and the bytes of an item."""
    name = _name(weights)
    native = stored_functions(name)
    made: tuple[int, ...] = native["project"], native.get("spread", 0)
    if name == "bfloat16" and rows == torch.bfloat16:
        dots = _dot_functions()
        made = (dots["project"], dots["round"], PANEL) if dots else (native["project"], native["spread_rounded"])
    (N, K), product = shape, Product(place, 0, 0, *bias, *shape, *made)
    least = -(-N // _OUTPUTS)
    parts = next((parts for parts in range(least, 4 * least) if N % parts == 0), 1)
    return product._replace(parts=parts, code_step=N // parts * K * ITEM_BYTES[name])


def stored_functions(weights: str | torch.dtype) -> Mapping[str, int]:
    """Addresses of what stored_tiles.py writes for weights of that dtype; made, or loaded, by the first call."""
    return _stored_functions(_name(weights))


@cache
def _stored_functions(name: str) -> Mapping[str, int]:
    from buddymoe_ray.kernels.lowbit_tiles import host_level
    from buddymoe_ray.kernels.machine_code import native_functions
    from buddymoe_ray.kernels.stored_tiles import stored_module_text

    names = ("project", "project_strided", "blend") + (("spread", "spread_rounded") if name == "bfloat16" else ())
    return native_functions(stored_module_text(name, registers=32 if host_level().startswith("avx512") else 16), names)


@cache
def _dot_functions() -> Mapping[str, int]:
    """Those of stored_dots.py, none where this CPU does not run them."""
    from buddymoe_ray.kernels.machine_code import native_functions
    from buddymoe_ray.kernels.stored_dots import dots_module_text, has_dots

    return native_functions(dots_module_text(), ("project", "round")) if has_dots() else {}


def _name(dtype: str | torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
