"""What each field of a profile may hold: shapes, dtypes, ranges. For makers and readers alike.

Knows nothing of files or of where numbers come from. `canonical_*` return the value in the form that is kept, or raise
ProfileError naming the field. Neighbour: `profile` keeps the fields and writes them.

Legend: L MoE layers, E experts of the widest layer, T sampled tokens, K experts per token, P percentiles (0 to 100).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from buddymoe_ray.errors import ProfileError

__all__ = [
    "ARRAYS",
    "ERRORS",
    "FieldSpec",
    "canonical_array",
    "canonical_number",
    "canonical_row",
    "canonical_text",
    "check_kind",
    "wrong",
]

Array = npt.NDArray[Any]
Row = TypeVar("Row")

PERCENTILES = 101
_KIND = re.compile(r"[a-z][a-z0-9]*(:[a-z]+)?")


@dataclass(frozen=True, kw_only=True)
class FieldSpec:
    """`axes` has a letter per dimension (see legend); `dtype` is numpy's, `ids` the smallest that counts to E.

    `signed` arrays may be below zero, `nan` ones may lack numbers, `optional` ones may be empty as a whole.
    """

    axes: str
    dtype: str = "<f4"
    signed: bool = False
    nan: bool = False
    optional: bool = False

    def dtype_for(self, experts: int) -> np.dtype[Any]:
        """The dtype kept for a model of so many experts."""
        if self.dtype == "ids":
            return np.dtype("|u1" if experts <= 256 else "<u2")
        return np.dtype(self.dtype)


ARRAYS: Mapping[str, FieldSpec] = {
    "counts_LE": FieldSpec(axes="LE", dtype="<u4"),
    "weight2_LE": FieldSpec(axes="LE"),
    "energy_LE": FieldSpec(axes="LE"),
    "coactivation_LEE": FieldSpec(axes="LEE", dtype="<u4"),
    "tae_LP": FieldSpec(axes="LP"),
    "margin_LP": FieldSpec(axes="LP"),
    "entropy_L": FieldSpec(axes="L"),
    "reuse_L": FieldSpec(axes="L"),
    "next_layer_recall_L": FieldSpec(axes="L", nan=True),
    "pair_error_LEE": FieldSpec(axes="LEE", optional=True),
    "pair_scale_LEE": FieldSpec(axes="LEE", signed=True, optional=True),
    "sensitivity_L": FieldSpec(axes="L", nan=True),
    "routes_TLK": FieldSpec(axes="TLK", dtype="ids"),
    "route_weights_TLK": FieldSpec(axes="TLK", dtype="<f2", signed=True),
}
ERRORS = FieldSpec(axes="LE")
"""Each table in `errors`."""


def wrong(name: str, found: object, wanted: object) -> ProfileError:
    """The error for a field that is not what it must be."""
    return ProfileError(f"{name} is {found}, must be {wanted}. hint: run buddymoe profile again")


def canonical_array(name: str, value: object, spec: FieldSpec, sizes: Mapping[str, int]) -> Array:
    """`value` in the dtype of `spec`, its shape and numbers checked. `sizes` gives L, E, K and T."""
    if not isinstance(value, np.ndarray):
        raise wrong(name, type(value).__name__, "an array")
    if spec.optional and value.size == 0:
        return np.zeros(0, spec.dtype_for(sizes["E"]))
    shape = tuple(PERCENTILES if axis == "P" else sizes[axis] for axis in spec.axes)
    if value.shape != shape:
        raise wrong(name, f"of shape {list(value.shape)}", f"of shape {list(shape)}")
    if value.dtype.kind not in "fiu":
        raise wrong(name, f"of dtype {value.dtype}", "numbers")
    dtype = spec.dtype_for(sizes["E"])
    finite = np.isfinite(value)
    if not (finite | (np.isnan(value) if spec.nan else False)).all():
        raise wrong(name, f"{_first(value, ~finite)} in one place", "finite everywhere")
    if not spec.signed and (value < 0).any():
        raise wrong(name, f"{_first(value, value < 0)} in one place", "at least 0 everywhere")
    if dtype.kind == "u" and value.size and (value.max() > np.iinfo(dtype).max or (value != np.floor(value)).any()):
        raise wrong(name, f"up to {value.max()}", f"whole numbers up to {np.iinfo(dtype).max}")
    with np.errstate(over="ignore"):
        kept = np.ascontiguousarray(value, dtype=dtype)
    if not (np.isfinite(kept) == finite).all():
        raise wrong(name, f"up to {np.nanmax(np.abs(value))}", f"within {dtype.name}")
    return kept


def canonical_number(name: str, value: object, kind: type, *, least: float = 0, finite: bool = True) -> Any:
    """`value` as a plain int, float or bool."""
    if kind is bool:
        if not isinstance(value, bool | np.bool_):
            raise wrong(name, repr(value), "true or false")
        return bool(value)
    allowed = (int, np.integer) if kind is int else (int, float, np.integer, np.floating)
    if not isinstance(value, allowed) or isinstance(value, bool):
        raise wrong(name, repr(value), "a whole number" if kind is int else "a number")
    number = kind(value)
    if finite and not (math.isfinite(number) and number >= least):
        raise wrong(name, number, "finite" if least == -math.inf else f"at least {least}")
    return number


def canonical_text(name: str, value: object, *, empty: bool = False) -> str:
    """`value` as a string."""
    if not isinstance(value, str) or not (value or empty):
        raise wrong(name, repr(value), "a text")
    return value


def check_kind(name: str, kind: object) -> str:
    """The name of a kind of stand-in, such as `lowbit3` or `buddy:output`."""
    if not isinstance(kind, str) or _KIND.fullmatch(kind) is None:
        raise wrong(f"a kind in {name}", repr(kind), "a name such as lowbit3 or buddy:output")
    return kind


def canonical_row(name: str, row: object, cls: type[Row]) -> Row:
    """A row of a table with plain values; standard errors may be unknown (NaN), nothing else."""
    if not isinstance(row, cls):
        raise wrong(f"a row of {name}", type(row).__name__, cls.__name__)
    made: dict[str, Any] = {}
    for field in fields(row):  # type: ignore[arg-type]
        value, label = getattr(row, field.name), f"{field.name} of a row of {name}"
        if field.type == "str":
            made[field.name] = canonical_text(label, value)
        elif field.type == "int":
            made[field.name] = canonical_number(label, value, int)
        else:
            made[field.name] = canonical_number(label, value, float, least=-math.inf, finite=field.name[-3:] != "_se")
    return cls(**made)


def _first(value: Array, where: Array) -> Any:
    return value[where].flat[0]
