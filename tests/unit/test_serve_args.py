"""The options of deployments/*.yaml: typed, unknown names refused, EngineConfig's defaults; and every shipped file."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from ray.serve.schema import ServeDeploySchema

from buddymoe_ray.config import EngineConfig
from buddymoe_ray.errors import ConfigError
from buddymoe_ray.serve.app import application, build_app
from buddymoe_ray.serve.args import ServeArgs
from buddymoe_ray.serve.handles import APP_NAME
from buddymoe_ray.serve.keys import add_key
from buddymoe_ray.serve.replica import open_async_engine

ROOT = Path(__file__).parents[2]
DEPLOYMENTS = sorted((ROOT / "deployments").glob("*.yaml"))


def args_of(path: Path) -> dict[str, Any]:
    application = yaml.safe_load(path.read_text())["applications"][0]
    args = application["args"]
    assert isinstance(args, dict)
    return args


def test_engine_options_are_engine_configs_own_with_its_defaults() -> None:
    assert ServeArgs().engine_config() == EngineConfig()
    assert set(EngineConfig.names()) <= set(ServeArgs.model_fields)


def test_engine_options_arrive() -> None:
    args = ServeArgs(model="x", memory="50%", host_memory=1 << 30, threads=3, max_model_len=99, kv_memory="1GiB")
    config = args.engine_config()
    assert (config.model, config.memory, config.host_memory) == ("x", "50%", str(1 << 30))
    assert (config.threads, config.max_model_len, config.kv_memory) == (3, 99, "1GiB")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("replicas", 2),
        ("memroy", "25%"),
        ("workers", 0),
        ("workers", "many"),
        ("max_workers", 0),
        ("routing", "luck"),
        ("num_gpus", -1),
        ("mode", "quick"),
        ("budget", -1.0),
        ("standin", "oracle"),
        ("policy", "luck"),
        ("expert_dtype", "fp8"),
        ("dtype", "int3"),
        ("threads", 0),
        ("memory", True),
        ("flush_ms", -1),
        ("max_queued_requests", -1),
        ("request_timeout_seconds", 0),
        ("api_key_env", ""),
        ("cors_origins", ["chat.example"]),
        ("cors_origins", ["https://chat.example/"]),
        ("cors_origins", "*"),
    ],
)
def test_unusable_options_are_named(field: str, value: Any) -> None:
    with pytest.raises(ValidationError, match=field):
        ServeArgs.model_validate({field: value})


def scaling(**options: Any) -> tuple[int | None, tuple[int, int, float] | None]:
    """What Serve is told about the workers: so many, or between so many and so many, each with so much to do."""
    app: Any = application(ServeArgs.model_validate(options), open_engine=open_async_engine)
    config = app._bound_deployment.init_args[1]._bound_deployment._deployment_config
    scaled = config.autoscaling_config
    between = scaled and (scaled.min_replicas, scaled.max_replicas, scaled.target_ongoing_requests)
    return (None, between) if between else (config.num_replicas, None)


def test_workers_are_fixed_unless_more_are_allowed() -> None:
    assert scaling(workers=3) == (3, None) == scaling(workers=3, max_workers=3)
    assert scaling(workers=2, max_workers=5, max_running=16) == (None, (2, 5, 8))
    assert scaling(max_workers=2, max_running=1) == (None, (1, 2, 1))
    with pytest.raises(ValidationError, match="max_workers is 2, must be at least workers"):
        ServeArgs(workers=3, max_workers=2)


def test_the_served_name() -> None:
    assert ServeArgs(model="org/m").served_name == "org/m"
    assert ServeArgs(model="org/m", model_name="m").served_name == "m"


def test_the_key_is_read_from_the_named_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BUDDYMOE_API_KEY", raising=False)
    monkeypatch.setenv("OTHER_KEY", "other")
    assert ServeArgs().api_key() is None
    assert ServeArgs(api_key_env="OTHER_KEY").api_key() == "other"
    with pytest.raises(ConfigError, match=r"BUDDYMOE_API_KEY is unset.*hint: export BUDDYMOE_API_KEY"):
        ServeArgs(require_api_key=True).api_key()
    monkeypatch.setenv("BUDDYMOE_API_KEY", "")
    with pytest.raises(ConfigError):
        ServeArgs(require_api_key=True).api_key()
    monkeypatch.setenv("BUDDYMOE_API_KEY", "secret")
    args = ServeArgs(require_api_key=True)
    assert args.api_key() == "secret" and "secret" not in repr(args)


def test_there_are_deployments() -> None:
    names = {path.stem for path in DEPLOYMENTS}
    assert {"tiny-cpu", "mixtral", "olmoe", "qwen3-30b-a3b", "deepseek-v2-lite"} <= names


def test_a_keys_file_is_found_from_elsewhere_and_binds_nothing(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BUDDYMOE_API_KEY", raising=False)
    args = ServeArgs(api_keys="keys.toml", require_api_key=True)
    assert args.api_keys == str(tmp_path / "keys.toml")
    with pytest.raises(ConfigError, match=r"cannot be read.*hint: buddymoe key"):
        args.key_ring()
    add_key(tmp_path / "keys.toml", "alice", {})
    assert not args.key_ring().open
    assert args.binding() == ServeArgs(memory="90%", threads=3).binding(), "these change no answer in exact"
    others = [{"model": "x"}, {"expert_dtype": "int8"}, {"default_max_tokens": 5}, {"seed": 1}, {"mode": "bounded"}]
    assert len({ServeArgs(**other).binding() for other in others}) == 5 and args.binding() == ServeArgs().binding()


@pytest.mark.parametrize("path", DEPLOYMENTS, ids=lambda path: path.stem)
def test_every_deployment_is_what_ray_and_we_accept(path: Path) -> None:
    schema = ServeDeploySchema.model_validate(yaml.safe_load(path.read_text()))
    [application] = schema.applications
    assert application.import_path == "buddymoe_ray.serve.app:build_app"
    assert application.name == APP_NAME
    assert schema.http_options.host == "127.0.0.1"
    args = ServeArgs.model_validate(args_of(path))
    assert (args.mode, args.budget) == ("bounded", 0.003) and args.api_key_env == "BUDDYMOE_API_KEY"
    if path.stem != "tiny-cpu":
        assert (args.num_gpus, args.device, args.workers) == (1, "auto", "auto")


def test_ray_can_see_the_type_of_the_builders_args() -> None:
    [parameter] = inspect.signature(build_app).parameters.values()
    assert parameter.annotation is ServeArgs  # a postponed annotation would be text, and ray would pass a plain dict


def test_describing_the_application_loads_no_torch() -> None:
    code = (
        "import sys, buddymoe_ray.serve.app, buddymoe_ray.client; print({'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_embedded_default() -> None:
    args = ServeArgs.model_validate(args_of(next(path for path in DEPLOYMENTS if path.stem == "tiny-cpu")))
    assert (args.model, args.memory, args.num_gpus) == ("builtin:tiny", "50%", 0)


def test_a_plain_off_of_yaml_is_the_word() -> None:
    given = yaml.safe_load("{mode: bounded, calibrate: off, read_ahead: off, prefix_cache: off}")
    assert given["calibrate"] is False
    args = ServeArgs.from_options(given)
    assert (args.calibrate, args.read_ahead, args.prefix_cache) == ("off", "off", "off")
    with pytest.raises(ConfigError, match="mode is False"):
        ServeArgs.from_options({"mode": False})
