"""The input of a batch: JSON lines as OpenAI's Batch API takes them, found by one pass and read again when it is their
turn.

Keeps three numbers a line, no bodies. A line that cannot be read, or whose custom_id another line before it has, is a
LineError in its place. Knows endpoints, not what their bodies say.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from buddymoe_ray.errors import ConfigError
from buddymoe_ray.serve.calls import ENDPOINTS, MAX_BODY_BYTES, Endpoint

__all__ = ["BatchInput", "BatchLine", "LineError"]

_FIELDS = ("custom_id", "method", "url", "body")
_MOST_BYTES = MAX_BODY_BYTES + (1 << 20)


@dataclass(frozen=True, kw_only=True)
class BatchLine:
    """A request: what the caller calls it, where it goes, and its body as JSON."""

    custom_id: str
    endpoint: Endpoint
    body: bytes


@dataclass(frozen=True, kw_only=True)
class LineError:
    """Why a line is no request; `code` is one of those of OpenAI's Batch API where it has one."""

    custom_id: str | None
    code: str
    message: str


class BatchInput:
    """The lines of a file that are not blank, by position from 0. The file must not change while it is used.

    `digest` is the SHA-256 of its bytes; `choices` counts the answers that its lines ask for.

    Raises:
        ConfigError: it is no file that can be read twice, or it changed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            found = path.stat()
            if not stat.S_ISREG(found.st_mode):  # opening a pipe would wait for somebody to write
                raise ConfigError(f"{path} is no plain file, must be one: it is read twice. hint: save it first")
            self._file = open(path, "rb")  # noqa: SIM115
        except OSError as error:
            raise ConfigError(
                f"{path} cannot be read ({error.strerror}), must be a file. hint: check the path"
            ) from error
        self._state = (found.st_size, found.st_mtime_ns)
        self._starts, self._numbers, self._ids = array("Q"), array("Q"), array("Q")
        self.choices = 0
        self.digest = self._scan()
        self._first = self._repeated()

    def __len__(self) -> int:
        return len(self._starts)

    def number(self, at: int) -> int:
        """The number of a line in its file, from 1, blank ones counted."""
        return self._numbers[at]

    def read(self, at: int) -> BatchLine | LineError:
        """The line at a position. Raises ConfigError when the file changed since it was opened."""
        found = os.fstat(self._file.fileno())
        if (found.st_size, found.st_mtime_ns) != self._state:
            raise ConfigError(f"{self.path} changed while it was read, must stay as it is. hint: --restart")
        self._file.seek(self._starts[at])
        line = _parsed(self._file.readline(), self._numbers[at])
        if isinstance(line, BatchLine) and at in self._first:
            message = (
                f"line {self._numbers[at]}: custom_id is {line.custom_id!r:.200}, must be unique: "
                f"line {self._first[at]} has it. hint: rename one"
            )
            return LineError(custom_id=line.custom_id, code="duplicate_custom_id", message=message)
        return line

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _scan(self) -> str:
        digest, start = hashlib.sha256(), 0
        for number, raw in enumerate(self._file, start=1):
            digest.update(raw)
            if not raw.isspace():
                fields = _fields(raw)
                self._starts.append(start)
                self._numbers.append(number)
                self._ids.append(_mark(fields))
                self.choices += _choices(fields)
            start += len(raw)
        return digest.hexdigest()

    def _repeated(self) -> dict[int, int]:
        """By position of a line whose custom_id is taken, the number of the line that has it."""
        marks = np.frombuffer(self._ids, dtype=np.uint64)
        order = np.argsort(marks, kind="stable")
        same = np.flatnonzero((marks[order[1:]] == marks[order[:-1]]) & (marks[order[1:]] > 0))
        suspects = sorted({int(at) for at in (*order[same], *order[same + 1])})
        owners: dict[str, int] = {}
        repeated: dict[int, int] = {}
        for at, custom_id in zip(suspects, self._custom_ids(suspects), strict=True):  # marks may collide, ids decide
            owner = owners.setdefault(custom_id, self._numbers[at])
            if owner != self._numbers[at]:
                repeated[at] = owner
        return repeated

    def _custom_ids(self, positions: list[int]) -> Iterator[str]:
        for at in positions:
            self._file.seek(self._starts[at])
            yield str((_fields(self._file.readline()) or {}).get("custom_id"))


def _parsed(raw: bytes, number: int) -> BatchLine | LineError:
    fields = _fields(raw)
    given = None if fields is None else fields.get("custom_id")
    custom_id = given if _is_name(given) else None

    def error(code: str, message: str) -> LineError:
        return LineError(custom_id=custom_id, code=code, message=f"line {number}: {message}")

    if fields is None:
        return error("invalid_json_line", _no_object(raw))
    missing = next((name for name in _FIELDS if name not in fields), None)
    if missing is not None:
        return error("missing_required_parameter", f"{missing} is missing, must be given. hint: add it")
    unknown = next((name for name in fields if name not in _FIELDS), None)
    if unknown is not None:
        return error("unknown_parameter", f"{unknown!r:.200} is no field of a line, must be left out. hint: remove it")
    if custom_id is None:
        return error(
            "invalid_custom_id", f"custom_id is {given!r:.200}, must be text, at least a character. hint: name it"
        )
    if fields["method"] != "POST":
        return error("invalid_method", f"method is {fields['method']!r:.200}, must be 'POST'. hint: write POST")
    endpoint = ENDPOINTS.get(fields["url"]) if isinstance(fields["url"], str) else None
    if endpoint is None:
        return error(
            "invalid_url", f"url is {fields['url']!r:.200}, must be {' or '.join(ENDPOINTS)}. hint: check spelling"
        )
    return BatchLine(custom_id=custom_id, endpoint=endpoint, body=json.dumps(fields["body"]).encode())


def _fields(raw: bytes) -> dict[str, Any] | None:
    """The object that a line holds, or None."""
    if len(raw) > _MOST_BYTES:
        return None
    try:
        fields = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return fields if isinstance(fields, dict) else None


def _no_object(raw: bytes) -> str:
    if len(raw) > _MOST_BYTES:
        return f"it is {len(raw)} bytes, must be at most {_MOST_BYTES}. hint: shorten it"
    try:
        return f"it is a JSON {type(json.loads(raw)).__name__}, must be an object. hint: see OpenAI's Batch API"
    except (ValueError, RecursionError) as error:
        return f"it is not JSON ({error}), must be an object. hint: write one object a line"


def _is_name(value: object) -> bool:
    """Whether it is text that can be written again: no half characters."""
    if not isinstance(value, str) or not value:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _mark(fields: dict[str, Any] | None) -> int:
    """64 bits that stand for a custom_id; 0 where there is none."""
    custom_id = None if fields is None else fields.get("custom_id")
    if not _is_name(custom_id):
        return 0
    return int.from_bytes(hashlib.blake2b(str(custom_id).encode(), digest_size=8).digest()) or 1


def _choices(fields: dict[str, Any] | None) -> int:
    """Answers that a line seems to ask for: whether it may, is seen when it is its turn."""
    body = (fields or {}).get("body")
    if not isinstance(body, dict):
        return 1
    n, prompt = body.get("n"), body.get("prompt")
    times = n if isinstance(n, int) and 1 <= n <= 128 else 1
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        times *= min(len(prompt), 128)
    return times
