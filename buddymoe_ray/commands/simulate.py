"""`buddymoe simulate`: placements replayed at cluster scale, from a made-up workload or a recorded trace.

Prints a row per placement. `--record MODEL --corpus F --out T` writes such a trace instead. No GPU and no Ray needed.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from buddymoe_ray.commands.common import add_json_argument, emit, print_facts, print_table
from buddymoe_ray.config import why_unwritable
from buddymoe_ray.errors import ConfigError
from buddymoe_ray.observe import progress

if TYPE_CHECKING:
    from buddymoe_ray.calibrate.simulate import Cluster
    from buddymoe_ray.calibrate.workloads import Workload

__all__ = ["add_arguments", "run"]

_MADE_UP = {"layers": 16, "experts": 256, "top_k": 8, "skew": 1.0, "seed": 0}
_TOKENS, _RECORDED_TOKENS = 500, 16_384
_MOST_GPUS = 4096  # of more no placement is found within a window
_WHOLE = ("gpus", "gpus_per_node", "layers", "experts", "top_k", "tokens", "hidden", "max_replicas", "host_cores")
_TIMES = (
    "same_node_us",
    "other_node_us",
    "fetch_gbps",
    "migrate_gbps",
    "token_ms",
    "window_seconds",
    "horizon_seconds",
    "host_gbps",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `simulate`."""
    add = parser.add_argument
    add_json_argument(parser)
    add("--workload", default=None, choices=["zipf", "drifting", "bursty"], help="made-up accesses; default zipf")
    add("--trace", type=Path, default=None, help="recorded routes to replay instead")
    add("--placements", default=None, help="some of ours,static,round-robin,eplb,oracle; default all")
    add("--gpus", type=int, default=64, help="GPUs of the cluster, a worker each")
    add("--gpus-per-node", type=int, default=8, help="GPUs that share a node's links")
    add("--layers", type=int, default=None, help="MoE layers of a made-up workload; default 16")
    add("--experts", type=int, default=None, help="experts per layer of a made-up workload; default 256")
    add("--top-k", type=int, default=None, help="experts per token of a made-up workload; default 8")
    add("--skew", type=float, default=None, help="popularity of rank r is r^-skew in a made-up workload; default 1")
    add("--seed", type=int, default=None, help="of a made-up workload; default 0")
    add("--windows", type=int, default=12, help="windows of the run; the first is only learned from")
    add("--tokens", type=int, default=None, help="tokens per GPU and window (500); with --record, recorded (16384)")
    add("--memory", default="5%", help="full experts of each GPU: 5%% of all experts' bytes, or 40GiB")
    add("--expert-bytes", default="44MB", help="one expert")
    add("--hidden", type=int, default=7168, help="hidden size: a peer's use moves it there and back in 2 bytes each")
    add("--same-node-us", type=float, default=25.0, help="an access that a peer of the same node computes")
    add("--other-node-us", type=float, default=80.0, help="an access that a peer of another node computes")
    add("--fetch-gbps", type=float, default=25.0, help="GB/s from host memory to a GPU: a fetched use waits for it")
    add("--host-gbps", type=float, default=None, help="GB/s of weights that a core of the host multiplies beside a GPU")
    add("--host-cores", type=int, default=1, help="cores of a GPU's host that compute misses, with --host-gbps")
    add("--standin-us", type=float, default=None, help="what a stand-in's answer is worth; default no stand-ins")
    add("--token-ms", type=float, default=10.0, help="a token's compute when every access is local")
    add("--migrate-gbps", type=float, default=2.0, help="GB/s that each GPU's mover may use")
    add("--window-seconds", type=float, default=10.0, help="length of a window")
    add("--horizon-seconds", type=float, default=60.0, help="for how long a placement is expected to stand")
    add("--max-replicas", type=int, default=None, help="most GPUs that hold one expert; default no limit")
    add("--affinity-us", type=float, default=0.0, help="saved where a peer answers two layers in a row; needs --trace")
    add("--plot", type=Path, default=None, help="write an HTML page with plots there")
    add("--record", default=None, metavar="MODEL", help="record this model's routes on --corpus into --out, and stop")
    add("--corpus", nargs="+", default=None, help="text to record on")
    add("--out", type=Path, default=None, help="trace to write")


def run(args: argparse.Namespace) -> int:
    """Print a row per placement, or write a trace; exit status 0."""
    if args.record is not None:
        return _record(args)
    for name in ("corpus", "out"):
        if getattr(args, name) is not None:
            raise ConfigError(f"--{name} is given without --record, must go with it. hint: add --record MODEL")
    _check(args)
    _check_output("--plot", args.plot)
    from buddymoe_ray.calibrate.simulate import PLACEMENTS, simulate

    names = tuple(args.placements.split(",")) if args.placements is not None else PLACEMENTS
    if not set(names) <= set(PLACEMENTS) or len(set(names)) < len(names):
        raise ConfigError(f"--placements is {args.placements!r}, must be of {', '.join(PLACEMENTS)}. hint: drop it")
    workload = _workload(args)
    cluster = _cluster(args, workload)
    outcomes = simulate(cluster, workload, names, progress=progress)
    conditions = _conditions(args, cluster, workload)
    if args.plot is not None:
        from buddymoe_ray.calibrate.simulate import write_plot

        title = f"{conditions['workload']} on {args.gpus} GPUs, {args.memory} of the experts each"
        write_plot(outcomes, cluster, workload, args.plot, title=title)
    rows = [outcome.as_record(cluster, workload) for outcome in outcomes]
    if args.json:
        for row in rows:
            emit(conditions | row)
    else:
        _print([conditions | row for row in rows])
    return 0


def _check_output(option: str, path: Path | None) -> None:
    if path is not None and (why := why_unwritable(path)):
        raise ConfigError(f"{option} {why}. hint: choose another file")


def _check(args: argparse.Namespace) -> None:
    """Raise ConfigError naming the option that is not usable."""
    for name in _WHOLE:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}, must be at least 1. hint: drop it")
    if args.gpus > _MOST_GPUS:
        raise ConfigError(f"--gpus is {args.gpus}, must be at most {_MOST_GPUS}. hint: simulate a part of the cluster")
    for name in _TIMES:
        if getattr(args, name) is not None and not 0 < getattr(args, name) < math.inf:
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(args, name)}, must be above 0. hint: drop it")
    if args.same_node_us > args.other_node_us:
        raise ConfigError(
            f"--same-node-us is {args.same_node_us:g}, must be at most --other-node-us {args.other_node_us:g}. "
            "hint: give both"
        )
    for name in ("standin_us", "skew", "seed", "affinity_us"):
        value = getattr(args, name)
        if value is not None and not 0 <= value < math.inf:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}, must be at least 0. hint: drop it")
    if args.windows < 2:
        raise ConfigError(f"--windows is {args.windows}, must be at least 2: the first is learned from. hint: drop it")
    given = [name for name in (*_MADE_UP, "workload") if getattr(args, name) is not None]
    if args.trace is not None and given:
        raise ConfigError(f"--{given[0].replace('_', '-')} is given with --trace, must not be. hint: drop one of them")
    if args.trace is None and args.affinity_us:
        raise ConfigError(
            "--affinity-us is given without --trace, must go with one. hint: made-up layers are unrelated"
        )


def _workload(args: argparse.Namespace) -> Workload:
    from buddymoe_ray.calibrate.workloads import load_routes, replayed, synthetic

    tokens = (args.tokens or _TOKENS) * args.gpus
    if args.trace is not None:
        return replayed(load_routes(args.trace), windows=args.windows, tokens=tokens)
    shape: dict[str, Any] = {
        name: default if (value := getattr(args, name)) is None else value for name, default in _MADE_UP.items()
    }
    if shape["top_k"] > shape["experts"]:
        raise ConfigError(f"--top-k is {shape['top_k']}, must be at most --experts {shape['experts']}. hint: lower it")
    sizes = (shape.pop("experts"),) * shape.pop("layers")
    return synthetic(args.workload or "zipf", experts_per_layer=sizes, windows=args.windows, tokens=tokens, **shape)


def _cluster(args: argparse.Namespace, workload: Workload) -> Cluster:
    from buddymoe_ray.calibrate.simulate import Cluster
    from buddymoe_ray.config import parse_memory

    if "%" in args.expert_bytes:
        raise ConfigError(f"--expert-bytes is {args.expert_bytes}, must be bytes. hint: write 44MB")
    expert_bytes = parse_memory(args.expert_bytes, total_expert_bytes=0)
    if expert_bytes < 1:
        raise ConfigError(f"--expert-bytes is {args.expert_bytes}, must be at least 1. hint: write 44MB")
    return Cluster(
        gpus=args.gpus,
        gpus_per_node=args.gpus_per_node,
        pool_bytes=parse_memory(args.memory, total_expert_bytes=expert_bytes * sum(workload.experts_per_layer)),
        expert_bytes=expert_bytes,
        activation_bytes=4 * args.hidden,
        same_node=args.same_node_us / 1e6,
        other_node=args.other_node_us / 1e6,
        fetch=expert_bytes / (args.fetch_gbps * 1e9),
        host=math.inf if args.host_gbps is None else expert_bytes / (args.host_gbps * args.host_cores * 1e9),
        standin=math.inf if args.standin_us is None else args.standin_us / 1e6,
        token_seconds=args.token_ms / 1e3,
        migrate_bytes_per_second=args.migrate_gbps * 1e9,
        window_seconds=args.window_seconds,
        horizon_seconds=args.horizon_seconds,
        max_replicas=args.max_replicas,
        affinity_seconds=args.affinity_us / 1e6,
    )


def _conditions(args: argparse.Namespace, cluster: Cluster, workload: Workload) -> dict[str, Any]:
    return {
        "workload": str(args.trace) if args.trace is not None else args.workload or "zipf",
        "gpus": cluster.gpus,
        "layers": len(workload.experts_per_layer),
        "experts": max(workload.experts_per_layer),
        "top_k": workload.top_k,
        "windows": len(workload.counts_WLE),
        "tokens_per_window": workload.tokens,
        "memory": args.memory,
        "host_compute": math.isfinite(cluster.host),
        "slots_per_gpu": min(cluster.pool_bytes // cluster.expert_bytes, sum(workload.experts_per_layer)),
    }


def _print(rows: list[dict[str, Any]]) -> None:
    print("{workload}: {gpus} GPUs of {slots_per_gpu} expert slots each".format(**rows[0]))
    print("{layers} layers of {experts} experts, {top_k} a token; {windows} windows".format(**rows[0]))
    print_table(
        rows,
        {
            "placement": "{placement}",
            "here %": "{local_percent:.1f}",
            "same node %": "{same_node_percent:.1f}",
            "other node %": "{other_node_percent:.1f}",
            "stand-in %": "{standin_percent:.1f}",
            "fetched %": "{fetch_percent:.1f}",
            "tok/s": "{tokens_per_second:,.0f}",
        },
        title="Where accesses were answered",
    )
    print_table(
        rows,
        {
            "placement": "{placement}",
            "in nodes": "{same_node_bytes:bytes}",
            "between nodes": "{other_node_bytes:bytes}",
            "fetched": "{fetch_bytes:bytes}",
            "moved": "{migration_bytes:bytes}",
            "late moves": "{late_loads}",
            "solver ms": "{solver_ms:,.1f}",
        },
        title="Traffic",
    )
    if rows[0]["host_compute"]:
        columns = {
            "placement": "{placement}",
            "by host %": "{host_percent:.1f}",
            "tok/s": "{host_tokens_per_second:,.0f}",
        }
        print_table(rows, columns, title="With misses that the host computes")
    print("tok/s: a sequence per GPU, one access after another, costs as given, no queues")


def _record(args: argparse.Namespace) -> int:
    if args.corpus is None or args.out is None:
        raise ConfigError("--record is given alone, must go with --corpus and --out. hint: --corpus F --out T")
    if args.tokens is not None and args.tokens < 1:
        raise ConfigError(f"--tokens is {args.tokens}, must be at least 1. hint: drop it")
    _check_output("--out", args.out)
    from buddymoe_ray.commands.eval import encode_corpus, tokenizer_of
    from buddymoe_ray.config import EngineConfig

    tokenizer = tokenizer_of(args.record, "to record. hint: copy tokenizer.json there")
    from buddymoe_ray.calibrate.simulate_record import record_routes
    from buddymoe_ray.calibrate.workloads import save_routes

    config = EngineConfig.from_options(model=args.record, memory="100%")
    routes = record_routes(
        config, encode_corpus(tokenizer, args.corpus), tokens=args.tokens or _RECORDED_TOKENS, progress=progress
    )
    save_routes(routes, args.out)
    T, L, K = routes.routes_TLK.shape
    if args.json:
        emit({"trace": str(args.out), "tokens": T, "layers": L, "top_k": K})
    else:
        print_facts({"trace": str(args.out), "routes": f"{T:,} tokens, {L} layers, {K} experts a token"})
    return 0
