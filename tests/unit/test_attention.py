"""Paged attention against a dense reference without blocks: ragged batches, windows, sinks, GQA, MLA sizes."""

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface

from buddymoe_ray.engine import attention
from buddymoe_ray.engine.attention import ChunkRows, PackedPass, PagedAttention
from buddymoe_ray.engine.kv import KVPool, KVShape, contiguous_start
from buddymoe_ray.errors import UnsupportedModel
from buddymoe_ray.kernels import paged_attention

BLOCK = 4


def pool_of(H: int, d: int, dv: int, dtype: torch.dtype, blocks: int = 10) -> KVPool:
    shapes, cpu = {0: KVShape(heads=H, key_dim=d, value_dim=dv)}, torch.device("cpu")
    return KVPool(shapes, blocks=blocks, block_size=BLOCK, dtype=dtype, device=cpu)


def dense(q, k, v, scale, window, sinks):
    """One whole sequence: q [Q, L, d], k/v [H, L, *] -> [L, Q, dv]."""
    Q, L, _ = q.shape
    k, v = (t.repeat_interleave(Q // k.shape[0], dim=0) for t in (k, v))
    scores = q @ k.transpose(1, 2) * scale
    i, j = torch.arange(L)[:, None], torch.arange(L)[None]
    visible = (j <= i) & ((j > i - window) if window else torch.ones_like(j <= i))
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(Q, L, 1)], dim=-1)
    p = scores.softmax(-1)
    return ((p[..., :-1] if sinks is not None else p) @ v).transpose(0, 1)


@pytest.mark.parametrize("by_kernel", [True, False])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize(("Q", "H", "d", "dv"), [(4, 2, 8, 8), (4, 4, 12, 8), (6, 1, 8, 8)])
def test_chunked_prefill_and_batched_decode_equal_dense(by_kernel, window, with_sinks, Q, H, d, dv) -> None:
    rng = torch.Generator().manual_seed(0)
    lengths, cut = [11, 4, 17], [6, 2, 9]
    blocks = [[5, 2, 9], [0], [1, 3, 4, 6, 7]]  # scattered, single, scattered
    sinks = torch.randn(Q, generator=rng) if with_sinks else None
    data = [tuple(torch.randn(n, L, w, generator=rng) for n, w in ((Q, d), (H, d), (H, dv))) for L in lengths]
    paged = PagedAttention()
    pool = pool_of(H, d, dv, torch.float32)
    if by_kernel:
        paged.open(pool)
    else:
        paged.pool = pool

    def run(spans, decode):
        rows, at = [], 0
        for (start, end), table in zip(spans, blocks, strict=True):
            rows.append(ChunkRows(row=at, count=end - start, start=start, blocks=tuple(table)))
            at += end - start
        paged.current = PackedPass(rows, decode=decode, block_size=BLOCK, device=torch.device("cpu"))
        packed = [torch.cat([t[i][:, a:b] for t, (a, b) in zip(data, spans, strict=True)], dim=1) for i in range(3)]
        out = paged(0, *packed, scale=0.3, window=window, sinks=sinks)
        return out.split([b - a for a, b in spans])

    got = [[] for _ in lengths]
    for spans in ([(0, c) for c in cut], [(c, L - 1) for c, L in zip(cut, lengths, strict=True)]):
        for seq, part in enumerate(run(spans, False)):
            got[seq].append(part)
    for seq, part in enumerate(run([(L - 1, L) for L in lengths], True)):
        got[seq].append(part)
    for seq, (q, k, v) in enumerate(data):
        torch.testing.assert_close(torch.cat(got[seq]), dense(q, k, v, 0.3, window, sinks), atol=1e-5, rtol=1e-5)


def test_single_sequence_decode_reads_without_a_copy() -> None:
    chunk = ChunkRows(row=0, count=1, start=9, blocks=(3, 4, 5))
    built = PackedPass([chunk], decode=True, block_size=BLOCK, device=torch.device("cpu"))
    assert built.where == (slice(12, 22),) and built.padded_BL is None
    assert built.slots_T.tolist() == [21]


@pytest.mark.parametrize(
    ("blocks", "start"), [([4], 4), ([4, 5, 6], 4), ([4, 6, 5], None), ([6, 5], None), ([4, 6], None)]
)
def test_contiguous_start(blocks, start) -> None:
    assert contiguous_start(blocks) == start


def test_kv_bytes_per_token() -> None:
    shapes = {0: KVShape(heads=2, key_dim=8, value_dim=4), 1: KVShape(heads=1, key_dim=8, value_dim=8)}
    assert KVPool.bytes_per_token(shapes, torch.bfloat16) == (2 * 12 + 16) * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 21])
@pytest.mark.parametrize(("Q", "H", "d", "dv"), [(4, 4, 64, 64), (8, 1, 40, 24)])
def test_a_rows_bits_do_not_depend_on_how_it_comes_to_be_computed(
    dtype, window, Q, H, d, dv, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A text of 70 tokens in one chunk, in chunks of odd sizes, token by token, with others beside it, in scattered
    blocks and on several threads."""
    monkeypatch.setattr(paged_attention, "THREADED_ITEMS", 0)
    rng = torch.Generator().manual_seed(3)
    L, sinks = 70, torch.randn(Q, generator=rng)
    texts = [[torch.randn(n, L, w, generator=rng).to(dtype) for n, w in ((Q, d), (H, d), (H, dv))] for _ in range(2)]

    def computed(ends: list[int], *, tables: list[list[int]], threads: int = 1) -> torch.Tensor:
        """Of the first text; the second is computed beside it where it has a table."""
        paged, got, begin = PagedAttention(), [], 0
        pool = pool_of(H, d, dv, dtype, blocks=40)
        for tensors in (pool.keys_NHd, pool.values_NHd):
            tensors[0].fill_(float("nan"))  # what nobody wrote is read by nobody
        paged.open(pool, threads=threads)
        for end in ends:
            chunks = [
                ChunkRows(row=i * (end - begin), count=end - begin, start=begin, blocks=tuple(table))
                for i, table in enumerate(tables)
            ]
            paged.current = PackedPass(chunks, decode=end == begin + 1, block_size=BLOCK, device=torch.device("cpu"))
            rows = [torch.cat([text[i][:, begin:end] for text in texts[: len(tables)]], dim=1) for i in range(3)]
            got.append(paged(0, *rows, scale=0.2, window=window, sinks=sinks)[: end - begin])
            begin = end
        return torch.cat(got)

    straight = list(range(18))
    whole = computed([L], tables=[straight])
    assert bool(whole.isfinite().all())
    assert torch.equal(computed([1, 14, 33, 34, 69, L], tables=[straight]), whole)
    assert torch.equal(computed(list(range(1, L + 1)), tables=[straight[::-1]]), whole)
    scattered = torch.randperm(40, generator=rng).tolist()
    assert torch.equal(computed([50, *range(51, L + 1)], tables=[scattered[:18], scattered[18:36]]), whole)
    assert torch.equal(computed([30, 31, L], tables=[straight], threads=3), whole)


@pytest.mark.parametrize("what", ["query", "key", "value"])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_number_that_is_none_is_not_hidden(what: str, number: float) -> None:
    """It shows in the rows that see it, of its head, and nowhere else."""
    L, rng, paged = 20, torch.Generator().manual_seed(5), PagedAttention()
    rows = {name: torch.randn(2, L, 8, generator=rng) for name in ("query", "key", "value")}
    rows[what][0, 9, 0] = number
    paged.open(pool_of(2, 8, 8, torch.float32))
    chunk = ChunkRows(row=0, count=L, start=0, blocks=(4, 2, 1, 7, 3))
    paged.current = PackedPass([chunk], decode=False, block_size=BLOCK, device=torch.device("cpu"))
    out_TQd = paged(0, *rows.values(), scale=0.3, window=None, sinks=None)
    shows_TQ = ~out_TQd.isfinite().all(dim=-1)
    assert not shows_TQ[:, 1].any() and not shows_TQ[:9].any()
    expected = [at == 9 for at in range(9, L)] if what == "query" else [True] * (L - 9)
    if what != "key" or number != float("inf"):  # an infinite key leaves out rows whose score it makes -inf
        assert shows_TQ[9:, 0].tolist() == expected


def test_an_attention_that_is_told_more_is_refused() -> None:
    attention.register()
    attend, mask = (each[attention.NAME] for each in (AttentionInterface(), AttentionMaskInterface()))
    module, rows = torch.nn.Module(), torch.zeros(1, 2, 3, 4)
    module.layer_idx, module.buddymoe_attention = 0, PagedAttention()
    said = {"dropout": 0.0, "position_ids": None, "output_attentions": False, "s_aux": None}
    attend(module, rows, rows, rows, mask(local_size=2), 1.0, **said)
    for own_mask, more, named in (
        (True, {}, "a mask of its own"),
        (False, {"position_bias": rows}, "by position_bias"),
    ):
        with pytest.raises(UnsupportedModel, match=named):
            attend(module, rows, rows, rows, mask(use_vmap=own_mask), 1.0, **said, **more)
