"""Prompts to token ids, the room they leave, and the request's terms: what is checked before an engine sees it.

Knows the tokenizer and the limits, not the engine. On the token path: `Work` → `encode` → engine
requests.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from buddymoe_ray.engine.answers import AnswerForm, answer_form, call_output, reasoned_output
from buddymoe_ray.engine.chat import encode_chat, encode_prompt
from buddymoe_ray.engine.detokenize import IncrementalDetokenizer
from buddymoe_ray.engine.validate import checked_sampling, checked_terms, plain_text, plain_tokens, whole
from buddymoe_ray.errors import RequestError
from buddymoe_ray.serve.deltas import Echo
from buddymoe_ray.serve.refusals import over_long
from buddymoe_ray.serve.work import ChatMessage, Prompt, Refusal, Spelling, Terms, Work
from buddymoe_ray.types import SamplingParams, StructuredOutput

__all__ = [
    "echo_of",
    "encode",
    "hopeless",
    "in_form",
    "longest_text",
    "longest_token",
    "output_limit",
    "resumed_choices",
    "sampling_of",
    "spelling_of",
    "tokenizer_info",
    "usable",
]


def usable(work: Work) -> Work:
    """The same work in plain types. Raises RequestError naming the caller's field.

    HTTP bodies are typed by `wire`; a Python client's arguments come here as they were given.
    """
    for message in work.messages:
        plain_text("messages", json.dumps(asdict(message), ensure_ascii=False, default=str))
    terms, named = work.terms, "tokens" if work.spells_only else "prompt"
    mode, budget, record, replay = checked_terms(terms.mode, terms.budget, terms.record, terms.replay)
    return replace(
        work,
        prompts=tuple(
            plain_text("prompt", prompt) if isinstance(prompt, str) else plain_tokens(named, prompt)
            for prompt in work.prompts
        ),
        sampling=checked_sampling(replace(work.sampling, max_tokens=SamplingParams.max_tokens)),
        max_tokens=None if work.max_tokens is None else whole("max_tokens", work.max_tokens, 0 if work.echo else 1),
        terms=Terms(mode=mode, budget=budget, record=record, replay=replay),
    )


def longest_token(tokenizer: Any | None) -> int:
    """Characters of the longest token of a vocabulary; a prompt of more for each token it may have cannot fit."""
    return 0 if tokenizer is None else max(map(len, tokenizer.get_vocab()), default=0)


def longest_text(work: Work) -> int:
    """Characters of the longest text of some work; a conversation is one."""
    texts = [len(prompt) for prompt in work.prompts if isinstance(prompt, str)]
    texts.append(
        sum(
            len("".join(content) if isinstance(content, tuple) else str(content or ""))
            for content in (message.content for message in work.messages)
        )
    )
    return max(texts)


def hopeless(work: Work, *, most_tokens: int, token_characters: int) -> Refusal | None:
    """Why a text cannot fit, whatever its tokens are: told before anybody takes the time to find out."""
    most, longest = most_tokens * token_characters, longest_text(work)
    if not token_characters or longest <= most:
        return None
    return over_long(
        f"{work.prompt_field} is {longest} characters, must be at most {most} for {most_tokens} tokens. "
        "hint: shorten it",
        param=work.prompt_field,
    )


def encode(tokenizer: Any | None, work: Work) -> tuple[tuple[int, ...], ...]:
    """Token ids of every prompt of a call; a conversation is one prompt.

    Raises:
        RequestError: text without a tokenizer, messages that no chat template takes, or a text of no tokens.
    """
    if work.messages:
        messages = [_template_fields(message) for message in work.messages]
        tools = () if work.tools is None else work.tools.tools
        return (tuple(encode_chat(tokenizer, messages, work.template_options, tools)),)
    return tuple(
        tuple(encode_prompt(tokenizer, prompt, specials=work.add_special_tokens)) if isinstance(prompt, str) else prompt
        for prompt in work.prompts
    )


def _template_fields(message: ChatMessage) -> dict[str, Any]:
    fields: dict[str, Any] = {"role": message.role, "content": message.content}
    optional = {name: getattr(message, name) for name in ("name", "reasoning_content", "tool_call_id", "tool_calls")}
    return fields | {name: value for name, value in optional.items() if value}


def echo_of(tokenizer: Any | None, prompt: Prompt, token_ids: tuple[int, ...]) -> Echo:
    """What is told of a prompt: the caller's own text, or that of its tokens."""
    if tokenizer is None:
        return Echo(token_ids=token_ids, text="", offsets=(0,) * len(token_ids))
    spelled = IncrementalDetokenizer(tokenizer, (), specials=True)
    text = "".join(spelled.push([token]) for token in token_ids) + spelled.flush()
    text = prompt if isinstance(prompt, str) else text
    begins = [min(begin, len(text)) for begin in spelled.begins]
    offsets = (*begins, *[len(text)] * (len(token_ids) - len(begins)))
    return Echo(token_ids=token_ids, text=text, offsets=offsets)


def spelling_of(tokenizer: Any | None, token_ids: tuple[int, ...]) -> Spelling:
    """What tokens are called and what they say, special ones too. Raises RequestError without a tokenizer, or for ids
    that it has not."""
    if tokenizer is None:
        raise RequestError("tokens are of a model without tokenizer, must have one. hint: nothing can be spelled")
    plain_tokens("tokens", token_ids, len(tokenizer))
    text = tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return Spelling(token_ids=token_ids, names=tuple(tokenizer.convert_ids_to_tokens(list(token_ids))), text=text)


def tokenizer_info(tokenizer: Any | None) -> dict[str, Any]:
    """What is known of a tokenizer, by the names of tokenizer_config.json."""
    if tokenizer is None:
        return {}
    found = {"tokenizer_class": type(tokenizer).__name__, "model_max_length": tokenizer.model_max_length}
    found |= {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    return found | {"vocab_size": len(tokenizer), "chat_template": getattr(tokenizer, "chat_template", None)}


def in_form(tokenizer: Any, work: Work) -> tuple[Work, AnswerForm | None]:
    """How the answers to a conversation are read, and the work with what that asks of their text.

    Raises:
        RequestError: there are tools, and how the model writes calls is not known or cannot be forced.
    """
    use, sampling = work.tools, work.sampling
    form = None
    if work.messages and work.reads_answer:
        form = answer_form(tokenizer, work.template_options, () if use is None else use.tools)
    if use is not None and (form is None or "tool_calls" not in form.template["fields"]):
        raise RequestError(
            "tools is given, must be left out: how this model writes calls is not known. hint: give the checkpoint's "
            "tokenizer_config.json a response_template",
            param="tools",
        )
    if form is None:
        return work, None
    wanted = sampling.structured_outputs
    if use is not None and (use.required or not use.several):
        tools = [tool for tool in use.tools if use.only in (None, tool["function"]["name"])]
        wanted = call_output(form, tools, must=use.required, several=use.several)
    elif isinstance(wanted, StructuredOutput):
        wanted = reasoned_output(form, wanted)
    visible = sampling.skip_special_tokens and not form.specials
    return replace(work, sampling=replace(sampling, skip_special_tokens=visible, structured_outputs=wanted)), form


def sampling_of(work: Work, defaults: Mapping[str, Any]) -> SamplingParams:
    """How the work's tokens are chosen: as it says, and where it says nothing by `defaults`, the checkpoint's own."""
    open_ = {name: value for name, value in defaults.items() if name not in work.given and name != "max_tokens"}
    return replace(work.sampling, **open_)


def output_limit(
    prompt_tokens: int, work: Work, *, max_model_len: int, kv_tokens: int, default_max_tokens: int
) -> int | Refusal:
    """How many tokens may follow a prompt, or why none or not so many can.

    Args:
        prompt_tokens: length of the prompt.
        work: its `max_tokens` is a demand; None takes what fits, at most `default_max_tokens`.
        max_model_len: most tokens of prompt and output of the model.
        kv_tokens: most tokens that the KV cache holds.
    """
    limit = min(max_model_len, kv_tokens)
    name = "the model's context" if max_model_len <= kv_tokens else "the KV cache"
    room = limit - prompt_tokens
    wanted = work.max_tokens
    if room < 1:
        return over_long(
            f"{work.prompt_field} is {prompt_tokens} tokens, must be at most {limit - 1} ({name} is {limit} tokens, "
            "the output included). hint: shorten it",
            param=work.prompt_field,
        )
    if wanted is not None and wanted > room:
        return over_long(
            f"{work.prompt_field} and {work.limit_field} are {prompt_tokens} + {wanted} tokens, must be at most "
            f"{limit} ({name}). hint: lower {work.limit_field} to {room}",
            param=work.prompt_field,
        )
    return min(room, default_max_tokens) if wanted is None else wanted


def resumed_choices(work: Work) -> dict[int, tuple[int, ...]]:
    """The choices to answer, each with the tokens its client has. Raises RequestError for unknown choices."""
    if not work.resume:
        return dict.fromkeys(range(work.choices), ())
    chosen = {resumed.choice: resumed.token_ids for resumed in work.resume}
    if len(chosen) < len(work.resume) or not chosen.keys() <= set(range(work.choices)):
        named = [resumed.choice for resumed in work.resume]
        raise RequestError(
            f"resume names choices {named}, must be different ones below {work.choices}. hint: ask again from the start"
        )
    return chosen
