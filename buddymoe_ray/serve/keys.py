"""The named API keys of a service: a TOML file that holds their hashes, read again when it changes.

    [alice]
    sha256 = "…"                  # as `buddymoe key` writes it
    requests_per_minute = 60      # these are optional: what is not named is not limited
    tokens_per_minute = 20000
    concurrent_requests = 4
    weight = 2                    # of its turns beside other keys'; 1 unless told

Keys are 256 random bits, so a plain SHA-256 tells nobody anything: salts and slow hashes are for secrets that can be
guessed. Hence `buddymoe key` makes keys and takes none. Invariant: a file that cannot be used, or is gone, changes
nothing while the service runs; it keeps a service from starting.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import secrets
import stat
import time
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from buddymoe_ray.errors import ConfigError

__all__ = ["SINGLE", "ApiKey", "KeyLimits", "KeyRing", "add_key", "read_keys"]

log = logging.getLogger(__name__)

SINGLE = "default"
"""What the key of the environment is called."""
LOOK_SECONDS = 1.0
MOST_BYTES = 1 << 20
MOST_GIVEN = 4
"""So many keys of one request are looked at: each is compared with all."""

_Most = Annotated[int | None, Field(strict=True, ge=1, le=10**12)]
_NAME = re.compile(r"^[a-z0-9][a-z0-9_-]{0,63}$")
_Name = Annotated[str, Field(pattern=_NAME.pattern)]


class KeyLimits(BaseModel):
    """What may be done with a key; None is no limit. A key that may do nothing is one to take out of the file. Where
    keys wait for each other each has a share as large as its `weight`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    requests_per_minute: _Most = None
    tokens_per_minute: _Most = None
    concurrent_requests: _Most = None
    weight: Annotated[float, Field(strict=True, ge=0.1, le=100)] = 1.0


class _Entry(KeyLimits):
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


_FILE = TypeAdapter(dict[_Name, _Entry])


@dataclass(frozen=True, kw_only=True)
class ApiKey:
    """A key by its name; `digest` is the SHA-256 of it."""

    name: str
    digest: bytes
    limits: KeyLimits = field(default_factory=KeyLimits)


def read_keys(path: Path) -> tuple[ApiKey, ...]:
    """The keys of a file, at least one. Raises ConfigError when it is not usable, or others could write to it."""
    return _parsed(path, _bytes_of(path))


def add_key(path: Path, name: str, limits: Mapping[str, float | None]) -> str:
    """A new key of that name, which is nowhere but in what is returned; its hash is in the file, made if need be, with
    those of its limits that are not None.

    Raises ConfigError when the file is not usable, has such a name, or that is none.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"name is {name!r:.80}, must be small letters, digits, _ and -, at most 64. hint: it is told in logs"
        )
    key = f"sk-{secrets.token_urlsafe(32)}"
    lines = [f"[{name}]", f'sha256 = "{hashlib.sha256(key.encode()).hexdigest()}"']
    lines += [f"{option} = {most}" for option, most in limits.items() if most is not None]
    path = path.resolve()
    before = _bytes_of(path) if path.exists() else b""
    content = before + b"\n" * bool(before) + "\n".join([*lines, ""]).encode()
    _parsed(path, content)
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}")  # whoever reads sees the old file or the new one
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        raise ConfigError(f"{path} cannot be written: {error.strerror}. hint: check the folder") from error
    return key


def _bytes_of(path: Path) -> bytes:
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            found = os.fstat(file.fileno())
            mode = stat.S_IMODE(found.st_mode)
            if not stat.S_ISREG(found.st_mode) or found.st_uid not in (os.getuid(), 0) or mode & 0o022:
                raise ConfigError(
                    f"{path} is of user {found.st_uid} with mode {mode:o}, must be a file of user {os.getuid()} or "
                    f"root that nobody else can write to. hint: chmod 600 {path}"
                )
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read: {error.strerror}. hint: buddymoe key NAME --file {path} makes it"
        ) from error
    if len(content) > MOST_BYTES:
        raise ConfigError(f"{path} is longer than {MOST_BYTES} bytes, must be a file of API keys. hint: check the path")
    return content


def _parsed(path: Path, content: bytes) -> tuple[ApiKey, ...]:
    try:
        entries = _FILE.validate_python(tomllib.loads(content.decode()))
    except ValidationError as refused:
        error = refused.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(at) for at in error["loc"] if at != "[key]")
        raise ConfigError(f"{path}: {where}: {error['msg']}. hint: see deployments/README.md, API keys") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is no TOML ({error}), must be. hint: see deployments/README.md, API keys") from None
    names = {entry.sha256: name for name, entry in entries.items()}
    twice = next((name for name, entry in entries.items() if names[entry.sha256] != name), None)
    if twice is not None or not entries or SINGLE in entries:
        wrong = f"{twice} and {names[entries[twice].sha256]} are one key" if twice else "no key is there"
        wrong = f"{SINGLE} is the name of the environment's key" if SINGLE in entries else wrong
        raise ConfigError(f"{path}: {wrong}, must be different ones, at least one. hint: buddymoe key NAME makes one")
    return tuple(
        ApiKey(name=name, digest=bytes.fromhex(entry.sha256), limits=KeyLimits(**entry.model_dump(exclude={"sha256"})))
        for name, entry in entries.items()
    )


class KeyRing:
    """The keys that are good now: the environment's, and those of a file. Without either everybody is served.

    Raises ConfigError when the file is not usable.
    """

    def __init__(self, single: str | None, path: str | None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._single = () if single is None else (ApiKey(name=SINGLE, digest=_digest(single.encode())),)
        self._path = None if path is None else Path(path).expanduser()
        self._clock, self._looked, self._complaint = clock, clock(), ""
        self._content = None if self._path is None else _bytes_of(self._path)
        self._named = () if self._path is None else read_keys(self._path)

    @property
    def open(self) -> bool:
        """Whether no key is asked for."""
        return not self.keys

    @property
    def keys(self) -> tuple[ApiKey, ...]:
        """All of them."""
        return (*self._single, *self._named)

    @property
    def description(self) -> str:
        """Who is served."""
        named = [f"{len(self._named)} named of {self._path}"] if self._path else []
        return ", ".join(["one of the environment"] * len(self._single) + named) or "none: whoever reaches it is served"

    @property
    def has_names(self) -> bool:
        """Whether there is a file, so that keys are told apart."""
        return self._path is not None

    def find(self, given: Iterable[bytes]) -> ApiKey | None:
        """The key that is among those given. Takes as long whichever it is, and whether there is one."""
        self.refresh()
        found = None
        for digest in [_digest(key) for key in given][:MOST_GIVEN]:
            for key in self.keys:
                if hmac.compare_digest(digest, key.digest):
                    found = key
        return found

    def refresh(self) -> None:
        """Read the file anew, at most once a second; what is wrong with it is said once."""
        if self._path is None or self._clock() - self._looked < LOOK_SECONDS:
            return
        self._looked, content = self._clock(), None
        try:
            content = _bytes_of(self._path)
            if content != self._content:
                self._named, self._complaint = _parsed(self._path, content), ""
                log.info("%s: %d API keys from now on", self._path, len(self._named))
        except ConfigError as error:
            if str(error) != self._complaint:
                log.error("the API keys stay as they were: %s", error)
            self._complaint = str(error)
        self._content = content  # a bad one is not read over and over


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
