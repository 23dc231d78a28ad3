"""Every option of the engine, with its one default: a frozen record that validates itself.

Knows neither torch nor ray. The command line, the YAML of `deployments/` and `LLM(...)` all end here, so a default is
written once. Environment variables are read in this file alone.
"""

from __future__ import annotations

import difflib
import os
import re
import stat
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args

from buddymoe_ray.errors import ConfigError
from buddymoe_ray.types import Mode

__all__ = [
    "EngineConfig",
    "api_key_from_environment",
    "cache_folder",
    "near_miss",
    "one_of",
    "option_notes",
    "parse_memory",
    "private_folder",
    "ray_address_from_environment",
    "visible_gpus_from_environment",
    "refuse_unknown",
    "why_unwritable",
]

DTYPES = ("auto", "float32", "bfloat16", "float16")
BATCHING = ("auto", "packed", "solo")
READ_AHEADS = ("auto", "off")
PREFIX_CACHES = HOST_COMPUTES = ("auto", "on", "off")
GENERATION_CONFIGS = ("auto", "none")
CALIBRATES = ("auto", "off")
INEXACT = (  # without effect in `exact`
    *("budget", "standin", "standin_layers", "policy", "profile", "guard_share"),
    *("calibrate", "cache_dir", "host_compute"),
)
ANSWERS = (  # with another of these a request may be answered differently
    *("mode", "budget", "standin", "standin_layers", "policy", "profile", "calibrate", "guard_share", "host_compute"),
    *("expert_dtype", "dense_dtype", "dtype", "device", "batching", "prefix_cache"),
    *("max_model_len", "seed", "generation_config"),
)
RESIDENT = ("memory", "host_memory")  # so it may with these, where stand-ins answer
EXPERT_DTYPES = ("native", "bf16", "int8", "int4")
DENSE_DTYPES = ("native", "int8", "int4")
POLICIES = ("ladder", "buddymoe")
LOWBIT = ("lowbit12", "lowbit2", "lowbit23", "lowbit24", "lowbit3", "lowbit34", "lowbit4", "lowbit48", "lowbit8")
RECORD_KINDS = (*LOWBIT, "lowrank", "mean")
BUDDIES = ("buddy:router", "buddy:output", "buddy:coactivation", "random")
STANDINS = {
    **{"auto": RECORD_KINDS, "lowbit": LOWBIT},
    **{kind: (kind,) for kind in RECORD_KINDS},
    **dict.fromkeys((*BUDDIES, "drop"), ()),
}
"""Each `standin` with the kinds of record it may use; buddies and drop keep no bytes of their own."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How one engine serves one model.

    Args:
        model: `builtin:tiny`, a checkpoint folder, or a hub id.
        memory: device budget for routed experts, staging and scratch included: `25%` of their stored bytes, or `6GiB`.
            On CPU the workers of a node put theirs together.
        host_memory: host-tier budget between device and disk, same forms; `0` is no host tier. Workers of a node put
            theirs together.
        mode: `exact` answers every miss with the expert itself; `bounded` lets stand-ins answer within `budget`; `fast`
            never waits in decode. A request may ask for another where stand-ins are loaded.
        budget: mean extra loss (nats) per generated token that `bounded` may spend; .003 is about .3 % of perplexity.
        standin: what answers for a missing expert: `auto` (the best mix by the profile), `lowbit`, `lowbit12` (1 bit,
            2 in the second projection), `lowbit2`, `lowbit23`, `lowbit24`, `lowbit3`, `lowbit34`, `lowbit4`,
            `lowbit48`, `lowbit8`, `lowrank`, `buddy:coactivation`, `buddy:router`, `buddy:output`, `mean`, `drop`,
            `random`.
        standin_layers: MoE layers where stand-ins may answer, as `0,2,3`; None is all. Elsewhere misses are fetched.
        policy: `ladder` (cheapest option within the budget) or `buddymoe` (the paper whole, its gates fetch).
        profile: calibration file; None is the one beside the checkpoint.
        calibrate: what happens where there is no profile: `auto` serves exactly and has stand-ins made meanwhile, by a
            process beside and from text that the model writes; once measured they serve `mode`, at half the budget
            until requests confirm them. `off` makes none: `bounded` stays exact, `fast` is refused.
        cache_dir: folder of this user's alone where what `calibrate` makes is kept, by checkpoint; None is
            `~/.cache/buddymoe_ray/calibrations`.
        expert_dtype: precision the experts are served in: `native`, `bf16`, `int8`, `int4`.
        dense_dtype: precision of attention, shared experts and output head: `native`, `int8`, `int4` (CPU only). Mode
            `exact` is exact to it.
        guard_share: share of `bounded` and `fast` sequences recomputed exactly to check their cost and correct what
            later ones are charged; 0 is off.
        dtype: compute dtype; `auto` is float32 for `builtin:tiny` and float32 checkpoints, else the checkpoint's.
        device: `auto` (cuda when there is one, else cpu), `cpu`, `cuda`, `cuda:1`, or `interpret`: experts take a GPU's
            path on the CPU, in Triton's interpreter, to debug it (TRITON_INTERPRET=1; seconds a token).
        threads: CPU threads of the compute kernels of one engine.
        max_model_len: most tokens of prompt and output; None is the model's own limit.
        max_running: most sequences that decode side by side.
        kv_memory: bytes of the KV cache: `512MiB`, or `auto`: what `max_running` sequences of `max_model_len` need, as
            far as the device has room beside dense weights and experts.
        prefill_chunk: most prompt tokens computed in one step, whoever waits; None is 512, or, where experts are
            missing, as many as 256 MiB of activations hold, so that a prompt reads each expert once: on CPU in most
            families set aside for decode steps, so that these wait at most about three times as long as alone. Where
            layers carry a state always as many, which nobody makes fewer: its bits depend on where a prompt is cut.
        prefix_cache: whether what was computed of a text serves later ones with the same beginning, as long as the KV
            cache has room: `auto` where it changes no bit (on CPU, in most families), `on` wherever rows share a pass
            and no layer carries a state, `off`. What a stand-in had a part in is never shared.
        read_ahead: whether experts are read before a layer asks for them (CPU): `auto` for prompts, and in decode steps
            where guesses are measured to pay, `off`.
        host_compute: whether a GPU's host computes missing experts that lie in its memory (`host_memory`), for rows of
            `bounded` and `fast` alone, as a CPU's last bits are others: `auto` where that is measured to be sooner than
            their fetch, `on` whatever it takes, `off`.
        batching: `packed` (ragged rows over a paged KV cache), `solo` (transformers' own cache, a forward per sequence;
            for families whose attention chooses keys by an indexer), `auto` picks by family.
        seed: seeds the requests that bring none.
        generation_config: what requests of a service leave open is sampled as the checkpoint's generation_config.json
            says (`auto`), or as OpenAI's API does (`none`). `LLM.generate` is greedy where it is told nothing.
    """

    model: str = "builtin:tiny"
    memory: str = "50%"
    host_memory: str = "0"
    mode: Mode = "exact"
    budget: float = 0.003
    standin: str = "auto"
    standin_layers: str | None = None
    policy: str = "ladder"
    profile: str | None = None
    calibrate: str = "auto"
    cache_dir: str | None = None
    expert_dtype: str = "native"
    dense_dtype: str = "native"
    guard_share: float = 0.02
    dtype: str = "auto"
    device: str = "auto"
    threads: int = 1
    max_model_len: int | None = None
    max_running: int = 32
    kv_memory: str = "auto"
    prefill_chunk: int | None = None
    prefix_cache: str = "auto"
    read_ahead: str = "auto"
    host_compute: str = "auto"
    batching: str = "auto"
    seed: int = 0
    generation_config: str = "auto"

    def __post_init__(self) -> None:
        for name in ("model", "standin_layers", "profile", "cache_dir"):
            value = getattr(self, name)
            if not isinstance(value, str) and (value is not None or name == "model"):
                raise ConfigError(f"{name} is {value!r}, must be text. hint: put it in quotes")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise ConfigError(f"seed is {self.seed!r}, must be an integer. hint: leave it out for the default")
        one_of("mode", self.mode, get_args(Mode))
        one_of("standin", self.standin, tuple(STANDINS))
        one_of("policy", self.policy, POLICIES)
        one_of("expert_dtype", self.expert_dtype, EXPERT_DTYPES)
        one_of("dense_dtype", self.dense_dtype, DENSE_DTYPES)
        for name in ("memory", "host_memory", "kv_memory"):
            if (name, getattr(self, name)) != ("kv_memory", "auto"):
                parse_memory(getattr(self, name), total_expert_bytes=0, name=name)
        if self.kv_memory.endswith("%"):
            raise ConfigError(f"kv_memory is {self.kv_memory!r}, must be bytes or auto. hint: write 512MiB")
        self.chosen_layers()
        _between("budget", self.budget, 0.0, 1.0)
        _between("guard_share", self.guard_share, 0.0, 1.0)
        one_of("calibrate", self.calibrate, CALIBRATES)
        one_of("dtype", self.dtype, DTYPES)
        one_of("batching", self.batching, BATCHING)
        one_of("prefix_cache", self.prefix_cache, PREFIX_CACHES)
        one_of("read_ahead", self.read_ahead, READ_AHEADS)
        one_of("host_compute", self.host_compute, HOST_COMPUTES)
        one_of("generation_config", self.generation_config, GENERATION_CONFIGS)
        for name in ("threads", "max_running"):
            _at_least(name, getattr(self, name), 1)
        _between("threads", self.threads, 1, 1024)
        if self.prefill_chunk is not None:
            _at_least("prefill_chunk", self.prefill_chunk, 1)
        if self.max_model_len is not None:
            _at_least("max_model_len", self.max_model_len, 2)
        if not re.fullmatch(r"auto|cpu|interpret|cuda(:\d+)?", str(self.device)):
            raise ConfigError(
                f"device is {self.device!r}, must be auto, cpu, interpret, cuda or cuda:N. hint: leave it at auto"
            )
        if self.mode == "exact":
            self._refuse_inexact()

    def _refuse_inexact(self) -> None:
        for name in INEXACT:
            value = getattr(self, name)
            if value != getattr(EngineConfig, name) and not (name == "guard_share" and value == 0):
                raise ConfigError(
                    f"{name} is {value!r}, must be left out in mode exact, where it has no effect. "
                    "hint: set mode to bounded or fast"
                )

    def exactly(self, **changes: Any) -> EngineConfig:
        """The same in mode `exact`, without what has no effect there."""
        unused = {name: getattr(EngineConfig, name) for name in INEXACT}
        return replace(self, **{"mode": "exact", **unused, **changes})

    def binding(self) -> dict[str, object]:
        """What its answers depend on, beside the model: what was begun may be gone on with under the same alone."""
        names = ANSWERS if self.mode == "exact" else ANSWERS + RESIDENT
        return {name: getattr(self, name) for name in names}

    def chosen_layers(self) -> frozenset[int] | None:
        """`standin_layers` as numbers, None for all. Raises ConfigError."""
        if self.standin_layers is None:
            return None
        parts = self.standin_layers.split(",")
        if not all(part.strip().isdecimal() for part in parts):
            raise ConfigError(
                f"standin_layers is {self.standin_layers!r}, must be layer numbers like 0,2,3. "
                "hint: leave it out for all layers"
            )
        return frozenset(int(part) for part in parts)

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Names of all options, in the order of the class."""
        return tuple(f.name for f in fields(cls))

    @classmethod
    def from_options(cls, **options: Any) -> EngineConfig:
        """Build from keywords and refuse unknown names with the list of known ones; a path is the text of it."""
        refuse_unknown("option", options, cls.names())
        return cls(**{name: os.fspath(x) if isinstance(x, os.PathLike) else x for name, x in options.items()})


def option_notes(cls: type) -> dict[str, str]:
    """What the docstring of an options class says of each, on one line."""
    section = (cls.__doc__ or "").partition("Args:\n")[2].rstrip() + "\n"
    found = re.findall(r"^        (\w+): (.+?)(?=^        \w+: |\Z)", section, re.M | re.S)
    return {name: " ".join(note.split()).rstrip(".") for name, note in found}


_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_MOST, _MOST_BYTES = (1 << 31) - 1, 1e18
_MEMORY = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(%|[a-zA-Z]*)\s*")


def parse_memory(text: str, *, total_expert_bytes: int, name: str = "memory") -> int:
    """Bytes of `50%` (of all routed experts as stored), `6GiB`, `300MB` or `1234`. Raises ConfigError."""
    match = _MEMORY.fullmatch(text) if isinstance(text, str) else None
    unit = match.group(2).lower() if match else ""
    if match is None or (unit != "%" and unit not in _UNITS):
        raise ConfigError(f"{name} is {text!r}, must be like 25% or 6GiB. hint: units are %, KiB, MiB, GiB, KB, MB, GB")
    number = float(match.group(1))
    nbytes = number * total_expert_bytes / 100 if unit == "%" else number * _UNITS[unit]
    if nbytes > _MOST_BYTES:
        raise ConfigError(f"{name} is {nbytes:.3g} bytes, must be at most {_MOST_BYTES:.3g}. hint: 100% is all experts")
    return int(nbytes)


def refuse_unknown(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise ConfigError for the first word that is not known, with the one that looks most like it, or with all."""
    known = tuple(known)
    for word in given:
        if word not in known:
            hint = near_miss(word, known, otherwise=f"there are {', '.join(known)}")
            raise ConfigError(f"{what} is {word!r}, must be one that is known. {hint}")


def near_miss(word: object, known: Iterable[str], *, otherwise: str = "check spelling") -> str:
    """The hint for a word that is not one of the known ones: the one that looks most like it."""
    found = difflib.get_close_matches(str(word), list(known), n=1)
    return f"hint: did you mean {found[0]}?" if found else f"hint: {otherwise}"


def cache_folder() -> Path:
    """Where what can be made again is kept: `$XDG_CACHE_HOME/buddymoe_ray`, by default under `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "buddymoe_ray"


def private_folder(folder: Path) -> str:
    """Make the folder, for this user alone. Why what lies there may be others' work, or nothing."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        return f"{folder} cannot be used ({error.strerror}), must be a folder. hint: choose another"
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o022:
        return (
            f"{folder} is of user {found.st_uid} with mode {stat.S_IMODE(found.st_mode):o}, must be a folder of user "
            f"{os.getuid()} that nobody else can write to. hint: delete it"
        )
    return ""


def why_unwritable(path: Path) -> str:
    """Why no file can take this place by a rename, or nothing: to be asked before the work, not after it."""
    if path.exists() and not path.is_file():  # a rename would put a file where a device or a pipe was
        kind = "a folder" if path.is_dir() else "a device or pipe"
        return f"is {path}, {kind}, must be a file"
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            return ""
    except OSError as error:
        return f"is {path}, must be in a folder that can be written ({error.strerror})"


def ray_address_from_environment() -> str | None:
    """The ray cluster to join, or None to start one."""
    return os.environ.get("RAY_ADDRESS") or None


def visible_gpus_from_environment() -> tuple[str, ...]:
    """Ids of the GPUs that CUDA shows to this process, in its order; none where it shows all."""
    return tuple(filter(None, os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")))


def api_key_from_environment(variable: str = "BUDDYMOE_API_KEY") -> str | None:
    """The API key clients must send, or None when the variable is unset or empty."""
    return os.environ.get(variable) or None


def one_of(name: str, value: object, allowed: Iterable[str]) -> None:
    """Raise ConfigError unless `value` is one of the words allowed."""
    allowed = tuple(allowed)
    if value not in allowed:
        hint = near_miss(value, allowed, otherwise="leave it out for the default")
        raise ConfigError(f"{name} is {value!r}, must be {' or '.join(allowed)}. {hint}")


def _between(name: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ConfigError(
            f"{name} is {value!r}, must be a number from {low:g} to {high:g}. hint: leave it out for the default"
        )


def _at_least(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= _MOST:
        most = "" if not isinstance(value, int) or value < least else f" and at most {_MOST}"
        raise ConfigError(
            f"{name} is {value!r}, must be an integer of at least {least}{most}. hint: leave it out for the default"
        )
