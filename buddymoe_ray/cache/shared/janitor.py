"""Removes a node's shared files when nobody is left to do it: a process of its own that outlives those it watches.

A killed machine's worth of processes (kill -9 of all, a cluster that is torn down) has nobody to unlink its files, and
memory in /dev/shm belongs to no process. `watch` starts a small process, a child of init, that sleeps until its starter
is gone and then removes files that no living process has locked. Standard library alone: it must be small.
Invariant: a file that a living process uses stays; an unused one stays for `GRACE_SECONDS`, for a restart to find.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

__all__ = ["watch"]

GRACE_SECONDS, _POLL_SECONDS = 10.0, 0.5


def watch(folder: Path, tag: str, grace: float = GRACE_SECONDS) -> None:
    """Have the files of this user and `tag` under `folder` removed once this process and all their users are gone for
    `grace` seconds."""
    reader, writer = os.pipe()  # nobody writes: it ends when this process does
    os.set_inheritable(reader, True)
    starter = subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, str(reader), str(folder), tag, str(grace)],
        pass_fds=(reader,),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    starter.wait()  # it goes at once and leaves its child to init, where no supervisor of ours kills it with us
    os.close(reader)
    _OPEN.append(writer)


_OPEN: list[int] = []  # kept open for the life of this process


def main(reader: int, folder: Path, tag: str, grace: float) -> None:
    """Sleep until the pipe ends, then remove what stays unused."""
    if os.fork():
        os._exit(0)
    os.nice(10)
    os.read(reader, 1)
    remove_unused = _remove_unused()
    unused_since: dict[Path, float] = {}
    while files := list(folder.glob(f"buddymoe-{os.geteuid()}-*-{tag}.*")):
        now = time.monotonic()
        unused_since = {path: unused_since.get(path, now) for path in remove_unused(files, dry=True)}
        remove_unused(path for path, since in unused_since.items() if now - since > grace)
        time.sleep(_POLL_SECONDS)


def _remove_unused():  # type: ignore[no-untyped-def]
    """`locks.remove_unused`, loaded by path: importing the package would load torch."""
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("locks", Path(__file__).with_name("locks.py"))
    assert spec is not None and spec.loader is not None, "locks.py must lie beside this file"
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.remove_unused


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], float(sys.argv[4]))
