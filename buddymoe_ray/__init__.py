"""Serve Mixture-of-Experts models that are bigger than your memory: exact when asked, honest always.

`from buddymoe_ray import LLM` runs a model in this process without Ray; `serve run deployments/tiny-cpu.yaml` serves
it.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from buddymoe_ray.config import EngineConfig
from buddymoe_ray.types import EngineResult, SamplingParams, Usage

if TYPE_CHECKING:
    from buddymoe_ray.engine.llm import LLM

__version__ = "0.1.0"
__all__ = ["LLM", "EngineConfig", "EngineResult", "SamplingParams", "Usage", "__version__"]


# torch reads this at its first allocation: large tensors in huge pages (see cache/shared/pages.py)
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def __getattr__(name: str) -> Any:
    if name == "LLM":  # imported late: `import buddymoe_ray` stays free of torch
        from buddymoe_ray.engine.llm import LLM

        return LLM
    raise AttributeError(f"module 'buddymoe_ray' has no attribute {name!r}")
