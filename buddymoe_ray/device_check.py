"""`python -m buddymoe_ray.device_check`: is this device right, is the budget held, how fast is it? No Ray, no network.

Runs on whatever device there is (`--device`), in a few minutes: the kernels of one apart against float64, its memory as
other workers map it, tokens it chooses, steps begun ahead of the host, greedy tokens at several budgets against
transformers' own `generate`, the expert pool against its budget in device memory, and a first table of tokens/s for
`builtin:tiny` and a synthetic checkpoint made on the spot. Prints JSON lines, the first one of what will be done; in
parts, of which a later run with `--resume` leaves out those that held. Exit status 1 when a check fails, or is left.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional

from buddymoe_ray.config import EngineConfig
from buddymoe_ray.device import Device, open_device
from buddymoe_ray.engine.engine import Engine
from buddymoe_ray.engine.in_flight import AHEAD
from buddymoe_ray.engine.llm import LLM
from buddymoe_ray.engine.measure import BenchLoad, measure
from buddymoe_ray.engine.recorded import REPLAYED
from buddymoe_ray.errors import BuddyMoEError
from buddymoe_ray.kernels import (
    ExpertMath,
    LowbitFormat,
    TritonExperts,
    coded_shapes,
    decode_attention,
    dequantise,
    expert_forward,
    pack_plain,
    plain_weights,
    record_tensors,
)
from buddymoe_ray.kernels.reference import ENTERED
from buddymoe_ray.kernels.sample import SamplingState, choose_rows, choose_sorted, settings_of
from buddymoe_ray.models.expert_layout import slot_tensors
from buddymoe_ray.models.reference import greedy_difference, reference_generate
from buddymoe_ray.models.resolve import resolve_model
from buddymoe_ray.models.synth import Popularity, synth_checkpoint
from buddymoe_ray.residency.sharing import Sharing
from buddymoe_ray.types import CodedMatrix, CodeFormat, SamplingParams, SlotTensor

__all__ = ["main"]

Records = Iterator[dict[str, Any]]

PROMPTS = ("def add(a, b):\n", "import os\n", "class Queue:\n    def __init__(self):\n", "The following example shows")
BUDGETS = ("100%", "50%", "25%")
SHARED_BYTES, MANY, KV_BLOCK, NATS = 64 << 20, 1024, 16, 0.01
CODED = (
    CodeFormat(codes="fp8", block=(128, 128), scale="float32"),
    CodeFormat(codes="int8", block=(1, 0), scale="bfloat16"),
    CodeFormat(codes="int4", block=(1, 32), scale="bfloat16"),
    CodeFormat(codes="mxfp4", block=(1, 32), scale="e8m0"),
    CodeFormat(codes="nvfp4", block=(1, 16), scale="float8_e4m3fn", global_scale="*"),
    CodeFormat(codes="gptq", block=(1, 128), scale="float16", zeros=True),
    CodeFormat(codes="awq", block=(1, 128), scale="float16", zeros=True),
)


def check_exact(device: str, *, new_tokens: int) -> Records:
    """Greedy float32 tokens of `builtin:tiny` at every budget and batch against transformers on the CPU."""
    folder = resolve_model("builtin:tiny")
    expected = reference_generate(folder, PROMPTS, new_tokens=new_tokens)
    for memory in BUDGETS:
        for max_running in (1, len(PROMPTS)):
            with LLM(str(folder), dtype="float32", memory=memory, device=device, max_running=max_running) as llm:
                got = [list(r.token_ids) for r in llm.generate(list(PROMPTS), max_tokens=new_tokens)]
            same = sum(a == b for a, b in zip(got, expected, strict=True))
            ok = same == len(PROMPTS)
            yield {"check": "exact", "memory": memory, "batch": max_running, "same": same, "of": len(PROMPTS), "ok": ok}


def check_kernels(device: Device) -> Records:
    """The kernels of a device apart: random experts in every format against float64, rows alone against rows together,
    and how fast they read a GPU's memory."""
    D, F, rng = 1024, 384, torch.Generator().manual_seed(0)
    shapes = {"gate_up_proj": (2 * F, D), "down_proj": (D, F)}
    plain = {name: torch.randn(shape, generator=rng).mul(0.05).bfloat16() for name, shape in shapes.items()}
    math = ExpertMath(activate=lambda x: functional.silu(x[..., :F]) * x[..., F:])
    x_TD, expert_TK = torch.randn(4, D, generator=rng), torch.zeros(4, 1, dtype=torch.int64)
    if timed := device.torch.type != "cpu":
        source, copied = torch.empty(2, SHARED_BYTES << 4, dtype=torch.uint8, device=device.torch)
        most = 2 * copied.numel() / _seconds(lambda: copied.copy_(source), copied)  # read and written
    for name, made, slot, weights in _experts(shapes, plain, math, rng):
        expected = expert_forward(x_TD.double(), {key: weight.double() for key, weight in weights.items()}, math)
        held, table, rows, experts = (
            tensor.to(device.torch) for tensor in (slot, torch.zeros(1, dtype=torch.int64), x_TD, expert_TK)
        )
        together, alone = torch.empty_like(rows), torch.empty_like(rows)
        made(rows, held, table, experts, together)
        for at in range(len(rows)):
            made(rows[at : at + 1], held, table, experts[:1], alone[at : at + 1])
        error = float((together.cpu().double() - expected).norm() / expected.norm())
        same = torch.equal(together, alone)
        found = {"error": error, "same_bits": same, "ok": error < 2e-6 and same}
        if timed:
            found |= {"bytes_per_s": (rate := _rate(made, held, rows[:1])), "of_a_copy": rate / most}
        yield {"check": "kernels", "format": name, **found}


def _rate(experts: TritonExperts, slot: Tensor, row: Tensor) -> float:
    """Of weights that kernels read in one call, of more experts than a GPU's caches hold."""
    slots, table = slot.repeat(MANY), torch.arange(MANY, device=row.device) * slot.numel()
    named, out = torch.arange(MANY, device=row.device)[None], row.new_empty(MANY, row.shape[1])
    return slots.numel() / _seconds(lambda: experts(row, slots, table, named, out), out)


def _seconds(run: Callable[[], object], there: Tensor) -> float:
    """Of a call, on the GPU that the tensor is on; the first ones compile."""
    for passes in (3, 30):
        began = time.perf_counter()
        for _ in range(passes):
            run()
        there[:1].cpu()
    return (time.perf_counter() - began) / 30


def _experts(
    shapes: dict[str, tuple[int, int]], plain: dict[str, Tensor], math: ExpertMath, rng: torch.Generator
) -> Iterator[tuple[str, TritonExperts, Tensor, Mapping[str, Tensor]]]:
    """In every format: its name, the kernels, an expert's slot, and the weights that it means."""
    layout = slot_tensors(shapes, dict.fromkeys(shapes, "bfloat16"))
    yield "bfloat16", TritonExperts(layout=layout, fmt=None, math=math), _slot(layout, plain), plain
    for fmt in (LowbitFormat(bits=bits) for bits in (8, 4, 3, 2, 1)):
        layout, packed = record_tensors(shapes, fmt)[0], {n: pack_plain(w, fmt) for n, w in plain.items()}
        stored = {name: part for n, matrix in packed.items() for name, part in matrix.named(n).items()}
        weights = {name: dequantise(matrix, fmt) for name, matrix in packed.items()}
        yield f"{fmt.bits} bit", TritonExperts(layout=layout, fmt=fmt, math=math), _slot(layout, stored), weights
    for coded_format in CODED:
        parts = {"gate_up_proj": 2, "down_proj": 1}
        coded = [CodedMatrix(name=n, format=coded_format, parts=parts[n], N=N, K=K) for n, (N, K) in shapes.items()]
        sized = {f"{m.name}.{part}": found for m in coded for part, found in coded_shapes(m).items()}
        layout = slot_tensors({n: s for n, (s, _) in sized.items()}, {n: dtype for n, (_, dtype) in sized.items()})
        stored = {tensor.name: _codes(tensor, rng) for tensor in layout}
        experts = TritonExperts(layout=layout, fmt=None, math=math, coded=coded)
        yield str(coded_format), experts, _slot(layout, stored), plain_weights(stored, coded)


def _codes(tensor: SlotTensor, rng: torch.Generator) -> Tensor:
    """Random scales, all of which are about as large, or codes, none of which is no number."""
    if tensor.name.endswith(("scales", "scale")):
        if tensor.dtype == "uint8":
            return torch.randint(118, 122, tensor.shape, generator=rng, dtype=torch.uint8)
        return torch.rand(tensor.shape, generator=rng).add(0.5).div(200).to(getattr(torch, tensor.dtype))
    made = torch.randint(0, 256, (tensor.nbytes,), generator=rng, dtype=torch.uint8)
    made &= 0xBF if tensor.dtype == "float8_e4m3fn" else 0xFF
    return made.view(getattr(torch, tensor.dtype)).view(tensor.shape)


def _slot(layout: Sequence[SlotTensor], stored: Mapping[str, Tensor]) -> Tensor:
    slot = torch.zeros(layout[-1].offset + -(-layout[-1].nbytes // 64) * 64, dtype=torch.uint8)
    for tensor in layout:
        slot[tensor.offset :][: tensor.nbytes] = stored[tensor.name].contiguous().view(-1).view(torch.uint8)
    return slot


def check_attention(device: Device) -> Records:
    """Decode attention of a device apart against float64, and how fast it reads a GPU's KV cache."""
    (B, Q, H, d), apart = (16, 32, 4, 128), device.torch
    length = 100 if apart.type == "cpu" else 16384
    M = -(-length // KV_BLOCK)
    keys, values = (torch.randn(B * M * KV_BLOCK, H, d, device=apart).bfloat16() for _ in range(2))
    blocks_BM, lengths_B = torch.arange(B * M, device=apart).view(B, M), torch.full((B,), length, device=apart)
    rows_BQd = torch.randn(B, Q, d, device=apart).bfloat16()
    pools, context = (keys, values, KV_BLOCK), (blocks_BM, lengths_B)
    attend = partial(decode_attention, rows_BQd, pools, context, scale=d**-0.5, window=None, sinks_Q=None)
    out = attend()
    k_QLd, v_QLd = (t[:length].double().repeat_interleave(Q // H, dim=1).transpose(0, 1) for t in (keys, values))
    expected = functional.scaled_dot_product_attention(rows_BQd[0, :, None].double(), k_QLd, v_QLd)[:, 0]
    error = float((out[0].double() - expected).norm() / expected.norm())
    rate = 2 * B * length * H * d * 2 / _seconds(attend, out) if apart.type != "cpu" else None
    yield {"check": "attention", "error": error, "bytes_per_s": rate, "ok": error < 0.005}


def check_decode(device: str) -> Records:
    """Decode steps of a device apart enter no reference kernel, and are replayed: `check_exact` sees their tokens."""
    entered, before = list[int](), REPLAYED.copy()
    with LLM("builtin:tiny", memory="50%", mode="fast", device=device, guard_share=0.0) as llm:
        for new_tokens in (1, 1, 5):  # prompts, which may, are the same
            already = ENTERED.total()
            llm.generate(list(PROMPTS), max_tokens=new_tokens)
            entered.append(ENTERED.total() - already)
    replayed, ok = REPLAYED - before, entered[2] == entered[1]
    steps = {"replayed_steps_by_rows": dict(replayed)}
    yield {"check": "decode", "reference_kernels": entered[2] - entered[1]} | steps | {"ok": ok and bool(replayed)}


def check_sampling(device: Device) -> Records:
    """Tokens that the device chooses against those of the CPU's machine code, and how long it takes with a GPU."""
    rows, V = 16, 50_304
    how = [
        SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        for temperature in (0.0, 0.7, 1.0, 1.5)
        for top_k, top_p, min_p in ((0, 1.0, 0.0), (50, 1.0, 0.0), (0, 0.9, 0.0), (20, 0.95, 0.05))
    ]
    states = [SamplingState(params=p, seed=seed, token_ids=[1, 2], prompt_length=1) for seed, p in enumerate(how)]
    logits_BV = 3 * torch.randn(rows, V, generator=torch.Generator().manual_seed(0))
    there_BV, settings = logits_BV.to(device.torch), settings_of(states)
    same = choose_sorted(there_BV, settings).tolist() == choose_rows(logits_BV, states)
    seconds = _seconds(partial(choose_sorted, there_BV, settings), there_BV) if device.torch.type != "cpu" else None
    yield {"check": "sampling", "rows": rows, "vocabulary": V, "seconds": seconds, "ok": same}


def check_ahead(device: str, *, new_tokens: int) -> Records:
    """Steps that are begun before the host knows the tokens of those before: the same tokens, sooner."""
    for mode, memory in (("exact", "100%"), ("fast", "50%")):
        with LLM("builtin:tiny", memory=memory, mode=mode, device=device, guard_share=0.0) as llm:
            found, seconds, counts = list[list[tuple[int, ...]]](), list[float](), Counter[str]()
            for logprobs in (1, None, 1, None):  # who asks for them waits for each step; the first two record it
                before, began = AHEAD.copy(), time.perf_counter()
                how = SamplingParams(temperature=0.8, top_p=0.9, seed=7, ignore_eos=True, max_tokens=new_tokens)
                results = llm.generate(list(PROMPTS), replace(how, logprobs=logprobs))
                seconds.append((time.perf_counter() - began) / new_tokens)
                found.append([result.token_ids for result in results])
                counts = AHEAD - before
        ok = counts["taken"] > new_tokens // 2 and (mode == "fast" or all(tokens == found[0] for tokens in found))
        timed = {"seconds_a_step": seconds[3], "without": seconds[2]}
        yield {"check": "ahead", "mode": mode, "memory": memory} | timed | counts | {"ok": ok}


def check_shared(device: Device, name: str) -> Records:
    """How fast a device apart copies host memory, and its own as another worker maps it; two engines, the second of
    which fills its slots from the first one's."""
    host = torch.full((SHARED_BYTES,), 5, dtype=torch.uint8)
    device.pin(host)
    target = torch.empty(SHARED_BYTES, dtype=torch.uint8, device=device.torch)
    yield {"check": "link", "bytes_per_s": _copied(device, target, host), "ok": bool((target == 5).all())}
    device.unpin(host)
    try:
        shared = device.share(SHARED_BYTES)
        shared.tensor.fill_(3)
        speed = _copied(device, target, device.map(shared.fd, SHARED_BYTES))
    except BuddyMoEError as error:
        yield {"check": "shared memory", "error": str(error), "ok": False}
        return
    os.close(shared.fd)
    yield {"check": "shared memory", "bytes_per_s": speed, "ok": bool((target == 3).all())}
    config = EngineConfig(memory="50%", device=name, dtype="float32")
    sharing, engines = Sharing(workers=2, tag=f"check{os.getpid()}"), list[Engine]()
    try:
        for _ in range(2):
            engines.append(Engine.from_config(config, text=False, sharing=sharing))
        read = [engine.cache.stats().bytes_requested_disk for engine in engines]
        for layer, block in enumerate(engines[0].cache.layout.experts_per_layer):
            for _ in engines[1].cache.stream(layer, range(block), protect_residency=True):
                pass
        hits = engines[1].cache.stats().peer_hits
    finally:
        for engine in engines:
            engine.close()
    yield {"check": "peers", "bytes_read": read, "peer_hits": hits, "ok": hits > 0}


def _copied(device: Device, target: Tensor, source: Tensor) -> float:
    """Bytes per second."""
    for copies in (1, 8):
        began = time.perf_counter()
        for _ in range(copies):
            copy = device.copy(target, source)
        copy.wait()
    return 8 * target.numel() / (time.perf_counter() - began)


def check_budget(device: str) -> Records:
    """Device memory with 25 % of the experts against with all of them: the difference is the budget's."""
    sizes = {}
    for memory in ("100%", "25%"):
        with LLM("builtin:tiny", memory=memory, device=device, kv_memory="16MiB") as llm:
            llm.generate(list(PROMPTS), max_tokens=8)
            cache = llm.engine.cache
            sizes[memory] = cache.device_bytes
            budget, total = cache.plan.budget_bytes, cache.layout.total_bytes
    held = sizes["25%"] <= budget <= 0.26 * total
    yield {"check": "budget", "device_bytes": sizes, "budget_25": budget, "total": total, "ok": held}


def check_standins(device: str, *, new_tokens: int, apart: bool) -> Records:
    """Stand-ins by this device's kernels against torch's, of one plan: same tokens but at near ties, nothing fetched,
    charges within the budget; where it is apart once more with the host computing what they may not answer."""
    computing = {"host_memory": "100%", "host_compute": "on"}
    cases = [("fast", "25%", {}), ("bounded", "25%", {}), ("fast", "50%", {}), ("bounded", "25%", computing)]
    for mode, memory, host in cases if apart else cases[:3]:
        options = {"memory": memory, "mode": mode, "dtype": "float32", "guard_share": 0.0, "device": device}
        answers, most = [], NATS if host else NATS / 100  # the host's answers take no slot: other experts stay
        for more, covers in (({}, lambda *_: False), (host, TritonExperts.covers)):
            with patch.object(TritonExperts, "covers", covers), LLM("builtin:tiny", **options, **more) as llm:
                answers.append(llm.generate(list(PROMPTS), max_tokens=new_tokens, logprobs=2))
        same = sum(a.token_ids == b.token_ids for a, b in zip(*answers, strict=True))
        nats = max(greedy_difference(a, b, tolerance=most) for a, b in zip(*answers, strict=True))
        usages = [result.usage for result in answers[1]]
        kept = all(u.fetched == 0 if mode == "fast" else u.expected_rise <= 0.003 * u.completion_tokens for u in usages)
        stood_in, computed = sum(u.standins.total for u in usages), sum(u.host for u in usages)
        ok = nats <= most and kept and stood_in > 0 and bool(computed) == bool(host)
        found = {"check": "stand-ins", "mode": mode, "memory": memory, "same": same, "stood_in": stood_in}
        yield found | {"by_host": computed, "nats_apart": min(nats, 1e9), "ok": ok}


def table(device: str, *, layers: int, new_tokens: int, folder: Path) -> Records:
    """Tokens/s at each budget for `builtin:tiny` and a synthetic OLMoE cut to `layers` layers."""
    synth_checkpoint("olmoe-1b-7b", folder, layers=layers, popularity=Popularity(skew=1.0))
    models = {"builtin:tiny": "builtin:tiny", str(folder): f"synthetic olmoe-1b-7b, {layers} layers, skew 1"}
    for model, label in models.items():
        for memory in BUDGETS:
            for batch in (1, 8):
                config = EngineConfig(model=model, memory=memory, device=device, max_running=batch, kv_memory="256MiB")
                work = BenchLoad(batch=batch, prompt_tokens=64, new_tokens=new_tokens, reps=2)
                record = measure(config, work).as_record()
                yield {"table": label, "memory": memory, "batch": batch} | record


def main(argv: list[str] | None = None) -> int:
    """Run the checks that are left; exit status 0 when all hold and none is left."""
    parser = argparse.ArgumentParser("python -m buddymoe_ray.device_check", description=str(__doc__).split("\n")[0])
    parser.add_argument("--device", default="auto", help="auto, cpu, interpret, cuda or cuda:N")
    parser.add_argument("--layers", type=int, default=2, help="layers of the synthetic checkpoint")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens per sequence")
    parser.add_argument("--minutes", type=float, default=9.0, help="after so many no further part is begun")
    parser.add_argument("--out", type=Path, default=None, help="append the JSON lines to this file")
    parser.add_argument("--resume", action="store_true", help="leave out the parts that --out says held already")
    args = parser.parse_args(argv)
    if args.resume and args.out is None:
        parser.error("--resume is set without --out, must be beside it. hint: name the file of the first run")
    opened, began = open_device(args.device), time.perf_counter()
    device = "interpret" if args.device == "interpret" else str(opened.torch)
    about, failed, late = {"device": device, "name": opened.name, "torch": torch.__version__}, 0, list[str]()
    held = _held(args.out, about) if args.resume else set()
    with tempfile.TemporaryDirectory() as scratch:
        parts = _parts(opened, device, args, Path(scratch) / "synthetic")
        will = {name: str(run.func.__doc__).split("\n")[0] for name, run in parts.items() if name not in held}
        _say(about | {"will": will, "held_before": sorted(held)}, args.out)
        for name, run in ((name, parts[name]) for name in will):
            if time.perf_counter() - began > 60 * args.minutes:
                late.append(name)
                continue
            before, at = failed, time.perf_counter()
            for record in run():
                failed += record.get("ok") is False
                _say(record, args.out)
            _say(about | {"part": name, "held": failed == before, "seconds": time.perf_counter() - at}, args.out)
    _say({"ok": not failed and not late, "failed": failed, "left": late}, args.out)
    return 1 if failed or late else 0


def _held(out: Path, about: Mapping[str, Any]) -> set[str]:
    """Parts that held on this device before, by the lines of an earlier run, of which the last may be cut off."""
    held = set[str]()
    for line in out.read_text().splitlines() if out.exists() else []:
        with suppress(json.JSONDecodeError):
            record = json.loads(line)
            if record.get("held") and all(record[key] == about[key] for key in ("device", "name")):
                held.add(record["part"])
    return held


def _parts(opened: Device, device: str, args: argparse.Namespace, folder: Path) -> dict[str, partial[Records]]:
    """What there is to check, the most doubtful first."""
    apart = {
        "kernels": partial(check_kernels, opened),
        "attention": partial(check_attention, opened),
        "decode": partial(check_decode, device),
        "ahead": partial(check_ahead, device, new_tokens=args.new_tokens),
        "shared": partial(check_shared, opened, device),
    }
    return (apart if opened.apart else {}) | {
        "sampling": partial(check_sampling, opened),
        "exact": partial(check_exact, device, new_tokens=args.new_tokens),
        "budget": partial(check_budget, device),
        "stand-ins": partial(check_standins, device, new_tokens=args.new_tokens, apart=opened.apart),
        "speed": partial(table, device, layers=args.layers, new_tokens=args.new_tokens, folder=folder),
    }


def _say(record: dict[str, Any], out: Path | None) -> None:
    line = json.dumps(record, separators=(",", ":"))
    print(line, flush=True)
    if out is not None:
        with out.open("a") as lines:
            lines.write(line + "\n")


if __name__ == "__main__":
    sys.exit(main())
