"""Quantised weights of a checkpoint: codes, scales and what is beside them found and put together.

`schemes` says by what keys; `CodedTensor.fit` whether a weight of a size can be made of them. Reads headers alone, but
for `check_values` and weights that are asked for. Static scales of activations are left out: rows are multiplied as
they are.

Legend: N outputs, K inputs of a weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from buddymoe_ray.errors import CheckpointError, UnsupportedModel
from buddymoe_ray.kernels import COLUMNS, CodedWeight, coded_shapes, decoded
from buddymoe_ray.models.dense import read_tensor
from buddymoe_ray.models.schemes import INSTEAD, UNREAD, Scheme
from buddymoe_ray.models.tensor_index import TensorLocation
from buddymoe_ray.types import CodedMatrix, CodeFormat

__all__ = ["CodedTensor", "Stored", "check_values", "find_coded"]

_SCALES = {
    "uint8": "e8m0",
    "float8_e8m0fnu": "e8m0",
    "float32": "float32",
    "bfloat16": "bfloat16",
    "float16": "float16",
    "float8_e4m3fn": "float8_e4m3fn",
}
_LARGEST_NVFP4 = 6.0 * 448.0
_WHOLE_INPUTS = {"mxfp4": 32, "nvfp4": 8, "gptq": 8}
_WHOLE_OUTPUTS = {"gptq": 8, "awq": 8}


@dataclass(frozen=True, kw_only=True)
class CodedTensor:
    """A quantised weight, as `CodedKeys`, with the places of its parts. `inputs` is K where it is known."""

    key: str
    codes: str
    block: tuple[int, int] | None
    places: Mapping[str, TensorLocation]
    inputs: int | None = None
    divides: bool = False

    @property
    def path(self) -> str:
        """The file of the codes."""
        return self.places["codes"].path

    def fit(self, name: str, N: int, K: int, *, stack: int | None = None) -> CodedMatrix:
        """The matrix as one part; of a `stack`, each of so many. Raises CheckpointError where shapes do not fit [N, K],
        UnsupportedModel where no kernel knows the format."""
        fmt, lead = self._format(N, stack), () if stack is None else (stack,)
        matrix = CodedMatrix(name=name, format=fmt, parts=1, N=N, K=K)
        for size, whole, what in ((K, _WHOLE_INPUTS, "inputs"), (N, _WHOLE_OUTPUTS, "outputs")):
            if size % whole.get(self.codes, 1):
                raise UnsupportedModel(
                    f"key {self.key!r} has {size} {what}, must be a multiple of {whole[self.codes]}. {INSTEAD}"
                )
        for part, (shape, dtype) in coded_shapes(matrix).items():
            place = self.places[part]
            if part == "codes" and self.codes == "mxfp4":  # in blocks or, elsewhere than in gpt-oss, in rows of pairs
                place = replace(place, dtype="uint8" if place.dtype == "int8" else place.dtype)
                fits = place.shape in ((*lead, *shape), (*lead, N, K // 2))
            elif (part == "scales" and not fmt.block[1]) or part == "global_scale":  # [N], [N, 1] and of one number []
                fits = math.prod(place.shape) == math.prod((*lead, *shape))
            else:
                fits = place.shape == (*lead, *shape)
            if not fits or (part != "scales" and place.dtype != dtype):
                raise CheckpointError(
                    f"key {place.key!r} in {place.path} is {place.dtype} {place.shape}, must be {dtype} "
                    f"{(*lead, *shape)} for {fmt} of a weight {(N, K)}. "
                    "hint: config.json and weights are from different models"
                )
        return matrix

    def _format(self, N: int, stack: int | None) -> CodeFormat:
        scales = self.places["scales"]
        if scales.dtype not in _SCALES:
            raise UnsupportedModel(
                f"key {scales.key!r} is stored as {scales.dtype}, must be one of {', '.join(_SCALES)}. {INSTEAD}"
            )
        block = self.block
        if block is None or self.codes == "int8":
            one = math.prod(scales.shape) == (stack or 1)
            block = (0, 0) if one and N != 1 else (1, 0)
        scale = _SCALES[scales.dtype]
        wanted = {"nvfp4": "float8_e4m3fn", "mxfp4": "e8m0"}.get(self.codes)
        if (self.codes in COLUMNS and scale == "e8m0") or (scale != wanted if wanted else scale == "float8_e4m3fn"):
            wanted = wanted or "floats"
            raise UnsupportedModel(f"key {scales.key!r} is stored as {scales.dtype}, must be {wanted}. {INSTEAD}")
        whole = ("/" if self.divides else "*") if "global_scale" in self.places else ""
        return CodeFormat(codes=self.codes, block=block, scale=scale, zeros="zeros" in self.places, global_scale=whole)

    def read(self, N: int, K: int) -> CodedWeight:
        """All of it in memory, a weight [N, K]. Raises CheckpointError."""
        matrix = self.fit("weight", N, K)
        parts = {
            part: read_tensor(self.places[part]).view(getattr(torch, dtype)).reshape(shape)
            for part, (shape, dtype) in coded_shapes(matrix).items()
        }
        return CodedWeight(matrix=matrix, **parts)

    def plain(self) -> Tensor:
        """The weight in float32, `[N, K]`. Raises CheckpointError."""
        rows, columns = self.places["codes"].shape
        N, K = {
            "int4": (rows, self.inputs or 8 * columns),
            "nvfp4": (rows, 2 * columns),
            "mxfp4": (rows, 2 * columns),
            "gptq": (columns, 8 * rows),
            "awq": (8 * columns, rows),
        }.get(self.codes, (rows, columns))
        weight = self.read(N, K)
        plain = decoded(weight.named(), weight.matrix)
        if not bool(plain.isfinite().all()):
            raise CheckpointError(f"key {self.key!r} has weights that are no numbers. hint: download it again")
        return plain


Stored = TensorLocation | CodedTensor
"""A weight of a checkpoint, plain or quantised."""


def find_coded(config: Mapping[str, Any], locations: Mapping[str, TensorLocation], where: str) -> dict[str, Stored]:
    """The checkpoint's weights by key: its plain tensors, and in the place of codes and scales what they are.

    `config` is that of the file `where`. Raises CheckpointError for codes without scales, UnsupportedModel.
    """
    said, found, used = config.get("quantization_config"), dict[str, CodedTensor](), set[str]()
    scheme = Scheme.of(said, where) if said else None
    for key, place in locations.items():
        made = None if scheme is None else scheme.coded(key, place.dtype, locations.keys())
        if made is not None:
            rival = found[made.base].places["codes"].key if made.base in found else made.base
            if rival in locations and rival not in made.keys.values():
                raise CheckpointError(
                    f"keys {rival!r} and {key!r} are both {made.base}, must be one. hint: remove the stale one"
                )
            places = {part: locations[name] for part, name in made.keys.items()}
            found[made.base] = CodedTensor(
                key=made.base, codes=made.codes, block=made.block, places=places, divides=made.divides
            )
            used |= {*made.keys.values()}
    plain = {key: place for key, place in locations.items() if key not in used and not (said and UNREAD.search(key))}
    for key, place in plain.items():
        whole = place.dtype in ("int8", "uint8", "int32") and key.endswith(("weight", ".weight_packed", "_blocks"))
        if whole or place.dtype.startswith("float8"):  # codes without what would give them a meaning
            raise UnsupportedModel(
                f"key {key!r} in {place.path} is stored as {place.dtype}, must be one of bfloat16, float16, float32 or "
                f"what quantization_config names. {INSTEAD}"
            )
    return plain | found


def check_values(weights: Iterable[CodedTensor]) -> None:
    """Read all scales, GPTQ's zero points, and the order of inputs where there is one. Raises CheckpointError for a
    scale that is no finite number or makes weights that are none, UnsupportedModel for inputs that are not in their own
    order and for zero points that are not the same to all who read them."""
    for weight in sorted(weights, key=lambda weight: (weight.path, weight.places["scales"].offset)):
        scales = weight.places["scales"]
        read_tensor(scales if scales.dtype != "uint8" else replace(scales, dtype="float8_e8m0fnu"))
        whole = weight.places.get("global_scale")
        if whole is not None:
            value = read_tensor(whole)
            most = _LARGEST_NVFP4 / value if weight.divides else _LARGEST_NVFP4 * value
            if not bool(most.isfinite().all()):
                raise CheckpointError(
                    f"key {whole.key!r} in {whole.path} is {value.tolist()}, must leave weights finite. "
                    "hint: download it again"
                )
        if weight.codes == "gptq":
            _check_zeros(weight.places["zeros"])
        order = weight.places.get("order")
        if order is None or weight.block is None:
            continue
        own = torch.arange(math.prod(order.shape)) // weight.block[1]
        if not torch.equal(read_tensor(order).long().flatten(), own):
            raise UnsupportedModel(f"key {order.key!r} orders inputs anew, must leave them as they are. {INSTEAD}")


def _check_zeros(zeros: TensorLocation) -> None:
    """Stored less 1, a zero point of 15 is 16 to vLLM, 0 to AutoGPTQ, and to GPTQModel, which adds to whole words, 0
    and one more to its neighbour. Raises UnsupportedModel."""
    held = read_tensor(zeros).flatten().view(torch.uint8)
    if bool(((held & 15 == 15) | (held >> 4 == 15)).any()):
        raise UnsupportedModel(
            f"key {zeros.key!r} in {zeros.path} has zero points stored as 15, to some 16, to some 0, must be below. "
            f"{INSTEAD}"
        )
