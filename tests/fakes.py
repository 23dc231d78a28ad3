"""Small stand-ins for the narrow seams: an engine without a model, its tokenizer, and workers without ray.

`FakeEngine` keeps AsyncEngine's contract (events in order, usage with the last, cancelling it cancels, resumed
tokens are not told again), so what is proven over it holds for the path above the engine. Its tokens are a function of
prompt, seed and position alone.
"""

from __future__ import annotations

import asyncio
import json
import os
import zlib
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from interpreter import quicken_interpreter
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from buddymoe_ray.cache import sharded_reads
from buddymoe_ray.config import EngineConfig
from buddymoe_ray.errors import CacheError, CapacityError, CheckpointError, RequestError
from buddymoe_ray.observe import EngineSnapshot, ExpertMap
from buddymoe_ray.residency.sharing import Sharing
from buddymoe_ray.serve.replica import open_async_engine
from buddymoe_ray.serve.resume import WorkerLost
from buddymoe_ray.serve.work import Batch, Reply, Work, WorkerInfo, WorkerReport
from buddymoe_ray.serve.worker import EngineSeam, Worker
from buddymoe_ray.types import FinishReason, GenerationRequest, StandinAccesses, TokenEvent, TokenLogprob, Usage

__all__ = [
    "Breaking",
    "FakeEngine",
    "FakeLimits",
    "LocalWorkers",
    "MortalWorkers",
    "byte_tokenizer",
    "exact_usage",
    "open_broken_engine",
    "open_fake_engine",
]

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ALPHABET = tuple(range(ord("a"), ord("z") + 1))  # the bytes a fake engine generates; ids are bytes


@cache
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A real tokenizer with one token per byte (id = byte), then the roles' special tokens from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    stand_in = {byte: chr(byte) for byte in printable}
    for at, byte in enumerate(byte for byte in range(256) if byte not in stand_in):
        stand_in[byte] = chr(0x100 + at)
    backend = Tokenizer(models.BPE(vocab={stand_in[byte]: byte for byte in range(256)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(f"<|{role}|>") for role in ("system", "user", "assistant")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@dataclass(frozen=True, kw_only=True)
class FakeLimits:
    """As EngineLimits."""

    max_model_len: int = 128
    max_running: int = 8
    kv_tokens: int = 1024


class FakeEngine:
    """Generates letters; `delay` seconds per token.

    A prompt may ask for trouble: one that holds byte 1 is refused by the engine, byte 2 fails after three tokens, byte
    3 kills the engine as a dying step thread would (not the next one, where the request goes on), byte 4 raises what
    nobody foresaw. A `bounded` request fetches one access per token and a `fast` one none; stand-ins answer the rest at
    .001 nats per token.
    """

    link_address = ""

    def link(self) -> None:
        """It never has peers."""

    def link_seconds(self) -> Mapping[str, float]:
        return {}

    def set_peers(self, peers: Mapping[str, str]) -> None:
        """It has no experts to share."""

    def __init__(self, *, model_id: str = "fake", delay: float = 0.0, limits: FakeLimits | None = None) -> None:
        self.model_id = model_id
        self.tokenizer: PreTrainedTokenizerFast | None = byte_tokenizer()
        self.limits = limits or FakeLimits()
        self.sampling_defaults: Mapping[str, Any] = {}
        self.delay = delay
        self.running: set[str] = set()
        self.seen: list[GenerationRequest] = []
        self.cancelled = 0
        self.steps = 0
        self.closed = False
        self._died: CapacityError | None = None

    async def run(self, request: GenerationRequest, tell: Callable[[TokenEvent], None]) -> None:
        """Tells the request's events, in pieces of one token."""
        self._raise_if_dead()
        self.seen.append(request)
        if 1 in request.prompt_token_ids:
            raise RequestError("prompt holds byte 1, must not. hint: leave it out", param="prompt")
        resumed = request.resumed_token_ids
        if resumed != tuple(fake_token(request, position) for position in range(len(resumed))):
            raise RequestError("resumed_token_ids are not those of this request, must be what it generated")
        self.running.add(request.request_id)
        ended = False
        try:
            text = bytes(resumed).decode()
            for position in range(len(resumed), request.sampling.max_tokens):
                await asyncio.sleep(self.delay)
                await asyncio.sleep(0)  # whoever was woken by the last token reads it first
                self.steps += 1
                self._trouble(request, position)
                event = self._event(request, position, text)
                text += event.text
                ended = event.finish_reason is not None
                tell(event)
                if ended:
                    return
        finally:
            self.running.discard(request.request_id)
            self.cancelled += not ended

    def _event(self, request: GenerationRequest, position: int, text: str) -> TokenEvent:
        token = fake_token(request, position)
        reason: FinishReason | None = "length" if position + 1 == request.sampling.max_tokens else None
        piece = chr(token)
        if any(stop in text + piece for stop in request.sampling.stop):
            reason, piece = "stop", ""
        wanted = request.sampling.logprobs
        top = tuple((id_, -float(rank + 1)) for rank, id_ in enumerate(ALPHABET[: wanted or 0]))
        return TokenEvent(
            request_id=request.request_id,
            token_ids=(token,),
            text=piece,
            logprobs=() if wanted is None else (self._chosen(request, token, top),),
            text_offsets=() if wanted is None else (len(text),),
            finish_reason=reason,
            usage=self._usage(request, position + 1) if reason else None,
        )

    def _chosen(self, request: GenerationRequest, token: int, top: tuple[tuple[int, float], ...]) -> TokenLogprob:
        standins = 0 if request.mode in (None, "exact") else 2
        return TokenLogprob(token_id=token, logprob=-0.5, top=top, standins=standins)

    def _usage(self, request: GenerationRequest, tokens: int) -> Usage:
        prompt = len(request.prompt_token_ids)
        record = f"record of {request.request_id}" if request.record else None
        made = tokens - len(request.resumed_token_ids)
        usage = Usage(
            prompt_tokens=prompt,
            completion_tokens=tokens,
            resumed=tokens - made,
            hits=3 * made,
            fetched=made,
            record=record,
        )
        mode = request.mode or "exact"
        if mode == "exact":
            return usage
        return replace(
            usage,
            mode=mode,
            requested_mode=mode,
            budget=request.budget or 0.003 if mode == "bounded" else None,
            fetched=made if mode == "bounded" else 0,
            standins=StandinAccesses(lowbit=2 * made, drop=1),
            expected_rise=0.001 * made,
            guard="ok",
        )

    def _trouble(self, request: GenerationRequest, position: int) -> None:
        self._raise_if_dead()
        if position == 3 and 2 in request.prompt_token_ids:
            raise CacheError("an expert could not be read. hint: check the disk")
        if position == 3 and 3 in request.prompt_token_ids and not request.resumed_token_ids:
            self.die()
            self._raise_if_dead()
        if position == 3 and 4 in request.prompt_token_ids:
            raise ZeroDivisionError("a secret path")

    def die(self) -> None:
        """As when the step thread ends by an error."""
        self._died = CapacityError("engine is stopped by a test, must be running. hint: restart the replica")

    def _raise_if_dead(self) -> None:
        if self._died is not None:
            raise self._died

    def snapshot(self) -> EngineSnapshot:
        """Counters; `steps` counts tokens."""
        return EngineSnapshot(
            running=len(self.running),
            waiting=0,
            free_kv_blocks=64 - len(self.running),
            total_kv_blocks=64,
            steps=self.steps,
            hits=0,
            misses=0,
            bytes_loaded_device=0,
            bytes_read_disk=0,
            stall_seconds=0.0,
            residency=0.5,
        )

    def expert_map(self) -> ExpertMap:
        """One MoE layer of three experts, the first of them resident and in use."""
        return ExpertMap(experts_per_layer=(3,), cells=bytes([1 | 31 << 3, 2, 0]))

    async def check_health(self) -> None:
        """Raises once dead."""
        self._raise_if_dead()

    def close(self) -> None:
        """Remembers it."""
        self.closed = True


def fake_token(request: GenerationRequest, position: int) -> int:
    """The letter at a position: keyed by prompt and seed, as real sampling is; temperature 0 reads no seed."""
    seed = request.sampling.seed if request.sampling.temperature else 0
    key = f"{request.prompt_token_ids}|{seed}|{position}".encode()
    return ALPHABET[zlib.crc32(key) % len(ALPHABET)]


class Breaking(FakeEngine):
    """Ends with an error after some tokens."""

    def _event(self, request: GenerationRequest, position: int, text: str) -> TokenEvent:
        event = super()._event(request, position, text)
        return event if position < 3 else replace(event, finish_reason="error", error="it broke", usage=Usage())


class LocalWorkers:
    """Workers in this process: what `ReplicaWorkers` does through ray, without it."""

    def __init__(self, *workers: Worker) -> None:
        self.workers = workers
        self.calls = 0

    def generate(self, work: Work) -> AsyncGenerator[Reply, None]:
        """Round robin."""
        self.calls += 1
        return self.workers[self.calls % len(self.workers)].generate(work)

    async def info(self) -> WorkerInfo:
        """Of the first."""
        return self.workers[0].info()

    async def reports(self, *, experts: bool = False) -> tuple[WorkerReport, ...]:
        """Of all."""
        return tuple(worker.report(experts=experts) for worker in self.workers)

    async def health(self) -> tuple[str | None, ...]:
        """Of all."""
        return tuple([await self._health(worker) for worker in self.workers])

    async def _health(self, worker: Worker) -> str | None:
        try:
            await worker.check_health()
        except CapacityError as error:
            return str(error)
        return None


class MortalWorkers(LocalWorkers):
    """The first one dies after some tokens of each request, twice, so that it moves."""

    def generate(self, work: Work) -> AsyncGenerator[Reply, None]:
        """Until it dies."""

        async def dying() -> AsyncGenerator[Reply, None]:
            told = 0
            async with aclosing(self.workers[0].generate(work)) as replies:
                async for reply in replies:
                    yield reply
                    told += sum(len(d.token_ids) for d in reply.deltas) if isinstance(reply, Batch) else 0
                    if told >= 5 and not (work.resume and len(work.resume[0].token_ids) > 9):
                        raise WorkerLost("it died")

        return dying()


def open_fake_engine(config: EngineConfig, model_id: str, sharing: Sharing | None = None) -> FakeEngine:
    """For applications under ray: slow enough to be met while it runs; limits from the config."""
    length = config.max_model_len or 4096
    limits = FakeLimits(max_model_len=length, max_running=config.max_running, kv_tokens=64 * length)
    return FakeEngine(model_id=model_id, delay=0.02, limits=limits)


def open_engine_and_note_gpus(config: EngineConfig, model_id: str, sharing: Sharing | None = None) -> EngineSeam:
    """The real one, which has others read small experts, too, beside a file in the model's folder with the GPUs that
    CUDA would show to its process."""
    sharded_reads.LEAST_BYTES = 1
    quicken_interpreter()
    seen = {"visible": os.environ.get("CUDA_VISIBLE_DEVICES"), "device": config.device}
    (Path(config.model) / f"seen-{os.getpid()}.json").write_text(json.dumps(seen))
    return open_async_engine(config, model_id, sharing)


def open_broken_engine(config: EngineConfig, model_id: str, sharing: Sharing | None = None) -> FakeEngine:
    """As when a checkpoint cannot be served."""
    raise CheckpointError(f"{config.model} is truncated, must be whole. hint: download it again")


def exact_usage(*, hits: int, fetched: int) -> dict[str, Any]:
    """`usage.buddymoe` of an answer that no stand-in had a part in."""
    return {
        "mode": "exact",
        "requested_mode": "exact",
        "budget": None,
        "hits": hits,
        "peer": 0,
        "host": 0,
        "fetched": fetched,
        "standins": {"lowbit": 0, "lowrank": 0, "buddy": 0, "mean": 0, "drop": 0},
        "expected_rise": 0.0,
        "resumed": 0,
        "guard": "off",
        "calibration": {"state": "none", "tokens": 0},
    }
