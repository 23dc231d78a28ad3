"""Decoder layers in one call of the kernels, where a trial shows that the layer's modules compute just that.

A layer is told by what it does, not by its class: at load every layer whose parts have kernels runs once on random rows
both ways, and the call takes the place of the modules only where keys, values, what the feed-forward reads, the
router's choice and the layer's output are the same bits. Other layers keep their modules, and so do all where more than
one thread computes: the bits are the same, it only takes longer. Does not know sequences or the cache.

Legend: T rows, D hidden, K experts per token.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from buddymoe_ray.engine.attention import ChunkRows, PackedPass, PagedAttention
from buddymoe_ray.kernels import CpuLinear, CpuNorm, DecoderLayer, DecoderParts, Routed
from buddymoe_ray.models.dense_dtype import PackedLinear, StoredLinear
from buddymoe_ray.models.load import LoadedModel
from buddymoe_ray.models.router_hook import find_routers
from buddymoe_ray.models.row_kernels import RowNorm, SoftmaxRouter
from buddymoe_ray.moe import MoEBlock, Phase, StepState

__all__ = ["OneCallLayer", "attach"]

log = logging.getLogger(__name__)

_ROWS = (13, 3)
"""Of the trial's two sequences: within a block of the KV cache each."""


class OneCallLayer:
    """In the place of a decoder layer's `forward`. `block` is None where the router is not the kernel's."""

    def __init__(self, paged: PagedAttention, compute: DecoderLayer, mlp: nn.Module, block: MoEBlock | None) -> None:
        self.block = block
        self._paged, self._compute, self._mlp = paged, compute, mlp

    def __call__(self, hidden_states: Tensor, *, position_embeddings: tuple[Tensor, Tensor], **_: Any) -> Tensor:
        """`[1, T, D] -> [1, T, D]` of the pass in progress; the mask is known to the attention."""
        current, block = self._paged.current, self.block
        assert current is not None, "a layer runs in a pass"
        glance = None if block is None else block.glance()
        coming = None if block is None or not self._compute.guesses else block.glance_ahead()
        routed = self._compute(
            hidden_states[0],
            (position_embeddings[0][0], position_embeddings[1][0]),
            current.spans_S4,
            current.blocks,
            None if glance is None else glance.at_E,
            None if block is None else block.allowed,
            None if coming is None else coming.at_E,
        )
        if block is None:
            y_TD = self._mlp(routed.normed[None])[0]
        elif (
            routed.out is not None and glance is not None and block.settle(glance, routed.ids.numpy(), routed.stood_in)
        ):
            return routed.out[None]
        else:
            glanced = glance is not None and self._compute.runs_experts and routed.guess is None
            y_TD = block(routed.normed, routed.ids, routed.weights, glanced=glanced, guess_TK=routed.guess)
        return (routed.attended + y_TD)[None]


def attach(loaded: LoadedModel, blocks: Sequence[MoEBlock], paged: PagedAttention, step: StepState) -> int:
    """Have as many decoder layers of the model computed in one call as can be; returns how many. `paged` is open."""
    if not paged.one_thread:
        return 0
    block_of = {id(module): block for module, block in zip(loaded.experts, blocks, strict=True)}
    routers = find_routers(loaded.model, loaded.experts, loaded.layout.experts_per_layer)
    trials = [_Trial(layer, paged, block_of, routers) for layer in loaded.model.modules() if _has_parts(layer)]
    count = sum(_ROWS)
    ids = torch.arange(count)[None] % loaded.vocab_size
    positions = torch.cat([torch.arange(rows) for rows in _ROWS])[None]
    chunks = [
        ChunkRows(row=row, count=rows, start=0, blocks=(at,))
        for at, (row, rows) in enumerate(zip((0, _ROWS[0]), _ROWS, strict=True))
    ]
    paged.current = PackedPass(chunks, decode=False, block_size=paged.block_size, device=loaded.device)
    step.begin(Phase.PROBE, count)
    try:
        for trial in trials:
            trial.layer.forward = trial  # type: ignore[assignment]
        with torch.inference_mode():
            loaded.model(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=1)
    finally:
        paged.current = None
        for trial in trials:
            del trial.layer.forward  # what the class has; a layer that held its own method would not be freed
    for trial in trials:
        if trial.made is not None:
            trial.layer.forward = trial.made  # type: ignore[assignment]
    made = [trial.made for trial in trials if trial.made is not None]
    routed = sum(layer.block is not None for layer in made)
    log.info("%d decoder layers run in one call, %d of them with their router and experts", len(made), routed)
    return len(made)


def _has_parts(layer: nn.Module) -> bool:
    names = ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
    return all(isinstance(getattr(layer, name, None), nn.Module) for name in names)


class _Watch(nn.Module):
    """A feed-forward that shows what it read and answers noise."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: Tensor) -> Any:
        self.read, answer = x, self.mlp(x)
        self.noise = _noise(x) if isinstance(answer, Tensor) and answer.shape == x.shape else None
        return answer if self.noise is None else self.noise


class _Trial:
    """Stands in for a layer's `forward` once: runs it on random rows both ways. `made` is what may take its place."""

    def __init__(
        self,
        layer: nn.Module,
        paged: PagedAttention,
        block_of: dict[int, MoEBlock],
        routers: Sequence[nn.Module | None],
    ) -> None:
        self.layer: Any = layer
        self.forward: Callable[..., Any] = layer.forward
        self.made: OneCallLayer | None = None
        self._paged, self._block_of, self._routers = paged, block_of, routers

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        x = _noise(hidden_states, seed=1)
        turn: Any = kwargs.get("position_embeddings")
        with self._watched() as watch:
            expected = self.forward(x, *args, **kwargs)
        pool, layer = self._paged.pool, getattr(self.layer.self_attn, "layer_idx", -1)
        assert pool is not None, "the cache is open"
        parts = _parts(self.layer, self._paged.layer(layer))
        if parts is not None and not args and _turns(turn, x, parts) and watch.noise is not None:
            current = self._paged.current
            assert current is not None, "a trial is a pass"
            keys, values, _ = pool.of(layer)
            kept = [kind[current.slots_T] for kind in (keys, values)]
            compute = DecoderLayer(parts, x.dtype)
            made = self._run(compute, x, turn)
            same = all(torch.equal(a, b[current.slots_T]) for a, b in zip(kept, (keys, values), strict=True))
            answer = made.attended + watch.noise[0]
            if same and torch.equal(made.normed, watch.read[0]) and torch.equal(answer[None], expected):
                self.made = self._routed(parts, x, turn) or OneCallLayer(self._paged, compute, self.layer.mlp, None)
        return expected

    @contextmanager
    def _watched(self) -> Iterator[_Watch]:
        mlp = self.layer.mlp
        self.layer.mlp = watch = _Watch(mlp)
        try:
            yield watch
        finally:
            self.layer.mlp = mlp

    def _run(self, compute: DecoderLayer, x: Tensor, turn: tuple[Tensor, Tensor]) -> Routed:
        current = self._paged.current
        assert current is not None, "a trial is a pass"
        return compute(x[0], (turn[0][0], turn[1][0]), current.spans_S4, current.blocks, None)

    def _routed(self, parts: DecoderParts, x: Tensor, turn: tuple[Tensor, Tensor]) -> OneCallLayer | None:
        """The layer with its router and experts, None where they are not all of its feed-forward."""
        mlp = self.layer.mlp
        experts = next((module for module in mlp.modules() if id(module) in self._block_of), None)
        router = next((module for module in mlp.children() if isinstance(module.forward, SoftmaxRouter)), None)
        if experts is None or router is None or {*mlp.children()} != {experts, router} or router._forward_hooks:
            return None
        block, chosen = self._block_of[id(experts)], cast(SoftmaxRouter, router.forward).compute
        following = getattr(next(iter(self._routers[block.layer + 1 :]), None), "forward", None)
        whole = replace(
            parts,
            router=chosen,
            experts=block.kernel,
            standins=block.records,
            next_router=following.compute if isinstance(following, SoftmaxRouter) else None,
        )
        compute = DecoderLayer(whole, x.dtype)
        made = self._run(compute, x, turn)
        found = _choice(mlp, experts, made.normed)
        if found is None or not all(torch.equal(*pair) for pair in zip((made.ids, made.weights), found, strict=True)):
            return None
        return OneCallLayer(self._paged, compute, mlp, block)


def _turns(turn: Any, x: Tensor, parts: DecoderParts) -> bool:
    """Whether these are cosines and sines as the kernel reads them."""
    most = parts.attention.heads[2]
    return isinstance(turn, tuple) and all(
        isinstance(part, Tensor) and part.dtype is x.dtype and part.shape[:2] == x.shape[:2] and part.shape[2] <= most
        for part in turn
    )


def _noise(like: Tensor, *, seed: int = 0) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)).to(like.dtype)


def _choice(mlp: nn.Module, experts: nn.Module, x_TD: Tensor) -> tuple[Tensor, Tensor] | None:
    """The ids and weights that a feed-forward calls its experts with, None where it does more than that."""
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    noise_TD, block = _noise(x_TD), experts.__dict__["buddymoe_block"]

    def answer(hidden_TD: Tensor, ids_TK: Tensor, weight_TK: Tensor) -> Tensor:
        seen.append((hidden_TD, ids_TK, weight_TK))
        return noise_TD

    experts.__dict__["buddymoe_block"] = answer
    try:
        out = mlp(x_TD[None])
    finally:
        experts.__dict__["buddymoe_block"] = block
    if len(seen) != 1 or not torch.equal(seen[0][0], x_TD) or not torch.equal(out.view_as(noise_TD), noise_TD):
        return None
    return seen[0][1:]


def _parts(layer: Any, attention: Any) -> DecoderParts | None:
    """The kernels of a layer's modules, None where one has none."""
    attn = layer.self_attn
    if getattr(getattr(attn, "config", None), "clip_qkv", None) is not None:  # no trial's rows need reach it
        return None
    norms = {name: getattr(attn, name, None) for name in ("q_norm", "k_norm")}
    if (norms["q_norm"] is None) != (norms["k_norm"] is None):
        return None
    linears = [_linear(getattr(attn, f"{name}_proj", None)) for name in "qkvo"]
    around = [_norm(layer.input_layernorm), _norm(layer.post_attention_layernorm)]
    inside = [None if norm is None else _norm(norm) for norm in norms.values()]
    if None in linears or None in around or (norms["q_norm"] is not None and None in inside) or attention is None:
        return None
    return DecoderParts(*around, *inside, *linears, attention=attention)  # type: ignore[arg-type,misc]


def _linear(module: nn.Module | None) -> CpuLinear | None:
    return module.compute if isinstance(module, StoredLinear | PackedLinear) else None


def _norm(module: nn.Module) -> CpuNorm | None:
    return module.compute if isinstance(module, RowNorm) else None
