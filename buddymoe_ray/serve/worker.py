"""One worker: prompts in, batches of deltas out, around one engine. A plain class; `app` makes it a replica.

Knows the engine's seam and the tokenizer, neither HTTP nor ray. Invariant: when a call's generator ends or is closed,
none of its sequences is left in the engine. A call that comes again, because its caller lost sight of this worker,
takes the place of the one before it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Protocol

from buddymoe_ray.errors import BuddyMoEError, CapacityError, RequestError
from buddymoe_ray.models.token_bytes import TokenBytes
from buddymoe_ray.observe import EngineSnapshot, ExpertMap
from buddymoe_ray.policy.fair import may_queue
from buddymoe_ray.policy.forecast import Forecast
from buddymoe_ray.serve.channel import offer
from buddymoe_ray.serve.flushing import Batches, Items
from buddymoe_ray.serve.guests import Guests
from buddymoe_ray.serve.prompts import longest_text, tokenizer_info, usable
from buddymoe_ray.serve.refusals import in_terms_of, overloaded, refusal_of, too_late, unavailable, worker_lost
from buddymoe_ray.serve.work import Batch, Refusal, Reply, Work, WorkerInfo, WorkerReport
from buddymoe_ray.serve.work_plan import Intake, Limits, ServingEngine, WorkPlan
from buddymoe_ray.types import GenerationRequest, TokenEvent

__all__ = ["EngineSeam", "Limits", "Worker"]

log = logging.getLogger(__name__)

QUICK_CHARACTERS, QUICK_MESSAGES = 4096, 16
SETTLE_SECONDS = 0.1


class EngineSeam(ServingEngine, Protocol):
    """What a worker needs of an engine; `engine.async_engine.AsyncEngine` is the real one."""

    @property
    def model_id(self) -> str: ...
    @property
    def link_address(self) -> str: ...
    def link(self) -> None: ...
    def link_seconds(self) -> Mapping[str, float]: ...
    def set_peers(self, peers: Mapping[str, str]) -> None: ...
    async def run(self, request: GenerationRequest, tell: Callable[[TokenEvent], None]) -> None: ...
    def snapshot(self) -> EngineSnapshot: ...
    def expert_map(self) -> ExpertMap: ...
    async def check_health(self) -> None: ...
    def close(self) -> None: ...


class Worker:
    """Answers `Work` with one engine.

    Admission is decided here and not in ray's queues: those count per caller, and hold up health checks when full.

    Args:
        engine: owned by this worker from now on.
        default_max_tokens: output limit of work that names none.
        max_queued_requests: answers (choices of calls) that may wait beside those that run; a call that would exceed
            them is refused, but by a worker that has none.
        retry_after_seconds: what refused clients are told.
        name: what its metrics are labelled with.
        devices: ids of the GPUs it was given.
        beat_seconds: a call that has nothing to say for so long says an empty batch: its caller knows that it lives.
    """

    _binding = ""

    def __init__(
        self,
        engine: EngineSeam,
        *,
        default_max_tokens: int = 1024,
        max_queued_requests: int = 256,
        retry_after_seconds: int = 2,
        name: str = "0",
        devices: tuple[str, ...] = (),
        beat_seconds: float = 5.0,
    ) -> None:
        self._engine, self._beat_seconds = engine, beat_seconds
        self._name, self._devices = name, devices
        self._bytes = TokenBytes(engine.tokenizer)
        self._intake = Intake(engine, default_max_tokens=default_max_tokens)
        self._most_answers = engine.limits.max_running + max_queued_requests
        self._answers = Counter[str]()  # by tenant
        self._guests = Guests(places=engine.limits.max_running, retry_after_seconds=retry_after_seconds)
        self._forecast = Forecast(places=engine.limits.max_running, tokens=engine.limits.kv_tokens)
        self._running: dict[str, asyncio.Task[None]] = {}  # by the engine's request id
        self._retry_after = retry_after_seconds
        if engine.sampling_defaults:
            log.warning(
                "what requests leave open is sampled as the checkpoint's generation_config.json says: %s. "
                "hint: generation_config: none serves OpenAI's defaults",
                engine.sampling_defaults,
            )

    async def generate(self, work: Work) -> AsyncGenerator[Reply, None]:
        """Batches until every choice has ended, or one refusal. Closing the generator cancels every choice."""
        try:
            work, answers = usable(work), len(work.resume) or work.choices
        except RequestError as error:
            yield refusal_of(error)
            return
        if work.resume and work.binding not in ("", self._binding):
            yield unavailable("the service was replaced by another", retry_after_seconds=self._retry_after)
            return
        others, room = self._answers.total(), not work.gives_way and self._has_room(work.tenant, answers)
        if not room and not (work.gives_way and self._guests.fit(others, answers)):
            yield overloaded(calls=others + self._guests.answers, retry_after_seconds=self._retry_after)
            return
        items = Items()
        if work.gives_way:
            self._guests.add(items, answers)
        else:
            self._answers[work.tenant] += answers
            self._guests.make_room(0 if work.spells_only else others + answers)
        tasks: list[asyncio.Task[None]] = []
        try:
            planned = await self._plan(work)
            if isinstance(planned, Refusal):
                yield planned
                return
            if work.spells_only:
                yield Batch(deltas=(), spelled=planned.spelled)
                return
            if work.resume:
                await self._engine.check_health()  # a dead one would take it, and cost it a move
                yield Batch(deltas=())
                await self._displace({request.request_id for request in planned.requests.values()})
            tasks += [self._start(request, items) for request in planned.requests.values()]
            choices = {request.request_id: choice for choice, request in planned.requests.items()}
            prompts, answer = planned.prompts if work.report_prompts else (), planned.answer
            batches = Batches(
                items,
                len(tasks),
                delta_of=lambda event: planned.delta_of(choices[event.request_id], event, self._bytes),
                flush_seconds=work.flush_seconds,
                beat_seconds=self._beat_seconds,
                calls=self._answers.total,
            )
            while batches.open_choices:
                reply = await batches.next()
                if isinstance(reply, Refusal):
                    reply = in_terms_of(reply, work)
                elif reply.deltas and (prompts or answer):  # the first one that is no beat
                    reply, prompts, answer = replace(reply, prompt_token_ids=prompts, answer=answer), (), None
                yield reply
        except CapacityError as error:
            yield self._lost(error)
        finally:
            self._answers -= Counter({work.tenant: 0 if work.gives_way else answers})
            self._guests.leave(items)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def info(self) -> WorkerInfo:
        """What this worker serves."""
        limits = self._engine.limits
        return WorkerInfo(
            model_id=self._engine.model_id,
            max_model_len=limits.max_model_len,
            max_running=limits.max_running,
            kv_tokens=limits.kv_tokens,
            sampling_defaults=self._engine.sampling_defaults,
            tokenizer=tokenizer_info(self._engine.tokenizer),
        )

    def snapshot(self) -> EngineSnapshot:
        """The engine's state now."""
        return self._engine.snapshot()

    def report(self, *, experts: bool = False) -> WorkerReport:
        """The same with this worker's name, and where its `experts` are."""
        return WorkerReport(
            replica=self._name,
            pid=os.getpid(),
            devices=self._devices,
            links=self._engine.link_seconds(),
            snapshot=self._engine.snapshot(),
            experts=self._engine.expert_map() if experts else None,
        )

    async def check_health(self) -> None:
        """Raises when the engine's step thread died; ray then replaces this worker."""
        await self._engine.check_health()

    async def channel(self) -> str:
        """Where a process of this user on this node may ask, see `serve.channel`."""
        return await offer(self.generate)

    async def settle(self) -> None:
        """Until nothing is asked any more."""
        while self._answers.total() or self._guests.answers:
            await asyncio.sleep(SETTLE_SECONDS)

    def close(self) -> None:
        """Stop the engine."""
        self._engine.close()

    async def _plan(self, work: Work) -> WorkPlan | Refusal:
        """One engine request per choice to answer, all checked before the first starts."""
        refused = self._intake.hopeless(work)
        if refused is not None:
            return refused
        plan = partial(self._intake.plan, work)
        planned = plan() if _is_quick(work) else await asyncio.to_thread(plan)  # a long one must not stop streams
        if isinstance(planned, Refusal) or work.resume:
            return planned
        tokens = sum(map(_most_tokens, planned.requests.values()))
        now = time.monotonic()
        seconds = self._forecast.seconds(work.tenant, len(planned.requests), tokens, now, weight=work.weight)
        if seconds > work.begin_within:
            return too_late(seconds, within=work.begin_within, retry_after_seconds=self._retry_after)
        return planned

    def _lost(self, error: CapacityError) -> Refusal:
        return worker_lost(str(error), retry_after_seconds=self._retry_after)

    def _has_room(self, tenant: str, answers: int) -> bool:
        """Whether so many more may run or wait. Of one of several tenants fewer may than of all."""
        own, total, most = self._answers[tenant], self._answers.total(), self._most_answers
        if not total:
            return True
        return total + answers <= most and (not tenant or may_queue(answers, own=own, total=total, most=most))

    def _start(self, request: GenerationRequest, items: Items) -> asyncio.Task[None]:
        task = asyncio.create_task(self._run(request, items))
        self._running[request.request_id] = task
        task.add_done_callback(lambda done: self._forget(request.request_id, done))
        return task

    def _forget(self, request_id: str, task: asyncio.Task[None]) -> None:
        if self._running.get(request_id) is task:  # else it was started again
            del self._running[request_id]

    async def _displace(self, request_ids: set[str]) -> None:
        """End what runs under these names: its caller asks again, so nobody reads it."""
        earlier = [self._running[name] for name in request_ids & self._running.keys()]
        for task in earlier:
            task.cancel()
        await asyncio.gather(*earlier, return_exceptions=True)

    async def _run(self, request: GenerationRequest, items: Items) -> None:
        """Have one sequence say its events to `items`; its end is always told, as a last event or a refusal."""
        made = 0

        def tell(event: TokenEvent) -> None:
            nonlocal made
            made += len(event.token_ids)
            items.put(event)

        def fail(error: str) -> None:
            end = TokenEvent(request_id=request.request_id, token_ids=(), text="", finish_reason="error", error=error)
            items.put(end)

        self._forecast.arrive(request.tenant, _most_tokens(request), time.monotonic(), weight=request.weight)
        try:
            await self._engine.run(request, tell)
        except RequestError as error:
            items.put(refusal_of(error))
        except CapacityError as error:
            items.put(self._lost(error))
        except asyncio.CancelledError:  # displaced, or nobody reads on
            items.put(unavailable("the request goes on elsewhere", retry_after_seconds=self._retry_after))
            raise
        except BuddyMoEError as error:
            fail(str(error))
        except Exception:  # the client gets an answer whatever happened; the log says what
            log.exception("sequence %s failed", request.request_id)
            fail("internal error. hint: see the log")
        finally:
            held = len(request.prompt_token_ids) + len(request.resumed_token_ids) + made
            self._forecast.end(request.tenant, _most_tokens(request), held, time.monotonic())


def _most_tokens(request: GenerationRequest) -> int:
    return len(request.prompt_token_ids) + request.sampling.max_tokens


def _is_quick(work: Work) -> bool:
    """Whether its one text is read while a thread would only be woken."""
    several = len(work.prompts) > 1 or len(work.messages) > QUICK_MESSAGES
    return not several and work.tools is None and not work.echo and longest_text(work) < QUICK_CHARACTERS
