"""`LLM`: a model in this process, without Ray or HTTP. The offline entry to the same Engine that serves.

Knows prompts and results, not scheduling. All prompts are handed over before the first step, so the batch composition,
and with it every bit of a bfloat16 result, is a function of the arguments alone.
"""

from __future__ import annotations

import itertools
import numbers
import sys
import threading
from collections.abc import Sequence
from dataclasses import fields, replace
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

from buddymoe_ray.config import EngineConfig
from buddymoe_ray.engine.engine import Engine
from buddymoe_ray.engine.interrupts import interrupts_wait
from buddymoe_ray.engine.validate import checked_sampling, plain_text, plain_tokens
from buddymoe_ray.errors import ConfigError, RequestError
from buddymoe_ray.types import EngineResult, GenerationRequest, Mode, SamplingParams, TokenEvent, TokenLogprob, Usage

__all__ = ["LLM"]

Prompt = str | Sequence[int]


class LLM:
    """Load a model once, generate many times.

    >>> with LLM("builtin:tiny", memory="25%") as llm:
    ...     print(llm.generate("def add(a, b):", max_tokens=16)[0].text)

    Args:
        model: `builtin:tiny`, a checkpoint folder, or a hub id.
        **options: every other field of `EngineConfig`.

    Raises:
        ConfigError, CheckpointError, BudgetError: before anything is generated, saying what to change.
    """

    def __init__(self, model: str = "builtin:tiny", **options: Any) -> None:
        if options.get("generation_config", EngineConfig.generation_config) != EngineConfig.generation_config:
            raise ConfigError(
                "generation_config is given to LLM, must be left out: generate() is greedy where it is not told else. "
                "hint: pass SamplingParams"
            )
        self._engine = Engine.from_config(EngineConfig.from_options(model=model, **options))
        self._ids = itertools.count()
        self._lock, self._closed = threading.RLock(), False

    @property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer, or None."""
        return self._engine.tokenizer

    @property
    def engine(self) -> Engine:
        """The engine underneath, for measurements."""
        return self._engine

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | None = None,
        *,
        mode: Mode | None = None,
        budget: float | None = None,
        record: bool = False,
        replay: str | None = None,
        progress: bool | None = None,
        **changes: Any,
    ) -> list[EngineResult]:
        """Generate for all prompts; results in the order given. Threads take turns, call by call.

        After an interrupt, or an exception in a callback, nothing of the call is left in the engine. The first Ctrl-C
        waits for the end of the step, a second one does not.

        Args:
            prompts: a string or a list of token ids (numpy's too), or a list of such.
            sampling: how tokens are chosen; default greedy, 16 tokens.
            mode, budget: how missing experts are answered, and the nats per token that `bounded` may spend; default the
                engine's.
            record: return each request's substitutions in `.usage.record`; `replay` is such a record, to be repeated.
            progress: a bar on stderr; default when stderr is a terminal.
            **changes: fields of SamplingParams, e.g. `max_tokens=64`; and `cache_salt`: only calls with the same share
                what was computed of a common beginning.

        Raises:
            RequestError: an argument is of the wrong type, a prompt is empty, too long, or text without a tokenizer, or
                it is closed; nothing is generated then.
        """
        terms = {"mode": mode, "budget": budget, "record": record, "replay": replay}
        terms["cache_salt"] = changes.pop("cache_salt", "")
        chosen = _sampling(sampling, changes)
        requests = [self._request(prompt, chosen, terms) for prompt in _as_list(prompts)]
        with self._lock:
            if self._closed:
                raise RequestError("this LLM is closed, must be open. hint: make another")
            try:
                for request in requests:
                    self._engine.add(request)
                return self._run(requests, sys.stderr.isatty() if progress is None else bool(progress))
            except BaseException:
                self._engine.reset()
                raise

    def _request(self, prompt: Prompt, sampling: SamplingParams, terms: dict[str, Any]) -> GenerationRequest:
        ids = (
            self._engine.encode(plain_text("prompt", prompt))
            if isinstance(prompt, str)
            else plain_tokens("prompt", prompt)
        )
        name = f"llm-{next(self._ids)}"
        return GenerationRequest(request_id=name, prompt_token_ids=tuple(ids), sampling=sampling, **terms)

    def _run(self, requests: list[GenerationRequest], progress: bool) -> list[EngineResult]:
        parts: dict[str, list[TokenEvent]] = {request.request_id: [] for request in requests}
        with tqdm(total=len(requests), desc="generate", disable=not progress, file=sys.stderr) as bar:
            while self._engine.has_work():
                with interrupts_wait():
                    events = self._engine.step()
                for event in events:
                    parts[event.request_id].append(event)
                    bar.update(event.finish_reason is not None)
        return [_result(request, parts[request.request_id]) for request in requests]

    def close(self) -> None:
        """Free the model's memory and close its files."""
        with self._lock:
            self._closed = True
            self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _as_list(prompts: Any) -> list[Prompt]:
    """The prompts one by one; what is no prompt is told when it is read."""
    listed = prompts.tolist() if callable(getattr(prompts, "tolist", None)) else prompts
    if not isinstance(listed, str | list | tuple):
        raise RequestError(
            f"prompts is a {type(prompts).__name__}, must be text, token ids or a list of such. hint: use list()",
            param="prompts",
        )
    several = not isinstance(listed, str) and not any(isinstance(item, numbers.Number) for item in listed[:1])
    return list(listed) if several else [listed]  # type: ignore[arg-type]


def _sampling(sampling: SamplingParams | None, changes: dict[str, Any]) -> SamplingParams:
    unknown = sorted(changes.keys() - {f.name for f in fields(SamplingParams)})
    if unknown:
        raise RequestError(
            f"option is {unknown[0]!r}, must be a field of SamplingParams. hint: check spelling", param=unknown[0]
        )
    return replace(checked_sampling(sampling or SamplingParams(temperature=0.0)), **changes)


def _result(request: GenerationRequest, events: list[TokenEvent]) -> EngineResult:
    last = events[-1]
    if last.finish_reason == "error":
        raise RequestError(last.error or "generation failed")
    logprobs: list[TokenLogprob] = [item for event in events for item in event.logprobs]
    return EngineResult(
        request_id=request.request_id,
        prompt_token_ids=request.prompt_token_ids,
        token_ids=tuple(token for event in events for token in event.token_ids),
        text="".join(event.text for event in events),
        finish_reason=last.finish_reason or "stop",
        usage=last.usage or Usage(),
        logprobs=tuple(logprobs),
        prompt_logprobs=tuple(entry for event in events for entry in event.prompt_logprobs),
    )
