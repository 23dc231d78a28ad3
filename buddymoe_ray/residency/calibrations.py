"""Where the stand-ins that an engine makes by itself are kept, and how much memory is set aside for them meanwhile.

A folder per checkpoint, of this user alone: records by layer, a profile, what was measured (written last: a folder
without it is not finished), the text that the model wrote itself. Nothing in it comes from a request. Knows sizes, not
how records are made or when they are trusted. Neighbours: `calibrate.background` fills the folder, `standin_setup`
reads it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from buddymoe_ray.config import STANDINS, EngineConfig, cache_folder, private_folder
from buddymoe_ray.errors import ProfileError
from buddymoe_ray.kernels import LowbitFormat
from buddymoe_ray.models.profile import VERSION
from buddymoe_ray.policy import Measured, split_movable
from buddymoe_ray.types import ExpertLayout

__all__ = [
    "ROOM_SPARE",
    "ROOM_WANTED",
    "SELF_MADE",
    "CalibrationFolder",
    "MakerProgress",
    "calibrates",
    "maker_bytes",
    "reserved_bytes",
]

ROOM_WANTED, ROOM_SPARE = b"+", b"-"
"""What whoever fills a folder says to its engine about the memory reserved for records; the first is echoed."""
SELF_MADE = ("lowbit2", "lowbit24", "lowbit34", "lowbit48")
"""Copies made where nobody names others: most of the error is the second projection's, a third of the bytes."""
_MAKER_SLOTS = 4
_PRIOR_LOSS = {"lowbit2": 7.8, "lowbit24": 3.0, "lowbit34": 1.4, "lowbit48": 0.46}
"""Of an access, before anything is measured, beside four bits in both projections: as on builtin:tiny. Decides sizes
only."""
_MOST_BYTES = 1 << 26


@dataclass(frozen=True, kw_only=True)
class MakerProgress:
    """How far whoever fills a folder is: per cent of all work, what it does, bytes of the records there are."""

    percent: float = 0.0
    phase: str = ""
    record_bytes: int = 0


@dataclass(frozen=True)
class CalibrationFolder:
    """The files of one checkpoint's calibration."""

    path: Path

    @classmethod
    def of(cls, config: EngineConfig, fingerprint: str) -> CalibrationFolder:
        """Where that of a checkpoint is. Raises ProfileError where others may write."""
        root = cache_folder() / "calibrations" if config.cache_dir is None else Path(config.cache_dir).expanduser()
        own = root / f"{fingerprint[:24]}-{VERSION}"
        for folder in (root, own):
            fault = private_folder(folder)
            if fault:
                raise ProfileError(f"{fault}, or give another --cache-dir")
        return cls(own)

    @property
    def profile(self) -> Path:
        """Its records are beside it."""
        return self.path / "made.profile"

    @property
    def lock(self) -> Path:
        """Held by whoever fills the folder."""
        return self.path / "lock"

    @property
    def finished(self) -> bool:
        """Whether all of it is there."""
        return bool(self.measured()) and self.profile.is_file()

    def measured(self) -> tuple[Measured, ...]:
        """What stand-ins cost on texts of the model's own; none where nobody has measured, or it cannot be read."""
        try:
            found = tuple(Measured(**row) for row in json.loads(self._read("measured.json")))
            sound = all(isinstance(m.tokens, int) and math.isfinite(m.kl) and math.isfinite(m.predicted) for m in found)
            return found if sound else ()
        except (OSError, ValueError, TypeError):
            return ()

    def write_measured(self, rows: Sequence[Measured]) -> None:
        """The last of all files. Raises ProfileError."""
        self._write("measured.json", [asdict(row) for row in rows])

    def discard(self) -> None:
        """It is not finished after all; what is whole of it will be used again."""
        (self.path / "measured.json").unlink(missing_ok=True)

    def progress(self) -> MakerProgress:
        """What whoever fills the folder said last."""
        try:
            return MakerProgress(**json.loads(self._read("progress.json")))
        except (OSError, ValueError, TypeError):
            return MakerProgress()

    def write_progress(self, progress: MakerProgress) -> None:
        """Raises ProfileError."""
        self._write("progress.json", asdict(progress))

    def text(self) -> list[list[int]]:
        """Texts that the model wrote, as token ids; none where there are none that can be read."""
        try:
            found = json.loads(self._read("text.json"))
            return found if all(isinstance(i, int) for text in found for i in text) else []
        except (OSError, ValueError, TypeError):
            return []

    def write_text(self, texts: Sequence[Sequence[int]]) -> None:
        """Raises ProfileError."""
        self._write("text.json", [list(text) for text in texts])

    def _read(self, name: str) -> bytes:
        with (self.path / name).open("rb") as file:
            return file.read(_MOST_BYTES)

    def _write(self, name: str, content: Any) -> None:
        """Whole or not at all."""
        temporary = self.path / f"{name}.part"
        try:
            temporary.write_text(json.dumps(content))
            os.replace(temporary, self.path / name)
        except OSError as error:
            raise ProfileError(
                f"{self.path / name} cannot be written ({error.strerror}), must be. hint: free some space"
            ) from error


def calibrates(config: EngineConfig) -> bool:
    """Whether an engine without profile makes stand-ins by itself: those that `standin` asks for can be made so."""
    return config.mode != "exact" and config.calibrate == "auto" and bool(_kinds(config))


def maker_bytes(layout: ExpertLayout) -> int:
    """Of experts and staging that whoever calibrates holds at a time, beside the records of one measurement."""
    return (_MAKER_SLOTS + 1) * layout.slot_bytes + (64 << 10)


def reserved_bytes(config: EngineConfig, layout: ExpertLayout, *, room: int, on_cpu: bool) -> int:
    """How much of `room` bytes for experts to set aside for records, and for whoever makes them on a CPU; 0 where the
    smallest records of all experts do not fit. Meanwhile so much fewer experts are resident."""
    kinds, count = _kinds(config), sum(layout.experts_per_layer)
    maker = maker_bytes(layout) if on_cpu else 0
    record_bytes = [_record_bytes(config, layout, kind) for kind in kinds]
    if not kinds or room - maker < count * min(record_bytes):
        return 0
    E = max(layout.experts_per_layer)
    split = split_movable(
        bytes_of=np.array([layout.slot_bytes, *record_bytes], dtype=np.int64),
        loss_of=np.stack([np.full((layout.layers, E), loss) for loss in (0.0, *(_PRIOR_LOSS[k] for k in kinds))]),
        budget_bytes=room - maker,
        experts_per_layer=layout.experts_per_layer,
    )
    full = 0 if split.full_LE is None else int(split.full_LE.sum())
    return split.nbytes - full * layout.slot_bytes + maker


def _kinds(config: EngineConfig) -> list[str]:
    """What can be made without being asked for anything else."""
    return [kind for kind in SELF_MADE if config.policy == "ladder" and kind in STANDINS[config.standin]]


def _record_bytes(config: EngineConfig, layout: ExpertLayout, kind: str) -> int:
    """About those of a record: of its bits, by those that an expert has."""
    packed = {f"int{bits}": LowbitFormat(bits=bits).weight_bits for bits in (4, 8)}
    stored = packed.get(config.expert_dtype) or 8.0 * getattr(torch, layout.tensors[0].dtype).itemsize
    fmt = LowbitFormat.of_kind(kind)
    bits = (2 * fmt.of("up_proj").weight_bits + fmt.of("down_proj").weight_bits) / 3
    return math.ceil(layout.slot_bytes * bits / stored)
