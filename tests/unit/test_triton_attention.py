"""Decode attention in Triton, on a GPU where there is one and else in the interpreter, against softmax in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from buddymoe_ray.engine import attention
from buddymoe_ray.engine.attention import ChunkRows, PackedPass, PagedAttention
from buddymoe_ray.engine.kv import KVPool, KVShape
from buddymoe_ray.kernels import decode_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCK = 16
LENGTHS = (1, 17, 150, 64)
Rows = tuple[Tensor, Tensor, Tensor, Tensor]


def random_rows(Q: int, H: int, d: int, dv: int, dtype: torch.dtype) -> Rows:
    """Queries, pools of keys and values, and block tables: what nobody wrote is no number."""
    rng, B, M = torch.Generator().manual_seed(1), len(LENGTHS), 10
    blocks_BM = torch.randperm(B * M, generator=rng).view(B, M)
    keys, values = (torch.full((B * M * BLOCK, H, size), float("nan")) for size in (d, dv))
    for table, length in zip(blocks_BM, LENGTHS, strict=True):
        at = torch.arange(length)
        places = table[at // BLOCK] * BLOCK + at % BLOCK
        keys[places], values[places] = (torch.randn(length, H, size, generator=rng) for size in (d, dv))
    return torch.randn(B, Q, d, generator=rng).to(dtype), keys.to(dtype), values.to(dtype), blocks_BM


def run(rows: Rows, at: slice, *, window: int | None, sinks: Tensor | None, splits: int | None) -> Tensor:
    q, keys, values, blocks_BM = (tensor.to(DEVICE) for tensor in rows)
    context = blocks_BM[at], torch.tensor(LENGTHS[at], device=DEVICE)
    sinks_Q = None if sinks is None else sinks.to(DEVICE)
    pools = keys, values, BLOCK
    return decode_attention(q[at], pools, context, scale=0.3, window=window, sinks_Q=sinks_Q, splits=splits).cpu()


def exact(rows: Rows, window: int | None, sinks: Tensor | None) -> Tensor:
    q, keys, values, blocks_BM = (rows[0].double(), rows[1].double(), rows[2].double(), rows[3])
    answers = []
    for row, table, length in zip(q, blocks_BM, LENGTHS, strict=True):
        at = torch.arange(0 if window is None else max(0, length - window), length)
        places = table[at // BLOCK] * BLOCK + at % BLOCK
        k, v = (t[places].repeat_interleave(len(row) // t.shape[1], dim=1) for t in (keys, values))
        scores = torch.einsum("qd,lqd->ql", row, k) * 0.3
        if sinks is not None:
            scores = torch.cat([scores, sinks.double()[:, None]], dim=1)
        answers.append(torch.einsum("ql,lqv->qv", scores.softmax(1)[:, : len(at)], v))
    return torch.stack(answers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("Q", "H", "d", "dv", "window", "with_sinks", "splits"),
    [
        (8, 2, 64, 64, None, False, 3),
        (8, 2, 64, 64, 40, True, 1),
        (3, 3, 48, 32, None, True, 2),
        (8, 1, 40, 24, 5, False, 4),
    ],
)
def test_a_row_is_the_exact_one_rounded_and_sees_no_other(Q, H, d, dv, window, with_sinks, splits, dtype) -> None:
    rows = random_rows(Q, H, d, dv, dtype)
    sinks = torch.randn(Q, generator=torch.Generator().manual_seed(2)) if with_sinks else None
    got = run(rows, slice(None), window=window, sinks=sinks, splits=splits)
    error = 1e-5 if dtype is torch.float32 else 1e-2
    torch.testing.assert_close(got.double(), exact(rows, window, sinks), rtol=error, atol=error)
    for at in (slice(1, 2), slice(2, 4)):
        assert torch.equal(run(rows, at, window=window, sinks=sinks, splits=splits), got[at])
    _, keys, _, blocks_BM = rows
    keys[blocks_BM[1, 0] * BLOCK] = float("nan")  # of row 1, unless its window is past it
    shown = run(rows, slice(None), window=window, sinks=sinks, splits=splits).isfinite().all(dim=-1)
    assert shown[[0, 2, 3]].all() and bool(shown[1].any()) is (window is not None and window < LENGTHS[1])


def test_blocks_may_lie_further_apart_than_32_bits_tell() -> None:
    """Of which nobody touches what is between them."""
    Q, H, d = 4, 2, 64
    q, keys, values, blocks_BM = random_rows(Q, H, d, d, torch.bfloat16)
    first = (1 << 31) // (BLOCK * H * d) + 1  # the first block whose items 31 bits do not number
    apart = [torch.empty((first + blocks_BM.numel()) * BLOCK, H, d, dtype=q.dtype) for _ in "kv"]
    for pool, held in zip(apart, (keys, values), strict=True):
        pool[first * BLOCK :] = held
    how = {"window": None, "sinks": None, "splits": 2}
    far = run((q, *apart, blocks_BM + first), slice(None), **how)
    assert torch.equal(far, run((q, keys, values, blocks_BM), slice(None), **how))


def test_a_device_aparts_decode_rows_are_triton_and_the_others_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the cache in between: prompts in chunks, then a token of each."""
    shapes, device = {0: KVShape(heads=2, key_dim=16, value_dim=16)}, torch.device(DEVICE)
    pool = KVPool(shapes, blocks=8, block_size=4, dtype=torch.float32, device=device)
    calls, attend = list[int](), attention.decode_attention  # type: ignore[attr-defined]
    monkeypatch.setattr(
        attention, "decode_attention", lambda q, *args, **how: calls.append(len(q)) or attend(q, *args, **how)
    )
    data = [torch.randn(n, 12, 16, generator=torch.Generator().manual_seed(n)).to(device) for n in (4, 2, 3)]
    data[2] = data[2][:2]
    found = []
    for apart in (False, True):
        paged, answers = PagedAttention(), []
        if apart:
            paged.open(pool, apart=True)
        else:
            paged.pool = pool
        for spans, decode in (([(0, 5), (0, 4)], False), ([(5, 6), (4, 5)], True)):
            first = spans[0][1] - spans[0][0]
            chunks = [
                ChunkRows(row=i * first, count=end - begin, start=begin, blocks=((6, 1), (3, 0))[i])
                for i, (begin, end) in enumerate(spans)
            ]
            paged.current = PackedPass(chunks, decode=decode, block_size=4, device=device)
            packed = [torch.cat([t[:, i : i + end - begin] for i, (begin, end) in enumerate(spans)], 1) for t in data]
            answers.append(paged(0, *packed, scale=0.2, window=None, sinks=None))
        found.append(answers)
    assert calls == [2]
    for torchs, ours in zip(*found, strict=True):
        torch.testing.assert_close(torchs, ours, rtol=1e-5, atol=1e-5)
