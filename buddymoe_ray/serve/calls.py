"""One call of OpenAI's or Anthropic's API, before anybody answers it: its endpoint, its body checked, what a worker is
asked, and who writes the reply.

Knows neither HTTP nor workers: the routes open a call for a POST, `buddymoe batch` for a line of its input. On the
token path: bytes → `open_call` → `Work`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from buddymoe_ray.errors import ModelNotFound
from buddymoe_ray.serve.refusals import in_words
from buddymoe_ray.serve.render import ChatRenderer, CompletionRenderer, Renderer, ReplyHead
from buddymoe_ray.serve.render_messages import MessagesRenderer
from buddymoe_ray.serve.render_responses import ResponsesRenderer
from buddymoe_ray.serve.wire import ChatRequest, CompletionRequest, parse_chat, parse_completion
from buddymoe_ray.serve.wire_messages import MESSAGES_WORDS, parse_messages
from buddymoe_ray.serve.wire_responses import RESPONSES_WORDS, parse_response
from buddymoe_ray.serve.work import Refusal, Work

__all__ = [
    "CHAT",
    "COMPLETIONS",
    "ENDPOINTS",
    "MAX_BODY_BYTES",
    "MESSAGES",
    "RESPONSES",
    "Call",
    "Endpoint",
    "ModelNames",
    "open_call",
    "too_long",
]

MAX_BODY_BYTES = 16 << 20
Body = ChatRequest | CompletionRequest


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """A path that is answered: how its bodies are read, its replies written, and what their ids begin with. `words` are
    its names of the fields of chat completions that it calls otherwise."""

    path: str
    prefix: str
    parse: Callable[[bytes], Body]
    renderer: Callable[[ReplyHead], Renderer]
    words: Mapping[str, str] = field(default_factory=dict)


CHAT = Endpoint(path="/v1/chat/completions", prefix="chatcmpl", parse=parse_chat, renderer=ChatRenderer)
COMPLETIONS = Endpoint(path="/v1/completions", prefix="cmpl", parse=parse_completion, renderer=CompletionRenderer)
MESSAGES = Endpoint(
    path="/v1/messages", prefix="msg", parse=parse_messages, renderer=MessagesRenderer, words=MESSAGES_WORDS
)
RESPONSES = Endpoint(
    path="/v1/responses", prefix="resp", parse=parse_response, renderer=ResponsesRenderer, words=RESPONSES_WORDS
)
ENDPOINTS = {endpoint.path: endpoint for endpoint in (CHAT, COMPLETIONS)}


@dataclass(frozen=True, kw_only=True)
class ModelNames:
    """What a service calls its model; clients may also ask for `path`, the model as it was given."""

    model: str
    path: str = ""

    def check(self, name: str) -> None:
        """Raises ModelNotFound for the name of another."""
        if name not in (self.model, self.path or self.model):
            raise ModelNotFound(
                f"model is {name!r}, must be {self.model!r}. hint: GET /v1/models lists what is served", param="model"
            )


@dataclass(frozen=True, kw_only=True)
class Call:
    """A body that was accepted, as `work`, and the renderer of its one reply."""

    body: Body
    work: Work
    renderer: Renderer


def open_call(
    endpoint: Endpoint, body: bytes, names: ModelNames, *, unique: str, created: int, flush_seconds: float = 0.0
) -> Call:
    """Read a body.

    Args:
        body: JSON of at most MAX_BODY_BYTES, which the caller has checked.
        unique: what makes the call's id its own, after the endpoint's prefix.
        created: when it came, in seconds since 1970.
        flush_seconds: tokens of this much time share a message, where the body asks for a stream.

    Raises:
        RequestError: naming the field; ModelNotFound for the name of another model.
    """
    parsed = endpoint.parse(body)
    names.check(parsed.model)
    request_id = f"{endpoint.prefix}-{unique}"
    head = ReplyHead(
        id=request_id,
        created=created,
        model=names.model,
        include_usage=parsed.include_usage,
        logprobs=parsed.wants_logprobs,
        repeats=parsed.repeats,
    )
    with in_words(endpoint.words):
        work = parsed.work(request_id, flush_seconds=flush_seconds)
    return Call(body=parsed, work=work, renderer=endpoint.renderer(head))


def too_long() -> Refusal:
    """A body of more than MAX_BODY_BYTES."""
    return Refusal(status=413, message=f"the body is too long, must be at most {MAX_BODY_BYTES} bytes")
