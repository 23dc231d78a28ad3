"""The check of a device says first what it will do, and leaves out what held before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from buddymoe_ray.device import open_device
from buddymoe_ray.device_check import main

NAME = open_device("cpu").name
APART = ["kernels", "attention", "decode", "ahead", "shared"]
EVERYWHERE = ["sampling", "exact", "budget", "stand-ins", "speed"]


def said(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_what_will_be_done_is_said_first_and_what_is_late_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    for device, parts in (("cpu", EVERYWHERE), ("interpret", APART + EVERYWHERE)):
        assert main(["--device", device, "--minutes", "0"]) == 1
        first, last = said(capsys)
        assert [*first["will"]] == parts and all(len(about) > 20 for about in first["will"].values())
        assert last == {"ok": False, "failed": 0, "left": parts}


def test_what_held_on_this_device_is_not_done_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nor what a run that was killed had written half of."""
    out, here = tmp_path / "found.jsonl", {"device": "cpu", "name": NAME, "torch": torch.__version__}
    lines = [here | {"part": name, "held": name != "budget", "seconds": 1.0} for name in EVERYWHERE[1:]]
    lines += [here | {"part": "sampling", "held": True, "device": "cuda:0"}, {"check": "exact", "ok": True}]
    out.write_text("\n".join(map(json.dumps, lines)) + '\n{"part": "sampl')
    asked = ["--device", "cpu", "--minutes", "0", "--out", str(out)]
    assert main([*asked, "--resume"]) == 1
    assert said(capsys)[-1]["left"] == ["sampling", "budget"] and main(asked) == 1
    assert said(capsys)[-1]["left"] == EVERYWHERE
    with pytest.raises(SystemExit):
        main(["--resume"])
