"""An engine without profile: exact at once, stand-ins made by a process beside it, taken over while it serves."""

from __future__ import annotations

import json
import os
import random
import shutil
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from families import build_checkpoint

from buddymoe_ray import LLM
from buddymoe_ray.cache.shared.locks import TABLES_BYTE, FileLocks
from buddymoe_ray.calibrate import background
from buddymoe_ray.config import EngineConfig
from buddymoe_ray.engine import calibration
from buddymoe_ray.engine.engine import Engine
from buddymoe_ray.errors import ConfigError, ProfileError, RequestError
from buddymoe_ray.models.fingerprint import model_hash
from buddymoe_ray.models.resolve import resolve_model
from buddymoe_ray.residency.calibrations import CalibrationFolder
from buddymoe_ray.residency.sharing import Sharing
from buddymoe_ray.types import GenerationRequest, SamplingParams, TokenEvent

PROMPTS = ["def add(a, b):\n", "import os\nimport sys\n", "class Queue:\n    def __init__(self):\n", "The following"]
MAKER, ALL = 700_000, 4_000_000
CHECKED = background._CHECKED_TEXTS
FEW = {"_LEAST_TEXTS": 40, "_MOST_TEXTS": 40, "_ROUNDING_MINUTES": 0.0}
"""A text that a model wrote may cost five times what is expected: of 8 of them the bound was luck (1.9, 3.9)."""
FEWER = {**FEW, "_CHECKED_TEXTS": 4, "_LEAST_TEXTS": 28, "_MOST_TEXTS": 28}
"""Where it does not matter what they cost: 32 are written side by side."""

IN_STEPS = """
import sys, time
from pathlib import Path
from buddymoe_ray.calibrate.background import _Starter

def reached(name):
    path = Path(sys.argv[3]) / name
    path.touch()
    while path.exists():
        time.sleep(0.01)

starter = _Starter()
starter.take_room()
reached("taken")
starter.spare_room()
reached("spare")
starter.take_room()
reached("again")
sys.exit("nothing came of it")
"""
"""What asks for memory as a calibration does, and goes on when told to."""
WAITING = """
import sys, time
from pathlib import Path

while not (Path(sys.argv[3]) / "measured.json").exists():
    time.sleep(0.02)
"""
"""What waits for another's calibration, as the real one does once it has been imported, which takes seconds."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """builtin:tiny without its profile."""
    folder = tmp_path_factory.mktemp("model")
    for path in resolve_model("builtin:tiny").iterdir():
        if path.is_file() and not path.name.startswith("buddymoe."):
            (folder / path.name).symlink_to(path)
    return folder


@pytest.fixture(scope="module")
def made(model: Path, tmp_path_factory: pytest.TempPathFactory) -> CalibrationFolder:
    """A whole calibration on a few texts."""
    patch = pytest.MonkeyPatch()
    for name, value in FEW.items():
        patch.setattr(background, name, value)
    config = EngineConfig(mode="bounded", cache_dir=str(tmp_path_factory.mktemp("cache") / "own"))
    folder = CalibrationFolder.of(config, model_hash(model))
    background.fill(folder, str(model), 50.0, MAKER, ALL)
    patch.undo()
    return folder


@pytest.fixture
def cache(made: CalibrationFolder, tmp_path: Path) -> Path:
    """A cache that holds a copy of it."""
    shutil.copytree(made.path.parent, tmp_path / "cache")
    return tmp_path / "cache"


def folder_in(cache: Path) -> CalibrationFolder:
    return CalibrationFolder(next(cache.iterdir()))


def served(model: Path, cache: Path, **options: object) -> LLM:
    chosen = {"memory": "50%", "mode": "bounded", "cache_dir": str(cache), "max_running": 4} | options
    return LLM(str(model), **chosen)  # type: ignore[arg-type]


def calibrated_by(program: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on engines run it beside themselves."""
    (folder / "beside.py").write_text(program)
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
    monkeypatch.setattr(calibration, "_MODULE", "beside")


class Unfinished:
    """A calibration just before its end, with another process at work on it."""

    def __init__(self, cache: Path) -> None:
        self._folder = folder_in(cache).path
        os.replace(self._folder / "measured.json", self._folder / "measured.later")
        self._locks = FileLocks(os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT, 0o600))
        self._locks.lock(TABLES_BYTE)

    def finish(self, *engines: Engine) -> None:
        """The other process is done: the engines learn of it, and take over."""
        os.replace(self._folder / "measured.later", self._folder / "measured.json")
        self._locks.close()
        self.wait(*engines)

    def wait(self, *engines: Engine) -> None:
        """Until they have taken over."""
        until = time.monotonic() + 300
        while not all(engine.snapshot().calibration.state == "ready" for engine in engines):
            assert time.monotonic() < until, [engine.calibration.snapshot() for engine in engines]
            time.sleep(0.05)
            for engine in engines:
                engine.drain()


@pytest.fixture(scope="module")
def exact_tokens(model: Path) -> list[tuple[int, ...]]:
    with LLM(str(model), memory="100%") as llm:
        return [result.token_ids for result in llm.generate(PROMPTS, max_tokens=24)]


def test_a_calibration_is_for_its_user_alone_and_has_nobodys_text(made: CalibrationFolder) -> None:
    assert stat.S_IMODE(made.path.stat().st_mode) == stat.S_IMODE(made.path.parent.stat().st_mode) == 0o700
    names = {path.name for path in made.path.iterdir()}
    assert names == {"made.profile", "made.standins", "measured.json", "progress.json", "text.json"}
    assert made.finished and made.progress().percent == 100 and made.progress().record_bytes > 4_000_000
    assert len(made.measured()) == CHECKED and all(row.tokens == 192 and row.predicted > 0 for row in made.measured())


def test_exact_at_once_and_stand_ins_as_soon_as_there_are_any(
    model: Path, cache: Path, exact_tokens: list[tuple[int, ...]]
) -> None:
    unfinished = Unfinished(cache)
    with served(model, cache) as llm:
        engine, plan = llm.engine, llm.engine.cache.plan
        first = llm.generate(PROMPTS, max_tokens=24)
        assert [result.token_ids for result in first] == exact_tokens
        assert {result.usage.calibration.state for result in first} == {"collecting"}
        assert {(result.usage.mode, result.usage.requested_mode) for result in first} == {("exact", "bounded")}
        with pytest.raises(RequestError, match=r"mode is fast, must be exact: stand-ins are being calibrated, \d+ %"):
            llm.generate(PROMPTS[0], mode="fast")
        unfinished.finish(engine)
        later = llm.generate(PROMPTS, max_tokens=24)
        assert {(r.usage.mode, r.usage.calibration.state) for r in later} == {("bounded", "ready")}
        assert all(r.usage.standins.lowbit > 0 and r.usage.expected_rise <= 0.003 * 24 for r in later)
        assert llm.generate(PROMPTS, mode="exact", max_tokens=24)[0].token_ids == exact_tokens[0]
        now = engine.cache.plan
        assert sum(now.layer_slots) == sum(plan.layer_slots) - sum(plan.lent_slots)
        assert 0 < engine.standin_bytes <= plan.reserved_bytes, "records take what was lent"
        assert plan.slots_total * plan.slot_bytes + plan.overhead_bytes <= plan.budget_bytes
        engine.cache.check_integrity()


def test_experts_have_the_memory_of_records_while_nobody_else_has(
    model: Path, tmp_path: Path, exact_tokens: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until it is asked for, and again once nothing came of the calibration."""
    calibrated_by(IN_STEPS, tmp_path, monkeypatch)
    with served(model, tmp_path / "cache", memory="25%") as llm:
        engine, folder = llm.engine, folder_in(tmp_path / "cache").path

        def slots(reached: Callable[[], bool]) -> int:
            until = time.monotonic() + 300
            while not reached():
                assert time.monotonic() < until, engine.calibration.snapshot()
                time.sleep(0.01)
                engine.drain()
            plan = engine.cache.plan
            assert engine.cache.device_bytes + plan.overhead_bytes <= plan.budget_bytes
            if any(plan.lent_slots):
                assert [result.token_ids for result in llm.generate(PROMPTS, max_tokens=24)] == exact_tokens
            engine.cache.check_integrity()
            return sum(plan.layer_slots)

        taken = slots((folder / "taken").exists)
        (folder / "taken").unlink()
        spare = slots(lambda: any(engine.cache.plan.lent_slots) and (folder / "spare").exists())
        assert taken + 8 < spare
        (folder / "spare").unlink()
        assert slots((folder / "again").exists) == taken, "it goes on only once it has the memory"
        (folder / "again").unlink()
        assert slots(lambda: any(engine.cache.plan.lent_slots)) > spare
        state = engine.snapshot().calibration
        assert (state.state, state.reason) == ("refused", "nothing came of it")


def test_workers_of_a_node_take_over_one_copy(
    model: Path,
    cache: Path,
    tmp_path: Path,
    exact_tokens: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calibrated_by(WAITING, tmp_path, monkeypatch)
    unfinished, shared = Unfinished(cache), tmp_path / "shm"
    shared.mkdir()
    config = EngineConfig(model=str(model), memory="25%", mode="bounded", cache_dir=str(cache), max_running=4)
    sharing = Sharing(workers=2, folder=shared, movable=True)
    engines = [Engine.from_config(config, sharing=sharing) for _ in range(2)]
    plan, held = engines[0].cache.plan, [0]

    def watch() -> None:
        while engines:
            with suppress(FileNotFoundError):  # removed in between
                held.append(sum(path.stat().st_blocks * 512 for path in shared.iterdir()))
            time.sleep(0.01)

    watcher = threading.Thread(target=watch)
    watcher.start()

    def said(engine: Engine) -> list[TokenEvent]:
        ids = tuple(engine.encode(PROMPTS[0]))
        sampling = SamplingParams(temperature=0.0, max_tokens=24)
        engine.add(GenerationRequest(request_id="a", prompt_token_ids=ids, sampling=sampling))
        return engine.drain()

    for engine in engines:
        assert tuple(token for event in said(engine) for token in event.token_ids) == exact_tokens[0]
        there = sum(len(engine.cache.resident(layer)) for layer in range(len(plan.layer_slots)))
        assert there > plan.slots_total - sum(plan.lent_slots), "nothing is lent"
    unfinished.finish(*engines)
    engines.pop().close()
    engines.append(Engine.from_config(config, sharing=sharing))  # as after a crash: with those who are there
    unfinished.wait(*engines)
    for engine in engines:
        usage = said(engine)[-1].usage
        assert usage is not None and usage.mode == "bounded" and usage.standins.lowbit > 0
    assert {path.suffix for path in shared.iterdir()} == {".experts", ".records"}, "one copy of all"
    for engine in engines:
        engine.cache.check_integrity()
        assert engine.cache.plan.slots_total == plan.slots_total - sum(plan.lent_slots)
        assert engine.cache.device_bytes == engine.cache.plan.slots_total * plan.slot_bytes
    while engines:
        engines.pop().close()
    watcher.join()
    assert not list(shared.iterdir()) and 0 < max(held) <= plan.budget_bytes + (256 << 10), "what nobody had yet"


def test_the_next_engine_finds_it_and_begins_with_half_the_budget(model: Path, cache: Path) -> None:
    with served(model, cache) as llm:
        assert llm.engine.calibration._process is None and not llm.engine.cache.plan.reserved_bytes
        state = llm.engine.snapshot().calibration
        assert state.state == "ready" and state.tokens == CHECKED * 192 and state.factor >= 2.0
        usage = llm.generate(PROMPTS[0], max_tokens=24)[0].usage
        assert usage.mode == "bounded" and usage.standins.lowbit > 0


@pytest.mark.parametrize("mode", ["bounded", "fast"])
def test_requests_decide_where_own_texts_say_nothing(
    model: Path, cache: Path, mode: str, exact_tokens: list[tuple[int, ...]]
) -> None:
    """Exact requests are run again with stand-ins, and confirm what was expected of these."""
    folder = folder_in(cache)
    folder.write_measured(folder.measured()[:3])
    with served(model, cache, mode=mode) as llm:
        engine = llm.engine
        assert engine.snapshot().calibration.state == "collecting"
        prompts = [*PROMPTS, *(PROMPTS[at % 4] + f"# {at}\n" for at in range(12))]
        first = [llm.generate(prompt, max_tokens=24)[0] for prompt in prompts[:7]]
        assert [result.token_ids for result in first[:4]] == exact_tokens, "replays changed a request"
        assert all(result.usage.mode == "exact" for result in first)
        for prompt in prompts[7:]:
            llm.generate(prompt, max_tokens=24)
        seen = engine.snapshot().calibration
        assert seen.state == "ready" and seen.tokens > 3 * 192 + 100 and 1.0 <= seen.factor <= 2.0
        later = llm.generate(PROMPTS, max_tokens=24)
        assert all(r.usage.mode == mode and r.usage.standins.lowbit > 0 for r in later)
        engine._scheduler.check_integrity()
        assert engine.snapshot().free_kv_blocks == engine.snapshot().total_kv_blocks


def test_a_shift_of_domain_takes_trust_back(model: Path, cache: Path) -> None:
    """Stand-ins calibrated on what the model writes are confirmed by code, and cost several times as much in a script
    that it never saw: that is noticed, and it is exact from then on."""
    rng = random.Random(0)
    with served(model, cache, guard_share=1.0) as llm:

        def ask(prompt: str) -> str:
            usage = llm.generate(prompt, max_tokens=32)[0].usage
            llm.engine.drain()  # what was sampled is computed again
            return usage.mode

        assert {ask(PROMPTS[at % 4] + f"# {at}\n") for at in range(12)} == {"bounded"}
        trusted = llm.engine.snapshot()
        assert trusted.calibration.state == "ready" and trusted.calibration.factor < 1.5, "requests have confirmed it"
        foreign = ["".join(chr(rng.randrange(0x430, 0x450)) for _ in range(80)) for _ in range(24)]
        modes = [ask(text) for text in foreign]
        noticed = modes.index("exact")
        assert 0 < noticed <= 16 and set(modes[noticed:]) == {"exact"}
        now = llm.engine.snapshot()
        assert now.calibration.state == "collecting" or now.guard.state == "tripped"
        again, exact = (llm.generate(foreign[0], max_tokens=16, **how)[0] for how in ({}, {"mode": "exact"}))
        assert again.token_ids == exact.token_ids and again.usage.standins.total == 0


def test_what_cannot_be_calibrated_is_said(model: Path, cache: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    with served(model, empty, calibrate="off") as llm:
        usage = llm.generate(PROMPTS[0], max_tokens=4)[0].usage
        assert (usage.mode, usage.calibration.state) == ("exact", "none") and not empty.exists()
    with served(model, empty, memory="15%") as llm:
        state = llm.engine.snapshot().calibration
        assert state.state == "refused" and "memory is too little" in state.reason
        assert llm.engine.calibration._process is None, "nothing could come of it"
    with pytest.raises(ProfileError, match="mode is fast, must be exact or bounded"):
        served(model, empty, mode="fast", calibrate="off")
    with pytest.raises(ProfileError, match="mode is fast, must be exact or bounded"):
        served(model, empty, mode="fast", standin="buddy:router")
    with pytest.raises(ConfigError, match="calibrate is 'on', must be auto or off"):
        EngineConfig(mode="bounded", calibrate="on")
    cache.chmod(0o777)
    with pytest.raises(ProfileError, match=r"with mode 777, must be a folder of user \d+ that nobody else can write"):
        served(model, cache)


@pytest.mark.parametrize("name", ["made.profile", "made.standins/lowbit34-01.safetensors"])
def test_what_was_damaged_is_made_again(model: Path, cache: Path, name: str) -> None:
    path = folder_in(cache).path / name
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    with served(model, cache) as llm:
        assert llm.engine.snapshot().calibration.state == "collecting" and llm.engine.cache.plan.reserved_bytes
        assert llm.generate(PROMPTS[0], max_tokens=2)[0].usage.mode == "exact"
    assert not folder_in(cache).finished


@pytest.mark.parametrize("name", ["measured.json", "text.json", "progress.json"])
@pytest.mark.parametrize(
    "content", ["", "[[1", '[{"tokens": "x"}]', "null", "{}", '[{"tokens":1,"kl":NaN,"predicted":1}]']
)
def test_a_damaged_file_is_as_none(cache: Path, name: str, content: str) -> None:
    folder = folder_in(cache)
    (folder.path / name).write_text(content)
    found = {"measured.json": folder.measured, "text.json": folder.text, "progress.json": folder.progress}[name]()
    assert not found or found.percent == 0.0  # type: ignore[union-attr]
    assert folder.finished == (name != "measured.json")


def test_killed_in_the_middle_it_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_checkpoint("qwen3_moe", tmp_path / "model", max_position_embeddings=520, num_hidden_layers=2)
    folder = CalibrationFolder.of(EngineConfig(mode="bounded", cache_dir=str(tmp_path / "c")), model_hash(model))
    changed = "; ".join(f"b.{name} = {value}" for name, value in FEWER.items())
    command = [sys.executable, "-c", f"import buddymoe_ray.calibrate.background as b; {changed}; b.main()"]
    command += [str(model), "--into", str(folder.path), "--memory-percent", "50"]
    command += ["--maker-bytes", str(MAKER), "--record-bytes", str(ALL)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE)
    until = time.monotonic() + 300
    while not list(folder.path.glob("made.standins/*.safetensors")) and time.monotonic() < until:
        time.sleep(0.005)
    process.kill()
    process.wait()
    kept = {path: path.stat().st_mtime_ns for path in (folder.path / "made.standins").glob("*.safetensors")}
    kept[folder.path / "text.json"] = (folder.path / "text.json").stat().st_mtime_ns
    assert len(kept) > 1 and not folder.finished
    for name, value in FEWER.items():
        monkeypatch.setattr(background, name, value)
    background.fill(folder, str(model), 50.0, MAKER, ALL)
    assert folder.finished
    assert all(path.stat().st_mtime_ns == then for path, then in kept.items()), "what was there was made again"
    assert len(json.loads((folder.path / "measured.json").read_text())) == FEWER["_CHECKED_TEXTS"]


def test_it_ends_with_whoever_started_it(model: Path, tmp_path: Path) -> None:
    folder = CalibrationFolder.of(EngineConfig(mode="bounded", cache_dir=str(tmp_path / "c")), model_hash(model))
    command = [sys.executable, "-m", "buddymoe_ray.calibrate.background", str(model), "--into", str(folder.path)]
    command += ["--memory-percent", "50", "--maker-bytes", str(MAKER), "--record-bytes", str(ALL)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(timeout=60) == 3
