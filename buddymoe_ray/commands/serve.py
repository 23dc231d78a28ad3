"""`buddymoe serve`: check a deployment, then start Ray Serve with it; the same application as `serve run FILE.yaml`.

Everything that can be checked without ray is checked before ray is imported: names and values of options, the model's
folder, GPUs. Knows ray's options, not requests.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from buddymoe_ray.commands.common import add_json_argument, add_option, emit, print_facts
from buddymoe_ray.config import EngineConfig, one_of, option_notes, ray_address_from_environment, refuse_unknown
from buddymoe_ray.errors import ConfigError

if TYPE_CHECKING:
    from buddymoe_ray.serve.args import ServeArgs

__all__ = ["add_arguments", "read_deployment", "run"]

_BUILDER = "buddymoe_ray.serve.app:build_app"
_DEFAULTS: dict[str, Any] = {"name": "buddymoe", "route_prefix": "/", "import_path": _BUILDER, "args": {}}
_HTTP: dict[str, Any] = {"host": "127.0.0.1", "port": 8000}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `serve`: every field of ServeArgs."""
    from buddymoe_ray.serve.args import ServeArgs

    parser.add_argument(
        "what", nargs="?", default=EngineConfig.model, metavar="MODEL|YAML", help="a model, or a file of deployments/"
    )
    notes = option_notes(EngineConfig) | option_notes(ServeArgs)
    for name in ServeArgs.model_fields:
        if name != "model":
            add_option(parser, name, argparse.SUPPRESS, notes[name], kind="str")  # ServeArgs reads the text
    parser.add_argument("--host", default=argparse.SUPPRESS, help="address to listen at (default 127.0.0.1)")
    parser.add_argument("--port", type=int, default=argparse.SUPPRESS, help="port to listen at (default 8000)")
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Serve until Ctrl-C; exit status 0, or 1 when the workers cannot start."""
    from buddymoe_ray.serve.args import ServeArgs

    given: dict[str, Any] = {name: text for name, text in vars(args).items() if name in ServeArgs.model_fields}
    if "cors_origins" in given:
        given["cors_origins"] = given["cors_origins"].split(",")
    http, application = read_deployment(args.what)
    http = _placed(http | {name: getattr(args, name) for name in _HTTP if hasattr(args, name)}, application)
    options = ServeArgs.from_options(application["args"] | given)
    keys = _check(options)
    url = f"http://{http['host']}:{http['port']}{application['route_prefix'].rstrip('/')}"
    from buddymoe_ray.serve.launch import start, wait  # late: ray

    kept = start(options, name=application["name"], route_prefix=application["route_prefix"], http=http)
    facts = {
        "serving": f"{options.served_name} at {url}/v1",
        "mode": options.mode + (f", at most {options.budget:g} nats per token" if options.mode == "bounded" else ""),
        "memory": f"{options.memory} of the experts, {options.workers} worker{'s' if options.workers != 1 else ''}",
        "keys": keys,
        "pages": f"{url}/dashboard, {url}/docs, {url}/health, {url}/metrics",
    }
    if args.json:
        named = {"model": options.served_name, "mode": options.mode, "memory": options.memory, "keys": keys}
        emit({"url": f"{url}/v1", **named, "page": f"{url}/dashboard"})
    else:
        print_facts(facts)
        print("Ctrl-C ends the service", flush=True)
    wait(application["name"], drain_seconds=options.drain_seconds, kept=kept)
    return 0


def read_deployment(what: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """HTTP options and the application of a YAML, or those of a model's name. Raises ConfigError."""
    if not what.endswith((".yaml", ".yml")):
        return dict(_HTTP), _DEFAULTS | {"args": {"model": what}}
    import yaml

    try:
        content = yaml.safe_load(Path(what).read_text())
        [application] = content["applications"]
        http, options = content.get("http_options") or {}, application.get("args") or {}
        refuse_unknown("field", content, ("proxy_location", "http_options", "applications"))
        one_of("proxy_location", content.get("proxy_location", "HeadOnly"), ("Disabled", "HeadOnly", "EveryNode"))
        refuse_unknown("field of http_options", http, _HTTP)
        refuse_unknown("field of the application", application, _DEFAULTS)
        if application["import_path"] != _BUILDER or not isinstance(options, dict):
            raise KeyError("import_path")
    except OSError as error:
        raise ConfigError(f"{what} cannot be read: {error.strerror}. hint: check the path") from error
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f" in line {where.line + 1}" if where else ""
        problem = getattr(error, "problem", error)
        raise ConfigError(
            f"{what} is no YAML{line} ({problem}), must be. hint: see deployments/tiny-cpu.yaml"
        ) from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"{what} holds no application of {_BUILDER}, must hold one. "
            f"hint: write `applications: [{{import_path: {_BUILDER}, args: {{model: MODEL}}}}]`"
        ) from error
    application = _DEFAULTS | application | {"args": options}
    return _placed(_HTTP | http, application), application


def _placed(http: dict[str, Any], application: dict[str, Any]) -> dict[str, Any]:
    """HTTP options that can be listened at, of an application with a name and a place. Raises ConfigError."""
    for name, value in (("host", http["host"]), *((name, application[name]) for name in ("name", "route_prefix"))):
        if not isinstance(value, str) or not value:
            raise ConfigError(f"{name} is {value!r}, must be text. hint: leave it out for the default")
    if type(http["port"]) is not int or not 1 <= http["port"] < 1 << 16:
        raise ConfigError(f"port is {http['port']!r}, must be a number from 1 to 65535. hint: leave it out for 8000")
    if not application["route_prefix"].startswith("/"):
        raise ConfigError(f"route_prefix is {application['route_prefix']!r}, must begin with /. hint: leave it out")
    return http


def _check(options: ServeArgs) -> str:
    """What this machine can say before ray starts; who will be served. Raises ConfigError, CheckpointError,
    UnsupportedModel."""
    from buddymoe_ray.models.resolve import resolve_model
    from buddymoe_ray.models.schemes import served_family
    from buddymoe_ray.models.tensor_index import read_index
    from buddymoe_ray.residency.devices import list_gpus

    keys = options.key_ring()
    if options.served_name != options.model or options.model.startswith("builtin:"):  # a hub id is the workers' to load
        folder = resolve_model(options.model)
        served_family(folder)
        read_index(folder)
    gpus = len(list_gpus())
    if options.num_gpus > gpus and not ray_address_from_environment():
        raise ConfigError(
            f"num_gpus is {options.num_gpus:g}, must be at most the {gpus} GPUs of this machine. "
            "hint: --num-gpus 0 --device cpu computes on the CPU"
        )
    return keys.description
