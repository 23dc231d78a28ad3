"""Bodies and replies of /tokenize and /detokenize, in vLLM's shapes. Neither is on the token path."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from buddymoe_ray.serve.wire_parts import Message, Tool, WireBody
from buddymoe_ray.serve.work import Spelling, ToolUse, Work
from buddymoe_ray.types import SamplingParams

__all__ = ["DetokenizeRequest", "TokenizeRequest", "tokenize_reply"]


class TokenizeRequest(WireBody):
    """Body of POST /tokenize: a text, or a conversation through the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(default=None, min_length=1)
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Tool] | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("prompt and messages are both or neither given, must be one of them")
        return self

    def work(self, request_id: str) -> Work:
        """What a worker is asked."""
        options = self.chat_template_kwargs or {}
        tools = tuple(tool.record() for tool in self.tools or ())
        return Work(
            request_id=request_id,
            prompts=() if self.prompt is None else (self.prompt,),
            messages=tuple(message.record() for message in self.messages or ()),
            template_options=options if self.add_generation_prompt else {**options, "add_generation_prompt": False},
            tools=ToolUse(tools=tools) if tools else None,
            add_special_tokens=self.add_special_tokens,
            sampling=SamplingParams(),
            spells_only=True,
        )


class DetokenizeRequest(WireBody):
    """Body of POST /detokenize."""

    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0)]] = Field(min_length=1)

    def work(self, request_id: str) -> Work:
        """What a worker is asked."""
        return Work(request_id=request_id, prompts=(tuple(self.tokens),), sampling=SamplingParams(), spells_only=True)


def tokenize_reply(spelled: Spelling, *, max_model_len: int, names: bool) -> dict[str, Any]:
    """Reply of /tokenize; `names` adds what the vocabulary calls the tokens."""
    return {
        "count": len(spelled.token_ids),
        "max_model_len": max_model_len,
        "tokens": list(spelled.token_ids),
        "token_strs": list(spelled.names) if names else None,
    }
