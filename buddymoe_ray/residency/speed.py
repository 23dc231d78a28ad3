"""What a model's speed would be, from what this machine was measured to do. Pure arithmetic.

A decode step multiplies its weights once, at the rate of the kernel that reads them, and costs something besides, by
step and by layer. What must be read from disk overlaps with that: a layer's experts are computed in the order in which
they arrive, and where layers are read ahead little is left to wait for. Of several GPUs, a miss is read from another's
slots where it is there. `engine.measure_machine` measures.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import NormalDist

from buddymoe_ray.cache import READ_ON_THE_SPOT
from buddymoe_ray.config import EngineConfig, parse_memory
from buddymoe_ray.models.shape import ModelShape
from buddymoe_ray.policy import ExpectedMisses, expected_misses
from buddymoe_ray.residency.standin_setup import StandinSetup

__all__ = [
    "GUESSED_DISK",
    "GUESSED_RAM",
    "ROWS",
    "MachineSpeed",
    "TokenWork",
    "answered_misses",
    "decode_seconds",
    "guessed_speed",
    "prefill_seconds",
    "stood_in_share",
    "token_work",
    "weight_dtypes",
]

GUESSED_DISK, GUESSED_RAM, GUESSED_HBM = 1.0e9, 10.0e9, 1.0e12
"""Bytes a second where nothing better is known, of RAM by a core; PCIe comes from NVML."""

ROWS = (1, 8, 64)
"""Rows for which the rate of weights is measured; it is interpolated between them, more are computed 64 at a time."""
_RECORDS = "int4"  # whose rate is taken for that of all stand-ins
_NORMAL, _LOSS_SPREAD = NormalDist(), 1.0
"""Deviation of the logarithms of accesses' expected losses: of the misses of `builtin:tiny` at 25 and 37.5 % stand-ins
answer .33 to .91 with budgets for .07 to .74 of all expected loss, .32 to .95 by this."""
_WAITED, _WAITED_READ_AHEAD = 0.7, 0.2
"""Share of the shorter of arithmetic and reads that the other does not hide. Measured with 4-bit experts of an OLMoE of
8 layers at 25 %, 63 ms of arithmetic and 46 of reads a token: 95 ms, with reads ahead 71."""


@dataclass(frozen=True, kw_only=True)
class MachineSpeed:
    """`weights_bytes_s[dtype][rows]`: bytes of weights multiplied in a second with so many rows; `step_seconds`,
    `layer_seconds` and `token_seconds`: what a step, each of its layers, and each token of a prompt in each of them
    take besides; `pair_seconds`: what each number of a prompt's queries takes for each token that it looks at;
    `brought_seconds`: what each expert that a prompt brings costs the thread that computes; `disk_bytes_s`: of reads as
    large as experts, on a GPU of its link to the host; `peer_bytes_s`: of reads from another GPU's slots;
    `host_bytes_s`: of weights that a GPU's host multiplies beside it.

    `measured` is False where the figures are guesses."""

    weights_bytes_s: Mapping[str, Mapping[int, float]]
    disk_bytes_s: float
    peer_bytes_s: float = math.inf
    host_bytes_s: float = 0.0
    step_seconds: float = 0.0
    layer_seconds: float = 0.0
    token_seconds: float = 0.0
    pair_seconds: float = 0.0
    brought_seconds: float = 0.0
    measured: bool = True

    def weights_seconds(self, dtype: str, nbytes: float, rows: float = 1) -> float:
        """How long `nbytes` of weights take with so many rows."""
        rates = self.weights_bytes_s[dtype]
        most = max(rates)
        if rows > most:
            return nbytes / rates[most] * rows / most
        low, high = max(at for at in rates if at <= max(1, rows)), min(at for at in rates if at >= rows)
        share = 0.0 if low == high else (rows - low) / (high - low)
        return nbytes * ((1 - share) / rates[low] + share / rates[high])


@dataclass(frozen=True, kw_only=True)
class TokenWork:
    """What a token asks for. `dense_bytes` are read every step, without what is looked up by row; `head_bytes` of them
    see only the last token of a prompt; `kv_bytes` are those of a token in the KV cache, `query_width` the numbers of
    its queries; `active` are a token's accesses in all layers, of which the shares `missed` and `stood_in` are no hits;
    of all `experts` the share `absent` is not resident, and prompts read that into `wave_slots`; of reads the share
    `at_peers` is out of the slots of other GPUs, of a prompt's also what each of the node's `workers` reads for it;
    misses among a token's `per_layer` accesses to a layer the host computes as EngineConfig's `host_compute` says."""

    layers: int
    dense_dtype: str
    dense_bytes: int
    head_bytes: int
    kv_bytes: int
    expert_dtype: str
    expert_bytes: int
    active: int
    per_layer: int
    experts: int
    missed: float
    stood_in: float = 0.0
    standin_bytes: float = 0.0
    reads_ahead: bool = False
    absent: float = 0.0
    at_peers: float = 0.0
    workers: int = 1
    wave_slots: int = 0
    query_width: int = 0
    host_compute: str = "off"


def decode_seconds(work: TokenWork, speed: MachineSpeed, context: int) -> float:
    """Of one step of one sequence of so many tokens."""
    own = work.active * (1 - work.stood_in)
    arithmetic = speed.step_seconds + work.layers * speed.layer_seconds
    arithmetic += speed.weights_seconds(work.dense_dtype, work.dense_bytes + context * work.kv_bytes)
    arithmetic += speed.weights_seconds(work.expert_dtype, own * work.expert_bytes)
    if work.stood_in:
        arithmetic += speed.weights_seconds(_RECORDS, work.active * work.stood_in * work.standin_bytes)
    waited = _WAITED_READ_AHEAD if work.reads_ahead else _WAITED
    return _together(work, arithmetic, answered_misses(work, speed).seconds, waited)


def answered_misses(work: TokenWork, speed: MachineSpeed) -> ExpectedMisses:
    """Of a token of decode, in all layers."""
    fetch = _read_seconds(work, speed, work.expert_bytes)
    hosts, layers = work.host_compute != "off" and speed.host_bytes_s > 0, work.active / max(1, work.per_layer)
    each, always = work.expert_bytes / speed.host_bytes_s if hosts else math.inf, hosts and work.host_compute == "on"
    found = expected_misses(work.per_layer, work.missed, each, fetch, always=always)
    return ExpectedMisses(**{name: layers * value for name, value in vars(found).items()})


def prefill_seconds(work: TokenWork, speed: MachineSpeed, tokens: int) -> float:
    """Of a prompt in one pass: prompts are exact in every mode, and read each missing expert that they use once; of the
    last layer only the last token's.

    Reads overlap with experts' arithmetic, not with what comes before it in a layer: they pass through wave slots, and
    these are full with what was read ahead.
    """
    layers, work = max(1, work.layers), replace(work, at_peers=1 - (1 - work.at_peers) / work.workers)
    dense = speed.layer_seconds + tokens * speed.token_seconds
    dense += speed.weights_seconds(work.dense_dtype, (work.dense_bytes - work.head_bytes) / layers, tokens)
    dense += work.query_width / layers * tokens * tokens / 2 * speed.pair_seconds
    most = _layer_seconds(work, speed, dense, tokens)
    head = speed.weights_seconds(work.dense_dtype, work.head_bytes)
    return speed.step_seconds + (layers - 1) * most + _layer_seconds(work, speed, dense, 1) + head


def _layer_seconds(work: TokenWork, speed: MachineSpeed, dense: float, rows: int) -> float:
    """Of one layer of a prompt, so many rows of which need its experts, behind `dense` seconds of other work."""
    experts, accesses = work.experts / max(1, work.layers), work.active / max(1, work.layers) * rows
    used = experts * (1 - (1 - 1 / experts) ** accesses) if experts else 0.0
    arithmetic = speed.weights_seconds(work.expert_dtype, used * work.expert_bytes, accesses / used if used else 1)
    each, missing = _read_seconds(work, speed, work.expert_bytes), work.absent * used
    ahead = min(dense, work.wave_slots * each, missing * each) if work.reads_ahead else 0.0
    reads, arithmetic = missing * each - ahead, arithmetic + missing * speed.brought_seconds
    waited = _WAITED_READ_AHEAD if work.reads_ahead else _WAITED
    return dense + _together(work, arithmetic, reads, waited)


def _read_seconds(work: TokenWork, speed: MachineSpeed, nbytes: float) -> float:
    return nbytes * ((1 - work.at_peers) / speed.disk_bytes_s + work.at_peers / speed.peer_bytes_s)


def _together(work: TokenWork, arithmetic: float, reads: float, waited: float) -> float:
    """Both, with what of the shorter the other does not hide: all of it where who computes reads, too."""
    return max(arithmetic, reads) + (1.0 if work.expert_bytes <= READ_ON_THE_SPOT else waited) * min(arithmetic, reads)


def weight_dtypes(config: EngineConfig, shape: ModelShape) -> tuple[str, str]:
    """What dense weights and experts are multiplied as, by torch's names, `int8` and `int4`, or the format in
    which they are stored quantised."""
    dense = shape.dense_format if config.dense_dtype == "native" else config.dense_dtype
    experts = shape.expert_dtype if config.expert_dtype == "native" else config.expert_dtype
    return dense, {"bf16": "bfloat16"}.get(experts, experts)


def guessed_speed(
    config: EngineConfig, shape: ModelShape, link_bytes_s: float, peer_bytes_s: float, *, apart: bool
) -> MachineSpeed:
    """Where nothing was measured; `apart` is a GPU's, beside a host with the threads of `config`."""
    rates = dict.fromkeys(ROWS, GUESSED_HBM if apart else GUESSED_RAM)
    dtypes = {*weight_dtypes(config, shape), "int4"}
    weights = dict.fromkeys(dtypes, rates)
    return MachineSpeed(
        weights_bytes_s=weights,
        disk_bytes_s=link_bytes_s,
        peer_bytes_s=peer_bytes_s,
        host_bytes_s=GUESSED_RAM * config.threads if apart else 0.0,
        measured=False,
    )


def token_work(
    config: EngineConfig,
    shape: ModelShape,
    setup: StandinSetup | None,
    *,
    resident: float,
    hit: float,
    stood_in: float,
    workers: int = 1,
) -> TokenWork:
    """Of a model that is served so, with the share of its experts that are `resident`, and those of its accesses that
    `hit` and are `stood_in` for; slots of a node's `workers` that read each other's hold different experts as far as
    there are."""
    dense, experts = weight_dtypes(config, shape)
    hosts = config.mode != "exact" and parse_memory(config.host_memory, total_expert_bytes=shape.total_expert_bytes) > 0
    records = [] if setup is None else [setup.layouts[kind].slot_bytes for kind in setup.kind_of.values()]
    return TokenWork(
        layers=shape.num_layers,
        dense_dtype=dense,
        dense_bytes=shape.dense_bytes - shape.embedding_bytes,
        head_bytes=shape.head_bytes,
        kv_bytes=shape.kv_bytes_per_token,
        expert_dtype=experts,
        expert_bytes=shape.expert_bytes,
        active=shape.experts_per_token * shape.moe_layers,
        per_layer=shape.experts_per_token,
        experts=sum(shape.experts_per_layer),
        missed=1 - hit - stood_in,
        stood_in=stood_in,
        standin_bytes=sum(records) / len(records) if records else 0.0,
        reads_ahead=config.read_ahead != "off" and setup is None and shape.expert_bytes > READ_ON_THE_SPOT,
        absent=1 - resident,
        workers=workers,
        at_peers=(min(1.0, workers * resident) - resident) / (1 - resident) if resident < 1 else 0.0,
        query_width=shape.query_width,
        host_compute=config.host_compute if hosts else "off",
    )


def stood_in_share(config: EngineConfig, setup: StandinSetup | None) -> float:
    """Share of the misses that stand-ins answer. In `bounded` the cheapest, as many as the budget pays for: losses of
    accesses are about lognormal, so all but few cost little."""
    if setup is None or (setup.refusal and config.mode == "bounded"):
        return 0.0
    worth = config.budget / setup.expected_loss if config.mode == "bounded" and setup.expected_loss > 0 else 1.0
    return _NORMAL.cdf(_NORMAL.inv_cdf(worth) + _LOSS_SPREAD) if 0 < worth < 1 else float(worth > 0)
