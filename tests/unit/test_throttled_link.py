"""What is foretold of an engine behind a slow link: by bytes alone, which need no clock."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from nodes_of_gpus import CARDS, Holding, work_of
from throttled_link import TINY, Arithmetic, Link, config_of, disks_behind, foretold, model_at

from buddymoe_ray.engine.engine import Engine
from buddymoe_ray.models.resolve import resolve_model
from buddymoe_ray.residency.plan import planned_shape
from buddymoe_ray.residency.speed import decode_seconds, prefill_seconds
from buddymoe_ray.types import GenerationRequest, SamplingParams

BYTES_S = 1e6
NOTHING = Arithmetic(token=1e-12, stood_in=1e-12, prompt=1e-12)


@pytest.mark.parametrize(("memory", "mode"), [("50%", "exact"), ("25%", "exact"), ("25%", "fast")])
def test_the_bytes_of_a_token_are_those_that_the_link_carries(memory: str, mode: str, tmp_path: Path) -> None:
    config, (_, ids) = config_of(TINY, memory, mode), model_at(TINY, tmp_path)
    said, link = foretold(config, NOTHING, BYTES_S), Link(math.inf)
    engine = Engine.from_config(config, text=False)
    sampling = SamplingParams(temperature=1.0, seed=1, max_tokens=129, ignore_eos=True)
    engine.add(GenerationRequest(request_id="r", prompt_token_ids=ids[-160:], sampling=sampling))
    with disks_behind(link):
        at_first = link.nbytes if engine.step() else 0
        while engine.has_work():
            at_first = link.nbytes if any(e.token_ids for e in engine.step()) and not at_first else at_first
    engine.close()
    carried = (link.nbytes - at_first) / 128
    assert at_first > 0, "the prompt read nothing"
    assert carried == pytest.approx(said.read_bytes, rel=0.2, abs=1e4), f"{said} for {carried}"
    assert at_first == pytest.approx(said.prompt_bytes, rel=0.2), f"{said} for a prompt of {at_first}"
    assert said.tok_s == pytest.approx(1 / (1e-12 + said.read_bytes / BYTES_S))


@pytest.mark.parametrize("gpus", [1, 2, 4])
def test_gpus_that_share_bring_from_the_host_what_none_of_them_holds(gpus: int) -> None:
    """A token all of it, of a prompt each its share."""
    shape, nvlink = planned_shape(config_of(TINY, "50%", "exact"), resolve_model(TINY)), CARDS[-1]
    slow = replace(nvlink, host=1.0, peer=math.inf).speed()  # so that seconds are bytes of the link to the host
    for card, sharing in ((nvlink, gpus), (CARDS[0], 1)):
        holding = Holding.of(0.2, "exact", card, gpus, scale=1.0)
        assert holding is not None and holding.sharing == sharing
        token, prompt = work_of(shape, 1.0, "exact", holding)
        layers, experts = shape.num_layers, shape.experts_per_layer[0]
        of_one = (1 - (1 - 1 / experts) ** shape.experts_per_token) / layers  # the last layer runs one row
        read = (1 - 0.2 * sharing) * shape.total_expert_bytes / sharing * ((layers - 1) / layers + of_one)
        assert prefill_seconds(prompt, slow, 100_000) == pytest.approx(read, rel=1e-3, abs=1.0)
        asked = token.active * token.expert_bytes * (1 - (0.2 * sharing) ** 0.7)
        assert decode_seconds(token, slow, 0) == pytest.approx(asked, rel=1e-3, abs=1.0)
