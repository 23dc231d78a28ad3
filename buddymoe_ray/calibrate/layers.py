"""Every layer's stand-ins: makes the records, writes them, measures their errors, and the errors of buddies.

One expert is in memory at a time beside the layer's rows. Neighbours: samples.py lends the experts, fitting.py makes a
record, run.py assembles the profile.

Legend: L layers, E experts, B bytes of a record.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from buddymoe_ray.calibrate.fitting import (
    ENOUGH,
    Fitting,
    RecordMaker,
    energy_of,
    error_of,
    fit_and_error,
    record_bytes,
    record_views,
)
from buddymoe_ray.calibrate.pairs import pair_errors
from buddymoe_ray.calibrate.samples import ExpertSample, walk_layer
from buddymoe_ray.calibrate.trace import Trace
from buddymoe_ray.engine.parts import EngineParts
from buddymoe_ray.errors import CheckpointError, ProfileError
from buddymoe_ray.kernels import ExpertMath
from buddymoe_ray.models.expert_math import expert_math
from buddymoe_ray.models.shard_writer import check_space
from buddymoe_ray.models.standin_files import StandinWriter

__all__ = ["LayerTables", "make_layers", "parameter_shapes"]

log = logging.getLogger(__name__)

Floats = npt.NDArray[np.float32]


@dataclass(kw_only=True)
class LayerTables:
    """Errors and energies `[L, E]`, pair tables `[L, E, E]` (empty when not asked for), bytes of each kind's record.

    Experts that too few tokens reached have their layer's mean error in `errors`.
    """

    energy_LE: Floats
    errors: dict[str, Floats]
    record_bytes: dict[str, int] = field(default_factory=dict)
    pair_error_LEE: Floats = field(default_factory=lambda: np.zeros(0, np.float32))
    pair_scale_LEE: Floats = field(default_factory=lambda: np.zeros(0, np.float32))


def make_layers(
    parts: EngineParts,
    trace: Trace,
    *,
    kinds: tuple[str, ...],
    folder: Path,
    model_hash: str,
    fitting: Fitting,
    progress: Callable[..., Iterable[Any]],
) -> LayerTables:
    """Make and measure all stand-ins. Layers of an earlier run by the same recipe are
    kept and only measured. Raises ProfileError when records cannot be written.
    """
    cache, loaded = parts.experts.cache, parts.loaded
    counts = cache.layout.experts_per_layer
    L, E = len(counts), max(counts)
    own = tuple(kind for kind in kinds if kind != "buddy")
    tables = LayerTables(energy_LE=np.zeros((L, E), np.float32), errors={k: np.zeros((L, E), np.float32) for k in own})
    if "buddy" in kinds:
        tables.pair_error_LEE, tables.pair_scale_LEE = np.zeros((L, E, E), np.float32), np.zeros((L, E, E), np.float32)
    maths = [expert_math(module) for module in loaded.experts]
    files = [_Files(RecordMaker(kind=kind, math=maths[0], fitting=fitting), parts, folder, model_hash) for kind in own]
    _check_room(folder, files, counts)
    reached_LE = np.zeros((L, E), dtype=bool)
    units = [layer for layer in range(L) for _ in range(counts[layer])]
    bar = iter(progress(units, total=len(units), desc="stand-ins"))
    for layer in range(L):
        math, reached_E = maths[layer], reached_LE[layer]
        records = [_LayerRecords(one, math, layer, counts[layer]) for one in files]
        for sample in walk_layer(cache, trace, layer, math):
            next(bar, None)
            reached_E[sample.expert] = sample.own >= ENOUGH
            tables.energy_LE[layer, sample.expert] = energy_of(sample)
            for one in records:
                tables.errors[one.maker.kind][layer, sample.expert] = one.add(sample)
        for one in records:
            one.write()
            _fill_rare(tables.errors[one.maker.kind][layer], reached_E)
        _fill_rare(tables.energy_LE[layer], reached_E)
        if "buddy" in kinds:
            tables.pair_error_LEE[layer], tables.pair_scale_LEE[layer] = _pairs(
                cache, trace, layer, math, counts[layer], E
            )
    next(bar, None)
    tables.record_bytes = {one.maker.kind: one.nbytes for one in files}
    _tell_rare(len(units) - int(reached_LE.sum()), len(units))
    return tables


class _Files:
    """Where the records of one kind are kept: a file per layer."""

    def __init__(self, maker: RecordMaker, parts: EngineParts, folder: Path, model_hash: str) -> None:
        self.maker = maker
        self.layout, self.nbytes = maker.layout(parameter_shapes(parts, maker.math), parts.loaded.hidden_size)
        self.writer = StandinWriter(
            folder, maker.kind, layout=self.layout, record_bytes=self.nbytes, model_hash=model_hash, recipe=maker.recipe
        )


class _LayerRecords:
    """Records of one kind and layer while they are made, or as an earlier run left them."""

    def __init__(self, files: _Files, math: ExpertMath, layer: int, E: int) -> None:
        self.maker, self._files, self._layer = replace(files.maker, math=math), files, layer
        found = files.writer.read(layer)
        self._found = found is not None
        self._records_EB = np.zeros((E, files.nbytes), np.uint8) if found is None else found

    def add(self, sample: ExpertSample) -> float:
        """Make one expert's record, unless it is there; returns its error."""
        if self._found:
            record = record_views(self._records_EB[sample.expert], self._files.layout)
            return error_of(self.maker, sample, record)
        record, error = fit_and_error(self.maker, sample)
        self._records_EB[sample.expert] = record_bytes(record, self._files.layout, self._files.nbytes)
        return error

    def write(self) -> None:
        """Write the layer's file."""
        if not self._found:
            self._files.writer.write(self._layer, self._records_EB)


def _check_room(folder: Path, files: Sequence[_Files], counts: Sequence[int]) -> None:
    """Raise ProfileError before the work when the disk cannot take what is still to be written."""
    missing = [(one, E) for one in files for layer, E in enumerate(counts) if not one.writer.has(layer)]
    try:
        check_space(folder, sum(one.nbytes * E for one, E in missing))
    except CheckpointError as error:
        raise ProfileError(f"stand-ins cannot be written: {error}, or make fewer --kinds") from error


def _pairs(cache: Any, trace: Trace, layer: int, math: ExpertMath, count: int, E: int) -> tuple[Floats, Floats]:
    error_EE, scale_EE = pair_errors(lambda: walk_layer(cache, trace, layer, math), count, math)
    pad = ((0, E - count), (0, E - count))
    return np.pad(error_EE, pad), np.pad(scale_EE, pad)


def _fill_rare(error_E: Floats, reached_E: npt.NDArray[np.bool_]) -> None:
    if reached_E.any():
        error_E[~reached_E] = error_E[reached_E].mean()


def _tell_rare(rare: int, experts: int) -> None:
    if rare:
        log.warning(
            "%d of %d experts got fewer than %d tokens: their errors are their layer's mean. "
            "hint: calibrate on more text",
            *(rare, experts, ENOUGH),
        )


def parameter_shapes(parts: EngineParts, math: ExpertMath) -> Mapping[str, tuple[int, ...]]:
    """Shapes of an expert's parameters, matrices `[out, in]`."""
    tensors = parts.experts.cache.layout.tensors
    return {t.name: t.shape[::-1] if math.transposed and len(t.shape) == 2 else t.shape for t in tensors}
