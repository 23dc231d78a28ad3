"""The training record of builtin:tiny and the model card made from it.

Pure text from numbers: reads nothing, computes nothing, so that every figure in the card is one in training.json.
Neighbours: export.py fills the record and writes both files.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from buddymoe_ray.models.tiny.corpus import HELDOUT_PERMILLE
from buddymoe_ray.models.tiny.evaluate import Evaluation
from buddymoe_ray.models.tiny.trainer import TrainConfig


@dataclass(frozen=True, kw_only=True)
class TrainingRecord:
    """What was trained, on what, for how long, and how well it does on files it never saw."""

    parameters: int
    steps: int
    decay_steps: int
    tokens: int
    corpus_tokens: int
    corpus_documents: int
    seconds: int
    commands: tuple[str, ...]
    heldout: dict[str, Evaluation]
    shipped_text: dict[str, Evaluation]
    torch: str
    transformers: str


FRONT = """\
---
license: psf-2.0
library_name: transformers
pipeline_tag: text-generation
language: [en, code]
---

# builtin:tiny

A Mixture-of-Experts language model of {millions:.1f} M parameters that ships with buddymoe-ray, so that every command,
test and benchmark runs on a model whose experts really differ. It is a stock Qwen3-MoE and loads with
`AutoModelForCausalLM`. It writes plausible Python and documentation; it knows nothing else, and nothing it says
should be relied on.

| | |
|---|---|
| shape | hidden {hidden}, {layers} layers, {heads} heads of 32, tied embeddings |
| experts | {experts} a layer, top-{top_k}, SwiGLU of {ffn} |
| tokenizer | byte-level BPE, {vocab} tokens, ChatML template, ends at `<|im_end|>` or `<|endoftext|>` |
| context | {context} tokens |
| weights | bf16 |
"""

TRAINING = """
## Training
{tokens:.1f} M tokens in {steps} steps of {batch}: {epochs:.2f} epochs of {corpus:.2f} M tokens, {documents} documents.
The learning rate fell linearly to zero over the last {decay} steps. {minutes:.0f} minutes on two shared CPU cores
({speed:.0f} tokens/s), float32. Muon for attention and expert matrices, AdamW for the rest; balance loss {balance}.
torch {torch}, transformers {transformers}.
Each command below was stopped by hand and continued by the next; seconds count kept steps only.

```
{commands}
python -m buddymoe_ray.models.tiny.export --run DIR
```

## Text
The Python standard library and the Python documentation (reStructuredText sources), both under the PSF License 2.0;
duplicates removed by content, {heldout:.0f} % of the files held out by a hash of their path. About {chat:.0f} % of the
training text are chat documents made of the training files' own functions: the question names a function and the first
line of its docstring, the answer is its code. `heldout/` holds some of the held-out files, for evaluation anywhere.
"""


def _score_rows(evaluations: dict[str, Evaluation]) -> list[str]:
    rows = ["| context / stride | text | documents | bytes | nats/token | perplexity | bits/byte |", "|---" * 7 + "|"]
    for evaluation in evaluations.values():
        for kind, score in [*evaluation.scores.items(), ("**total**", evaluation.total)]:
            rows.append(
                f"| {evaluation.context} / {evaluation.stride} | {kind} | {score.documents} | {score.bytes:,} |"
                f" {score.nats_per_token:.3f} | {math.exp(score.nats_per_token):.1f} | {score.bits_per_byte:.3f} |"
            )
    return rows


def _balance_rows(evaluation: Evaluation) -> list[str]:
    rows = ["| layer | busiest expert / mean | idlest expert / mean |", "|---|---|---|"]
    return rows + [f"| {b.layer} | {b.max_over_mean:.2f} | {b.min_over_mean:.2f} |" for b in evaluation.router_balance]


def model_card(record: TrainingRecord, config: TrainConfig) -> str:
    """README.md of the shipped folder."""
    front = FRONT.format(
        millions=record.parameters / 1e6,
        hidden=config.hidden,
        layers=config.layers,
        experts=config.experts,
        top_k=config.top_k,
        ffn=config.ffn,
        heads=config.hidden // 32,
        vocab=config.vocab,
        context=max(evaluation.context for evaluation in record.heldout.values()),
    )
    training = TRAINING.format(
        tokens=record.tokens / 1e6,
        steps=record.steps,
        batch=config.batch_tokens,
        epochs=record.tokens / record.corpus_tokens,
        corpus=record.corpus_tokens / 1e6,
        documents=record.corpus_documents,
        decay=record.decay_steps,
        minutes=record.seconds / 60,
        speed=record.tokens / max(1, record.seconds),
        balance=config.balance,
        torch=record.torch,
        transformers=record.transformers,
        commands="\n".join(record.commands),
        heldout=HELDOUT_PERMILLE / 10,
        chat=config.chat_share * 100,
    )
    return "\n".join(
        [
            front + training,
            "## Held-out files, all of them",
            "",
            "Every token is scored once, with at least context - stride tokens of its own document before it",
            "(fewer at the document's start, which follows `<|endoftext|>`). Weights as shipped, computed in float32.",
            "",
            *_score_rows(record.heldout),
            "",
            "## Held-out text in `heldout/`, each file as one document",
            "",
            *_score_rows(record.shipped_text),
            "",
            "## Router balance on the held-out files",
            "",
            *_balance_rows(next(iter(record.heldout.values()))),
            "",
        ]
    )
