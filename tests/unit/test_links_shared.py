"""Shared files: only ours, only of the announced size, gone after one reading, swept after a kill -9."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from link_rig import eventually, nothing_leaks, own_files

from buddymoe_ray.errors import LinkError
from buddymoe_ray.links.shared_files import (
    FOLDER,
    PREFIX,
    Mailbox,
    open_file,
    read_file,
    sweep_leftovers,
    write_file,
)

__all__ = ["nothing_leaks"]

NAME = f"{PREFIX}.1.{os.getpid()}.1.{'0' * 32}"
PATH = Path(FOLDER) / NAME


def parts(size: int) -> list[memoryview]:
    return [memoryview(bytes(range(256)) * (size // 256)), memoryview(b""), memoryview(bytes(size % 256))]


def test_a_payload_is_read_once() -> None:
    name = write_file([memoryview(b"ab")] * 3000)
    assert name is not None and os.stat(f"{FOLDER}/{name}").st_mode & 0o777 == 0o600
    into = bytearray(6000)
    assert read_file(name, memoryview(into)) and into == b"ab" * 3000
    assert not own_files() and not read_file(name, memoryview(into)), "it is gone"


@pytest.mark.parametrize(
    "name",
    ["", "x", "../x", "/etc/passwd", f"{PREFIX}.1.1.1.{'0' * 31}", f"{PREFIX}.1.1.1.{'0' * 32}/..", NAME + "\n",
     f"../shm/{NAME}", NAME.replace(PREFIX, "other"), NAME.replace(".1.", ".¹."), f"{PREFIX}.-1.1.1.{'0' * 32}"],
    ids=str.__len__,  # the names hold this process's id, and ids must be the same in every process
)  # fmt: skip
def test_names_that_are_not_ours_are_refused(name: str) -> None:
    with pytest.raises(LinkError, match="must be named by this service"):
        open_file(name, 4)


def test_files_that_are_not_ours_are_refused_and_left(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("1234")
    secret.chmod(0o600)

    def refused() -> None:
        with pytest.raises(LinkError):
            open_file(NAME, 4)
        assert os.path.lexists(PATH)
        os.unlink(PATH)

    PATH.symlink_to(secret)
    refused()
    os.mkfifo(PATH, 0o600)
    refused()
    PATH.write_text("12345")
    PATH.chmod(0o600)
    refused()  # longer than announced
    PATH.write_text("1234")
    PATH.chmod(0o644)
    refused()  # readable by others
    PATH.write_text("1234")
    PATH.chmod(0o600)
    twin = Path(FOLDER) / (NAME[:-1] + "1")
    os.link(PATH, twin)
    refused()  # known by another name
    os.unlink(twin)
    if os.geteuid() == 0:
        PATH.write_text("1234")
        PATH.chmod(0o600)
        os.chown(PATH, 12345, -1)
        refused()  # another user's
    assert secret.read_text() == "1234"


def test_a_mailbox_keeps_little_unread() -> None:
    box = Mailbox(least_bytes=1000, most_files=3, most_bytes=10_000)
    assert box.post(parts(999)) is None, "small payloads go over the socket"
    names = [box.post(parts(2000)) for _ in range(3)]
    assert all(names) and box.post(parts(2000)) is None, "three lie unread"
    assert names[0] is not None and read_file(names[0], memoryview(bytearray(2000)))
    assert box.post(parts(7000)) is None, "too many bytes would"
    fourth = box.post(parts(6000))
    assert fourth is not None
    box.withdraw(fourth)
    assert len(own_files()) == 2
    box.close()
    box.close()
    assert not own_files() and box.post(parts(2000)) is None


def test_what_a_killed_process_left_is_swept() -> None:
    ours = write_file(parts(5000))
    assert ours is not None
    child = os.fork()
    if child == 0:
        write_file(parts(5000))
        signal.pause()
        os._exit(0)

    def left() -> list[str]:
        return [name for name in os.listdir(FOLDER) if f".{child}." in name and name.startswith(PREFIX)]

    try:
        eventually(lambda: len(left()) == 1 and os.stat(f"{FOLDER}/{left()[0]}").st_size == 5000, "the child's file")
        sweep_leftovers()
        assert len(left()) == 1, "its process lives"
        os.kill(child, signal.SIGKILL)
        eventually(lambda: Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] == "Z", "its end")
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert sweep_leftovers("some-other-prefix") == 0 and len(left()) == 1
    assert sweep_leftovers() >= 1 and not left(), "a process that is dead, though nobody has asked how it ended"
    os.waitpid(child, 0)
    reused = ours.split(".")
    reused[3] = "1"  # the same process id, of a process that started at another time
    os.rename(f"{FOLDER}/{ours}", f"{FOLDER}/{'.'.join(reused)}")
    elsewhere = reused.copy()
    elsewhere[1] = "7"  # of another process namespace
    Path(f"{FOLDER}/{'.'.join(elsewhere)}").touch(mode=0o600)
    assert sweep_leftovers() >= 1 and own_files() == [".".join(elsewhere)]
    os.unlink(f"{FOLDER}/{'.'.join(elsewhere)}")
