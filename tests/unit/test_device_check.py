"""The check of a device says first what it will do, and leaves out what held before."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from buddymoe_ray import device_check
from buddymoe_ray.device import open_device
from buddymoe_ray.device_check import main
from buddymoe_ray.models.reference import greedy_difference
from buddymoe_ray.types import EngineResult, TokenLogprob, Usage

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


def test_stand_ins_are_compared_under_one_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU's would have other records for the same memory: .12 nats between right answers."""
    monkeypatch.setattr(device_check, "PROMPTS", device_check.PROMPTS[:1])
    device = "cuda" if torch.cuda.is_available() else "interpret"
    found = next(iter(device_check.check_standins(device, new_tokens=2, apart=True)))
    assert found["ok"] and found["stood_in"] > 10 and found["nats_apart"] < 1e-5


def answered(*tops: tuple[tuple[int, float], tuple[int, float]]) -> EngineResult:
    """A greedy answer of tokens with these alternatives."""
    entries = tuple(TokenLogprob(token_id=top[0][0], logprob=top[0][1], top=top) for top in tops)
    ids = tuple(entry.token_id for entry in entries)
    more: dict[str, Any] = {"request_id": "", "prompt_token_ids": (), "text": "", "finish_reason": "length"}
    return EngineResult(token_ids=ids, usage=Usage(), logprobs=entries, **more)


def test_answers_may_part_at_a_near_tie_and_nowhere_else() -> None:
    first = ((5, -0.5), (6, -1.5))
    tied, parted, wide = ((7, -0.7), (8, -0.7025)), ((8, -0.7), (7, -0.702)), ((8, -0.2), (7, -1.9))
    found = partial(greedy_difference, answered(first, tied, first), tolerance=0.01)
    assert found(answered(first, tied, first)) == 0
    assert found(answered(first, parted, wide)) == pytest.approx(0.0025), "what comes behind says nothing"
    assert found(answered(((5, -0.52), (6, -1.5)), tied, first)) == pytest.approx(0.02)
    assert found(answered(first, wide, first)) > 1
    assert found(answered(first, ((9, -0.6), (7, -0.7)), first)) == found(answered(first, tied)) == float("inf")


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
