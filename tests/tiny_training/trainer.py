"""One training rank: configuration, model, optimizers, schedule, one step, checkpoint.

A step depends on (seed, step) and the restored state alone: a run killed at any moment continues bit-identically from
its last checkpoint. Knows nothing of files of text, processes or progress bars.
Neighbours: stream.py gives batches, moe_train.py and losses.py compute, optim.py updates, train.py drives.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm

from tiny_training import corpus, losses, moe_train, tokenizer
from tiny_training.optim import Muon
from tiny_training.stream import TokenStream
from tiny_training.task_stream import ROW, TaskRows, TaskStream


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run; every field is a command line option of the same name."""

    out: Path
    stdlib: Path = corpus.DEFAULT_STDLIB
    docs: Path = corpus.DEFAULT_DOCS
    steps: int = 2400
    decay_steps: int = 600
    warmup_steps: int = 100
    seed: int = 0
    ranks: int = 2
    batch_tokens: int = 8192
    seq_len: int = 512
    hidden: int = 160
    layers: int = 4
    experts: int = 32
    top_k: int = 4
    ffn: int = 64
    vocab: int = tokenizer.VOCAB_SIZE
    matrix_lr: float = 0.02
    embed_lr: float = 0.004
    small_lr: float = 0.004
    weight_decay: float = 0.1
    balance: float = 0.04
    chat_share: float = 0.05
    task_rows: int = 0
    init: str = ""
    checkpoint_seconds: float = 300.0
    log_steps: int = 20
    compile_norms: bool = False

    @property
    def step_tokens(self) -> int:
        """Tokens of text and of tasks that a step computes."""
        return self.batch_tokens + self.task_rows * ROW


class Figures(NamedTuple):
    """What a step computed: nats a token of text, the routers' balance loss, nats a token of answers."""

    nats: float
    balance: float
    answer_nats: float


def build_model(config: TrainConfig) -> Qwen3MoeForCausalLM:
    """A stock Qwen3-MoE in float32 with the training kernel as its experts."""
    shape = Qwen3MoeConfig(  # type: ignore[call-arg]
        vocab_size=config.vocab,
        hidden_size=config.hidden,
        intermediate_size=config.ffn * config.top_k,
        num_hidden_layers=config.layers,
        num_attention_heads=config.hidden // 32,
        num_key_value_heads=config.hidden // 32,
        head_dim=32,
        moe_intermediate_size=config.ffn,
        num_experts=config.experts,
        num_experts_per_tok=config.top_k,
        norm_topk_prob=True,
        tie_word_embeddings=True,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        router_aux_loss_coef=config.balance,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=None,
    )
    torch.manual_seed(config.seed)
    model: Qwen3MoeForCausalLM = Qwen3MoeForCausalLM._from_config(
        shape, dtype=torch.float32, experts_implementation=moe_train.register()
    )
    if config.compile_norms:
        for module in model.modules():
            if isinstance(module, Qwen3MoeRMSNorm):
                module.compile()
    model.train()
    return model


def make_optimizers(model: Qwen3MoeForCausalLM, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Muon for attention and expert matrices; AdamW for the embedding, the routers and the norms."""
    stacks: list[Tensor] = []
    matrices: list[Tensor] = []
    embeds: list[Tensor] = []
    small: list[Tensor] = []
    for name, param in model.named_parameters():
        if name.endswith("gate_up_proj"):
            stacks.append(param)
        elif "embed" in name:
            embeds.append(param)
        elif param.ndim < 2 or name.endswith("mlp.gate.weight"):
            small.append(param)
        else:
            matrices.append(param)
    groups: list[dict[str, Any]] = [{"params": stacks, "fused_halves": True}, {"params": matrices}]
    muon = Muon(
        groups,
        lr=config.matrix_lr,
        weight_decay=config.weight_decay,
    )
    adam = torch.optim.AdamW(
        [{"params": embeds, "lr": config.embed_lr}, {"params": small, "lr": config.small_lr}],
        betas=(0.9, 0.95),
        eps=1e-10,
        weight_decay=0.0,
        fused=True,
    )
    for group in (*muon.param_groups, *adam.param_groups):
        group["peak_lr"] = group["lr"]
    return [muon, adam]


def schedule(step: int, config: TrainConfig) -> float:
    """Warm up, stay, decay linearly to zero: the factor on every learning rate at `step` (0-based)."""
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    return warm * min(1.0, (config.steps - step) / max(1, config.decay_steps))


def losses_on(model: Qwen3MoeForCausalLM, windows_BL: Tensor) -> tuple[Tensor, Tensor]:
    """(mean nats a token, balance loss) of windows of one token more than the sequence length."""
    output = model.model(input_ids=windows_BL[:, :-1], use_cache=False, output_router_logits=True)
    hidden_TD = output.last_hidden_state.flatten(0, 1)
    nats = losses.ChunkedCrossEntropy.apply(hidden_TD, model.lm_head.weight, windows_BL[:, 1:].flatten(), 512)
    aux = losses.balance_loss(output.router_logits, model.config.num_experts_per_tok)
    return nats, aux


def losses_on_answers(model: Qwen3MoeForCausalLM, rows: TaskRows) -> tuple[Tensor, Tensor]:
    """(mean nats an answer's token, balance loss): questions are drawn by chance, so nothing is learned from them."""
    output = model.model(
        input_ids=rows.tokens_BL[:, :-1],
        position_ids=rows.positions_BL[:, :-1],  # falling positions keep packed tasks apart
        use_cache=False,
        output_router_logits=True,
    )
    learned_BL = rows.learned_BL[:, 1:]
    hidden_TD, targets_T = output.last_hidden_state[learned_BL], rows.tokens_BL[:, 1:][learned_BL]
    nats = losses.ChunkedCrossEntropy.apply(hidden_TD, model.lm_head.weight, targets_T, 512)
    return nats, losses.balance_loss(output.router_logits, model.config.num_experts_per_tok)


def _gradient(param: Tensor) -> Tensor:
    assert param.grad is not None, f"a parameter of shape {tuple(param.shape)} got no gradient"
    return param.grad


class Trainer:
    """One rank: model, optimizers, its share of each batch."""

    def __init__(
        self,
        config: TrainConfig,
        documents: Sequence[np.ndarray],
        tokenizer: PreTrainedTokenizerBase,
        rank: int,
    ) -> None:
        self.config, self.rank, self.step = config, rank, 0
        self.stream = TokenStream(documents, config.seq_len, config.seed)
        self.tasks = TaskStream(tokenizer, config.seed) if config.task_rows else None
        self.model = build_model(config)
        self.optimizers = make_optimizers(self.model, config)
        self._params = list(self.model.parameters())
        self._flat = torch.zeros(sum(p.numel() for p in self._params) + len(Figures._fields))

    def train_step(self) -> Figures:
        """One optimizer step over the global batch; returns its means."""
        config = self.config
        windows = config.batch_tokens // config.seq_len
        mine = windows // config.ranks
        batch_BL = self.stream.batch(self.step * windows + self.rank * mine, mine)
        nats, balance = losses_on(self.model, batch_BL)
        (nats + config.balance * balance).backward()
        figures = torch.stack([nats.detach(), balance.detach(), torch.zeros(())])
        if self.tasks is not None:
            mine = config.task_rows // config.ranks
            rows = self.tasks.batch(self.step * config.task_rows + self.rank * mine, mine)
            nats, balance = losses_on_answers(self.model, rows)
            (nats + config.balance * balance).backward()
            figures[2] = nats.detach()
        figures = self._average_gradients(figures)
        factor = schedule(self.step, config)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return Figures(*figures.tolist())

    def _average_gradients(self, figures: Tensor) -> Tensor:
        """One all-reduce of all gradients and the figures."""
        if self.config.ranks == 1:
            return figures
        torch.cat([*(_gradient(p).flatten() for p in self._params), figures], out=self._flat)
        dist.all_reduce(self._flat)
        self._flat.div_(self.config.ranks)
        place = 0
        for param in self._params:
            _gradient(param).copy_(self._flat[place : place + param.numel()].view_as(param))
            place += param.numel()
        return self._flat[place:].clone()

    def save(self, target: Path) -> None:
        """Write the whole state beside `target`, then rename: a kill leaves the old checkpoint or the new one."""
        state = {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
        }
        partial = target.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, target)

    def start_from(self, model: PreTrainedModel) -> None:
        """Take over the weights of a model of the same shape; the optimizers begin afresh."""
        self.model.load_state_dict(model.state_dict())

    def load(self, source: Path) -> None:
        """Continue from a checkpoint; peak learning rates are those of this run's options."""
        state = torch.load(source, map_location="cpu", weights_only=True)
        peaks = [[group["peak_lr"] for group in o.param_groups] for o in self.optimizers]
        self.model.load_state_dict(state["model"])
        for optimizer, saved, old in zip(self.optimizers, state["optimizers"], peaks, strict=True):
            optimizer.load_state_dict(saved)
            for group, peak in zip(optimizer.param_groups, old, strict=True):
                group["peak_lr"] = peak
        self.step = int(state["step"])
