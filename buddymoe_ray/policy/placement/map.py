"""The map that is published: who holds which expert, who answers for it, who pins what, and what must move.

Knows no costs and no solver. Invariant: `from_bytes(m.to_bytes())` is `m`; a primary is one of the holders.
Neighbours: `greedy` makes maps, `steps` orders their moves.

Legend: P pools, N experts of all MoE layers end to end, L MoE layers.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import msgpack
import numpy as np
import numpy.typing as npt

from buddymoe_ray.errors import ConfigError
from buddymoe_ray.policy.placement.problem import Bools, PlacementProblem

__all__ = ["Migration", "PlacementMap", "previous_held"]

Ints = npt.NDArray[np.int32]

_MAGIC, _VERSION = "buddymoe-placement", 1
_MOST_CELLS = 1 << 31


@dataclass(frozen=True, kw_only=True, eq=False)
class Migration:
    """What must move from the last map: pairs (pool, expert in N) to load and to evict, and the bytes of the loads."""

    load_pool: Ints
    load_expert: Ints
    evict_pool: Ints
    evict_expert: Ints
    nbytes: int


@dataclass(frozen=True, kw_only=True, eq=False)
class PlacementMap:
    """Where experts are.

    Args:
        epoch: rises by one with every change of holders.
        pools: names of the pools, in the order of P.
        workers: names of each pool's workers.
        experts_per_layer: E of every layer.
        held_PN: whether pool p holds expert n.
        primary_N: the holder who answers for it first, -1 where none holds it.
        migration: from the map before.
        objective_before, objective_after: seconds lost per second under the counts of this window, with the old map and
            with this one (its migration counted).
    """

    epoch: int
    pools: tuple[str, ...]
    workers: tuple[tuple[str, ...], ...]
    experts_per_layer: tuple[int, ...]
    held_PN: Bools
    primary_N: Ints
    migration: Migration
    objective_before: float
    objective_after: float

    @cached_property
    def _offset_L(self) -> npt.NDArray[np.int64]:
        return np.concatenate([[0], np.cumsum(self.experts_per_layer, dtype=np.int64)])

    def holders(self, layer: int, expert: int) -> tuple[int, ...]:
        """Indices of the pools that hold it, rising; none where it stays out."""
        return tuple(int(p) for p in np.flatnonzero(self.held_PN[:, self._offset_L[layer] + expert]))

    def primary(self, layer: int, expert: int) -> int | None:
        """The pool that answers for it first."""
        found = int(self.primary_N[self._offset_L[layer] + expert])
        return None if found < 0 else found

    def keys(self, experts_N: npt.NDArray[Any]) -> list[tuple[int, int]]:
        """Indices in N as (layer, expert)."""
        layers = np.searchsorted(self._offset_L, experts_N, side="right") - 1
        return list(zip(layers.tolist(), (experts_N - self._offset_L[layers]).tolist(), strict=True))

    def shards(self) -> Mapping[str, npt.NDArray[np.int64]]:
        """Experts (in N) that each worker pins: its pool's experts, dealt in turn, so that no two workers pin one."""
        return {
            worker: np.flatnonzero(held_N)[at :: len(workers)]
            for held_N, workers in zip(self.held_PN, self.workers, strict=True)
            for at, worker in enumerate(workers)
        }

    def to_bytes(self) -> bytes:
        """msgpack; the holders as packed bits."""
        arrays = {name: getattr(self.migration, name).tobytes() for name in _MOVES}
        body = {
            "magic": _MAGIC,
            "version": _VERSION,
            "epoch": self.epoch,
            "pools": self.pools,
            "workers": self.workers,
            "experts_per_layer": self.experts_per_layer,
            "held": zlib.compress(np.packbits(self.held_PN).tobytes(), 1),
            "primary": self.primary_N.tobytes(),
            "migration": arrays | {"nbytes": self.migration.nbytes},
            "objective": [self.objective_before, self.objective_after],
        }
        packed: bytes = msgpack.packb(body)
        return packed

    @classmethod
    def from_bytes(cls, raw: bytes) -> PlacementMap:
        """The map that `to_bytes` wrote. Raises ConfigError for anything else."""
        try:
            body = msgpack.unpackb(raw)
            if body["magic"] != _MAGIC or body["version"] != _VERSION:
                raise ValueError(f"{body['magic']} of version {body['version']}")
            return _unpacked(body)
        except (KeyError, TypeError, ValueError, zlib.error, msgpack.exceptions.UnpackException) as error:
            raise ConfigError(
                f"placement map is damaged ({error}), must be as version {_VERSION} wrote it. hint: start without it"
            ) from error


_MOVES = ("load_pool", "load_expert", "evict_pool", "evict_expert")


def _unpacked(body: Mapping[str, Any]) -> PlacementMap:
    """Raises KeyError, TypeError, ValueError or zlib.error for what no map holds."""
    pools = tuple(str(name) for name in body["pools"])
    per_layer = tuple(int(count) for count in body["experts_per_layer"])
    P, N = len(pools), sum(per_layer)
    if len(body["workers"]) != P or P * N > _MOST_CELLS or min(per_layer, default=0) < 1:
        raise ValueError(f"{P} pools and {N} experts do not fit together")
    inflater = zlib.decompressobj()
    bits = inflater.decompress(body["held"], -(-P * N // 8))
    if not inflater.eof or len(bits) != -(-P * N // 8):
        raise ValueError(f"holders are not of {P} pools and {N} experts")
    held_PN = np.unpackbits(np.frombuffer(bits, dtype=np.uint8), count=P * N).astype(bool).reshape(P, N)
    primary_N = np.frombuffer(body["primary"], dtype=np.int32)
    homeless_N = primary_N < 0
    if len(primary_N) != N or (primary_N >= P).any() or (homeless_N == held_PN.any(axis=0)).any():
        raise ValueError("primaries are not holders")
    if not held_PN[primary_N, np.arange(N)][~homeless_N].all():
        raise ValueError("primaries are not holders")
    moves = {name: np.frombuffer(body["migration"][name], dtype=np.int32) for name in _MOVES}
    for kind in ("load", "evict"):
        pool, expert = moves[f"{kind}_pool"], moves[f"{kind}_expert"]
        inside = len(pool) == len(expert) and ((pool >= 0) & (pool < P) & (expert >= 0) & (expert < N)).all()
        if not inside:
            raise ValueError(f"{kind}s name what is not there")
    before, after = (float(value) for value in body["objective"])
    held_PN.setflags(write=False)
    return PlacementMap(
        epoch=int(body["epoch"]),
        pools=pools,
        workers=tuple(tuple(str(name) for name in names) for names in body["workers"]),
        experts_per_layer=per_layer,
        held_PN=held_PN,
        primary_N=primary_N,
        migration=Migration(**moves, nbytes=int(body["migration"]["nbytes"])),
        objective_before=before,
        objective_after=after,
    )


def previous_held(problem: PlacementProblem, previous: PlacementMap | None) -> Bools:
    """What the problem's pools hold now `[P, N]`: rows of the last map by name, a new pool is empty.

    Raises ConfigError when the last map is of a model with other experts.
    """
    held_PN = np.zeros((len(problem.pools), problem.experts), dtype=bool)
    if previous is None:
        return held_PN
    if previous.experts_per_layer != problem.experts_per_layer:
        raise ConfigError(
            f"the last map has {sum(previous.experts_per_layer)} experts in {len(previous.experts_per_layer)} layers, "
            f"must have {problem.experts} in {len(problem.experts_per_layer)}. hint: start without it"
        )
    row_of = {name: at for at, name in enumerate(previous.pools)}
    for at, pool in enumerate(problem.pools):
        if pool.name in row_of:
            held_PN[at] = previous.held_PN[row_of[pool.name]]
    return held_PN
