"""`buddymoe doctor`: what would keep a model or a deployment from being served well here, each with what mends it.

Reads and measures, changes nothing, starts no ray. Neighbours: `serve` refuses what cannot be served, `plan` shows what
would live where.
"""

from __future__ import annotations

import argparse
import os
import resource
import socket
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from buddymoe_ray.commands.common import add_json_argument, emit
from buddymoe_ray.commands.plan import measured_speed
from buddymoe_ray.commands.serve import read_deployment
from buddymoe_ray.config import EngineConfig, ray_address_from_environment
from buddymoe_ray.errors import BuddyMoEError

if TYPE_CHECKING:
    from buddymoe_ray.models.shape import ModelShape
    from buddymoe_ray.residency.devices import GpuInfo
    from buddymoe_ray.residency.plan import Plan
    from buddymoe_ray.serve.args import ServeArgs

__all__ = ["Finding", "Patient", "add_arguments", "examine", "run", "word"]

State = Literal["ok", "note", "fault"]
SPEEDS = (("fast", 20.0), ("good", 8.0), ("usable", 2.0), ("slow", 0.0))
"""Words for tokens a second: people read 5 to 8."""
_MARKS: dict[State, str] = {"ok": "ok", "note": "–", "fault": "✗"}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What was looked at, what was found and, unless all is well, what to do."""

    name: str
    state: State
    said: str
    hint: str = ""


@dataclass(kw_only=True)
class Patient:
    """What is examined; what comes later is found by earlier examinations. `root` is where /proc, /sys and /dev are."""

    what: str
    root: Path = Path("/")
    http: dict[str, Any] | None = None
    options: ServeArgs | None = None
    folder: Path | None = None
    shape: ModelShape | None = None
    gpus: tuple[GpuInfo, ...] = ()
    plan: Plan | None = None

    @property
    def config(self) -> EngineConfig:
        """The engine's options."""
        assert self.options is not None, "options are read first"
        return self.options.engine_config()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `doctor`."""
    parser.add_argument(
        "what", nargs="?", default=EngineConfig.model, metavar="MODEL|YAML", help="a model, or a file of deployments/"
    )
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Print what was found, and a word for how fast it would be; exit status 0, or 1 where it cannot be served."""
    patient = Patient(what=args.what)
    found = list(examine(patient))
    verdict = word(found, patient.plan)
    if args.json:
        for finding in found:
            emit(asdict(finding))
        emit({"verdict": verdict, "decode_tok_s": patient.plan.predicted_decode_tok_s if patient.plan else None})
    else:
        _print(found)
        print(verdict)
    return int(any(finding.state == "fault" for finding in found))


def examine(patient: Patient) -> Iterator[Finding]:
    """Everything that can be looked at; what needs what was not found is left out."""
    steps: tuple[tuple[str, Callable[[Patient], Iterator[Finding]]], ...] = (
        ("deployment", _deployment),
        ("address", _address),
        ("ray", _ray),
        ("GPUs", _gpus),
        ("checkpoint", _checkpoint),
        ("memory", _memory),
        ("stand-ins", _standins),
        ("machine", _machine),
    )
    for name, step in steps:
        if patient.options is None and step not in (_deployment, _ray):
            continue
        try:
            yield from step(patient)
        except BuddyMoEError as error:
            said, _, hint = str(error).partition(" hint: ")
            yield Finding(name=name, state="fault", said=said, hint=hint)


def word(found: list[Finding], plan: Plan | None) -> str:
    """The last line."""
    faults = sum(finding.state == "fault" for finding in found)
    if faults or plan is None:
        return f"not ready: {faults} to mend"
    rate = plan.predicted_decode_tok_s
    return f"{next(name for name, least in SPEEDS if rate >= least)}: {rate:.1f} tokens/s predicted"


def _deployment(patient: Patient) -> Iterator[Finding]:
    from buddymoe_ray.serve.args import ServeArgs

    http, application = read_deployment(patient.what)
    patient.options, patient.http = ServeArgs.from_options(application["args"]), http
    yield Finding(name="deployment", state="ok", said=f"{patient.what}: its options are known and fit together")


def _address(patient: Patient) -> Iterator[Finding]:
    assert patient.options is not None and patient.http is not None
    host, port = patient.http["host"], patient.http["port"]
    ring = patient.options.key_ring()
    if ring.open and host not in ("127.0.0.1", "localhost", "::1"):
        hint = f"export {patient.options.api_key_env}, or --api-keys, or listen at 127.0.0.1"
        yield Finding(name="key", state="fault", said=f"{host} is open to others, and there is no key", hint=hint)
    else:
        yield Finding(name="key", state="ok", said=f"none, only {host} is served" if ring.open else ring.description)
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as door:
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            door.bind((host, port))
        except OSError as error:
            said = f"{host}:{port} cannot be listened at: {error.strerror}"
            yield Finding(name="port", state="fault", said=said, hint="end what listens there, or --port another")
        else:
            yield Finding(name="port", state="ok", said=f"{host}:{port} is free")


def _ray(patient: Patient) -> Iterator[Finding]:
    address = ray_address_from_environment()
    names = (patient.root / "proc").glob("[0-9]*/comm")
    runs = sum(_text(path) == "raylet" for path in names)
    if address:
        yield Finding(name="ray", state="ok", said=f"the cluster at {address} (RAY_ADDRESS) would be joined")
    elif runs:
        hint = "export RAY_ADDRESS=auto to join it, or `ray stop` if it is yours and idle"
        yield Finding(name="ray", state="note", said="another one runs here, and is left alone", hint=hint)
    else:
        yield Finding(name="ray", state="ok", said="none runs here; `serve` starts its own")


def _gpus(patient: Patient) -> Iterator[Finding]:
    from buddymoe_ray.residency.devices import list_gpus

    assert patient.options is not None
    patient.gpus = list_gpus()
    wanted = patient.options.num_gpus
    names = ", ".join(gpu.name for gpu in patient.gpus)
    if wanted > len(patient.gpus):
        hint = "check `nvidia-smi`, or --num-gpus 0 --device cpu computes on the CPU"
        yield Finding(
            name="GPUs", state="fault", said=f"{wanted:g} are wanted, {len(patient.gpus)} are here", hint=hint
        )
    elif patient.gpus and not wanted:
        said = f"{names}: not used, num_gpus is 0"
        yield Finding(name="GPUs", state="note", said=said, hint="--num-gpus 1 --device cuda")
    else:
        yield Finding(name="GPUs", state="ok", said=names or "none here, none wanted")
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if patient.gpus and wanted and locked != resource.RLIM_INFINITY:
        said = f"{_gb(locked)} of memory may be locked, copies to a GPU want more"
        yield Finding(name="memlock", state="note", said=said, hint="ulimit -l unlimited")


def _checkpoint(patient: Patient) -> Iterator[Finding]:
    from buddymoe_ray.models.resolve import resolve_model
    from buddymoe_ray.models.tokenizer import load_tokenizer
    from buddymoe_ray.residency.plan import planned_shape

    patient.folder = resolve_model(patient.config.model, progress=False)
    patient.shape = shape = planned_shape(patient.config, patient.folder)
    said = f"{shape.model_type}, {shape.moe_layers} layers of {max(shape.experts_per_layer)} experts, all there"
    if shape.has_weights:
        yield Finding(name="checkpoint", state="ok", said=said)
    else:
        hint = "copy the *.safetensors beside config.json"
        yield Finding(name="checkpoint", state="fault", said=f"{patient.folder} has a config, no weights", hint=hint)
    tokenizer = load_tokenizer(patient.folder)
    if tokenizer is None:
        yield Finding(
            name="tokenizer", state="note", said="none: requests must be token ids", hint="add tokenizer.json"
        )
    elif not getattr(tokenizer, "chat_template", None):
        hint = "add chat_template.jinja, or ask for completions"
        yield Finding(name="template", state="note", said="none: chat is refused", hint=hint)
    else:
        yield Finding(name="template", state="ok", said="there")


def _memory(patient: Patient) -> Iterator[Finding]:
    from buddymoe_ray.residency.machine import available_memory_bytes, cgroup_limit_bytes
    from buddymoe_ray.residency.plan import make_plan

    if patient.shape is None or patient.folder is None:
        return
    config, shape = patient.config, patient.shape
    patient.plan = plan = make_plan(config, patient.folder, gpus=patient.gpus, shape=shape)
    if plan.devices[0].device == "cpu" and plan.has_weights:
        speed = measured_speed(config, patient.folder, shape)
        patient.plan = plan = make_plan(config, patient.folder, gpus=patient.gpus, shape=shape, speed=speed)
    first, limit = plan.devices[0], cgroup_limit_bytes(patient.root)[0]
    taken = first.dense_bytes + first.expert_budget_bytes + first.kv_cache_bytes + plan.activation_bytes
    taken += first.recording_bytes
    there = f", of a limit of {_gb(limit)}" if limit is not None else ""
    said = f"{_gb(taken)} of {_gb(available_memory_bytes(patient.root))} that are free{there}"
    yield Finding(name="memory", state="ok", said=said)
    try:
        shm = os.statvfs(patient.root / "dev/shm")
    except OSError as error:
        said = f"cannot be looked at: {error.strerror}"
        yield Finding(name="/dev/shm", state="fault", said=said, hint="mount -t tmpfs tmpfs /dev/shm")
        return
    free, wanted = shm.f_bavail * shm.f_frsize, min(first.expert_budget_bytes, plan.total_expert_bytes)
    state: State = "ok" if free >= wanted or first.device != "cpu" else "fault"
    hint = "" if state == "ok" else "docker run --shm-size, or mount -o remount,size=… /dev/shm"
    yield Finding(name="/dev/shm", state=state, said=f"{_gb(free)} free, experts take {_gb(wanted)}", hint=hint)


def _standins(patient: Patient) -> Iterator[Finding]:
    from buddymoe_ray.models.profile import profile_path

    if patient.plan is None or patient.folder is None:
        return
    config, plan = patient.config, patient.plan
    has_profile = profile_path(config.profile, patient.folder)
    if config.mode == "exact":
        hint = "" if has_profile else "buddymoe profile, then --mode bounded, does not wait for the disk"
        state: State = "ok" if has_profile or plan.devices[0].resident_percent >= 100 else "note"
        yield Finding(name="stand-ins", state=state, said="mode is exact: none answers", hint=hint)
    elif has_profile:
        yield Finding(name="stand-ins", state="ok", said=f"calibrated; {_gb(plan.standin_bytes)} of them")
    elif config.calibrate == "auto":
        hint = "buddymoe profile does it beforehand, on texts of your own"
        yield Finding(name="stand-ins", state="note", said="not calibrated: exact until that was done", hint=hint)
    else:
        hint = "buddymoe profile, or --calibrate auto"
        yield Finding(name="stand-ins", state="fault", said="no profile, and calibrate is off", hint=hint)


def _machine(patient: Patient) -> Iterator[Finding]:
    from buddymoe_ray.residency.speed import weight_dtypes

    pages = _text(patient.root / "sys/kernel/mm/transparent_hugepage/enabled")
    if "[never]" in pages:
        hint = "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled"
        yield Finding(name="huge pages", state="note", said="off: weights are read a tenth slower", hint=hint)
    if patient.plan is None or patient.shape is None:
        return
    speed, used = patient.plan.speed, dict.fromkeys(weight_dtypes(patient.config, patient.shape))
    rates = {f"{name} weights": speed.weights_bytes_s[name][1] for name in used if name in speed.weights_bytes_s}
    origin = "measured" if speed.measured else "guessed"
    said = ", ".join(f"{name} {_gb(rate)}/s" for name, rate in (*rates.items(), ("disk", speed.disk_bytes_s)))
    yield Finding(name="rates", state="ok", said=f"{said}, {origin}")
    missed = patient.plan.predicted_miss_bytes_per_token
    if missed > 0.5 * speed.disk_bytes_s:
        hint = "--mode bounded, more --memory, or --expert-dtype int4"
        yield Finding(name="disk", state="note", said=f"{_gb(missed)} are read for each token", hint=hint)


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _gb(nbytes: float) -> str:
    from rich.filesize import decimal

    return decimal(round(nbytes))


def _print(found: list[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for finding in found:
        table.add_row(_MARKS[finding.state], finding.name, finding.said)
        if finding.hint:
            table.add_row("", "", f"hint: {finding.hint}")
    Console(highlight=False, markup=False).print(table)
