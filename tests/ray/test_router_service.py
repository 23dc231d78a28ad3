"""Routing by prefix in a running service of three workers: kept together while idle, spread when loaded, no ghosts."""

from __future__ import annotations

import contextlib
import os
import signal
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from fakes import open_fake_engine
from ray import serve
from serving import Deploy, eventually, running

from buddymoe_ray.client import Client
from buddymoe_ray.serve.handles import WORKER_NAME
from buddymoe_ray.serve.records import WorkerReport

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


def test_a_killed_worker_is_not_chosen_for_ever(kept: str, client: Client) -> None:
    prompts = [f"{PREFIX} again {at}" for at in range(6)]
    [home] = whose(kept, client, *prompts[:3])
    os.kill(home, signal.SIGKILL)
    answered = [client.generate(prompt, max_tokens=2) for prompt in prompts]  # moved, where it met the dead one
    assert all(result.usage.completion_tokens == 2 for result in answered)
    eventually(lambda: len(reports(kept)) == WORKERS and home not in reports(kept))
    [new_home] = whose(kept, client, *prompts)
    assert new_home != home


def test_pow2_keeps_nothing_together(deploy: Deploy) -> None:
    deploy(
        "plain",
        open_engine=open_fake_engine,
        model_name="fake",
        num_cpus=0,
        workers=WORKERS,
        flush_ms=0,
        routing="pow2",
    )
    client = Client("plain")
    eventually(lambda: len(reports("plain")) == WORKERS)
    assert len(whose("plain", client, *(f"{PREFIX} question {at}" for at in range(16)))) > 1
