"""The size of a model before anything loads: `describe` reads config and headers only.

A folder with only a config.json is described too, from the parameters of the model on meta; its experts are then
counted in the dtype that config.json names. Neighbours: `load` builds the same model with weights, `buddymoe plan`
prints what is found here.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from buddymoe_ray.errors import CheckpointError
from buddymoe_ray.kernels import decodes
from buddymoe_ray.models.coded_linear import BARE, CodedLinear, keep_coded
from buddymoe_ray.models.config_check import EXPERTS_PER_TOKEN, read_fields
from buddymoe_ray.models.dense_dtype import pack_dense
from buddymoe_ray.models.expert_layout import EXPERT_DTYPES, expert_layout, slot_tensors
from buddymoe_ray.models.expert_math import expert_math, read_as_stored
from buddymoe_ray.models.experts_hook import attach
from buddymoe_ray.models.families import Family, text_part
from buddymoe_ray.models.hf_loading import (
    build_meta,
    experts_modules,
    kept_in_float32,
    plan_keys,
    read_config,
    refusing,
    switch_length,
)
from buddymoe_ray.models.quantised import CodedTensor, Stored, find_coded
from buddymoe_ray.models.recurrent import StateShapes, attach_states
from buddymoe_ray.models.resolve import is_builtin
from buddymoe_ray.models.schemes import served_family, with_own_file
from buddymoe_ray.models.tensor_index import DTYPE_BYTES, TensorLocation, has_weights, read_index, read_json
from buddymoe_ray.types import CodedMatrix, ExpertLayout, SlotTensor

__all__ = [
    "MetaModel",
    "ModelShape",
    "auto_dtype",
    "dense_bytes",
    "describe",
    "eos_token_ids",
    "generation_defaults",
    "experts_per_token",
    "max_positions",
    "meta_model",
    "narrowed_family",
]


@dataclass(frozen=True, kw_only=True)
class MetaModel:
    """A model on meta with the places of its weights: `layout` for experts, `linears` for linear layers (by name) that
    compute from quantised weights as they are, `dense` (by stored key) for the rest. `coded` is all that is quantised.
    """

    model: PreTrainedModel
    config: PreTrainedConfig
    family: Family
    layout: ExpertLayout
    linears: dict[str, CodedTensor]
    dense: dict[str, Stored]
    coded: tuple[CodedTensor, ...]
    compute_dtype: torch.dtype


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What a checkpoint holds, in numbers. `dense_bytes` is what the dense weights take in the compute dtype, of them
    `embedding_bytes` those of which a token reads one row: the embedding, unless it is the head too, `head_bytes` the
    output head's.

    `expert_dtype` and `compute_dtype` are torch's names, of quantised experts their format; `has_weights` is False for
    a folder with a config alone. `transposed`: experts' matrices are stored `[in, out]`; `as_stored`: a CPU computes
    with their bytes as they are. `coded` are those of an expert that are stored quantised; `dense_format` is how most
    dense weights lie.
    `kv_bytes_per_token` is that of all attention layers, `query_width` how many numbers a token's queries are in them
    (a head's softmax takes as long as `_SOFTMAX` of those), `state_bytes` what others carry of a sequence from token to
    token.
    """

    model_type: str
    packed: bool
    has_weights: bool
    hidden_size: int
    vocab_size: int
    num_layers: int
    moe_layers: int
    experts_per_layer: tuple[int, ...]
    experts_per_token: int
    slot_tensors: tuple[SlotTensor, ...]
    coded: tuple[CodedMatrix, ...]
    slot_bytes: int
    expert_bytes: int
    total_expert_bytes: int
    dense_bytes: int
    dense_format: str
    head_bytes: int
    embedding_bytes: int
    expert_dtype: str
    compute_dtype: str
    max_positions: int
    transposed: bool
    as_stored: bool
    kv_bytes_per_token: int
    query_width: int
    state_bytes: int


def auto_dtype(folder: Path) -> torch.dtype:
    """float32 for `builtin:tiny` and float32 checkpoints, else the checkpoint's own dtype.

    The checkpoint's dtype is the one that most bytes of its plain weights are stored in; without any, what config.json
    says.
    """
    if is_builtin(folder):
        return torch.float32
    name = _plain_dtype(folder) or _config_dtype(folder)
    return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(name, torch.float32)


def meta_model(
    folder: Path, *, dtype: torch.dtype | None = None, attn: str | None = None, on_cpu: bool = True
) -> MetaModel:
    """Build the model on meta and find all weights, reading config and headers only.

    Raises:
        CheckpointError: the checkpoint is incomplete or does not fit its config.
        UnsupportedModel: family or storage has no path here.
    """
    family, stored = served_family(folder), _stored(folder)
    config = read_config(folder)
    dtype = dtype or auto_dtype(folder)
    model = build_meta(config, dtype=dtype, attn=attn)
    plan = plan_keys(model, stored)
    layout = expert_layout(model, plan.experts, stored)
    linears, dense = dict[str, CodedTensor](), dict[str, Stored]()
    modules = {f"{name}.weight": (name, m) for name, m in model.named_modules() if type(m) is nn.Linear}
    for name in kept_in_float32(model) & modules.keys():
        del modules[name]
    for key, target in plan.dense.items():
        found, (name, linear) = stored[key], modules.get(target or "", ("", None))
        if isinstance(found, CodedTensor) and linear is not None:
            matrix = found.fit(name, linear.out_features, linear.in_features)
            if on_cpu and decodes(matrix.format) and not name.endswith(BARE):
                linears[name] = found
                continue
            found = replace(found, inputs=linear.in_features)
        dense[key] = found
    return MetaModel(
        model=model,
        config=config,
        family=_narrowed(family, model),
        layout=layout,
        linears=linears,
        dense=dense,
        coded=tuple(found for found in stored.values() if isinstance(found, CodedTensor)),
        compute_dtype=dtype,
    )


def _stored(folder: Path) -> dict[str, Stored]:
    return find_coded(_written(folder), read_index(folder), str(folder / "config.json"))


def _written(folder: Path) -> Mapping[str, Any]:
    return with_own_file(text_part(read_json(folder / "config.json")), folder)


def describe(
    folder: Path, *, dtype: torch.dtype | None = None, dense_dtype: str = "native", on_cpu: bool = True
) -> ModelShape:
    """Sizes of the checkpoint in `folder`, which may hold a config.json and nothing else. Elsewhere than `on_cpu` dense
    weights that are stored quantised are held in the compute dtype."""
    if has_weights(folder):
        meta = meta_model(folder, dtype=dtype, on_cpu=on_cpu)
        keep_coded(meta.model, meta.linears, on_meta=True)
        pack_dense(meta.model, dense_dtype)
        return _shape(meta.model, meta.family, meta.layout, weights=True)
    family = served_family(folder)
    if _written(folder).get("quantization_config"):
        raise CheckpointError(
            f"{folder} is a quantised model's and has no weights, must have their headers. hint: download it whole"
        )
    model = build_meta(read_config(folder), dtype=dtype or auto_dtype(folder), attn=None)
    pack_dense(model, dense_dtype)
    modules = list(experts_modules(model).values())
    params = dict(modules[0].named_parameters())
    dtypes = dict.fromkeys(params, _config_dtype(folder))
    tensors = slot_tensors({name: tuple(p.shape[1:]) for name, p in params.items()}, dtypes)
    layout = ExpertLayout(
        tensors=tensors,
        slot_bytes=tensors[-1].offset + -(-tensors[-1].nbytes // 64) * 64,
        expert_bytes=sum(t.nbytes for t in tensors),
        layers=len(modules),
        experts_per_layer=tuple(next(m.parameters()).shape[0] for m in modules),
        pieces={},
    )
    return _shape(model, _narrowed(family, model), layout, weights=False)


def dense_bytes(model: PreTrainedModel) -> int:
    """Bytes of all parameters and buffers outside the experts, tied ones counted once; the same on meta and loaded."""
    expert_ids = {id(p) for m in experts_modules(model).values() for p in m.parameters()}
    tied, wide = set(model.all_tied_weights_keys), kept_in_float32(model)
    held: dict[int, int] = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if id(tensor) not in expert_ids and name not in tied:
            held[id(tensor)] = math.prod(tensor.shape) * (4 if name in wide else tensor.dtype.itemsize)
    return sum(held.values())


def experts_per_token(config: PreTrainedConfig) -> int:
    """The router's K. The largest where layers differ."""
    value = next(getattr(config, name) for name in EXPERTS_PER_TOKEN if name in read_fields(config))
    return max(value) if isinstance(value, list | tuple) else int(value)


def eos_token_ids(folder: Path, config: PreTrainedConfig) -> frozenset[int]:
    """End tokens as `generate` knows them: generation_config.json first, then config.json. Raises CheckpointError."""
    path = folder / "generation_config.json"
    value: Any = read_json(path).get("eos_token_id") if path.exists() else None
    if value is None:
        path, value = folder / "config.json", getattr(config, "eos_token_id", None)
    ids = value if isinstance(value, list | tuple) else [] if value is None else [value]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise CheckpointError(
            f"eos_token_id in {path} is {value!r}, must be a token id or a list of them. hint: fix the field"
        )
    return frozenset(ids)


def generation_defaults(folder: Path) -> dict[str, Any]:
    """What generation_config.json says of sampling, by the names of SamplingParams; as in vLLM, `do_sample` is not
    read."""
    path = folder / "generation_config.json"
    said = read_json(path) if path.exists() else {}
    names = {name: name for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")}
    names["max_new_tokens"] = "max_tokens"
    return {ours: said[theirs] for theirs, ours in names.items() if said.get(theirs) is not None}


def max_positions(config: PreTrainedConfig) -> int:
    """Longest sequence the model was made for, in tokens; `dynamic` rope stretches what it was trained on."""
    rope = getattr(config, "rope_parameters", None) or {}
    stretch = rope.get("factor", 1.0) if rope.get("rope_type") == "dynamic" and not rope.get("alpha") else 1.0
    return int(config.max_position_embeddings * stretch)


def _shape(model: PreTrainedModel, family: Family, layout: ExpertLayout, *, weights: bool) -> ModelShape:
    config, experts = model.config, list(experts_modules(model).values())
    maths = [expert_math(module, layout) for module in experts]
    head, carried = model.get_output_embeddings(), StateShapes()
    attach_states(model, carried)
    return ModelShape(
        model_type=family.model_type,
        packed=family.packed,
        has_weights=weights,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        num_layers=config.num_hidden_layers,
        moe_layers=layout.layers,
        experts_per_layer=layout.experts_per_layer,
        experts_per_token=experts_per_token(config),
        slot_tensors=layout.tensors,
        coded=layout.coded,
        slot_bytes=layout.slot_bytes,
        expert_bytes=layout.expert_bytes,
        total_expert_bytes=layout.total_bytes,
        dense_bytes=dense_bytes(model),
        dense_format=_dense_format(model),
        head_bytes=sum(tensor.nbytes for tensor in (*head.parameters(), *head.buffers())),
        embedding_bytes=0 if config.tie_word_embeddings else model.get_input_embeddings().weight.nbytes,
        expert_dtype=layout.stored_as,
        compute_dtype=str(config.dtype).removeprefix("torch."),
        max_positions=max_positions(config),
        transposed=maths[0].transposed,
        as_stored=read_as_stored(maths, layout),
        **_attention_sizes(model),
        state_bytes=carried.nbytes,  # known since that pass
    )


def _dense_format(model: PreTrainedModel) -> str:
    """How most bytes of the linear layers lie that are not packed anew."""
    held = Counter[str]()
    for module in model.modules():
        if isinstance(module, CodedLinear):
            held[str(module.coded.matrix.format)] += sum(t.nbytes for t in module.coded.named().values())
        elif isinstance(module, nn.Linear):
            held[str(module.weight.dtype).removeprefix("torch.")] += module.weight.nbytes
    return held.most_common(1)[0][0] if held else str(model.config.dtype).removeprefix("torch.")


def _attention_sizes(model: PreTrainedModel) -> dict[str, int]:
    """What one token's keys and values take in all attention layers, and the numbers of its queries: one token's pass
    on meta shows their shapes."""
    seen, queries = list[Tensor](), list[Tensor]()

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        seen.extend((key, value))
        queries.append(query)
        return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None

    AttentionInterface.register(_SIZING, attend)
    was = model.config._attn_implementation
    model.set_attn_implementation(_SIZING)
    attach(list(experts_modules(model).values()), lambda *_: lambda hidden_TD, *__: hidden_TD)
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.int64, device="meta")  # a mask of four dimensions is taken as it is
    rope = getattr(model.config, "rope_parameters", None)
    model.config.rope_parameters = {**(rope or {}), "rope_type": "default"}
    for module in model.modules():  # positions on meta have no length that frequencies could follow
        kind = getattr(module, "rope_type", None)
        if kind is not None:
            setattr(module, "rope_type", dict.fromkeys(kind, "default") if isinstance(kind, dict) else "default")  # noqa: B010
    with refusing(model.config), torch.inference_mode():
        model(input_ids=zero[0, 0], attention_mask=zero, use_cache=False, logits_to_keep=1)
    model.config.rope_parameters = rope
    model.set_attn_implementation(was)
    return {"kv_bytes_per_token": sum(t.nbytes for t in seen), "query_width": sum(map(_width, queries))}


def _width(query: Tensor) -> int:
    """Of one layer: `[1, heads, 1, numbers of a head]`."""
    return query.shape[1] * (query.shape[3] + _SOFTMAX)


_SIZING = "buddymoe_sizing"
_SOFTMAX = 32
"""A number of a head of 128 took half as long as one of a head of 32."""


def narrowed_family(folder: Path) -> Family:
    """The family as this checkpoint of it is served, of its config alone. Raises CheckpointError, UnsupportedModel."""
    family = served_family(folder)
    return _narrowed(family, build_meta(read_config(folder), dtype=torch.float32, attn=None))


def _narrowed(family: Family, model: PreTrainedModel) -> Family:
    """A packed family whose logits depend on how a text is cut into passes must run solo after all, and so must one
    whose layers are handed others' keys and values."""
    switch = 0 if getattr(model.config, "num_kv_shared_layers", 0) else switch_length(model)
    return family if switch is None or switch >= max_positions(model.config) else replace(family, packed=False)


def _plain_dtype(folder: Path) -> str | None:
    held = Counter[str]()
    for stored in _stored(folder).values() if has_weights(folder) else ():
        if isinstance(stored, TensorLocation) and stored.dtype in EXPERT_DTYPES:
            held[stored.dtype] += stored.nbytes
    return held.most_common(1)[0][0] if held else None


def _config_dtype(folder: Path) -> str:
    config = _written(folder)
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    return name if name in DTYPE_BYTES else "float32"
