"""Measures what each rounding costs on builtin:tiny when every expert is a copy; run it to write the table's rows.

Calibrated on every second window of the held-out text, judged on the others, in float32 by stock transformers. Minutes.

Legend: W windows, S tokens of one, V vocabulary.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from buddymoe_ray.calibrate import rounding
from buddymoe_ray.calibrate.fitting import Fitting, RecordMaker
from buddymoe_ray.calibrate.samples import walk_layer
from buddymoe_ray.calibrate.trace import record_trace
from buddymoe_ray.config import EngineConfig
from buddymoe_ray.engine.build import build_parts
from buddymoe_ray.kernels import LowbitFormat, dequantise, pack, packed_parts
from buddymoe_ray.kernels.rounding import round_nearest
from buddymoe_ray.models.expert_math import expert_math
from buddymoe_ray.models.reference import reference_model
from buddymoe_ray.models.resolve import resolve_model
from buddymoe_ray.models.tokenizer import load_tokenizer

WINDOW, BITS = 512, (2, 3, 4)
OUT = Path(__file__).parent / "golden" / "measured" / "rounding.jsonl"


def windows() -> list[tuple[int, ...]]:
    """The held-out text in windows."""
    folder = resolve_model("builtin:tiny")
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None
    found: list[tuple[int, ...]] = []
    for path in sorted((folder / "heldout").glob("*.txt")):
        ids = tokenizer.encode(path.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)
        found += [tuple(ids[at : at + WINDOW]) for at in range(0, len(ids) - WINDOW + 1, WINDOW)]
    return found


@contextmanager
def least_squares() -> Iterator[None]:
    """Roundings with the scales of least squared error."""
    kept = rounding.pack_plain, rounding.unbiased
    rounding.pack_plain = lambda weight, fmt: pack(*round_nearest(weight, fmt), fmt)  # type: ignore[assignment]
    rounding.unbiased = lambda rounded, *_: rounded  # type: ignore[assignment]
    try:
        yield
    finally:
        rounding.pack_plain, rounding.unbiased = kept  # type: ignore[assignment]


class Judge:
    """The model with every expert replaced, beside what it says with its own."""

    def __init__(self, texts: list[tuple[int, ...]]) -> None:
        self._model = reference_model(resolve_model("builtin:tiny")).float().eval()
        self.experts = [m for name, m in self._model.named_modules() if name.endswith(".experts")]
        self._ids_WS = torch.tensor(texts)
        self._exact = list(self._said())

    def _said(self) -> Iterator[Tensor]:
        with torch.no_grad():
            for ids_nS in self._ids_WS.split(8):
                yield self._model(ids_nS, use_cache=False).logits[:, :-1].log_softmax(dim=-1)

    def score(self) -> dict[str, float]:
        """Rise of perplexity in % and divergence in nats, with standard errors over windows."""
        rises, divergences = list[Tensor](), list[Tensor]()
        for ids_nS, exact, ours in zip(self._ids_WS.split(8), self._exact, self._said(), strict=True):
            wanted = ids_nS[:, 1:, None]
            rises.append((exact.gather(2, wanted) - ours.gather(2, wanted)).mean(dim=(1, 2)))
            divergences.append((exact.exp() * (exact - ours)).sum(dim=2).mean(dim=1))
        rise, kl = torch.cat(rises).double(), torch.cat(divergences).double()
        errors = [float(value.std() / math.sqrt(len(value))) for value in (rise, kl)]
        mean = float(rise.mean())
        return {
            "dppl_percent": 100 * math.expm1(mean),
            "dppl_se": 100 * math.exp(mean) * errors[0],
            "kl": float(kl.mean()),
            "kl_se": errors[1],
            "tokens": self._ids_WS.shape[0] * (WINDOW - 1),
        }


def replaced(judge: Judge, parts: Any, trace: Any, bits: int, *, compensated: bool) -> None:
    """Every expert of `judge` by its copy."""
    fmt = LowbitFormat(bits=bits)
    for layer, module in enumerate(judge.experts):
        math_ = expert_math(parts.loaded.experts[layer], parts.loaded.layout)
        maker = RecordMaker(kind=f"lowbit{bits}", math=math_, fitting=Fitting(compensated=compensated))
        for sample in walk_layer(parts.experts.cache, trace, layer, math_):
            record = maker.make(sample)
            for name in (math_.first, "down_proj"):
                getattr(module, name).data[sample.expert] = dequantise(packed_parts(record, name), fmt)


def measure() -> Iterator[dict[str, Any]]:
    """A row per rounding, scale and width."""
    texts = windows()
    judge = Judge(texts[1::2])
    parts = build_parts(EngineConfig(memory="100%", dtype="float32"), text=False)
    with TemporaryDirectory() as folder, record_trace(parts, texts[::2], Path(folder), progress=_silent) as trace:
        for compensated in (False, True):
            for bits in BITS:
                for unbiased in (False, True):
                    if unbiased:
                        replaced(judge, parts, trace, bits, compensated=compensated)
                    else:
                        with least_squares():
                            replaced(judge, parts, trace, bits, compensated=compensated)
                    row = {"rounding": "compensated" if compensated else "plain", "unbiased": unbiased, "bits": bits}
                    yield row | judge.score()
    parts.experts.cache.close()


def _silent(items: Any, **_: Any) -> Any:
    return items


if __name__ == "__main__":
    with OUT.open("w") as file:
        for found in measure():
            print(json.dumps(found, separators=(",", ":")), file=file, flush=True)
