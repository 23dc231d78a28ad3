"""Every option of `deployments/*.yaml`, typed: EngineConfig's own, and those of the service around it.

Knows neither ray nor torch. Engine defaults are read from EngineConfig, so each is written once. Unknown names are
errors.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from buddymoe_ray.config import EngineConfig, api_key_from_environment, cache_folder, near_miss, refuse_unknown
from buddymoe_ray.errors import ConfigError
from buddymoe_ray.serve.keys import KeyRing
from buddymoe_ray.types import Mode

__all__ = ["ServeArgs"]


def _number_as_text(value: object) -> object:
    """YAML reads `0` and `1073741824` as numbers; a memory option is text."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _absolute(path: str) -> str:
    """For processes that run elsewhere."""
    return str(Path(path).expanduser().absolute())


MemoryText = Annotated[str, BeforeValidator(_number_as_text)]
Origin = Annotated[
    str, Field(pattern=r"^(\*|[a-z][a-z0-9+.-]*://[^\sA-Z/*]+)$")
]  # as browsers write it: others match none


class ServeArgs(BaseModel):
    """The `args` of an application. Engine options first (see EngineConfig), then the service's.

    Args:
        model_name: the name clients ask for; None is `model`, of a folder its name alone.
        workers: engine replicas, each with its own weights and KV; those of a node share its experts. `auto` is as many
            as the cluster's GPUs allow when the service is deployed.
        max_workers: Serve starts more workers under load, up to so many, and ends them again; None keeps `workers`.
        num_gpus: GPUs that ray reserves per worker; 0 computes on the CPU.
        num_cpus: CPU cores that ray reserves per worker.
        default_max_tokens: output limit of chat requests that name none (also bounded by the context).
        flush_ms: tokens of a stream that arrive within this time share a message; within up to 100 ms where a worker
            has many streams, 250 ms of one of more than 100 tokens a second, but for 0.
        max_queued_requests: requests that may wait at each worker; the next one is answered 503 with Retry-After.
        retry_after_seconds: what Retry-After says.
        request_timeout_seconds: most time for one request, queue included; then 504.
        queue_seconds: a request that would wait longer to begin, by what is measured, is answered 429 with Retry-After;
            None is as long as it may take in all.
        max_moves: how often a stream may go on at another worker when the one it is on dies.
        drain_seconds: how long running requests may go on when the service stops or a worker is replaced; what is left
            then goes on at another worker that answers alike, once there is one.
        routing: `affinity` keeps prompts of a common prefix at one worker while its queue is not much longer than the
            shortest; `pow2` is Ray's own choice of the shorter of two queues.
        placement: `dynamic` moves experts between nodes and tiers as their use shifts; `static` keeps what was resident
            at start.
        placement_window_seconds: how often accesses are counted and the map is renewed.
        migration_mb_per_second: most that moving experts reads from each node's disk, in 10^6 bytes.
        api_key_env: name of the environment variable that holds the API key; read where the ingress runs.
        require_api_key: refuse to start when that variable is unset and no `api_keys` are given.
        api_keys: TOML file of named API keys and their limits, see below; on every node where the ingress may run.
        files_mb: most that files and batches of /v1/files take on the ingress's disk, in 10^6 bytes; 0 keeps none.
        cors_origins: origins whose pages may call the service from a browser, as `https://chat.example.org`, or `*`
            for any; none by default.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model: str = EngineConfig.model
    memory: MemoryText = EngineConfig.memory
    host_memory: MemoryText = EngineConfig.host_memory
    mode: Mode = EngineConfig.mode
    budget: float = EngineConfig.budget
    standin: str = EngineConfig.standin
    standin_layers: str | None = EngineConfig.standin_layers
    policy: str = EngineConfig.policy
    profile: str | None = EngineConfig.profile
    calibrate: str = EngineConfig.calibrate
    cache_dir: str | None = EngineConfig.cache_dir
    expert_dtype: str = EngineConfig.expert_dtype
    dense_dtype: str = EngineConfig.dense_dtype
    guard_share: float = EngineConfig.guard_share
    dtype: str = EngineConfig.dtype
    device: str = EngineConfig.device
    threads: int = EngineConfig.threads
    max_model_len: int | None = EngineConfig.max_model_len
    max_running: int = EngineConfig.max_running
    kv_memory: MemoryText = EngineConfig.kv_memory
    prefill_chunk: int | None = EngineConfig.prefill_chunk
    prefix_cache: str = EngineConfig.prefix_cache
    read_ahead: str = EngineConfig.read_ahead
    host_compute: str = EngineConfig.host_compute
    batching: str = EngineConfig.batching
    seed: int = EngineConfig.seed
    generation_config: str = EngineConfig.generation_config

    model_name: str | None = None
    workers: Annotated[int, Field(ge=1)] | Literal["auto"] = 1
    max_workers: int | None = Field(default=None, ge=1)
    num_gpus: float = Field(default=0, ge=0)
    num_cpus: float = Field(default=1, ge=0)
    default_max_tokens: int = Field(default=1024, ge=1)
    flush_ms: float = Field(default=25, ge=0, le=1000)
    max_queued_requests: int = Field(default=256, ge=0)
    retry_after_seconds: int = Field(default=2, ge=1)
    request_timeout_seconds: float = Field(default=600, gt=0)
    queue_seconds: float | None = Field(default=None, gt=0)
    max_moves: int = Field(default=3, ge=0)
    drain_seconds: float = Field(default=30, ge=0)
    routing: Literal["affinity", "pow2"] = "affinity"
    placement: Literal["dynamic", "static"] = "dynamic"
    placement_window_seconds: float = Field(default=5, gt=0)
    migration_mb_per_second: float = Field(default=200, gt=0)
    api_key_env: str = Field(default="BUDDYMOE_API_KEY", min_length=1)
    require_api_key: bool = False
    api_keys: Annotated[str, AfterValidator(_absolute)] | None = None
    files_mb: int = Field(default=1000, ge=0)
    cors_origins: tuple[Origin, ...] = ()

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> ServeArgs:
        """Build from the names and values of a YAML or a command line. Raises ConfigError, of one line."""
        try:
            return cls.model_validate(options)
        except ValidationError as refused:
            error = refused.errors()[0]
        if isinstance(cause := error.get("ctx", {}).get("error"), ValueError):
            raise ConfigError(str(cause))
        name = ".".join(map(str, error["loc"][:1]))
        wanted = error["msg"].replace("Input should be", "must be").replace("String should", "must")
        hint = near_miss(error["input"], re.findall(r"'(\w+)'", wanted), otherwise="leave it out for the default")
        raise ConfigError(f"{name or 'args'} is {error['input']!r:.80}, {wanted}. {hint}")

    @model_validator(mode="before")
    @classmethod
    def _names_are_known(cls, options: Any) -> Any:
        if not isinstance(options, dict):
            return options
        refuse_unknown("option", options, cls.model_fields)
        words = {name for name, field in cls.model_fields.items() if field.annotation is str}
        # YAML reads a plain `off` as false
        return {name: "off" if value is False and name in words else value for name, value in options.items()}

    @model_validator(mode="after")
    def _engine_options_are_usable(self) -> ServeArgs:
        self.engine_config()
        if self.max_workers is not None and self.workers != "auto" and self.max_workers < self.workers:
            raise ValueError(
                f"max_workers is {self.max_workers}, must be at least workers ({self.workers}). hint: leave it out"
            )
        return self

    @property
    def served_name(self) -> str:
        """The model name of the API."""
        folder = Path(self.model).expanduser()
        is_path = folder.is_dir() or self.model.startswith((".", "/", "~"))
        return self.model_name or (folder.resolve().name if is_path else self.model)

    def engine_config(self) -> EngineConfig:
        """The engine's own options."""
        return EngineConfig.from_options(**{name: getattr(self, name) for name in EngineConfig.names()})

    def files_folder(self) -> Path:
        """Where files and batches of this model are kept."""
        base = Path(self.cache_dir).expanduser() if self.cache_dir else cache_folder()
        return base / "files" / hashlib.sha256(self.served_name.encode()).hexdigest()[:16]

    def binding(self) -> str:
        """The same for workers of services that may answer for each other."""
        told = {"model": self.model, "default_max_tokens": self.default_max_tokens, **self.engine_config().binding()}
        return json.dumps(told)

    def api_key(self) -> str | None:
        """The key clients must send, from the environment of the calling process; None serves everyone."""
        key = api_key_from_environment(self.api_key_env)
        if key is None and self.require_api_key and self.api_keys is None:
            raise ConfigError(
                f"environment variable {self.api_key_env} is unset, must hold the API key (require_api_key is true). "
                f"hint: export {self.api_key_env} where the ingress runs, before the cluster starts"
            )
        return key

    def key_ring(self) -> KeyRing:
        """All keys that clients may send, as the calling process finds them. Raises ConfigError."""
        return KeyRing(self.api_key(), self.api_keys)
