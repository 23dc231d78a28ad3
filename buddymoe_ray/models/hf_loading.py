"""The one file that touches transformers' internals (5.23): meta build, key conversion, dense load.

Experts are never materialised: their parameters stay on meta and only their keys are converted, so that `experts_index`
knows where their bytes go. Invariant: a model leaves `load_dense` exactly as `from_pretrained` would leave it, experts
aside.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    apply_renamings,
    build_glob_alternation,
    convert_and_load_state_dict_in_model,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.utils import logging as hf_logging
from transformers.utils.generic import ContextManagers

from buddymoe_ray.errors import BuddyMoEError, CheckpointError, ConfigError, UnsupportedModel
from buddymoe_ray.models import experts_hook
from buddymoe_ray.models.config_check import check_config, rope_parameters
from buddymoe_ray.models.dense import LazyTensor, read_tensor
from buddymoe_ray.models.families import WINDOWED, text_part
from buddymoe_ray.models.quantised import CodedTensor, Stored
from buddymoe_ray.models.tensor_index import read_json

__all__ = [
    "StoredExperts",
    "KeyPlan",
    "architecture",
    "build_meta",
    "experts_modules",
    "kept_in_float32",
    "load_dense",
    "plan_keys",
    "read_config",
    "recomputes_at_switch",
    "refusing",
    "stored_shapes",
    "switch_length",
]


log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StoredExperts:
    """A stored tensor that is part of an experts parameter.

    `param` is the full parameter name. `expert` is None for a fused stack `[E, ...]`; else the tensor is one expert's
    part `part` of `parts` along the parameter's dimension 1.
    """

    key: str
    param: str
    expert: int | None
    part: int
    parts: int


@dataclass(frozen=True, kw_only=True)
class KeyPlan:
    """What becomes of each stored key: part of an expert, or left to transformers' loader. `dense` names the parameter
    that a key is, None where the loader converts it."""

    experts: tuple[StoredExperts, ...]
    dense: Mapping[str, str | None]


def read_config(folder: Path) -> PreTrainedConfig:
    """transformers' config of the folder, of a model of more than text that of its text part; the caller has checked
    the family."""
    where = folder / "config.json"
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            str(folder), trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # transformers raises many kinds for a bad field
        raise CheckpointError(f"{where} is refused by transformers ({error}). hint: fix the field") from error
    text: PreTrainedConfig = config.get_text_config(decoder=True)
    check_config(text, text_part(read_json(where)), str(where))
    if text is not config:
        text.tie_word_embeddings = getattr(config, "tie_word_embeddings", False)
        ends = getattr(config, "eos_token_id", None)
        text.eos_token_id = text.eos_token_id if ends is None else ends
    return text


def build_meta(config: PreTrainedConfig, *, dtype: torch.dtype, attn: str | None) -> PreTrainedModel:
    """The causal model of `config` on meta, in eval mode, its experts answered by `experts_hook`."""
    experts_hook.register()
    model_class = _causal_class(config)
    config.dtype = dtype
    config._experts_implementation = experts_hook.NAME
    config._attn_implementation = attn
    contexts = model_class.get_init_context(dtype, False, False, None)
    with ContextManagers(contexts), refusing(config, attn):
        model: PreTrainedModel = model_class(config)
    _freeze(model)
    return model


def experts_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Experts modules by full name, in the order of the model's layers."""
    found = {name: m for name, m in model.named_modules() if hasattr(m, "is_transposed") and hasattr(m, "_apply_gate")}
    if not found:
        raise UnsupportedModel(f"{type(model).__name__} has no routed experts. hint: it is configured as a dense model")
    return found


def switch_length(model: PreTrainedModel) -> int | None:
    """Tokens beyond which logits depend on how a text was cut into passes; None: they never do.

    There rotary frequencies become those of the longest position of a pass, or a sliding window ends that only prompts
    or only decode steps keep, or an indexer begins to choose. Rows may not share a pass then.
    """
    config = model.config
    window = getattr(config, "sliding_window", None)
    kinds = {str(getattr(module, "rope_type", "")) for module in model.modules()}
    lengths = []
    if "dynamic" in kinds:
        lengths.append(config.max_position_embeddings)
    for rope in rope_parameters(config).values():
        if "longrope" in (*kinds, rope.get("rope_type")) or "short_mscale" in rope:  # phimoe's mscale, of any kind
            lengths.append(rope.get("original_max_position_embeddings", 0))
    for chosen, each in _INDEXED.items():
        if getattr(config, chosen, None) is not None:
            lengths.append(getattr(config, chosen) * getattr(config, each, 1))
    if window is not None and config.model_type not in WINDOWED:
        lengths.append(window)
    return min(lengths, default=None)


_INDEXED = {"index_topk": "", "index_topk_blocks": "index_block_size"}
"""What an indexer chooses at most, and the tokens of each: which of equals it takes depends on how many there are."""


def recomputes_at_switch(model: PreTrainedModel) -> bool:
    """Whether `generate` drops the cache where the rotary frequencies change, so that no key of before is left."""
    own: Any = type(model)
    return own.prepare_inputs_for_generation is not GenerationMixin.prepare_inputs_for_generation


def kept_in_float32(model: PreTrainedModel) -> set[str]:
    """Names of stored tensors that transformers keeps in float32 whatever the compute dtype."""
    plan = model._get_dtype_plan(_dtype(model))
    if not plan:
        return set()
    pattern, _, _ = build_glob_alternation(list(plan))
    return {name for name in model.state_dict() if pattern.search(name)}


_TEXT_PART = {r"^(model\.language_model|language_model\.model)\.": "model.", r"^language_model\.lm_head\.": "lm_head."}
"""Where a model of more than text keeps what its text part has under its own names."""


def _conversions(model: PreTrainedModel) -> list[Any]:
    """Of stored keys; where a text part's keys are converted with those of its whole model, these come first."""
    kind = model.config.model_type
    outer = get_checkpoint_conversion_mapping(kind.removesuffix("_text")) if kind.endswith("_text") else None
    return [*(outer or ()), *get_model_conversion_mapping(model, key_mapping=_TEXT_PART)]


def plan_keys(model: PreTrainedModel, keys: Iterable[str]) -> KeyPlan:
    """Run every stored key through transformers' key conversion and tell experts from dense.

    Raises:
        UnsupportedModel: an expert key is converted by an operation that is no plain copy of bytes.
    """
    mapping = _conversions(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    state = model.state_dict()
    expert_params = {f"{name}.{p}" for name, m in experts_modules(model).items() for p, _ in m.named_parameters()}
    experts, dense = list[StoredExperts](), dict[str, str | None]()
    for key in sorted(keys, key=dot_natural_key):
        target, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if target not in state and key in state:
            target, pattern = key, None
        if target not in expert_params:
            dense[key] = target if pattern is None else None
        elif pattern is None:
            experts.append(StoredExperts(key=key, param=target, expert=None, part=0, parts=1))
        else:
            experts.append(_converted(key, target, pattern, by_pattern[pattern], renamings))
    return KeyPlan(experts=tuple(experts), dense=dense)


def _converted(
    key: str, target: str, pattern: str, converter: WeightConverter, renamings: list[WeightRenaming]
) -> StoredExperts:
    for op in converter.operations:
        merges = isinstance(op, MergeModulelist) and op.dim == 0
        joins = isinstance(op, Concatenate) and op.dim == 1
        if not (merges or joins):
            raise UnsupportedModel(
                f"key {key!r} is converted by {type(op).__name__}, must be MergeModulelist or Concatenate. "
                "hint: save the checkpoint again with transformers 5.23"
            )
    number = re.search(pattern.replace("*", r"(\d+)"), apply_renamings(key, renamings))
    if number is None or not number.groups():
        raise UnsupportedModel(f"key {key!r} has no expert number at the star of {pattern!r}. hint: report this family")
    parts = converter.source_patterns
    return StoredExperts(key=key, param=target, expert=int(number[1]), part=parts.index(pattern), parts=len(parts))


def load_dense(
    model: PreTrainedModel, dense: Mapping[str, Stored], *, device: torch.device, elsewhere: Collection[str] = ()
) -> None:
    """Load dense weights, quantised ones as float32 of their codes, rebuild the buffers that are not stored, tie what
    is tied. Parameters `elsewhere` stay on meta, like those of experts.

    Raises:
        CheckpointError: a key is missing, of the wrong shape, or not finite. One too many is a warning.
    """
    experts = {f"{name}.{p}" for name, m in experts_modules(model).items() for p, _ in m.named_parameters()}
    experts |= set(elsewhere)
    dtype = _dtype(model)
    mapping = _conversions(model)
    load_config = LoadStateDictConfig(
        device_map={"": device},
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),
        weight_mapping=mapping,
    )
    lazy: dict[str, Any] = {key: LazyTensor(_reader(stored)) for key, stored in dense.items()}
    with _no_progress_bar():
        info, _ = convert_and_load_state_dict_in_model(model, lazy, load_config)
    info.missing_keys -= experts
    for name in experts:  # or transformers would draw random weights for them
        setattr(model.get_parameter(name), "_is_hf_initialized", True)  # noqa: B010
    _raise_on_problems(model, info, dense)
    _finish(model, info, load_config)
    left = [n for n, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta and n not in experts]
    assert not left, f"{left} are on meta after the load, must be real: transformers' loading order changed"


def _reader(stored: Stored) -> Callable[[], Tensor]:
    return stored.plain if isinstance(stored, CodedTensor) else partial(read_tensor, stored)


def _finish(model: Any, info: Any, load_config: LoadStateDictConfig) -> None:
    """What `from_pretrained` does after the weights: buffers, ties, flags."""
    model.mark_tied_weights_as_initialized(info)
    model._move_missing_keys_from_meta_to_device(set(), load_config.device_map, None, None)
    model._initialize_missing_keys(is_quantized=False)
    model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
    for module in model.modules():
        if getattr(module, "rope_type", None) == "default":  # phimoe's would compute its own on the host in every pass
            module.rope_init_fn = lambda *_, kept=module: (kept.inv_freq, kept.attention_scaling)
    _freeze(model)


def _freeze(model: Any) -> None:
    model.eval().requires_grad_(False)


def _dtype(model: PreTrainedModel) -> torch.dtype:
    dtype = model.config.dtype
    assert isinstance(dtype, torch.dtype), f"config.dtype is {dtype!r}, must be a torch dtype: build_meta sets it"
    return dtype


def _causal_class(config: PreTrainedConfig) -> Any:
    causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING  # mistral4's model is in the other alone
    return (MODEL_FOR_CAUSAL_LM_MAPPING if causal else MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)[type(config)]


def _raise_on_problems(model: PreTrainedModel, info: Any, dense: Mapping[str, Stored]) -> None:
    model._adjust_missing_and_unexpected_keys(info)
    tied = model.all_tied_weights_keys  # either of two is enough
    missing = info.missing_keys.difference(tied, (tied[name] for name in tied.keys() - info.missing_keys))
    files = sorted({place.path for place in dense.values()})
    where = files[0] if len(files) == 1 else f"{Path(files[0]).parent} ({len(files)} files)" if files else "no file"
    if info.conversion_errors:
        name, text = next(iter(info.conversion_errors.items()))
        raise CheckpointError(f"parameter {name!r} of {where} cannot be converted ({text.splitlines()[-1]})")
    if info.mismatched_keys:
        name, stored, wanted = sorted(info.mismatched_keys, key=lambda item: item[0])[0]
        raise CheckpointError(
            f"key {name!r} in {where} has shape {tuple(stored)}, must be {tuple(wanted)} as config.json says. "
            "hint: config.json and weights are from different models"
        )
    if missing:
        raise CheckpointError(
            f"key {min(missing)!r} is missing from {where} ({len(missing)} are), must be there. "
            "hint: finish the download, or check that config.json belongs to these weights"
        )
    if info.unexpected_keys:
        named = sorted(info.unexpected_keys, key=dot_natural_key)
        log.warning(
            "%s: %d keys are no parameters of %s and left out, as transformers does: %s",
            where,
            len(named),
            type(model).__name__,
            ", ".join(named[:3]) + (", ..." if len(named) > 3 else ""),
        )


@contextmanager
def refusing(config: PreTrainedConfig, attn: str | None = None, dtype: torch.dtype | None = None) -> Iterator[None]:
    """Turns whatever a modeling file stumbles over into a CheckpointError, or a ConfigError about `attn`."""
    try:
        yield
    except BuddyMoEError:
        raise
    except Exception as error:  # transformers raises many kinds for a bad field
        if attn is not None and isinstance(error, ValueError | ImportError):
            raise ConfigError(
                f"attention is {attn!r}, must be one that {config.model_type} supports ({error}). "
                "hint: leave it to the default"
            ) from error
        half = dtype is torch.float16  # some families keep a few weights in float32 and do not widen rows for them
        raise CheckpointError(
            f"config.json of {config.model_type} describes no model{' that runs in float16' if half else ''} "
            f"({type(error).__name__}: {error}). "
            f"hint: {'serve with --dtype bfloat16, or ' if half else ''}compare it with the release's own"
        ) from error


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    bars: Any = hf_logging
    hide = bars.is_progress_bar_enabled()
    if hide:
        bars.disable_progress_bar()
    try:
        yield
    finally:
        if hide:
            bars.enable_progress_bar()


def stored_shapes(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Keys and shapes that `save_pretrained` would write for a model of `config`, in the order of its layers."""
    model = build_meta(config, dtype=torch.bfloat16, attn=None)
    tied = set(model.all_tied_weights_keys)
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    saved = revert_weight_conversion(model, state)
    return {key: tuple(saved[key].shape) for key in sorted(saved, key=dot_natural_key)}


def architecture(config: PreTrainedConfig) -> str:
    """Name of the causal model's class, as config.json's `architectures` has it."""
    return str(_causal_class(config).__name__)
