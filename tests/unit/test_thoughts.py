"""Thoughts: as long as a budget allows and not a token longer, on and off by whatever switch a chat template has."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_tokenizers import bpe

from buddymoe_ray import LLM
from buddymoe_ray.engine.answers import answer_form, reasoned_output
from buddymoe_ray.engine.json_schema import checked_output
from buddymoe_ray.engine.structured import Grammars, mask_logits
from buddymoe_ray.engine.thoughts import ThoughtLimit, thought_budget
from buddymoe_ray.errors import RequestError
from buddymoe_ray.serve.thinking import in_template
from buddymoe_ray.serve.work import ChatMessage, Thinking, Work
from buddymoe_ray.types import GenerationRequest, SamplingParams, ThoughtBudget

WRITES = "{{ messages[0]['content'] }}"
THINKS = "{# </think> #}{{ messages[0]['content'] }}{% if add_generation_prompt %}<|im_start|>OPENING{% endif %}"
SWITCHED = "{{ '<think>' if enable_thinking is not defined or enable_thinking else '<think></think>' }}"


def tokenizer_of(opening: str, *, marks: tuple[str, ...] = ("<think>", "</think>")) -> Any:
    tokenizer = copy.deepcopy(bpe())
    tokenizer.add_tokens(list(marks))
    tokenizer.chat_template = THINKS.replace("OPENING", opening)
    return tokenizer


def work_of(thinking: Thinking, **options: Any) -> Work:
    return Work(
        request_id="r",
        messages=(ChatMessage(role="user", content="x"),),
        sampling=SamplingParams(),
        thinking=thinking,
        template_options=options,
        reads_answer=True,
    )


def test_a_limit_counts_thoughts_alone_and_lets_nothing_else_come() -> None:
    limit = ThoughtLimit(ThoughtBudget(tokens=2, begin=(7, 8), end=63))
    for token, spent in ((1, False), (7, False), (8, False), (5, False), (5, True), (63, False), (1, False)):
        limit.accept(token)
        assert limit.spent == spent, token
    limit.accept(7)
    assert not limit.spent
    limit.accept(8)
    assert limit.spent, "what begins again has nothing left"
    logits_RV = torch.zeros(1, 70)
    mask_logits(logits_RV, [limit])
    assert logits_RV[0].isfinite().nonzero().flatten().tolist() == [63]
    assert ThoughtLimit(ThoughtBudget(tokens=0, begin=(), end=0)).spent


def test_greedy_thoughts_are_cut_and_go_on_wherever_they_are_resumed() -> None:
    params = SamplingParams(temperature=0.0, max_tokens=12, logprobs=1)
    with LLM("builtin:tiny", memory="50%", mode="exact") as llm:
        free = llm.generate("def add(a, b):", params)[0]
        end = next(token for token in range(300, 900) if token not in free.token_ids)
        for begin, at in ((), 3), (free.token_ids[1:3], 6):
            request = GenerationRequest(
                request_id="r",
                prompt_token_ids=free.prompt_token_ids,
                sampling=params,
                thoughts=ThoughtBudget(tokens=3, begin=begin, end=end),
            )
            events = list(_run(llm, request))
            ids = tuple(token for event in events for token in event.token_ids)
            assert ids[: at + 1] == (*free.token_ids[:at], end)
            told = [one for event in events for one in event.logprobs]
            assert told[at].top[0] == (free.token_ids[at], free.logprobs[at].logprob), "the model's own"
            for cut in range(1, len(ids)):
                moved = _run(llm, replace(request, resumed_token_ids=ids[:cut]))
                assert tuple(token for event in moved for token in event.token_ids) == ids[cut:]


def _run(llm: LLM, request: GenerationRequest) -> Any:
    llm.engine.add(request)
    return llm.engine.drain()


def test_a_budget_and_a_grammar_rule_one_after_the_other() -> None:
    tokenizer = tokenizer_of("<think>")
    form = answer_form(tokenizer, {})
    budget = thought_budget(tokenizer, form, 2)
    assert form is not None and budget is not None and budget.begin == ()
    wanted = reasoned_output(form, checked_output({"json": {"type": "integer"}}))
    limit, grammar = ThoughtLimit(budget), Grammars(tokenizer, len(tokenizer)).open(wanted, frozenset({0}))
    thoughts = tokenizer.encode("So", add_special_tokens=False)
    for token in (*thoughts * 2, budget.end)[-3:]:
        logits_RV = torch.zeros(1, len(tokenizer))
        mask_logits(logits_RV, [limit if limit.spent else grammar])
        assert logits_RV[0, token].isfinite()
        limit.accept(token)
        grammar.accept(token)
    logits_RV = torch.zeros(1, len(tokenizer))
    mask_logits(logits_RV, [grammar])
    allowed = tokenizer.convert_ids_to_tokens(logits_RV[0].isfinite().nonzero().flatten().tolist())
    assert {"1", "-"} <= set(allowed) and "a" not in allowed


def test_where_thoughts_end_is_known_by_a_token_of_its_own() -> None:
    begun, free = tokenizer_of("<think>"), tokenizer_of("")
    (begin,), (end,) = (begun.encode(mark, add_special_tokens=False) for mark in ("<think>", "</think>"))
    assert thought_budget(begun, answer_form(begun, {}), 9) == ThoughtBudget(tokens=9, begin=(), end=end)
    assert thought_budget(free, answer_form(free, {}), 9) == ThoughtBudget(tokens=9, begin=(begin,), end=end)
    led = tokenizer_of("<think>So,")
    assert thought_budget(led, answer_form(led, {}), 9) == ThoughtBudget(tokens=9, begin=(), end=end)
    closed = tokenizer_of("<think></think>")
    assert thought_budget(closed, answer_form(closed, {}), 9) is None and thought_budget(free, None, 9) is None
    spelled = tokenizer_of("<think>", marks=())
    with pytest.raises(RequestError, match="no token of this model is known to end its thoughts") as caught:
        thought_budget(spelled, answer_form(spelled, {}), 9)
    assert caught.value.param == "thinking_token_budget"
    harmony = tokenizer_of("", marks=("<|channel|>", "<|message|>", "<|end|>"))
    harmony.chat_template += "{# <|channel|> to=functions #}"
    found = thought_budget(harmony, answer_form(harmony, {}), 9)
    assert found is not None and harmony.decode([*found.begin, found.end]) == "<|channel|>analysis<|message|><|end|>"


def test_wishes_have_their_effect_or_are_refused() -> None:
    switched, plain, always = tokenizer_of(SWITCHED), copy.deepcopy(bpe()), tokenizer_of("<think>")
    bare = copy.deepcopy(plain)
    plain.chat_template, bare.chat_template = WRITES + "{{ reasoning_effort }}", WRITES
    for wish, options in (
        (Thinking(enabled=False), {"enable_thinking": False}),
        (Thinking(enabled=True), {"enable_thinking": True}),
        (Thinking(effort="none"), {"enable_thinking": False}),
        (Thinking(effort="medium", budget=3), {}),
        (Thinking(effort="high", usual="high"), {}),
    ):
        assert in_template(switched, work_of(wish)).template_options == options
    given = work_of(Thinking(enabled=False), enable_thinking=True)
    assert in_template(switched, given).template_options == {"enable_thinking": True}
    assert in_template(plain, work_of(Thinking(effort="low"))).template_options == {"reasoning_effort": "low"}
    assert in_template(plain, work_of(Thinking(enabled=False))).template_options == {}
    assert in_template(always, work_of(Thinking(enabled=True))).template_options == {}
    for tokenizer, wish, named in (
        (switched, Thinking(effort="high"), "reasoning_effort is high"),
        (plain, Thinking(enabled=True), "enable_thinking asks for thoughts.* writes no thoughts"),
        (always, Thinking(enabled=False), "enable_thinking asks for none.* thinks whatever it is asked"),
        (always, Thinking(effort="none"), "^reasoning_effort asks for none.* thinks whatever it is asked"),
        (bare, Thinking(effort="high"), "reasoning_effort is high"),
        (bare, Thinking(enabled=True), "writes no thoughts"),
    ):
        with pytest.raises(RequestError, match=named):
            in_template(tokenizer, work_of(wish))
