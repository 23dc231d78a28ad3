"""What a plan foretells of engines whose experts come over a link of a stated rate, against such engines.

    python tests/throttled_link.py OUT.jsonl

The arithmetic of a model is measured on engines that read nothing (all experts in memory; in `fast`, all misses stood
in for); what each run then takes follows from the bytes it is expected to read and the link's rate. Runs are the
engine's own, each disk read held back until the link has carried it. Prints foretold by measured; tokens a second are
asked to be within 15 %. The first token's time is foretold of a prompt that uses all experts, which one of few words
does not. Needs a quiet machine.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import buddymoe_ray.models.tiny as shipped
from buddymoe_ray.cache.disk import DiskReader
from buddymoe_ray.commands.eval import encode_corpus, tokenizer_of
from buddymoe_ray.config import EngineConfig
from buddymoe_ray.engine.measure import BenchLoad, measure
from buddymoe_ray.models import synth
from buddymoe_ray.models.resolve import resolve_model
from buddymoe_ray.residency.plan import PROMPT, Plan, make_plan
from buddymoe_ray.residency.speed import MachineSpeed

TINY, MIXTRAL = "builtin:tiny", "mixtral-8x7b"
SMALLER = {"hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 4, "vocab_size": 2048}
MEMORIES = ("50%", "25%")
LINKS = {TINY: (8e6, 2e6), MIXTRAL: (1.6e9, 0.4e9)}
"""Bytes a second: 8 to 55 ms an expert, for sleeps are not exact."""
MODES = {TINY: ("exact", "bounded", "fast"), MIXTRAL: ("exact",)}  # random weights have no stand-ins
NEW, REPS, WITHIN = 64, 3, 0.15
_LITTLE = 1e-12
_FREE = {dtype: {1: math.inf} for dtype in ("float32", "bfloat16", "int4")}


class Link:
    """Carries bytes one after the other, `bytes_s` in a second; `nbytes` so far. Who is woken late has it the sooner
    the next time."""

    def __init__(self, bytes_s: float) -> None:
        self.bytes_s, self.nbytes, self._free_at, self._late = bytes_s, 0, 0.0, 0.0
        self._lock = threading.Lock()

    def carry(self, nbytes: int, since: float) -> None:
        """Return when they are over, who were to come at `since`."""
        with self._lock:
            self.nbytes += nbytes
            self._free_at = max(since - self._late, self._free_at) + nbytes / self.bytes_s
            until, self._late = self._free_at, 0.0
        time.sleep(max(0.0, until - time.perf_counter()))
        with self._lock:
            self._late = max(self._late, time.perf_counter() - until)


@contextmanager
def disks_behind(link: Link) -> Iterator[None]:
    """Whatever is read from a disk meanwhile comes over the link."""
    read = DiskReader._read_through

    def held_back(self: DiskReader, buffer: Any, path: str, offset: int, targets: Any) -> None:
        asked = time.perf_counter()
        read(self, buffer, path, offset, targets)
        link.carry(sum(target.nbytes for target in targets), asked)

    DiskReader._read_through = held_back  # type: ignore[assignment]
    try:
        yield
    finally:
        DiskReader._read_through = read  # type: ignore[method-assign]


@dataclass(frozen=True, kw_only=True)
class Run:
    """Of an engine, foretold or measured."""

    tok_s: float
    ttft_s: float
    hit_percent: float
    read_bytes: float
    prompt_bytes: float


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """Seconds of a token, of one for which all misses are stood in for, and of a prompt, where nothing is read."""

    token: float
    stood_in: float
    prompt: float


def model_at(name: str, folder: Path) -> tuple[str, tuple[int, ...]]:
    """A model and text for it: the shipped one with held-out text, or a smaller Mixtral of random weights."""
    if name == TINY:
        texts = sorted(map(str, (Path(shipped.__file__).parent / "weights" / "heldout").glob("*.txt")))
        return TINY, tuple(encode_corpus(tokenizer_of(TINY, "to read"), texts))
    synth.SHAPES["smaller"] = {**synth.SHAPES[name], **SMALLER}  # type: ignore[index]
    return str(synth.synth_checkpoint("smaller", folder / "model")), ()


def config_of(model: str, memory: str, mode: str) -> EngineConfig:
    """One thread, and no host tier: what is missing comes over the link when it is missed."""
    config = EngineConfig(model=model, memory=memory, mode=mode, device="cpu", threads=1)  # type: ignore[arg-type]
    return replace(config, read_ahead="off", guard_share=0.0)


def foretold(config: EngineConfig, arithmetic: Arithmetic, link_bytes_s: float) -> Run:
    """What a plan says of a machine with this arithmetic and this link."""
    folder = resolve_model(config.model)

    def plan(seconds: float) -> Plan:
        speed = MachineSpeed(weights_bytes_s=_FREE, disk_bytes_s=link_bytes_s, step_seconds=seconds)
        return make_plan(config, folder, gpus=(), speed=speed)

    prompt = plan(arithmetic.prompt)
    stood_in = prompt.predicted_standin_percent / 100
    token = plan(arithmetic.token + stood_in * (arithmetic.stood_in - arithmetic.token))
    reads = plan(_LITTLE).predicted_ttft_seconds if link_bytes_s < math.inf else 0.0
    return Run(
        tok_s=token.predicted_decode_tok_s,
        ttft_s=prompt.predicted_ttft_seconds,
        hit_percent=token.predicted_hit_percent,
        read_bytes=token.predicted_miss_bytes_per_token,
        prompt_bytes=reads * link_bytes_s if reads else 0.0,
    )


def measured(config: EngineConfig, ids: tuple[int, ...], link: Link) -> Run:
    """What its engine does, with text drawn at the model's own odds."""
    load = BenchLoad(batch=1, prompt_tokens=PROMPT, new_tokens=NEW, reps=REPS, ids=ids, temperature=1.0)
    with disks_behind(link):
        found = measure(config, load)
    return Run(
        tok_s=found.decode_tok_s,
        ttft_s=found.ttft_ms / 1e3,
        hit_percent=found.hit_rate,
        read_bytes=found.bytes_read_per_token,
        prompt_bytes=found.prefill_bytes_read,
    )


def rows(name: str, folder: Path) -> Iterator[dict[str, Any]]:
    """Of one model."""
    model, ids = model_at(name, folder)
    modes = MODES[name]
    resident = measured(config_of(model, "100%", "exact"), ids, Link(math.inf))
    fast = measured(config_of(model, "25%", "fast"), ids, Link(math.inf)) if "fast" in modes else resident
    arithmetic = Arithmetic(token=1 / resident.tok_s, stood_in=1 / fast.tok_s, prompt=resident.ttft_s)
    for memory in MEMORIES:
        for mode in modes:
            for link_bytes_s in LINKS[name]:
                config = config_of(model, memory, mode)
                pair = foretold(config, arithmetic, link_bytes_s), measured(config, ids, Link(link_bytes_s))
                row = {"model": name, "memory": memory, "mode": mode, "link_bytes_s": link_bytes_s}
                yield row | {"foretold": asdict(pair[0]), "measured": asdict(pair[1])}


def main(out: Path) -> int:
    """All models; how many speeds are not within 15 %."""
    outside, lines = 0, list[str]()
    for name in MODES:
        with tempfile.TemporaryDirectory() as folder:
            for row in rows(name, Path(folder)):
                lines.append(json.dumps(row))
                out.write_text("\n".join(lines) + "\n")
                said, was = row["foretold"], row["measured"]
                ratios = {key: said[key] / was[key] for key in ("tok_s", "ttft_s")}
                outside += abs(ratios["tok_s"] - 1) > WITHIN
                shown = " ".join(f"{key} {said[key]:.4g} for {was[key]:.4g} ({r:.2f})" for key, r in ratios.items())
                hits = f"hits {said['hit_percent']:.0f} for {was['hit_percent']:.0f} %"
                link = f"{row['link_bytes_s'] / 1e6:g} MB/s"
                print(f"{name} {row['memory']} {row['mode']:8} {link} {shown}, {hits}", flush=True)
    return outside


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])) > 0)
