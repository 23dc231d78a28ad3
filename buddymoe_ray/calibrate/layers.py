"""Every layer's stand-ins: makes the records, writes them, measures their errors, and the errors of buddies.

One expert is in memory at a time beside the layer's rows. Neighbours: samples.py lends the experts, fitting.py makes a
record, run.py assembles the profile.

Legend: L layers, E experts, B bytes of a record.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from buddymoe_ray.calibrate.fitting import Fitting, RecordMaker, energy_of, error_of, record_bytes, record_views
from buddymoe_ray.calibrate.pairs import PairRows
from buddymoe_ray.calibrate.samples import ENOUGH, ExpertSample, walk_layer
from buddymoe_ray.calibrate.side_by_side import side_by_side
from buddymoe_ray.calibrate.trace import Trace
from buddymoe_ray.engine.parts import EngineParts
from buddymoe_ray.errors import CheckpointError, ProfileError
from buddymoe_ray.kernels import ExpertMath
from buddymoe_ray.models.expert_math import expert_math
from buddymoe_ray.models.shard_writer import check_space
from buddymoe_ray.models.standin_files import StandinWriter

__all__ = ["LayerTables", "make_layers"]

log = logging.getLogger(__name__)

T = TypeVar("T")
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
    clock, left = fitting.clock, 60 * fitting.minutes  # every layer gets its share of what is left
    cache, loaded = parts.experts.cache, parts.loaded
    counts = cache.layout.experts_per_layer
    L, E = len(counts), max(counts)
    own = tuple(kind for kind in kinds if kind != "buddy")
    tables = LayerTables(energy_LE=np.zeros((L, E), np.float32), errors={k: np.zeros((L, E), np.float32) for k in own})
    if "buddy" in kinds:
        tables.pair_error_LEE, tables.pair_scale_LEE = np.zeros((L, E, E), np.float32), np.zeros((L, E, E), np.float32)
    maths = [expert_math(module, cache.layout) for module in loaded.experts]
    files = [_Files(RecordMaker(kind=kind, math=maths[0], fitting=fitting), parts, folder, model_hash) for kind in own]
    _check_room(folder, files, counts)
    reached_LE = np.zeros((L, E), dtype=bool)
    improved, units = 0, range((1 + fitting.compensated) * sum(counts))
    bar = iter(progress(units, total=len(units), desc="stand-ins"))
    for layer in range(L):
        math, reached_E = maths[layer], reached_LE[layer]
        made = _Layer(files, math, layer, counts[layer], buddies="buddy" in kinds)
        walk = partial(walk_layer, cache, trace, layer, math)
        for sample, energy, errors in side_by_side(made.add, walk(), parts.config.threads):
            next(bar, None)
            reached_E[sample.expert] = sample.own >= ENOUGH
            tables.energy_LE[layer, sample.expert] = energy
            for kind, error in errors.items():
                tables.errors[kind][layer, sample.expert] = error
        began = clock()
        order = made.worst_first(_use_of_experts(trace, layer, counts[layer]), tables.errors, layer)
        with closing(side_by_side(made.improve, walk(experts=order), parts.config.threads)) as found:
            improved += _note(tables, layer, _until(found, clock, left / (L - layer)))
        left -= clock() - began
        for _ in range(fitting.compensated * counts[layer]):
            next(bar, None)
        made.write()
        for table in (tables.energy_LE, *tables.errors.values()):
            _fill_rare(table[layer], reached_E)
        if made.pairs is not None:
            error_EE, scale_EE = made.pairs.errors(walk)
            tables.pair_error_LEE[layer, : len(error_EE), : len(error_EE)] = error_EE
            tables.pair_scale_LEE[layer, : len(error_EE), : len(error_EE)] = scale_EE
    next(bar, None)
    tables.record_bytes = {one.maker.kind: one.nbytes for one in files}
    if fitting.compensated:
        log.info("%d of %d experts were rounded with error compensation, the worst first", improved, sum(counts))
    _tell_rare(sum(counts) - int(reached_LE.sum()), sum(counts))
    return tables


class _Files:
    """Where the records of one kind are kept: a file per layer."""

    def __init__(self, maker: RecordMaker, parts: EngineParts, folder: Path, model_hash: str) -> None:
        self.maker = maker
        self.layout, self.nbytes = maker.layout(_parameter_shapes(parts, maker.math), parts.loaded.hidden_size)
        self.writer = StandinWriter(
            folder, maker.kind, layout=self.layout, record_bytes=self.nbytes, model_hash=model_hash, recipe=maker.recipe
        )


class _LayerRecords:
    """Records of one kind and layer while they are made, or as an earlier run left them."""

    def __init__(self, files: _Files, math: ExpertMath, layer: int, E: int) -> None:
        self.maker, self._files, self._layer = replace(files.maker, math=math), files, layer
        self._error_E = np.zeros(E)
        found = files.writer.read(layer)
        self._found = found is not None
        self._records_EB = np.zeros((E, files.nbytes), np.uint8) if found is None else found

    def add(self, sample: ExpertSample) -> float:
        """Make one expert's record, unless it is there; returns the error of what is kept."""
        layout, record_B = self._files.layout, self._records_EB[sample.expert]
        if not self._found:
            record_B[:] = record_bytes(self.maker.first.make(sample), layout, self._files.nbytes)
        error = self._error_E[sample.expert] = error_of(self.maker, sample, record_views(record_B, layout))
        return float(error)

    @property
    def improvable(self) -> bool:
        """Whether what `add` made is not the best there is."""
        return not self._found and self.maker.first is not self.maker

    def improve(self, sample: ExpertSample) -> float:
        """Make one expert's record again, better; returns the error of the one that is kept."""
        better_B = record_bytes(self.maker.make(sample), self._files.layout, self._files.nbytes)
        error, at = error_of(self.maker, sample, record_views(better_B, self._files.layout)), sample.expert
        if error < self._error_E[at]:
            self._records_EB[at], self._error_E[at] = better_B, error
        return float(self._error_E[at])

    def write(self) -> None:
        """Write the layer's file."""
        if not self._found:
            self._files.writer.write(self._layer, self._records_EB)


class _Layer:
    """All kinds of one layer, and the rows of its pairs where `buddies` are wanted."""

    def __init__(self, files: Sequence[_Files], math: ExpertMath, layer: int, E: int, *, buddies: bool) -> None:
        self.pairs = PairRows(E) if buddies else None
        self._records = [_LayerRecords(one, math, layer, E) for one in files]

    def add(self, sample: ExpertSample) -> tuple[ExpertSample, float, dict[str, float]]:
        """Make one expert's records; its energy and, by kind, their errors."""
        if self.pairs is not None:
            self.pairs.add(sample)
        return sample, energy_of(sample), {one.maker.kind: one.add(sample) for one in self._records}

    def worst_first(self, use_E: npt.NDArray[np.float64], errors: Mapping[str, Floats], layer: int) -> list[int]:
        """Experts whose records may be improved, those first that cost most: by use and error."""
        kinds = [one.maker.kind for one in self._records if one.improvable]
        loss_E = use_E * sum((errors[kind][layer, : len(use_E)] for kind in kinds), np.zeros(len(use_E)))
        return np.argsort(-loss_E, kind="stable").tolist() if kinds else []

    def improve(self, sample: ExpertSample) -> tuple[int, dict[str, float]]:
        """Improve one expert's records; its number and, by kind, their errors."""
        return sample.expert, {one.maker.kind: one.improve(sample) for one in self._records if one.improvable}

    def write(self) -> None:
        """Write the layer's files."""
        for one in self._records:
            one.write()


def _until(items: Iterable[T], clock: Callable[[], float], seconds: float) -> Iterator[T]:
    """As many of the items as there is time for, one at least."""
    began = clock()
    for item in items:
        yield item
        if clock() - began >= seconds:
            return


def _note(tables: LayerTables, layer: int, found: Iterable[tuple[int, Mapping[str, float]]]) -> int:
    """Take over the errors, by kind, of experts; how many they are."""
    count = 0
    for expert, errors in found:
        for kind, error in errors.items():
            tables.errors[kind][layer, expert] = error
        count += 1
    return count


def _use_of_experts(trace: Trace, layer: int, E: int) -> npt.NDArray[np.float64]:
    """Summed squares of the slot weights of each expert's accesses, `[E]`."""
    squares_N = trace.weights(layer).double().square().flatten().numpy()
    return np.bincount(trace.ids(layer).flatten().numpy(), weights=squares_N, minlength=E).astype(np.float64)


def _check_room(folder: Path, files: Sequence[_Files], counts: Sequence[int]) -> None:
    """Raise ProfileError before the work when the disk cannot take what is still to be written."""
    missing = [(one, E) for one in files for layer, E in enumerate(counts) if not one.writer.has(layer)]
    try:
        check_space(folder, sum(one.nbytes * E for one, E in missing))
    except CheckpointError as error:
        raise ProfileError(f"stand-ins cannot be written: {error}, or make fewer --kinds") from error


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


def _parameter_shapes(parts: EngineParts, math: ExpertMath) -> Mapping[str, tuple[int, ...]]:
    """Shapes of an expert's parameters, matrices `[out, in]`."""
    shapes = parts.experts.cache.layout.shapes
    return {name: s[::-1] if math.transposed and len(s) == 2 else s for name, s in shapes.items()}
