"""What a newcomer meets: one line per mistake before anything heavy is imported, tables that fit, a default that shows
residency, hits and stand-ins, and README's path for an own model as it is typed."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from asgi import TEXT, check_error, serving, talking_to
from fakes import FakeEngine, byte_tokenizer
from families import build_checkpoint

from buddymoe_ray import LLM, EngineConfig, __version__, observe
from buddymoe_ray.cli import main
from buddymoe_ray.commands import bench, profile
from buddymoe_ray.engine.blocks import BlockAllocator
from buddymoe_ray.engine.measure import BenchLoad
from buddymoe_ray.engine.sequence import Sequence
from buddymoe_ray.errors import BudgetError, CapacityError, ConfigError
from buddymoe_ray.models.profile import ComparisonRow
from buddymoe_ray.models.resolve import resolve_model
from buddymoe_ray.models.shape import describe
from buddymoe_ray.residency import plan as plan_module
from buddymoe_ray.residency.plan import make_plan
from buddymoe_ray.serve import launch
from buddymoe_ray.serve.args import ServeArgs
from buddymoe_ray.serve.handles import ReplicaWorkers, _is_light
from buddymoe_ray.serve.refusals import STOPPED
from buddymoe_ray.serve.work import ChatMessage, Refusal, ResumedChoice, Work
from buddymoe_ray.types import SamplingParams

ROOT = Path(__file__).parents[2]
MISTAKES: dict[str, str] = {
    "plna": "did you mean plan?",
    "plan --memroy 25%": "did you mean --memory?",
    "plan --memory half": "must be like 25% or 6GiB",
    "plan --host-memory much": "host_memory is 'much'",
    "plan --kv-memory 10%": "kv_memory is '10%', must be bytes or auto",
    "chat --mode bouned": "did you mean bounded?",
    "eval --corpus x --standin lowbit5": "did you mean lowbit",
    "eval --corpus /nowhere": "must be a file or folder that exists",
    "plan --gpus many": "must be like 24GiB or 2x24GiB",
    "eval --corpus x --tokens 0": "--tokens is 0, must be at least 1",
    "bench --turns 0": "--turns is '0', must be 1 or 2",
    "bench --workers 99999": "whole numbers from 1 to 64",
    "bench --threads two": "--threads is 'two', must be a whole number",
    "bench --expert-dtype int5": "did you mean int",
    "profile --corpuss x": "did you mean --corpus?",
    "profile --corpus x --at half": "--at is 'half'",
    "simulate --workload zip": "did you mean zipf?",
    "synth --shape olmoe-tiny --outt x": "did you mean --out?",
    "serve --memry 25%": "did you mean --memory?",
    "serve --workers many": "workers is 'many', must be",
    "serve --routing afinity": "did you mean affinity?",
    "serve /nowhere.yaml": "cannot be read",
    "plan --max-model-len 99999999999999": "must be an integer of at least 2 and at most 2147483647",
    "serve --max-running 99999999999999": "must be an integer of at least 1 and at most 2147483647",
    "serve --port 70000": "port is 70000, must be a number from 1 to 65535",
}


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr of a call with status 2."""
    try:
        status: Any = main(arguments)
    except SystemExit as left:
        status = left.code
    captured = capsys.readouterr()
    assert status == 2 and captured.out == "" and captured.err.count("\n") == 1, captured.err
    return captured.err


@pytest.mark.parametrize("typed", MISTAKES)
def test_a_mistake_is_one_line_that_names_the_cure(typed: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(shlex.split(typed), capsys)
    assert line.startswith("buddymoe") and MISTAKES[typed] in line


def test_mistakes_version_and_help_import_nothing_heavy() -> None:
    """The imports are what takes seconds; the clock of a busy machine says nothing."""
    words = [shlex.split(typed) for typed in MISTAKES] + [["--version"], ["--help"], ["serve", "--help"]]
    code = (
        "import contextlib, io, sys\nfrom buddymoe_ray.cli import main\n"
        f"for words in {words!r}:\n"
        "    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):\n"
        "        try: main(words)\n        except SystemExit: pass\n"
        "    assert not {'torch', 'ray', 'transformers', 'numba'} & set(sys.modules), words\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_an_output_without_room_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(_: object) -> int:
        print("a table")
        return 0

    monkeypatch.setattr("buddymoe_ray.commands.plan.run", run)
    with open("/dev/full", "w") as full, monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", full)
        assert main(["plan"]) == 1
    said = "buddymoe plan: the output has no room, must have. hint: free some\n"
    assert capsys.readouterr().err == said


def test_a_worker_that_is_interrupted_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its parent ends with status 130; a traceback of each worker hid that."""

    def measure(*_: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("buddymoe_ray.engine.measure.measure", measure)
    gate, (receiver, sender) = threading.Barrier(2), multiprocessing.Pipe(duplex=False)
    workload = {"batch": 1, "prompt_tokens": 8, "new_tokens": 8, "reps": 1}
    bench._measure(EngineConfig(), workload, (), 0, gate, sender)  # type: ignore[arg-type]
    assert gate.broken and not receiver.poll(), "who waits for it goes on"


def test_a_measurement_that_no_model_has_room_for_is_refused() -> None:
    load = {"batch": 1, "new_tokens": 8, "reps": 1}
    BenchLoad(prompt_tokens=99, **load).check(100)
    for more, said in (
        ({"prompt_tokens": 100}, "prompt_tokens is 100, must be below the model's 100 tokens. hint"),
        ({"prompt_tokens": 95, "turns": 2}, "prompt_tokens is 95, .* with the answer"),
        ({"prompt_tokens": 9, "beside": 1000}, "beside is 1000, must be below"),
    ):
        with pytest.raises(ConfigError, match=said):
            BenchLoad(**load, **more).check(100)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0 and capsys.readouterr().out == f"buddymoe {__version__}\n"


def deployment(tmp_path: Path, **changes: Any) -> Path:
    content = yaml.safe_load((ROOT / "deployments" / "tiny-cpu.yaml").read_text())
    for name, value in changes.items():
        [application] = content["applications"]
        place = {"args": application["args"], "application": application}.get(name.partition("_")[0], content)
        place[name.removeprefix("args_").removeprefix("application_")] = value
    path = tmp_path / "d.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"args_memry": "25%"}, "option is 'memry', must be one that is known. hint: did you mean memory?"),
        ({"args_max_runing": 4}, "did you mean max_running?"),
        ({"args_mode": "bouned"}, "did you mean bounded?"),
        ({"args_threads": "two"}, "threads is 'two', must be a valid integer"),
        ({"args_standin": "lowbit5"}, "did you mean lowbit"),
        ({"args_require_api_key": True, "args_api_key_env": "NO_SUCH_KEY"}, "NO_SUCH_KEY is unset"),
        ({"http_option": {}}, "did you mean http_options?"),
        ({"http_options": {"prot": 1}}, "did you mean port?"),
        ({"http_options": {"port": "8000"}}, "port is '8000', must be a number"),
        ({"http_options": {"port": True}}, "port is True, must be a number"),
        ({"proxy_location": "Headonly"}, "did you mean HeadOnly?"),
        ({"http_options": {"host": 0}}, "host is 0, must be text"),
        ({"application_route_prefix": None}, "route_prefix is None, must be text"),
        ({"applications": []}, "must hold one. hint: write `applications: [{import_path: buddymoe_ray.serve"),
        ({"args_num_gpus": 1}, "num_gpus is 1, must be at most the 0 GPUs of this machine"),
    ],
)
def test_a_mistake_in_a_yaml_is_one_line(changes, said, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("buddymoe_ray.residency.devices.list_gpus", lambda: ())
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert said in refused(["serve", str(deployment(tmp_path, **changes))], capsys)
    if "args_memry" in changes:
        with pytest.raises(ValueError, match="did you mean memory"):  # what ray itself prints of it
            ServeArgs.model_validate({"memry": "25%"})


def test_no_yaml_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "d.yaml").write_text("applications: [")
    assert "is no YAML in line 1 (" in refused(["serve", str(tmp_path / "d.yaml")], capsys)


def test_from_python_too() -> None:
    with pytest.raises(ConfigError, match=r"'memry'.*did you mean memory\?"):
        LLM(memry="25%")
    with pytest.raises(ConfigError, match=r"memory is 25, must be like"):
        EngineConfig(memory=25)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"memory is 1e\+99 bytes, must be at most 1e\+18"):
        EngineConfig(memory="1" + 99 * "0")
    for options, said in (
        ({"model": None}, "model is None"),
        ({"standin_layers": 3, "mode": "fast"}, "standin_layers is 3"),
        ({"seed": 1.5}, "seed is 1.5"),
    ):
        with pytest.raises(ConfigError, match=f"{said}, must be"):
            LLM(**options)
    assert EngineConfig.from_options(model=Path("/a/model")).model == "/a/model"


def test_serve_starts_what_was_typed(tmp_path, monkeypatch, capsys) -> None:
    """Flags win over the file; the URL, mode and memory are told."""
    seen: dict[str, Any] = {}
    monkeypatch.setattr(launch, "start", lambda options, **places: seen.update(places, options=options))
    monkeypatch.setattr(launch, "wait", lambda name, **_: None)
    path = deployment(tmp_path, args_flush_ms=5)
    assert main(["serve", str(path), "--memory", "30%", "--workers", "2", "--port", "8123", "--cors-origins", "*"]) == 0
    options = seen["options"]
    assert (options.memory, options.workers, options.flush_ms, options.mode) == ("30%", 2, 5, "bounded")
    assert options.cors_origins == ("*",)
    assert (seen["name"], seen["route_prefix"], seen["http"]["port"]) == ("buddymoe", "/", 8123)
    said = capsys.readouterr().out
    assert "builtin:tiny at http://127.0.0.1:8123/v1" in said and "30%" in said and "bounded" in said
    assert "none: whoever reaches it is served" in said and "http://127.0.0.1:8123/dashboard" in said
    keys = tmp_path / "keys.toml"
    assert main(["key", "alice", "--file", str(keys)]) == main(["serve", "--api-keys", str(keys)]) == 0
    assert "1 named of" in capsys.readouterr().out
    monkeypatch.setenv("BUDDYMOE_API_KEY", "sk-x")
    assert main(["serve", "--api-keys", str(keys), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["keys"] == f"one of the environment, 1 named of {keys}"
    keys.chmod(0o666)
    assert main(["serve", "--api-keys", str(keys)]) == 2 and "chmod 600" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("", "config.json is missing"),
        ('{"model_type": "llama"}', "'llama', must be"),
        ('{"model_type": "olmoe"}', "no weights"),
    ],
)
def test_a_folder_that_cannot_be_served_is_told_before_ray_starts(config, said, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(launch, "start", lambda *_, **__: pytest.fail("ray was started"))
    if config:
        (tmp_path / "config.json").write_text(config)
    assert main(["serve", str(tmp_path)]) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("joined", ["", "10.0.0.1:6379"])
def test_only_a_named_cluster_is_joined_and_left_as_it_was(joined: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ray that happens to run here is not touched; of a joined one the application alone ends."""
    done: list[Any] = []
    monkeypatch.setenv("RAY_ADDRESS", joined)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", lambda address, **_: done.append(address))
    monkeypatch.setattr("ray.shutdown", lambda: done.append("ray ends"))
    for name in ("start", "run"):
        monkeypatch.setattr(f"ray.serve.{name}", lambda *_, **__: None)
    monkeypatch.setattr("ray.serve.delete", lambda name: done.append(f"{name} ends"))
    monkeypatch.setattr("ray.serve.shutdown", lambda: done.append("serve ends"))
    ended = SimpleNamespace(result=lambda timeout_s: 0)
    drain = SimpleNamespace(remote=lambda seconds: done.append(f"{seconds:g} s to drain") or ended)
    monkeypatch.setattr("ray.serve.get_app_handle", lambda name: SimpleNamespace(drain=drain))
    monkeypatch.setattr(launch.time, "sleep", lambda _: signal.raise_signal(signal.SIGTERM))
    kept = launch.start(ServeArgs(), name="mine", route_prefix="/", http={"host": "127.0.0.1", "port": 0})
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        launch.wait("mine", drain_seconds=7.0, kept=kept)
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
            signal.signal(number, handler)
    own = ["local", "7 s to drain", "mine ends", "serve ends", "ray ends"]
    assert done == ([joined, "7 s to drain", "mine ends"] if joined else own)


async def test_a_models_id_is_its_folders_name(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    assert ServeArgs(model=str(folder)).served_name == "my-model" == ServeArgs(model="/not/here/my-model").served_name
    assert ServeArgs(model="org/m").served_name == "org/m" and ServeArgs().served_name == "builtin:tiny"
    async with serving(FakeEngine(), model="my-model", path=str(folder)) as client:
        (listed,) = (await client.get("/v1/models")).json()["data"]
        named = await client.post("/v1/completions", json=TEXT | {"model": str(folder)})
        other = await client.post("/v1/completions", json=TEXT | {"model": "/else"})
    assert listed["id"] == named.json()["model"] == "my-model"
    check_error(other, 404, "model", "model_not_found")


def replicas(
    monkeypatch: pytest.MonkeyPatch, *, gpus: float = 0, message: str = "", status: str = "RUNNING", **states: int
) -> ReplicaWorkers:
    """Workers of a deployment in these states."""
    found = SimpleNamespace(replica_states={name.upper(): count for name, count in states.items()}, message=message)
    application = SimpleNamespace(deployments={"worker": found}, status=status)
    monkeypatch.setattr("ray.serve.status", lambda: SimpleNamespace(applications={"buddymoe": application}))
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 2.0})
    handle: Any = SimpleNamespace(app_name="buddymoe", deployment_name="worker", options=lambda **_: None)
    return ReplicaWorkers(handle, num_gpus=gpus)


@pytest.mark.parametrize(
    ("changes", "light"),
    [
        ({}, True),
        ({"flush_seconds": None}, False),  # one message with everything
        ({"prompts": ("x" * 300_000,)}, False),
        ({"prompts": (tuple(range(50_000)),)}, False),
        ({"messages": (ChatMessage(role="user", content="é" * 300_000),), "prompts": ()}, False),
        ({"sampling": SamplingParams(logprobs=0)}, False),
        ({"sampling": SamplingParams(prompt_logprobs=0)}, False),
        ({"spells_only": True}, False),
    ],
)
def test_only_what_surely_fits_a_grpc_message_goes_as_one(changes: dict[str, Any], light: bool) -> None:
    work = Work(request_id="r", prompts=("hello",), sampling=SamplingParams(), flush_seconds=0.025)
    assert _is_light(replace(work, **changes)) is light


async def test_nobody_is_refused_for_what_was_a_moment_ago(monkeypatch) -> None:
    workers = replicas(monkeypatch, starting=2)
    with pytest.raises(CapacityError, match="2 starting"):
        await workers.info()
    running = replicas(monkeypatch, running=2)
    assert [await workers._why_absent(), await running._why_absent()] == ["", ""]


@pytest.mark.parametrize(
    ("workers", "said"),
    [
        ({"starting": 2}, "no worker runs yet (2 starting)"),
        ({"gpus": 1, "starting": 1}, "num_gpus is 1 and the cluster has 0 GPUs"),
        ({"message": "one\nit takes long.", "pending_migration": 1}, "it takes long"),
        ({}, "none started"),
    ],
)
async def test_routes_answer_while_no_worker_runs(workers, said, monkeypatch) -> None:
    """503 with the reason and when to come again; a replica is never asked, so nothing can hang."""
    async with talking_to(replicas(monkeypatch, **workers), model="fake") as client:
        for reply in (
            await client.get("/v1/models"),
            await client.get("/v1/models/fake"),
            await client.post("/v1/completions", json=TEXT),
            await client.post("/v1/completions", json=TEXT | {"stream": True}),
        ):
            assert said in check_error(reply, 503, None, "unavailable") and reply.headers["retry-after"] == "2"
    work = Work(request_id="r", prompts=("x",), sampling=SamplingParams(), max_tokens=1)
    (refusal,) = [reply async for reply in replicas(monkeypatch, **workers).generate(work)]
    assert isinstance(refusal, Refusal) and refusal.status == 503
    with pytest.raises(CapacityError, match=re.escape(said)):
        replicas(monkeypatch, **workers).info_sync()


async def test_what_moves_does_not_wait_for_a_service_that_is_deleted(monkeypatch) -> None:
    moved = Work(request_id="r", prompts=("x",), sampling=SamplingParams(), resume=(ResumedChoice(choice=0),))
    workers = replicas(monkeypatch, status="DELETING", stopping=1)
    (refusal,) = [reply async for reply in workers.generate(moved)]
    assert isinstance(refusal, Refusal) and (refusal.status, refusal.code) == (503, STOPPED)


def fits(text: str) -> None:
    assert max(map(len, text.splitlines())) <= 80, text
    assert not re.search(r"[{}]|_bytes|_tok_s|_percent|\b\d{7,}\b", text), text


@pytest.mark.parametrize("arguments", [["--mode", "bounded"], ["--expert-dtype", "int4", "--mode", "fast"], []])
def test_plan_is_a_table(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--memory", "50%", *arguments]) == 0
    said = capsys.readouterr().out
    fits(said.replace(str(resolve_model("builtin:tiny")), "folder"))
    assert "tok/s" in said and "KV cache" in said and ("lowbit" in said) == bool(arguments)


def test_bench_is_a_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    names = (
        "decode_tok_s",
        "prefill_tok_s",
        "ttft_ms",
        "p99_itl_ms",
        "hit_rate",
        "standin_rate",
        "bytes_read_per_token",
    )
    record = dict.fromkeys(names, 12345.678) | {"peak_rss_bytes": 10**9, "expert_format": "bfloat16"}
    monkeypatch.setattr(bench, "_in_children", lambda *_: record)
    assert main(["bench", "--memory", "25%,100%", "--mode", "bounded,fast", "--batch", "1,8"]) == 0
    said = capsys.readouterr().out
    fits(said)
    assert "1.0 GB" in said and said.count("bounded") == 4 and said.count("builtin:tiny") == 1


def _dies(config: Any, workload: dict[str, Any], ids: Any, shared: int, gate: Any, sender: Any) -> None:
    """In the place of a worker: the second is killed, the first waits for it."""
    if workload["seed"] == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        gate.wait()
    except threading.BrokenBarrierError:
        sender.send(CapacityError("another worker failed"))


def test_bench_ends_when_a_worker_is_killed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "_measure", _dies)
    assert main(["bench", "--workers", "2"]) == 1
    assert "a worker died, must live to be measured" in capsys.readouterr().err


def test_eval_is_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = resolve_model("builtin:tiny") / "heldout" / "python.txt"
    (tmp_path / "c.txt").write_text(corpus.read_text()[:2000])
    arguments = ["eval", "--corpus", str(tmp_path), "--memory", "50%,1%", "--mode", "fast", "--tokens", "192"]
    assert main(arguments) == 1
    said = capsys.readouterr().out
    assert "memory 1%: memory is" in said and "perplexity" in said
    fits(said.split("memory 1%:")[0])


def test_profile_and_simulate_are_tables(capsys: pytest.CaptureFixture[str]) -> None:
    shares = {"dppl_percent": 12.3, "dppl_se": 0.4, "kl": 0.01, "top1_agreement": 97.0, "miss_rate": 60.0}
    row = ComparisonRow(standin="buddy:coactivation", memory_percent=50.0, tokens=6144, **shares)
    made = SimpleNamespace(comparison=[row], budget_curve=[], calibration_tokens=65536, recommended=None, reason="dear")
    made.model, made.measured = "./my model", True
    profile._print(made, Path("m.profile"), Path("m.html"))  # type: ignore[arg-type]
    assert main(["simulate", "--gpus", "8", "--layers", "2", "--experts", "16", "--windows", "2"]) == 0
    said = capsys.readouterr().out
    fits(said)
    assert "12.30 ± 0.40" in said and "dear" in said and "eplb" in said
    assert "buddymoe serve './my model' --mode exact" in said


def test_chat_explains_itself_and_its_cost(monkeypatch, capsys) -> None:
    typed = "/help\n/modes\n/mode fats\nWhat is 347 + 85?\n/mode exact\n/reset\nWhat is 347 + 85?\n/quit\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    assert main(["chat", "--max-tokens", "8", "--mode", "bounded"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("builtin:tiny in mode bounded, memory 50%: ") and "/reset" in said
    assert "did you mean /mode?" in said and "did you mean fast?" in said
    costs = re.findall(r"\[8 tokens, [\d,]+ tok/s; (\w+): (\d+) % hits, (\d+) % stand-ins, (\d+) % fetched", said)
    assert [cost[0] for cost in costs] == ["bounded", "exact"]
    assert int(costs[0][1]) > 0 and int(costs[0][2]) > 0 and costs[1][2] == "0" and int(costs[1][3]) > 0


def test_chat_says_why_an_answer_failed_and_goes_on(monkeypatch, capsys) -> None:
    append, failures = Sequence.append, [OSError("broken")]

    def failing(seq: Sequence, sampled: Any) -> Any:
        if failures:
            raise failures.pop()
        return append(seq, sampled)

    monkeypatch.setattr(Sequence, "append", failing)
    monkeypatch.setattr("sys.stdin", io.StringIO("\udcff\nHello\nHello\n"))
    assert main(["chat", "--max-tokens", "4"]) == 0
    said = capsys.readouterr().out
    places = [said.index(word) for word in ("must be whole characters", "internal error (OSError)", "[4 tokens, ")]
    assert places == sorted(places)


def test_ctrl_c_in_a_chat_ends_the_answer_wherever_it_strikes(monkeypatch, capsys) -> None:
    share, presses = BlockAllocator.share, [signal.SIGINT]

    def interrupted(blocks: BlockAllocator, found: Any) -> None:
        if presses:  # the request waits no more, and is not admitted yet
            signal.raise_signal(presses.pop())
        share(blocks, found)

    monkeypatch.setattr(BlockAllocator, "share", interrupted)
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\nHello\n"))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job begins with it ignored
    try:
        assert main(["chat", "--max-tokens", "4"]) == 0
    finally:
        signal.signal(signal.SIGINT, before)
    assert re.findall(r"\[(\d) tokens, ", capsys.readouterr().out) == ["1", "4"]


def test_the_phases_of_a_command_share_one_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setattr(observe._Bar, "done", 0)
    for outer in observe.progress([1, 2], total=2, desc="outer"):
        assert list(observe.progress([outer] * 3, total=3, desc="inner")) == [outer] * 3
    assert list(observe.progress("ab", total=2, desc="last")) == ["a", "b"]
    assert observe._Bar.done == 10 and "\n" not in screen.getvalue(), "one line, which is gone at the end"


def test_the_shipped_default_shows_residency_hits_and_stand_ins() -> None:
    content = yaml.safe_load((ROOT / "deployments" / "tiny-cpu.yaml").read_text())
    config = ServeArgs.model_validate(content["applications"][0]["args"]).engine_config()
    assert config.memory == EngineConfig().memory
    with LLM(**{name: getattr(config, name) for name in EngineConfig.names()} | {"guard_share": 0.0}) as llm:
        (result,) = llm.generate("class Stack:\n    def __init__(self, items):\n        self.", stop=("\n",))
        (exact,) = llm.generate(
            "class Stack:\n    def __init__(self, items):\n        self.", stop=("\n",), mode="exact"
        )
        residency = llm.engine.snapshot().residency
    accesses = result.usage.hits + result.usage.standins.total + result.usage.fetched
    assert residency > 0.2 and result.usage.hits > 0.1 * accesses and result.usage.standins.total > 0.1 * accesses
    assert result.text == exact.text == "items = items" and exact.usage.standins.total == 0


@pytest.mark.parametrize("expert_dtype", ["native", "bf16", "int8", "int4"])
def test_a_plan_of_recoded_experts_is_the_engines(expert_dtype, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("buddymoe_ray.models.expert_dtype.cache_folder", lambda: tmp_path / "cache")
    folder = tmp_path / "m"
    build_checkpoint("olmoe", folder)
    made = make_plan(EngineConfig(memory="60%", expert_dtype=expert_dtype), folder, gpus=[])
    with LLM(str(folder), memory="60%", expert_dtype=expert_dtype) as llm:
        cache = llm.engine.cache
        assert made.total_expert_bytes == cache.layout.total_bytes and made.expert_bytes == cache.layout.expert_bytes
        assert made.devices[0].layer_slots == cache.plan.layer_slots
        assert made.devices[0].kv_tokens == llm.engine.limits.kv_tokens


def test_a_plan_counts_what_stand_ins_answer() -> None:
    folder = resolve_model("builtin:tiny")
    exact, bounded, fast = (
        make_plan(EngineConfig(mode=mode, memory="25%"), folder, gpus=[]) for mode in ("exact", "bounded", "fast")
    )
    assert exact.predicted_standin_percent == 0 and fast.predicted_miss_bytes_per_token == 0
    assert fast.predicted_hit_percent + fast.predicted_standin_percent == 100
    assert 0 < bounded.predicted_standin_percent < 100 and bounded.predicted_miss_bytes_per_token > 0


def test_a_promised_kv_cache_fits_or_plan_says_no(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 sequences of the model's full length: as many tokens as promised, or the numbers and what to change."""
    folder = resolve_model("builtin:tiny")
    shape = describe(folder)
    config = EngineConfig(max_running=16, max_model_len=shape.max_positions)
    promised = 16 * shape.max_positions
    assert make_plan(config, folder, gpus=[]).devices[0].kv_tokens == promised
    need = shape.dense_bytes + shape.total_expert_bytes // 2 + promised * shape.kv_bytes_per_token
    monkeypatch.setattr(plan_module, "available_memory_bytes", lambda: need)
    with pytest.raises(
        BudgetError, match=rf"max_running 16 × max_model_len {shape.max_positions} is .* GiB.*hint: lower"
    ):
        make_plan(config, folder, gpus=[])
    monkeypatch.setattr(plan_module, "available_memory_bytes", lambda: int(1.2 * need))
    make_plan(config, folder, gpus=[])
    with LLM(max_running=16, max_model_len=shape.max_positions) as llm:
        assert llm.engine.limits.kv_tokens == promised


def test_more_kv_than_a_gibibyte_where_it_is_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("buddymoe_ray.engine.build.available_memory_bytes", lambda: 8 << 30)
    with LLM(max_running=512, max_model_len=1024) as llm:  # 2.7 GB, of which nothing is touched
        assert llm.engine.limits.kv_tokens == 512 * 1024


def test_readmes_own_model_path_as_typed(tmp_path, monkeypatch, capsys) -> None:
    """Its three commands, in a folder that holds a checkpoint and text; --quick, for noise has no losses."""
    block = (ROOT / "README.md").read_text().split("**Your own model**")[1].split("```sh\n")[1].split("```")[0]
    build_checkpoint("olmoe", tmp_path / "my-model", vocab_size=300, num_hidden_layers=1)
    byte_tokenizer().save_pretrained(tmp_path / "my-model")
    (tmp_path / "my-texts").mkdir()
    (tmp_path / "my-texts" / "a.txt").write_text(("A list holds items. " * 3 + "def f(x): return x\n") * 60)
    seen: list[Any] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch, "start", lambda options, **_: seen.append(options))
    monkeypatch.setattr(launch, "wait", lambda name, **_: None)
    lines = [shlex.split(line) for line in block.splitlines()]
    assert [words[:2] for words in lines] == [["buddymoe", "plan"], ["buddymoe", "profile"], ["buddymoe", "serve"]]
    for words in lines:
        assert main([*words[1:], *["--quick"] * (words[1] == "profile")]) == 0, capsys.readouterr().err
    (options,) = seen
    assert options.served_name == "my-model" and (tmp_path / "my-model" / "buddymoe.profile").exists()
    with LLM(**{name: getattr(options, name) for name in EngineConfig.names()}) as llm:
        assert llm.generate([[5, 6, 7]], max_tokens=4, ignore_eos=True)[0].usage.completion_tokens == 4
