"""Machine code on the disk: a second process finds it, a changed source does not, and nobody else's is run."""

from __future__ import annotations

import logging
import os
import shutil
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import buddymoe_ray
from buddymoe_ray.kernels import numba_calls
from buddymoe_ray.kernels.machine_code import code_folder

PACKAGE = Path(buddymoe_ray.__file__).parent
MAKE = """
from buddymoe_ray.kernels.expert_numba import compile_experts, compile_linear
from buddymoe_ray.kernels import numba_calls
from buddymoe_ray.kernels.machine_code import code_folder, native_functions
native_functions("define void @nothing() { ret void }", ("nothing",))
compile_experts(code_folder()), compile_linear(code_folder())
print(sum(made.cache_hits for made in numba_calls._alive))
"""
"""Says how many of numba's two functions came from the disk."""


def hits(where: Path, cache: Path) -> int:
    done = subprocess.run(
        [sys.executable, "-c", MAKE],
        cwd=where,
        env=os.environ | {"PYTHONPATH": str(where), "XDG_CACHE_HOME": str(cache), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def files(cache: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in (cache / "buddymoe_ray").rglob("*") if path.is_file()}


@pytest.fixture
def emptied(tmp_path: Path) -> Path:
    """Where there is a copy of the package whose kernels' bodies are emptied: what they say does not matter here."""
    package = tmp_path / "buddymoe_ray"
    shutil.copytree(PACKAGE / "kernels", package / "kernels")
    (package / "kernels" / "__init__.py").write_text("")
    (package / "kernels" / "lowbit_format.py").write_text("BLOCK, GROUP = 16, 32\n")  # without torch, which is slow
    for name in ("types.py", "errors.py", "config.py"):
        shutil.copy(PACKAGE / name, package / name)
    (package / "__init__.py").write_text("")
    numba = package / "kernels" / "expert_numba.py"
    begin, calls = numba.read_text().split("_SOURCES =", 1)
    nothing = "njit(lambda call_at, plan_at: OK)"
    numba.write_text(f"{begin}\nexperts = {nothing}\nlinear = {nothing}\n_SOURCES ={calls}")
    return tmp_path


def test_machine_code_is_kept_and_follows_its_sources(emptied: Path) -> None:
    cache, numba = emptied / "cache", emptied / "buddymoe_ray" / "kernels" / "expert_numba.py"
    assert hits(emptied, cache) == 0
    folder, made = cache / "buddymoe_ray" / "machine-code", files(cache)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    suffixes = sorted(suffix for name in made if (suffix := Path(name).suffix) != ".lock")
    assert suffixes == [".nbc", ".nbc", ".nbi", ".nbi", ".o"]
    assert hits(emptied, cache) == 2 and files(cache) == made
    for name in ("vector_ir", "expert_rows"):  # not the module that numba looks at
        source = numba.with_name(f"{name}.py")
        source.write_text(source.read_text() + "\n# changed\n")
        assert hits(emptied, cache) == 0


def test_processes_that_start_together_make_each_kernel_once(emptied: Path) -> None:
    with ThreadPoolExecutor(4) as together:
        found = list(together.map(lambda _: hits(emptied, emptied / "cache"), range(4)))
    assert sum(found) == 2 * 4 - 2, f"{found} of 2 kernels were found, the others made"


def test_a_folder_that_others_can_write_to_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "buddymoe_ray" / "machine-code"
    assert code_folder() == folder and stat.S_IMODE(folder.stat().st_mode) == 0o700
    for mode in (0o770, 0o702, 0o777):
        folder.chmod(mode)
        assert code_folder() is None
    assert "must be a folder of user" in caplog.text and "hint: delete it" in caplog.text
    folder.chmod(0o755)  # what others can read does no harm
    assert code_folder() == folder


def test_a_folder_of_another_user_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert code_folder() is not None
    mine = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: mine + 1)
    assert code_folder() is None


def test_a_link_to_elsewhere_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "buddymoe_ray").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "buddymoe_ray" / "machine-code").symlink_to(tmp_path / "elsewhere")
    assert code_folder() is None


def test_no_folder_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with caplog.at_level(logging.INFO):
        assert code_folder() is None
    assert "machine code is compiled by every process" in caplog.text


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_kernel_in_which_something_is_raised_raises_in_python() -> None:
    """numba prints what a callback raises and answers 0."""

    def kernel(call_at: Any, plan_at: Any) -> Any:
        if plan_at == 7:
            raise ValueError("as where memory ends")
        return 5

    run = numba_calls.kernel(lambda folder: numba_calls.compiled(kernel, None), 2)
    assert run((1, 2), 3) == 5
    with pytest.raises(MemoryError, match="must have memory for its rows"):
        run((1, 2), 7)
