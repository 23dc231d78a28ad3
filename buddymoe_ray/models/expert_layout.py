"""Expert bytes on disk -> places in a slot: the `ExpertLayout` that the cache loads by.

A slot holds one expert's parameters in the experts module's own layout, each at a multiple of 64 bytes. Bytes are only
copied, never converted. Does not read weights.

Legend: E experts, F ffn, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from torch import nn
from transformers import PreTrainedModel

from buddymoe_ray.cache import stamp_of
from buddymoe_ray.errors import CheckpointError, UnsupportedModel
from buddymoe_ray.kernels import coded_shapes
from buddymoe_ray.models.hf_loading import StoredExperts, experts_modules
from buddymoe_ray.models.quantised import CodedTensor, Stored
from buddymoe_ray.models.tensor_index import DTYPE_BYTES, TensorLocation
from buddymoe_ray.types import CodedMatrix, ExpertKey, ExpertLayout, ExpertPiece, SlotTensor

__all__ = ["ALIGNMENT", "EXPERT_DTYPES", "check_unchanged", "expert_layout", "slot_tensors"]

ALIGNMENT = 64
EXPERT_DTYPES = ("bfloat16", "float16", "float32")


def slot_tensors(shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, str]) -> tuple[SlotTensor, ...]:
    """Lay out one expert's parameters (shapes without E) one after the other."""
    tensors, offset = [], 0
    for name, shape in shapes.items():
        nbytes = math.prod(shape) * DTYPE_BYTES[dtypes[name]]
        tensors.append(SlotTensor(name=name, shape=shape, dtype=dtypes[name], offset=offset, nbytes=nbytes))
        offset += -(-nbytes // ALIGNMENT) * ALIGNMENT
    return tuple(tensors)


def expert_layout(
    model: PreTrainedModel, sources: Sequence[StoredExperts], stored: Mapping[str, Stored]
) -> ExpertLayout:
    """Map every byte of every routed expert of `model` to its file.

    Raises:
        CheckpointError: an expert is missing or has the wrong shape.
        UnsupportedModel: experts of different layers differ in shape, dtype or format, or no kernel knows it.
    """
    modules = experts_modules(model)
    by_param: dict[str, list[StoredExperts]] = {}
    for source in sources:
        by_param.setdefault(source.param, []).append(source)
    shapes = _common_shapes(modules)
    coded = _common_formats(modules, shapes, by_param, stored)
    dtypes = _common_dtypes(modules, shapes, coded, by_param, stored)
    parts = {f"{matrix.name}.{part}": (matrix, part) for matrix in coded.values() for part in coded_shapes(matrix)}
    sized = {name: (shapes[name], dtype) for name, dtype in dtypes.items()}
    for name, (matrix, part) in parts.items():
        sized[name] = coded_shapes(matrix)[part]
    order = sorted(sized, key=lambda name: list(shapes).index(name.partition(".")[0]))
    tensors = slot_tensors({name: sized[name][0] for name in order}, {name: sized[name][1] for name in order})
    pieces: dict[ExpertKey, tuple[ExpertPiece, ...]] = {}
    counts = []
    for layer, (module_name, module) in enumerate(modules.items()):
        counts.append(next(module.parameters()).shape[0])
        per_expert: list[list[ExpertPiece]] = [[] for _ in range(counts[-1])]
        for tensor in tensors:
            found = by_param[f"{module_name}.{tensor.name.partition('.')[0]}"]
            _check_unique(found)
            _, part = parts.get(tensor.name, (None, ""))
            places = {source.key: _place_of(stored[source.key], source, tensor, part) for source in found}
            if found[0].expert is None:
                _place_stack(per_expert, tensor, places[found[0].key])
            else:
                _place_parts(per_expert, tensor, found, places)
        pieces |= {ExpertKey(layer, e): tuple(runs) for e, runs in enumerate(per_expert)}
    last = tensors[-1]
    slot_bytes = -(-(last.offset + last.nbytes) // ALIGNMENT) * ALIGNMENT
    return ExpertLayout(
        tensors=tensors,
        slot_bytes=slot_bytes,
        expert_bytes=sum(t.nbytes for t in tensors),
        layers=len(modules),
        experts_per_layer=tuple(counts),
        pieces=pieces,
        coded=tuple(coded.values()),
        files={path: stamp_of(path) for path in {run.path for runs in pieces.values() for run in runs}},
    )


def check_unchanged(layout: ExpertLayout) -> None:
    """That the experts' files are as they were. Raises CheckpointError."""
    for path, stamp in layout.files.items():
        if stamp_of(path) != stamp:
            raise CheckpointError(f"{path} was written while it was loaded, must stay as it is. hint: load it again")


def _place_of(stored: Stored, source: StoredExperts, tensor: SlotTensor, part: str) -> TensorLocation:
    """Of what fills a slot's tensor; those of quantised matrices fit, so their shapes are the tensor's own."""
    if isinstance(stored, TensorLocation):
        return stored
    rows = tensor.shape[0] // source.parts
    place = stored.places[part]
    return replace(
        place,
        shape=(place.nbytes // tensor.nbytes, *tensor.shape) if source.expert is None else (rows, *tensor.shape[1:]),
    )


def _common_shapes(modules: Mapping[str, nn.Module]) -> dict[str, tuple[int, ...]]:
    """Parameter shapes of one expert, equal in every layer."""
    first_name, first = next(iter(modules.items()))
    shapes = {name: tuple(p.shape[1:]) for name, p in first.named_parameters()}
    for name, module in modules.items():
        these = {param: tuple(p.shape[1:]) for param, p in module.named_parameters()}
        if these != shapes:
            raise UnsupportedModel(
                f"experts of {name} have shapes {these}, must be {shapes} as in {first_name}. "
                "hint: experts of different sizes have no common slot"
            )
    return shapes


def _common_formats(
    modules: Mapping[str, nn.Module],
    shapes: Mapping[str, tuple[int, ...]],
    by_param: Mapping[str, list[StoredExperts]],
    stored: Mapping[str, Stored],
) -> dict[str, CodedMatrix]:
    """The quantised parameters, each in one format for every expert of every layer."""
    coded: dict[str, CodedMatrix] = {}
    for module_name, module in modules.items():
        for name, parameter in module.named_parameters():
            for source in by_param.get(f"{module_name}.{name}", ()):
                found = stored[source.key]
                if isinstance(found, TensorLocation):
                    continue
                N, K = shapes[name][::-1] if module.is_transposed else shapes[name]
                if module.is_transposed and found.codes != "mxfp4":
                    raise UnsupportedModel(
                        f"key {source.key!r} is stored as {found.codes}, must be mxfp4 or plain in experts of this "
                        "kind. hint: use the checkpoint's unquantised release"
                    )
                stack = parameter.shape[0] if source.expert is None else None
                fitted = found.fit(name, N // source.parts, K, stack=stack)
                matrix = replace(fitted, parts=source.parts, N=N)
                if coded.setdefault(name, matrix) != matrix:
                    raise UnsupportedModel(
                        f"key {source.key!r} in {found.path} is {matrix.format}, must be {coded[name].format} as the "
                        "experts before it. hint: use a release that stores all experts alike"
                    )
    return coded


def _common_dtypes(
    modules: Mapping[str, nn.Module],
    shapes: Mapping[str, tuple[int, ...]],
    coded: Collection[str],
    by_param: Mapping[str, list[StoredExperts]],
    stored: Mapping[str, Stored],
) -> dict[str, str]:
    """Stored dtype of each plain parameter, equal for every expert of every layer."""
    dtypes: dict[str, str] = {}
    for module_name, module in modules.items():
        for name, _ in module.named_parameters():
            sources = by_param.get(f"{module_name}.{name}")
            if not sources:
                raise CheckpointError(
                    f"no key of the checkpoint fills {module_name}.{name}, must be there. hint: finish the download"
                )
            for source in sources:
                place = stored[source.key]
                if coded and isinstance(place, TensorLocation) and len(shapes[name]) == 2:
                    raise UnsupportedModel(
                        f"key {source.key!r} in {place.path} is plain {place.dtype}, must be quantised as other "
                        "experts' weights. hint: use a release that stores all experts alike"
                    )
                if isinstance(place, CodedTensor):
                    continue
                if place.dtype not in EXPERT_DTYPES:
                    raise UnsupportedModel(
                        f"key {source.key!r} in {place.path} is stored as {place.dtype}, must be one of "
                        f"{', '.join(EXPERT_DTYPES)}. hint: use the checkpoint's unquantised release"
                    )
                if dtypes.setdefault(name, place.dtype) != place.dtype:
                    raise UnsupportedModel(
                        f"key {source.key!r} in {place.path} is {place.dtype}, must be {dtypes[name]} as the experts "
                        "before it. hint: save the checkpoint again in one dtype"
                    )
    return dtypes


def _place_stack(per_expert: list[list[ExpertPiece]], tensor: SlotTensor, place: TensorLocation) -> None:
    """A fused stack `[E, ...]`: expert e is a contiguous run."""
    _check_shape(place, (len(per_expert), *tensor.shape))
    for expert, runs in enumerate(per_expert):
        offset = place.offset + expert * tensor.nbytes
        runs.append(ExpertPiece(path=place.path, offset=offset, nbytes=tensor.nbytes, slot_offset=tensor.offset))


def _place_parts(
    per_expert: list[list[ExpertPiece]],
    tensor: SlotTensor,
    sources: Sequence[StoredExperts],
    locations: Mapping[str, TensorLocation],
) -> None:
    """One stored tensor per expert and part; the parts follow each other along dimension 0 of the expert."""
    by_slot = {(source.expert, source.part): source for source in sources}
    rest = tensor.shape[1:]
    beyond = [source for source in sources if source.expert is not None and source.expert >= len(per_expert)]
    if beyond:
        raise CheckpointError(
            f"key {beyond[0].key!r} is of an expert that config.json lacks, must be below {len(per_expert)}. "
            "hint: config.json and weights are from different models"
        )
    for expert, runs in enumerate(per_expert):
        offset, rows = tensor.offset, 0
        for part in range(sources[0].parts):
            source = by_slot.get((expert, part))
            if source is None:
                raise CheckpointError(
                    f"part {part} of expert {expert} of {sources[0].param} is missing "
                    f"(its neighbour is {sources[0].key!r}), must be there. hint: finish the download"
                )
            place = locations[source.key]
            _check_shape(place, (place.shape[0] if place.shape else 0, *rest))
            runs.append(ExpertPiece(path=place.path, offset=place.offset, nbytes=place.nbytes, slot_offset=offset))
            offset, rows = offset + place.nbytes, rows + place.shape[0]
        if rows != tensor.shape[0]:
            key = by_slot[(expert, 0)].key
            raise CheckpointError(
                f"key {key!r} and its parts have {rows} rows, must be {tensor.shape[0]} as config.json says. "
                "hint: config.json and weights are from different models"
            )


def _check_unique(sources: Sequence[StoredExperts]) -> None:
    """No two stored tensors may fill the same bytes."""
    first: dict[tuple[int | None, int], str] = {}
    stack = next((source.key for source in sources if source.expert is None), None)
    for source in sources:
        rival = first.setdefault((source.expert, source.part), source.key)
        if rival == source.key and stack is not None:
            rival = stack
        if rival != source.key:
            raise CheckpointError(
                f"keys {rival!r} and {source.key!r} both fill {source.param}, must be one. "
                "hint: remove the stale one from the checkpoint"
            )


def _check_shape(place: TensorLocation, wanted: tuple[int, ...]) -> None:
    if place.shape != wanted:
        raise CheckpointError(
            f"key {place.key!r} in {place.path} has shape {place.shape}, must be {wanted} as config.json says. "
            "hint: config.json and weights are from different models"
        )
