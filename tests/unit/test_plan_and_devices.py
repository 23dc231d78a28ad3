"""Plans from headers alone, on GPUs that NVML (a fake of it) reports, under cgroup limits that files (fakes) state."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import MixtralConfig

from buddymoe_ray import LLM, EngineConfig
from buddymoe_ray.cli import main
from buddymoe_ray.errors import BudgetError, ConfigError
from buddymoe_ray.models.resolve import resolve_model
from buddymoe_ray.residency.devices import list_gpus, peers_nearer, supposed_gpus
from buddymoe_ray.residency.machine import available_memory_bytes, cgroup_limit_bytes
from buddymoe_ray.residency.plan import make_plan

GIB = 1 << 30


class FakeNvml:
    """As much of pynvml as is asked; `silent` names queries this driver does not answer."""

    class NVMLError(Exception):
        pass

    def __init__(self, gpus: int, *, total: int = 80 * GIB, free: int = 78 * GIB, silent: tuple[str, ...] = ()) -> None:
        self.gpus, self.total, self.free, self.silent, self.open = gpus, total, free, silent, 0

    def nvmlInit(self) -> None:
        if self.gpus < 0:
            raise self.NVMLError("driver not loaded")
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:
        return self.gpus

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetName(self, handle: int) -> bytes:
        return f"Fake GPU {handle}".encode()

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:
        return SimpleNamespace(total=self.total, free=self.free)

    def _answer(self, name: str, value: int) -> int:
        if name in self.silent:
            raise self.NVMLError("not supported")
        return value

    def nvmlDeviceGetMaxPcieLinkGeneration(self, handle: int) -> int:
        return self._answer("pcie", 5)

    def nvmlDeviceGetMaxPcieLinkWidth(self, handle: int) -> int:
        return self._answer("pcie", 16)

    def nvmlDeviceGetNvLinkState(self, handle: int, link: int) -> int:
        return self._answer("nvlink", int(link < 4))

    def nvmlDeviceGetNumaNodeId(self, handle: int) -> int:
        return self._answer("numa", handle % 2)


@pytest.fixture
def mixtral(tmp_path: Path) -> Path:
    """A folder with Mixtral-8x7B's config and nothing else."""
    config = MixtralConfig(num_local_experts=8, dtype="bfloat16", architectures=["MixtralForCausalLM"])
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    return tmp_path


def test_gpus_are_described() -> None:
    nvml = FakeNvml(2)
    first, second = list_gpus(nvml)
    assert (first.index, first.name, first.total_bytes, first.nvlinks) == (0, "Fake GPU 0", 80 * GIB, 4)
    assert peers_nearer([first], 2.0) == pytest.approx(math.log2(4 * 25e9 / first.pcie_bytes_s))
    assert (peers_nearer(supposed_gpus("2x24GiB"), 2.0), peers_nearer((), 2.0)) == (0.0, 2.0)
    assert first.pcie_bytes_s == pytest.approx(63e9, rel=0.01) and (first.numa_node, second.numa_node) == (0, 1)
    assert nvml.open == 0, "NVML must be shut down again"


def test_what_a_driver_does_not_say_is_not_invented() -> None:
    (gpu,) = list_gpus(FakeNvml(1, silent=("pcie", "nvlink", "numa")))
    assert (gpu.pcie_bytes_s, gpu.nvlinks, gpu.numa_node) == (0.0, 0, None)


def test_no_driver_and_no_gpu_are_no_devices() -> None:
    assert list_gpus(FakeNvml(-1)) == () and list_gpus(FakeNvml(0)) == ()
    assert isinstance(list_gpus(), tuple)  # the real module, whatever this machine has


def test_a_plan_of_several_gpus_reads_what_they_hold_of_each_other(mixtral: Path) -> None:
    """100 GB/s by NVLink instead of 63 by PCIe; a driver that tells of no links gives no more than one GPU has."""

    def seconds(gpus: int, *silent: str) -> float:
        found = list_gpus(FakeNvml(gpus, silent=silent))
        return make_plan(EngineConfig(memory="25%"), mixtral, gpus=found).predicted_ttft_seconds

    assert seconds(4) < seconds(2) < seconds(1)
    assert seconds(4, "nvlink") == pytest.approx(seconds(1))


def test_mixtral_from_its_config_alone(mixtral: Path) -> None:
    plan = make_plan(EngineConfig(memory="25%"), mixtral, gpus=list_gpus(FakeNvml(2)))
    assert not plan.has_weights and plan.model_type == "mixtral" and plan.moe_layers == 32
    assert plan.expert_bytes == 3 * 4096 * 14336 * 2 and plan.total_expert_bytes == 256 * plan.expert_bytes
    assert [d.device for d in plan.devices] == ["cuda:0", "cuda:1"] and plan.devices[1].numa_node == 1
    for device in plan.devices:
        assert device.slots * plan.expert_bytes <= device.expert_budget_bytes == plan.total_expert_bytes // 4
        assert sum(device.layer_slots) + device.wave_slots == device.slots == 64
        assert device.link == "pcie"
    assert plan.predicted_miss_bytes_per_token == pytest.approx((1 - 61 / 256) * 64 * plan.expert_bytes)


def test_recorded_steps_have_their_part_of_a_gpus_memory(mixtral: Path) -> None:
    """Which a KV cache does not get; logits alone are so many bytes of every row."""
    gpus = list_gpus(FakeNvml(1))
    for running in (4, 64):
        config = EngineConfig(memory="10%", max_running=running)
        [device] = make_plan(config, mixtral, gpus=gpus).devices
        left = device.available_bytes - device.dense_bytes - device.expert_budget_bytes - device.recording_bytes
        assert device.kv_cache_bytes <= left // 4 and device.recording_bytes > 2 * running * 6 * 32000
    assert device.recording_bytes < GIB, "of 64 rows"
    for none in (EngineConfig(memory="10%", batching="solo"), EngineConfig(memory="1GiB", device="cpu")):
        assert make_plan(none, mixtral, gpus=gpus).devices[0].recording_bytes == 0


def test_a_plan_that_cannot_fit_says_what_would(mixtral: Path) -> None:
    gpus = list_gpus(FakeNvml(1, total=24 * GIB, free=22 * GIB))
    with pytest.raises(BudgetError, match=r"hint: lower --memory to (\d+\.\d+)GiB") as refused:
        make_plan(EngineConfig(memory="50%"), mixtral, gpus=gpus)
    fitting = str(refused.value).split("--memory to ")[1].split("GiB")[0]
    assert make_plan(EngineConfig(memory=f"{float(fitting) - 0.01}GiB"), mixtral, gpus=gpus).devices[0].slots > 40


def test_a_gpu_that_is_not_there_is_refused(mixtral: Path) -> None:
    with pytest.raises(ConfigError, match="must be one of 2 GPUs"):
        make_plan(EngineConfig(device="cuda:5"), mixtral, gpus=list_gpus(FakeNvml(2)))


def test_gpus_that_are_not_here_can_be_planned_for(mixtral: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["plan", "--model", str(mixtral), "--memory", "20GiB", "--max-model-len", "4096", "--json"]
    assert main([*asked, "--gpus", "2x48GiB"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [d["device"] for d in plan["devices"]] == ["cuda:0", "cuda:1"]
    assert {(d["available_bytes"], d["expert_budget_bytes"]) for d in plan["devices"]} == {
        (48 * GIB - GIB // 2, 20 * GIB)
    }
    assert main([*asked, "--gpus", "16GiB"]) == 1
    assert "cuda:0 needs" in capsys.readouterr().err
    assert main([*asked, "--gpus", "16GiB", "--device", "cpu"]) == 2
    assert "device is 'cpu', must be auto or cuda beside --gpus" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "24", "0x24GiB", "50%", "x24GiB", "99x24GiB", "24 cards"])
def test_gpus_that_cannot_be_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"gpus is .*, must be like .*\. hint: "):
        supposed_gpus(text)


def fake_root(root: Path, *, cgroup: str, limits: dict[str, str], available_kib: int = 1 << 22) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: 999 kB\nMemAvailable: {available_kib} kB\n")
    (root / "proc/self/cgroup").write_text(cgroup)
    for name, content in limits.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


def test_cgroup_v2_limits_and_their_parents_count(tmp_path: Path) -> None:
    limits = {
        "a/b/memory.max": "max\n",
        "a/memory.max": f"{2 * GIB}\n",
        "a/memory.stat": f"anon {GIB}\nfile {GIB}\nshmem 0\n",
    }
    root = fake_root(tmp_path, cgroup="0::/a/b\n", limits=limits)
    assert cgroup_limit_bytes(root) == (2 * GIB, GIB)
    assert available_memory_bytes(root) == GIB, "page cache is reclaimable, anonymous memory is not"


def test_cgroup_v1_limits(tmp_path: Path) -> None:
    limits = {
        "memory/x/memory.limit_in_bytes": f"{3 * GIB}",
        "memory/x/memory.stat": f"cache 5\ntotal_rss {GIB}\ntotal_shmem 4096\n",
        "memory/memory.limit_in_bytes": str(2**63 - 4096),
    }
    root = fake_root(tmp_path, cgroup="5:memory:/x\n2:cpu:/\n", limits=limits)
    assert cgroup_limit_bytes(root) == (3 * GIB, GIB + 4096)


def test_without_a_limit_the_machine_is_the_limit(tmp_path: Path) -> None:
    root = fake_root(tmp_path, cgroup="0::/\n", limits={"memory.max": "max"})
    assert cgroup_limit_bytes(root) == (None, 0) and available_memory_bytes(root) == (1 << 22) * 1024


def test_a_plan_names_the_stand_ins_that_the_engine_then_has() -> None:
    folder = resolve_model("builtin:tiny")
    config = EngineConfig(memory="25%", mode="bounded", guard_share=0.0)
    plan = make_plan(config, folder, gpus=[])
    with LLM(memory="25%", mode="bounded", guard_share=0.0) as llm:
        cache = llm.engine.cache
        assert plan.devices[0].layer_slots == cache.plan.layer_slots
        # the plan does not know in how many pieces an expert is stored, so its staging may differ by some pages
        assert plan.overhead_bytes == pytest.approx(cache.plan.overhead_bytes, abs=16384)
        assert plan.standin_bytes == pytest.approx(llm.engine.standin_bytes, abs=16384)
    assert sum(plan.standins.values()) + plan.devices[0].resident_experts == 128
    assert plan.expected_rise_fast is not None and 0.001 < plan.expected_rise_fast < 0.01
    exact = make_plan(EngineConfig(memory="25%"), folder, gpus=[])
    assert (exact.mode, exact.standins, exact.standin_bytes, exact.expected_rise_fast) == ("exact", {}, 0, None)
