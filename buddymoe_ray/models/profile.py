"""The calibration of one model: tables of numbers in one msgpack file, bound to the model's hash.

Knows neither how a number was measured (`calibrate`) nor how it is used (`engine`). Reading is strict: anything that is
not exactly a profile of this version and this model is refused, and says what is wrong with it. Never unpickles.
Neighbour: `profile_fields` says what each field may hold.

Legend: L MoE layers, E experts of the widest layer, T sampled tokens, K experts per token, P percentiles (0 to 100).
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import numpy.typing as npt

from buddymoe_ray.errors import ProfileError
from buddymoe_ray.models.profile_fields import (
    ARRAYS,
    ERRORS,
    canonical_array,
    canonical_number,
    canonical_row,
    canonical_text,
    check_kind,
    wrong,
)

__all__ = [
    "NAME",
    "VERSION",
    "BudgetPoint",
    "ComparisonRow",
    "Profile",
    "default_profile_path",
    "load_profile",
    "profile_path",
    "save_profile",
]

NAME = "buddymoe.profile"
VERSION = 2
"""Of a profile, and of the records beside it: 2 since copies of 1 to 3 bits are trellis codes."""
_MAGIC = "buddymoe-profile"
_MOST_BYTES = 1 << 30

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class ComparisonRow:
    """One stand-in at one memory on text that the calibration did not see; nothing fetched in decode."""

    standin: str
    memory_percent: float
    dppl_percent: float
    dppl_se: float
    kl: float
    top1_agreement: float
    miss_rate: float
    tokens: int


@dataclass(frozen=True, kw_only=True)
class BudgetPoint:
    """`bounded` at one memory and budget (nats per token)."""

    memory_percent: float
    budget: float
    dppl_percent: float
    dppl_se: float
    fetched_fraction: float
    expected_rise: float
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What calibration learned.

    Args:
        model_hash, model, corpus_sha, created_by: what it is of and from.
        calibration_tokens: tokens that the tables count.
        counts_LE: accesses of each expert.
        weight2_LE: mean squared slot weight of an access.
        energy_LE: mean squared norm of an expert's output over its accesses.
        coactivation_LEE: tokens whose top-k holds both experts.
        tae_LP, margin_LP: percentiles of the top-k's normalised entropy and of p1 - p2.
        entropy_L: mean entropy of the router's whole distribution over ln E, where known, else of the top-k.
        reuse_L: share of a token's experts that the next token uses too.
        next_layer_recall_L: share of the next layer's top-k named by its router on this layer's input; NaN where
            there is no next layer.
        errors: per kind of stand-in, mean squared norm of its output error `[L, E]`.
        pair_error_LEE, pair_scale_LEE: mean squared error when column j, scaled, answers tokens routed to row i.
        record_bytes: bytes of one expert's record, per kind that has one.
        sensitivity_L: nats of divergence per squared slot weight and squared error; NaN when not measured.
        kind_scale: measured over predicted divergence of each kind used everywhere.
        routes_TLK, route_weights_TLK: experts and slot weights of sampled tokens.
        comparison, budget_curve: measured on the calibration's own held-out part; a standard error may be NaN.
        recommended: the stand-in to use, None when nothing is within the budget; `reason` says why.
    """

    model_hash: str
    model: str
    corpus_sha: str
    created_by: str
    calibration_tokens: int
    layers: int
    experts: int
    top_k: int
    norm_topk: bool
    counts_LE: Array
    weight2_LE: Array
    energy_LE: Array
    coactivation_LEE: Array
    tae_LP: Array
    margin_LP: Array
    entropy_L: Array
    reuse_L: Array
    next_layer_recall_L: Array
    errors: Mapping[str, Array]
    pair_error_LEE: Array
    pair_scale_LEE: Array
    record_bytes: Mapping[str, int]
    sensitivity_L: Array
    kind_scale: Mapping[str, float]
    routes_TLK: Array
    route_weights_TLK: Array
    comparison: tuple[ComparisonRow, ...] = ()
    budget_curve: tuple[BudgetPoint, ...] = ()
    recommended: str | None = None
    reason: str = ""

    def __post_init__(self) -> None:
        """Bring every field to the form that is kept. Raises ProfileError naming the field that cannot be."""
        for name in ("model_hash", "model", "corpus_sha", "created_by", "reason"):
            canonical_text(name, getattr(self, name), empty=name in ("corpus_sha", "reason"))
        if self.recommended is not None:
            canonical_text("recommended", self.recommended)
        for name in ("calibration_tokens", "layers", "experts", "top_k"):
            self._keep(name, canonical_number(name, getattr(self, name), int, least=1))
        self._keep("norm_topk", canonical_number("norm_topk", self.norm_topk, bool))
        if self.top_k > self.experts:
            raise wrong("top_k", self.top_k, f"at most {self.experts}, the number of experts")
        self._keep_arrays()
        for name, row_type in _ROWS.items():
            rows = getattr(self, name)
            if not isinstance(rows, tuple | list):
                raise wrong(name, type(rows).__name__, "rows")
            self._keep(name, tuple(canonical_row(name, row, row_type) for row in rows))
        for name, kind, least in (("record_bytes", int, 1), ("kind_scale", float, 0)):
            table = {
                key: canonical_number(f"{name}[{key}]", value, kind, least=least) for key, value in self._items(name)
            }
            self._keep(name, table)

    def _keep_arrays(self) -> None:
        routes = self.routes_TLK
        tokens = len(routes) if isinstance(routes, np.ndarray) and routes.ndim else 0
        sizes = {"L": self.layers, "E": self.experts, "K": self.top_k, "T": tokens}
        for name, spec in ARRAYS.items():
            self._keep(name, canonical_array(name, getattr(self, name), spec, sizes))
        self._keep(
            "errors", {kind: canonical_array(f"errors[{kind}]", a, ERRORS, sizes) for kind, a in self._items("errors")}
        )
        if tokens and int(self.routes_TLK.max()) >= self.experts:
            raise wrong("routes_TLK", f"up to {self.routes_TLK.max()}", f"below {self.experts}, the number of experts")
        if self.pair_error_LEE.shape != self.pair_scale_LEE.shape:
            raise wrong("pair_scale_LEE", "of another shape than pair_error_LEE", "of the same")

    def _items(self, name: str) -> list[tuple[str, Any]]:
        table = getattr(self, name)
        if not isinstance(table, Mapping):
            raise wrong(name, type(table).__name__, "a table by kind of stand-in")
        return [(check_kind(name, kind), value) for kind, value in table.items()]

    def _keep(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # frozen for everyone else

    @property
    def measured(self) -> bool:
        """Whether sensitivities were measured, so that expected losses are in nats."""
        return bool(np.isfinite(self.sensitivity_L).all())

    def loss_LE(self, kind: str) -> npt.NDArray[np.float32]:
        """Expected loss (nats) of one access per squared slot weight, of a kind of stand-in. Without measured
        sensitivities the unit is squared error: good for ranking, not for a budget. Raises ProfileError for a kind it
        does not know."""
        if kind not in self.errors:
            raise ProfileError(
                f"stand-in is {kind!r}, must be one of {', '.join(sorted(self.errors))} in this profile. "
                "hint: run buddymoe profile with that kind"
            )
        return self._scaled(kind, self.errors[kind])

    def pair_loss_LEE(self) -> npt.NDArray[np.float32]:
        """The same for buddies: column j answers for row i. Raises ProfileError when pairs were not measured."""
        if not self.pair_error_LEE.size:
            raise ProfileError("profile has no pair errors, must have them for buddies. hint: profile with buddy kinds")
        return self._scaled("buddy:output", self.pair_error_LEE)

    def _scaled(self, kind: str, error: Array) -> npt.NDArray[np.float32]:
        sensitivity = self.sensitivity_L if self.measured else np.ones_like(self.sensitivity_L)
        shape = (-1,) + (1,) * (error.ndim - 1)
        return (error.astype(np.float32) * sensitivity.reshape(shape) * self.kind_scale.get(kind, 1.0)).astype(
            np.float32
        )


def default_profile_path(folder: Path) -> Path | None:
    """The profile beside a checkpoint, if there is one."""
    path = folder / NAME
    return path if path.is_file() else None


def profile_path(named: str | None, folder: Path) -> Path | None:
    """The profile that is named, which may not be there, else the one beside the checkpoint."""
    return default_profile_path(folder) if named is None else Path(named).expanduser()


def save_profile(profile: Profile, path: Path) -> None:
    """Write atomically: a reader sees the old file or the new one. Raises ProfileError."""
    body = zlib.compress(msgpack.packb({f.name: _encode(getattr(profile, f.name)) for f in fields(profile)}), 9)
    whole = {"magic": _MAGIC, "version": VERSION, "sha256": hashlib.sha256(body).hexdigest(), "body": body}
    temporary = path.with_name(path.name + ".part")
    try:
        with temporary.open("wb") as file:
            file.write(msgpack.packb(whole))
            file.flush()
            os.fsync(file.fileno())  # else a power cut may leave the new name with no bytes
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise ProfileError(
            f"profile {path} cannot be written ({error.strerror}), must be. "
            "hint: choose another --out or free some space"
        ) from error


def load_profile(path: Path, *, model_hash: str) -> Profile:
    """Read a profile of the model with this hash. Arrays are read-only. Raises ProfileError."""
    body = _read_body(path)
    try:
        profile = Profile(**_decode_fields(body))
    except ProfileError as error:
        raise ProfileError(f"profile {path}: {error}") from error
    if profile.model_hash != model_hash:
        raise ProfileError(
            f"profile {path} is of {profile.model} (hash {profile.model_hash[:12]}), must be of this checkpoint "
            f"(hash {model_hash[:12]}). hint: run buddymoe profile on this checkpoint, or give the right --profile"
        )
    return profile


def _read_body(path: Path) -> dict[str, Any]:
    """The fields as packed, when the file is whole and of this version."""
    try:
        size = path.stat().st_size
        if size > _MOST_BYTES:
            raise _damaged(path, f"{size} bytes long")
        raw = path.read_bytes()
    except OSError as error:
        raise ProfileError(
            f"profile {path} cannot be read ({error.strerror}), must be a file. "
            "hint: check the path, or run buddymoe profile"
        ) from error
    if not raw:
        raise _damaged(path, "empty")
    whole = _unpacked(path, raw, "truncated or no profile")
    if whole.get("magic") != _MAGIC:
        raise _damaged(path, "another kind of file")
    if whole.get("version") != VERSION:
        raise _damaged(path, f"of version {whole.get('version')!r}", f"of version {VERSION}")
    body, digest = whole.get("body"), whole.get("sha256")
    if not isinstance(body, bytes) or hashlib.sha256(body).hexdigest() != digest:
        raise _damaged(path, "corrupt (its checksum differs)")
    try:
        inflater = zlib.decompressobj()
        plain = inflater.decompress(body, _MOST_BYTES)
    except zlib.error as error:
        raise _damaged(path, f"damaged ({error})") from error
    if not inflater.eof or inflater.unused_data:
        raise _damaged(path, "too long or cut short inside")
    return _unpacked(path, plain, "damaged inside")


def _unpacked(path: Path, raw: bytes, otherwise: str) -> dict[str, Any]:
    try:
        found = msgpack.unpackb(raw)
    except (ValueError, TypeError, msgpack.exceptions.UnpackException) as error:
        raise _damaged(path, otherwise) from error
    if not isinstance(found, dict):
        raise _damaged(path, otherwise)
    return found


def _damaged(path: Path, how: str, wanted: str = "as buddymoe profile wrote it") -> ProfileError:
    return ProfileError(f"profile {path} is {how}, must be {wanted}. hint: run buddymoe profile again")


def _encode(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        planes = value.reshape(-1, 1).view(np.uint8).T  # bytes of equal significance together compress by a tenth more
        return {"dtype": value.dtype.str, "shape": list(value.shape), "bytes": planes.tobytes()}
    if isinstance(value, Mapping):
        return {key: _encode(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [asdict(item) for item in value]
    return value


def _decode_fields(body: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `Profile`; it checks what they hold."""
    names = {field.name for field in fields(Profile)}
    for name in sorted(names ^ set(body)):
        if name in names:
            raise wrong(name, "missing", "there")
        raise wrong("a field", repr(name), f"one that version {VERSION} has")
    experts = canonical_number("experts", body["experts"], int, least=1)
    decoded = dict(body)
    for name, spec in ARRAYS.items():
        decoded[name] = _decode_array(name, body[name], spec.dtype_for(experts))
    if isinstance(body["errors"], dict):
        dtype = ERRORS.dtype_for(experts)
        decoded["errors"] = {k: _decode_array(f"errors[{k}]", a, dtype) for k, a in body["errors"].items()}
    for name, row_type in _ROWS.items():
        decoded[name] = _decode_rows(name, body[name], row_type)
    return decoded


def _decode_array(name: str, value: Any, dtype: np.dtype[Any]) -> Array:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "bytes"}:
        raise wrong(name, type(value).__name__, "an array")
    if value["dtype"] != dtype.str:
        raise wrong(name, f"of dtype {value['dtype']!r}", f"of dtype {dtype.str!r}")
    shape, data = value["shape"], value["bytes"]
    sound = isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape) and isinstance(data, bytes)
    if not sound or math.prod(shape) * dtype.itemsize != len(data):
        raise wrong(name, f"{len(data) if isinstance(data, bytes) else 'no'} bytes", f"bytes for a shape of {shape}")
    planes = np.frombuffer(data, dtype=np.uint8).reshape(dtype.itemsize, -1)
    array = np.ascontiguousarray(planes.T).view(dtype).reshape(shape)
    array.setflags(write=False)
    return array


def _decode_rows(name: str, value: Any, row_type: type) -> tuple[Any, ...]:
    wanted = {field.name for field in fields(row_type)}
    if not isinstance(value, list) or not all(isinstance(row, dict) and set(row) == wanted for row in value):
        raise wrong(name, "otherwise", f"rows of {', '.join(sorted(wanted))}")
    return tuple(row_type(**row) for row in value)


_ROWS: Mapping[str, type] = {"comparison": ComparisonRow, "budget_curve": BudgetPoint}
