"""Decoder layers in one call of the kernels, where a trial shows that the layers' modules compute just that.

A layer is told by what it does, not by its class: at load every layer whose parts have kernels runs once on random rows
both ways, and the call takes the place of the modules only where keys, values, what the feed-forward reads, the
router's choice and the layer's output are the same bits. Layers that hand each other their rows as they are, are
computed in one call together: up to the first whose experts the call cannot answer for. Other layers keep their
modules, and so do all where more than one thread computes: the bits are the same, it only takes longer. Does not know
sequences or the cache.

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
from buddymoe_ray.kernels import CpuLinear, CpuNorm, DecoderLayer, DecoderLayers, DecoderParts, Routed
from buddymoe_ray.models.coded_linear import CodedLinear
from buddymoe_ray.models.dense_dtype import PackedLinear, StoredLinear
from buddymoe_ray.models.load import LoadedModel
from buddymoe_ray.models.router_hook import find_routers
from buddymoe_ray.models.row_kernels import RowNorm, SoftmaxRouter
from buddymoe_ray.moe import MoEBlock, Phase, StepState, Stretch

__all__ = ["OneCallLayer", "OneCallLayers", "attach", "renew", "trial_pass"]

log = logging.getLogger(__name__)

_ROWS = (13, 3)
"""Of the trial's two sequences: within a block of the KV cache each."""


class OneCallLayers:
    """Decoder layers that follow one another; `stretch` has their MoE blocks. It is None where the router is not the
    kernel's: then it is one layer, and its feed-forward is `mlp`."""

    def __init__(self, paged: PagedAttention, compute: DecoderLayers, mlp: nn.Module, stretch: Stretch | None) -> None:
        self.compute, self.stretch = compute, stretch
        self._paged, self._mlp = paged, mlp
        self._out: Tensor | None = None
        self._until = 0  # `_out` is what the layers before this one come to

    def run(self, at: int, hidden: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        """`[1, T, D] -> [1, T, D]` of the layer `at` and of those behind it, as far as one call computes them: these
        then hand on what they are given."""
        if hidden is self._out and at < self._until:
            return hidden
        current, outlook = self._paged.current, None
        assert current is not None, "a layer runs in a pass"
        if self.stretch is not None and self.compute.runs_experts:
            outlook = self.stretch.outlook(at, self.compute.most(hidden.shape[1]))
        use = () if outlook is None else (outlook.places, outlook.tallies)
        routed = self.compute(at, hidden, turn, (current.spans_S4, current.blocks), *use)
        done = routed.done
        if self.stretch is not None and outlook is not None:
            self.stretch.settle(at, outlook, routed.ids, done)
        if outlook is not None and done == len(outlook.glances):
            out = routed.out[done - 1 :]
        else:
            out = (routed.attended[done] + self._feed_forward(at, routed, glanced=outlook is not None))[None]
            done += 1
        self._out, self._until = out if done > 1 else None, at + done
        return out

    def _feed_forward(self, at: int, routed: Routed, *, glanced: bool) -> Tensor:
        """Of the layer where the call stopped."""
        done, normed_TD = routed.done, routed.normed[routed.done]
        if self.stretch is None:
            return cast(Tensor, self._mlp(normed_TD[None])[0])
        guess_TK = None if routed.guess is None else torch.from_numpy(routed.guess)
        block, ids_TK = self.stretch.blocks[at + done], torch.from_numpy(routed.ids[done])
        return block(normed_TD, ids_TK, routed.weights[done], glanced=glanced and guess_TK is None, guess_TK=guess_TK)


class OneCallLayer:
    """In the place of a decoder layer's `forward`."""

    def __init__(self, layers: OneCallLayers, at: int) -> None:
        self.layers, self.at = layers, at

    def __call__(self, hidden_states: Tensor, *, position_embeddings: tuple[Tensor, Tensor], **_: Any) -> Tensor:
        """`[1, T, D] -> [1, T, D]` of the pass in progress; the mask is known to the attention."""
        return self.layers.run(self.at, hidden_states, position_embeddings)


def attach(loaded: LoadedModel, blocks: Sequence[MoEBlock], paged: PagedAttention, step: StepState) -> int:
    """Have as many decoder layers of the model computed in one call as can be; returns how many. `paged` is open."""
    if not paged.one_thread:
        return 0
    block_of = {id(module): block for module, block in zip(loaded.experts, blocks, strict=True)}
    routers = find_routers(loaded.model, loaded.experts, loaded.layout.experts_per_layer)
    trials = [_Trial(layer, paged, block_of, routers) for layer in loaded.model.modules() if _has_parts(layer)]
    with trial_pass(loaded, paged, step) as (ids, positions):
        try:
            for trial in trials:
                trial.layer.forward = trial  # type: ignore[assignment]
            loaded.model(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=1)
        finally:
            for trial in trials:
                del trial.layer.forward  # what the class has; a layer that held its own method would not be freed
    count = routed = 0
    for group in _stretches(trials):
        blocks = [trial.block for trial in group if trial.block is not None]
        compute = DecoderLayers([cast(DecoderLayer, trial.made) for trial in group])
        layers = OneCallLayers(paged, compute, group[0].layer.mlp, Stretch(blocks, step) if blocks else None)
        for at, trial in enumerate(group):
            trial.layer.forward = OneCallLayer(layers, at)  # type: ignore[assignment]
        count, routed = count + len(group), routed + len(blocks)
    log.info("%d decoder layers run in one call, %d of them with their router and experts", count, routed)
    return count


@contextmanager
def trial_pass(loaded: LoadedModel, paged: PagedAttention, step: StepState) -> Iterator[tuple[Tensor, Tensor]]:
    """The context of a pass over two sequences whose experts answer 0; their ids and positions `[1, T]`."""
    count = sum(_ROWS)
    chunks = [
        ChunkRows(row=row, count=rows, start=0, blocks=(at,))
        for at, (row, rows) in enumerate(zip((0, _ROWS[0]), _ROWS, strict=True))
    ]
    paged.current = PackedPass(chunks, decode=False, block_size=paged.block_size, device=loaded.device)
    step.begin(Phase.PROBE, count)
    try:
        with torch.inference_mode():
            yield torch.arange(count)[None] % loaded.vocab_size, torch.cat([torch.arange(n) for n in _ROWS])[None]
    finally:
        paged.current = None


def renew(model: nn.Module) -> None:
    """Have the calls know the stand-ins that the blocks of their layers have by now."""
    calls = {
        id(f.layers): f.layers for m in model.modules() if isinstance(f := m.__dict__.get("forward"), OneCallLayer)
    }
    for layers in calls.values():
        if layers.stretch is not None:
            layers.compute = DecoderLayers(
                [
                    DecoderLayer(replace(layer.parts, standins=block.records), layer.dtype)
                    for layer, block in zip(layers.compute.layers, layers.stretch.blocks, strict=True)
                ]
            )


def _stretches(trials: Sequence[_Trial]) -> Iterator[list[_Trial]]:
    """Trials of layers that one call may compute together."""
    group = list[_Trial]()
    for trial in trials:
        if group and not trial.follows(group[-1]):
            yield group
            group = []
        if trial.made is not None:
            group.append(trial)
    if group:
        yield group


def _has_parts(layer: nn.Module) -> bool:
    names = ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
    return all(isinstance(getattr(layer, name, None), nn.Module) for name in names)


class _Watch(nn.Module):
    """A feed-forward that shows what it read and answers noise."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: Tensor, *more: Any) -> Any:
        self.read, answer = x, self.mlp(x, *more)
        self.noise = _noise(x) if isinstance(answer, Tensor) and answer.shape == x.shape else None
        return answer if self.noise is None else self.noise


class _Trial:
    """Stands in for a layer's `forward` once: runs it on random rows both ways. `made` is what may take its place, with
    the `block` of its experts where the router is in it too."""

    def __init__(
        self,
        layer: nn.Module,
        paged: PagedAttention,
        block_of: dict[int, MoEBlock],
        routers: Sequence[nn.Module | None],
    ) -> None:
        self.layer: Any = layer
        self.forward: Callable[..., Any] = layer.forward
        self.made: DecoderLayer | None = None
        self.block: MoEBlock | None = None
        self._rows: tuple[Any, ...] = ()  # read, turned by, and handed on
        self._paged, self._block_of, self._routers = paged, block_of, routers

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        x = _noise(hidden_states, seed=1)
        turn: Any = kwargs.get("position_embeddings")
        with self._watched() as watch:
            expected = self.forward(x, *args, **kwargs)
        self._rows = (hidden_states, *(turn if isinstance(turn, tuple) else (turn,)), expected)
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
            answer = made.attended[0] + watch.noise[0]
            if same and torch.equal(made.normed[0], watch.read[0]) and torch.equal(answer[None], expected):
                self.made = self._routed(parts, x, turn) or compute
        return expected

    def follows(self, before: _Trial) -> bool:
        """Whether the layer reads what that one hands on, as it is, and both are for one call."""
        if self.made is None or self.block is None or before.made is None or before.block is None:
            return False
        handed = self._rows[0] is before._rows[-1] and len(self._rows) == len(before._rows)
        return (
            self.made.shape == before.made.shape
            and handed
            and all(a is b for a, b in zip(self._rows[1:-1], before._rows[1:-1], strict=True))
        )

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
        return DecoderLayers([compute])(0, x, turn, (current.spans_S4, current.blocks))

    def _routed(self, parts: DecoderParts, x: Tensor, turn: tuple[Tensor, Tensor]) -> DecoderLayer | None:
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
        found, choice = _choice(mlp, experts, made.normed[0]), (torch.from_numpy(made.ids[0]), made.weights[0])
        if found is None or not all(torch.equal(*pair) for pair in zip(choice, found, strict=True)):
            return None
        self.block = block
        return compute


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
    Q, H, d, dv = attention.heads
    if [attn.get_submodule(f"{name}_proj").out_features for name in "qkv"] != [Q * d, H * d, H * dv]:
        return None  # queries come with their gates
    return DecoderParts(*around, *inside, *linears, attention=attention)  # type: ignore[arg-type,misc]


def _linear(module: nn.Module | None) -> CpuLinear | None:
    return module.compute if isinstance(module, StoredLinear | PackedLinear | CodedLinear) else None


def _norm(module: nn.Module) -> CpuNorm | None:
    return module.compute if isinstance(module, RowNorm) else None
