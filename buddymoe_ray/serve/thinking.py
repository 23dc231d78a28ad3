"""What a request asks of a model's thoughts, as variables of its chat template. Each has its effect or is refused.

Knows the tokenizer, not the engine. On the token path: `Work` → `in_template` → `prompts.encode`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from buddymoe_ray.engine.answers import answer_form
from buddymoe_ray.engine.chat import template_variables
from buddymoe_ray.errors import RequestError
from buddymoe_ray.serve.work import Work

__all__ = ["in_template"]

_SWITCHES = ("enable_thinking", "thinking")
"""What templates call the variable that turns thoughts on or off: Qwen's and GLM's; DeepSeek's and Granite's."""


def in_template(tokenizer: Any, work: Work) -> Work:
    """The same work, with what it asks of thoughts in `template_options`; what stands there already wins.

    Raises:
        RequestError: the model's chat template has no place for it.
    """
    wish = work.thinking
    asks = work.messages and (wish.enabled, wish.effort) != (None, None)
    if not asks or not getattr(tokenizer, "chat_template", None):  # without one it is refused where it is rendered
        return work
    tools = () if work.tools is None else work.tools.tools
    known, options = template_variables(tokenizer, tools), dict[str, Any]()
    enabled, field = wish.enabled, "chat_template_kwargs.enable_thinking"
    if "reasoning_effort" in known:
        options |= {"reasoning_effort": wish.effort} if wish.effort is not None else {}
    elif wish.effort == "none":
        enabled, field = False, "reasoning_effort"
    elif wish.effort not in (None, wish.usual):
        raise RequestError(
            f"reasoning_effort is {wish.effort}, must be {wish.usual}, none or left out: the model's chat template "
            "reads no such variable. hint: limit thoughts by thinking_token_budget",
            param="reasoning_effort",
        )
    switch = next((name for name in _SWITCHES if name in known), None)
    if enabled is not None and switch is not None:
        options[switch] = enabled
    work = replace(work, template_options=options | dict(work.template_options))
    if enabled is not None and switch is None:
        _check_is(enabled, field, tokenizer, work)
    return work


def _check_is(enabled: bool, field: str, tokenizer: Any, work: Work) -> None:
    """Raises RequestError, naming the field, unless the model thinks, or does not, without being told."""
    form = answer_form(tokenizer, work.template_options)
    thinks = form is not None and form.thinks
    if thinks != enabled:
        always = "thinks whatever it is asked" if thinks else "writes no thoughts"
        raise RequestError(
            f"{field} asks for {'thoughts' if enabled else 'none'}, must be left out: this model {always}. "
            "hint: leave it out",
            param=field,
        )
