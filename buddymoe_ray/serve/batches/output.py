"""The output of a batch, put in order and in place at once: a reader sees none of it, or all.

Knows files, not what lines say.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

from buddymoe_ray.errors import BuddyMoEError
from buddymoe_ray.serve.batches.journal import folder_synced

__all__ = ["write_output"]


def write_output(path: Path, lines: Iterable[bytes]) -> None:
    """Write lines (without their ends) to `path`, durably. Raises BuddyMoEError; what was at `path` then stays."""
    temporary = path.with_name(path.name + ".part")
    try:
        with temporary.open("wb") as file:
            for line in lines:
                file.write(line + b"\n")
            file.flush()
            os.fsync(file.fileno())  # a name must never stand for bytes that a power cut took
        os.replace(temporary, path)
        folder_synced(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        message = f"{path} cannot be written ({error.strerror}), must be; every answer is kept"
        raise BuddyMoEError(f"{message}. hint: free some space and run the same command again") from error
