"""Compiles LLVM IR to machine code and keeps the code in a folder that belongs to the user alone.

Machine code that is read is run: the folder must be the user's, and nobody else may write to it, or it is not used and
every process compiles anew. A file's name is the hash of its IR, the CPU and LLVM's version, so code never answers for
another source. Knows no kernels.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm

from buddymoe_ray.config import cache_folder, private_folder

__all__ = ["code_folder", "made_once", "native_functions", "optimised"]

log = logging.getLogger(__name__)

_LONGEST_WAIT_SECONDS = 60.0  # four times what the longest kernel takes
_DIGEST_BYTES = hashlib.sha256().digest_size
_alive: list[Any] = []
"""Engines own their code: one that is collected takes it along."""


@cache
def _initialised() -> llvm.Target:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.Target.from_default_triple()


def code_folder() -> Path | None:
    """The folder for machine code, made at the first call; None where it cannot be made or could be others' work."""
    folder = cache_folder() / "machine-code"
    fault = private_folder(folder)
    if fault:
        log.warning("%s; until then machine code is compiled by every process", fault)
    return None if fault else folder


@contextmanager
def made_once(folder: Path | None, name: str) -> Iterator[None]:
    """Whoever else makes code of this name for the folder waits, to find it there: workers that started together on a
    new machine compiled the same kernels at the same time, two on two cores for 82 seconds instead of 41.

    Nobody waits for ever: of one that stands still the code is made again. One lock for all names starved whoever
    waited beside a process that makes many.
    """
    fd = None if folder is None else _open_lock(folder / f"{name}.lock")
    if fd is None:
        yield
        return
    try:
        end = time.monotonic() + _LONGEST_WAIT_SECONDS
        while not _locked(fd) and time.monotonic() < end:
            time.sleep(0.05)
        yield
    finally:
        os.close(fd)


def _open_lock(path: Path) -> int | None:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError:
        return None


def _locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # goes with a process that is killed
    except BlockingIOError:
        return False
    return True


def native_functions(text: str, names: tuple[str, ...], *, baseline: bool = False) -> Mapping[str, int]:
    """Addresses of functions of a module, compiled for this CPU (`baseline`: for any of its architecture)."""
    cpu = "generic" if baseline else llvm.get_host_cpu_name()
    features = "" if baseline else llvm.get_host_cpu_features().flatten()
    key = hashlib.sha256("\0".join((text, cpu, features, str(llvm.llvm_version_info))).encode()).hexdigest()
    folder = code_folder()
    kept = None if folder is None else folder / f"{key}.o"
    target = _initialised().create_target_machine(
        cpu=cpu, features=features, opt=3, reloc="pic", codemodel="jitdefault"
    )
    code = None if kept is None else _read(kept)
    if code is None:
        with made_once(folder, key):
            code = (None if kept is None else _read(kept)) or target.emit_object(optimised(text, target))
            if kept is not None:
                _write(kept, code)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), target)
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _alive.append(engine)
    return {name: engine.get_function_address(name) for name in names}


def optimised(text: str, target: Any) -> Any:
    """The module that code is made of."""
    module = llvm.parse_assembly(text)
    module.verify()
    tuning = llvm.create_pipeline_tuning_options(speed_level=3)
    tuning.loop_unrolling = tuning.slp_vectorization = tuning.loop_vectorization = False  # the text is written as meant
    passes = llvm.create_pass_builder(target, tuning)
    passes.getModulePassManager().run(module, passes)
    return module


def _read(path: Path) -> bytes | None:
    """The code, None when there is none or it is not whole."""
    try:
        found = path.read_bytes()
    except OSError:
        return None
    digest, code = found[:_DIGEST_BYTES], found[_DIGEST_BYTES:]
    return code if hashlib.sha256(code).digest() == digest else None


def _write(path: Path, code: bytes) -> None:
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(hashlib.sha256(code).digest() + code)
        os.replace(file.name, path)
    except OSError as error:
        log.info("machine code is not kept: %s", error)
