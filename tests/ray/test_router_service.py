"""Routing by prefix in a running service of three workers: kept together while idle, spread when loaded, no ghosts."""

from __future__ import annotations

import contextlib
import os
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from fakes import open_fake_engine
from ray import serve
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, RequestMetadata
from ray.serve.request_router import PendingRequest, ReplicaID
from serving import Deploy, eventually, running

from buddymoe_ray.client import Client
from buddymoe_ray.serve.app import application
from buddymoe_ray.serve.args import ServeArgs
from buddymoe_ray.serve.handles import WORKER_NAME
from buddymoe_ray.serve.router import AffinityRouter
from buddymoe_ray.serve.work import ResumedChoice, Work, WorkerReport
from buddymoe_ray.types import SamplingParams

WORKERS, SLACK = 3, 2
PREFIX = "You are asked about one long document. " * 8


def reports(app: str) -> dict[int, WorkerReport]:
    """Of the workers that answer, by process."""
    handle: Any = serve.get_deployment_handle(WORKER_NAME, app)
    answers = handle.broadcast("report").results(timeout_s=10, return_exceptions=True)
    return {answer.pid: answer for answer in answers if isinstance(answer, WorkerReport)}


def steps(app: str) -> Counter[int]:
    """Tokens that each worker has made, by process."""
    return Counter({pid: report.snapshot.steps for pid, report in reports(app).items()})


def whose(app: str, client: Client, *prompts: str) -> set[int]:
    """The workers that answer these, one after the other."""
    before = steps(app)
    for prompt in prompts:
        assert client.generate(prompt, max_tokens=2).usage.completion_tokens == 2
    made = steps(app) - before
    assert sum(made.values()) == 2 * len(prompts)
    return set(made)


@pytest.fixture(scope="module")
def kept(deploy: Deploy) -> str:
    """`max_running` 16 is a slack of 2."""
    deploy(
        "kept", open_engine=open_fake_engine, model_name="fake", num_cpus=0, workers=WORKERS, max_running=16, flush_ms=0
    )
    eventually(lambda: len(reports("kept")) == WORKERS)
    return "kept"


@pytest.fixture(scope="module")
def client(kept: str) -> Client:
    return Client(kept)


def test_a_prefix_stays_at_one_worker_while_idle_and_others_spread(kept: str, client: Client) -> None:
    assert len(whose(kept, client, *(f"{PREFIX} question {at}" for at in range(10)))) == 1
    assert len(whose(kept, client, *(f"{at} has another beginning" for at in range(16)))) > 1


def test_a_conversation_stays_at_one_worker(kept: str, client: Client) -> None:
    messages = [{"role": "user", "content": "hello"}]
    before = steps(kept)
    for turn in range(6):
        answer = client.chat(messages, max_tokens=2).text
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": f"and {turn}?"}]
    assert len(steps(kept) - before) == 1


@contextlib.contextmanager
def streams(client: Client, prompts: list[str]) -> Iterator[None]:
    """All begun and none ended, one after the other, within."""
    with contextlib.ExitStack() as stack:
        for prompt in prompts:
            stream = client.stream(prompt, max_tokens=3500)
            stack.callback(stream.close)
            next(stream)
        yield
    eventually(lambda: running(client) == 0)


def test_one_prefix_spreads_when_loaded(kept: str, client: Client) -> None:
    with streams(client, [f"{PREFIX} stream {at}" for at in range(12)]):
        loads = sorted(report.snapshot.running for report in reports(kept).values())
    assert sum(loads) == 12 and len(loads) == WORKERS
    assert loads[-1] - loads[0] <= SLACK + 1, f"{loads}: a worker had room for more than its share"


def test_routers_hear_what_workers_have_in_memory(kept: str, client: Client) -> None:
    handle: Any = serve.get_deployment_handle(WORKER_NAME, kept)
    handle.info.remote().result(timeout_s=30)
    replicas = handle._router._asyncio_router.request_router.curr_replicas
    eventually(lambda: [replica.routing_stats for replica in replicas.values()] == [{"residency": 0.5}] * WORKERS)


def test_a_killed_worker_is_not_chosen_for_ever(kept: str, client: Client) -> None:
    prompts = [f"{'Another document. ' * 16} question {at}" for at in range(6)]
    [home] = whose(kept, client, *prompts[:3])
    os.kill(home, signal.SIGKILL)
    answered = [client.generate(prompt, max_tokens=2) for prompt in prompts]  # elsewhere, where it met the dead one
    assert all(result.usage.completion_tokens == 2 for result in answered)
    eventually(lambda: len(reports(kept)) == WORKERS and home not in reports(kept))
    [new_home] = whose(kept, client, *prompts)
    assert new_home != home


class Standing:
    """What a router reads of a replica."""

    max_ongoing_requests = 8
    node_id = availability_zone = None
    multiplexed_model_ids: frozenset[str] = frozenset()

    def __init__(self, name: str) -> None:
        self.replica_id = ReplicaID(unique_id=name, deployment_id=DeploymentID(name="worker", app_name="none"))
        self.routing_stats: dict[str, float] = {}

    async def get_queue_len(self, *, deadline_s: float) -> int:
        return 0


def pending(work: Work | None, method: str = "generate") -> PendingRequest:
    metadata = RequestMetadata(request_id="1", internal_request_id="1", call_method=method)
    return PendingRequest(args=[] if work is None else [work], kwargs={}, metadata=metadata)


async def test_only_new_requests_go_by_prefix(http_port: int) -> None:
    """The router by itself, with replicas that stand still: what it prefers, and what it leaves to Ray."""
    router: Any = AffinityRouter(
        deployment_id=DeploymentID(name="worker", app_name="none"),
        handle_source=DeploymentHandleSource.REPLICA,
        use_replica_queue_len_cache=True,
    )
    router.initialize_state(slack=SLACK)
    replicas = [Standing(name) for name in "abc"]
    router.update_replicas(replicas)
    work = Work(request_id="1", prompts=(PREFIX,), sampling=SamplingParams())
    moved = replace(work, resume=(ResumedChoice(choice=0, token_ids=(1,)),))
    home = replicas[1]

    async def ranks(request: PendingRequest) -> list[list[Any]]:
        ranked: list[list[Any]] = await router.choose_replicas(replicas, request)
        return ranked

    replicas[2].routing_stats = {"residency": 0.9}
    warmest = [(await ranks(pending(work)))[0] for _ in range(60)].count([replicas[2]])
    assert 30 < warmest < 60, "of two that are drawn, the one with more experts in memory: two thirds of the draws"
    replicas[2].routing_stats = {}
    router.on_request_routed(pending(moved), home.replica_id, None)  # a worker it moved to has it from then on
    for _ in range(20):
        first, *rest = await ranks(pending(work))
        assert first == [home] and [len(pair) for pair in rest] == [2], "Ray's own two stand behind the choice"
        for left_to_ray in (pending(moved), pending(None, "info"), pending(None, "report"), pending(work, "other")):
            assert [len(pair) for pair in await ranks(left_to_ray)] == [2]
    router.on_new_queue_len_info(home.replica_id, SLACK + 1)
    busy = [(await ranks(pending(work)))[0] for _ in range(20)]
    assert [home] not in busy and all(len(first) == 1 for first in busy), "it has too much to do"
    router.on_new_queue_len_info(home.replica_id, SLACK)
    assert (await ranks(pending(work)))[0] == [home]
    router.on_replica_actor_died(home.replica_id)
    replicas.remove(home)
    router.on_request_routed(pending(work), home.replica_id, None)  # it was under way
    router.update_replicas([*replicas, home])
    firsts = [(await ranks(pending(work)))[0][0] for _ in range(40)]
    assert set(firsts) == set(replicas), "what a dead one served is forgotten"


@pytest.mark.parametrize(("routing", "own"), [("affinity", AffinityRouter.__name__), ("pow2", "PowerOfTwoChoices")])
def test_the_option_chooses_the_router(routing: str, own: str) -> None:
    app: Any = application(ServeArgs.model_validate({"routing": routing}), open_engine=open_fake_engine)
    worker = app._bound_deployment.init_args[1]._bound_deployment
    assert own in worker._deployment_config.request_router_config.request_router_class
