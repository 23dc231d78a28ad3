"""Judge a checkpoint of builtin:tiny on held-out text: nats a token, bits a byte, router balance.

    python -m tiny_training.evaluate [--model DIR] [--text FILE ...] [--context 512] [--stride 256]

Each document (or shipped file) is read with windows of `context` tokens, the first one opened by <|endoftext|>; every
token is scored once, with at least `context - stride` tokens before it except at a document's start. Weights are used
as stored, widened to float32.
Neighbours: export.py writes the result into training.json, card.py into the model card.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from buddymoe_ray.errors import ConfigError
from buddymoe_ray.models.tiny import path
from tiny_training import moe_train
from tiny_training.tokenizer import END_OF_TEXT, load_tokenizer


@dataclass(frozen=True, kw_only=True)
class Score:
    """Held-out loss of one kind of text; `nats` is summed."""

    documents: int
    bytes: int
    tokens: int
    nats: float
    nats_per_token: float
    bits_per_byte: float

    @classmethod
    def of(cls, *, documents: int, bytes: int, tokens: int, nats: float) -> Score:
        """A score with its ratios."""
        ratios = {"nats_per_token": nats / tokens, "bits_per_byte": nats / math.log(2) / bytes}
        return cls(documents=documents, bytes=bytes, tokens=tokens, nats=nats, **ratios)

    def __add__(self, other: Score) -> Score:
        names = ("documents", "bytes", "tokens", "nats")
        return Score.of(**{name: getattr(self, name) + getattr(other, name) for name in names})


@dataclass(frozen=True, kw_only=True)
class LayerBalance:
    """The busiest and the idlest expert's load over the layer's mean load."""

    layer: int
    max_over_mean: float
    min_over_mean: float


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Scores per kind of text, all kinds together, and the routers' balance over them."""

    context: int
    stride: int
    scores: dict[str, Score]
    total: Score
    router_balance: tuple[LayerBalance, ...]


def spans(length: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, scored from, end) over the targets 0 ... length - 1; every target is scored once."""
    scored = 0
    while scored < length:
        end = min(length, scored + (context if scored == 0 else stride))
        yield max(0, end - context), scored, end
        scored = end


class Evaluator:
    """A model, its tokenizer and the running expert counts."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, context: int = 512, stride: int = 256
    ) -> None:
        if not 0 < stride <= context:
            raise ConfigError(f"--stride is {stride}, must be 1 ... --context ({context}). hint: take half the context")
        self._model, self._tokenizer = model.eval(), tokenizer
        self.context, self.stride = context, stride
        shape = model.config
        self.load_LE = torch.zeros(shape.num_hidden_layers, shape.num_experts, dtype=torch.int64)

    @torch.inference_mode()
    def score(self, text: str) -> Score:
        """Loss of one document and of the <|endoftext|> after it."""
        end_id = self._tokenizer.convert_tokens_to_ids(END_OF_TEXT)
        ids = [end_id, *self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], end_id]
        ids_N = torch.tensor(ids)
        nats = 0.0
        for start, first, end in spans(len(ids) - 1, self.context, self.stride):
            output = self._model(input_ids=ids_N[None, start:end], use_cache=False, output_router_logits=True)
            logits_TV = output.logits[0, first - start :].float()
            nats += functional.cross_entropy(logits_TV, ids_N[first + 1 : end + 1], reduction="sum").item()
            self._count(output.router_logits, first - start)
        return Score.of(documents=1, bytes=len(text.encode()), tokens=len(ids) - 1, nats=nats)

    def _count(self, router_logits: Sequence[Tensor], first: int) -> None:
        top_k = self._model.config.num_experts_per_tok
        for layer, logits_TE in enumerate(router_logits):
            chosen_TK = logits_TE[first:].topk(top_k, dim=1).indices
            self.load_LE[layer] += torch.bincount(chosen_TK.flatten(), minlength=self.load_LE.shape[1])

    def balance(self) -> tuple[LayerBalance, ...]:
        """Over all tokens scored so far."""
        mean_L1 = self.load_LE.double().mean(dim=1, keepdim=True).clamp_min(1e-9)
        return tuple(
            LayerBalance(layer=layer, max_over_mean=ratio_E.max().item(), min_over_mean=ratio_E.min().item())
            for layer, ratio_E in enumerate(self.load_LE / mean_L1)
        )


def load_model(folder: Path) -> PreTrainedModel:
    """The checkpoint in float32 with the fast kernel."""
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation=moe_train.register()
    )


def evaluate_texts(evaluator: Evaluator, texts: Iterable[tuple[str, list[str]]]) -> Evaluation:
    """Score the documents of every kind."""
    scores: dict[str, Score] = {}
    for kind, documents in texts:
        scores[kind] = functools.reduce(operator.add, (evaluator.score(text) for text in documents))
    return Evaluation(
        context=evaluator.context,
        stride=evaluator.stride,
        scores=scores,
        total=functools.reduce(operator.add, scores.values()),
        router_balance=evaluator.balance(),
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Print the scores of some text files as JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m tiny_training.evaluate", description="Held-out loss of builtin:tiny."
    )
    parser.add_argument("--model", type=Path, default=path())
    parser.add_argument("--text", type=Path, nargs="*", default=sorted((path() / "heldout").glob("*.txt")))
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--stride", type=int, default=256)
    options = parser.parse_args(argv)
    if not options.text:
        raise ConfigError("--text is empty, must name at least one file. hint: the package ships weights/heldout/*.txt")
    evaluator = Evaluator(
        load_model(options.model), load_tokenizer(options.model), context=options.context, stride=options.stride
    )
    texts = [(file.stem, [file.read_text(encoding="utf-8")]) for file in options.text]
    print(json.dumps(asdict(evaluate_texts(evaluator, texts)), indent=2))


if __name__ == "__main__":
    main()
