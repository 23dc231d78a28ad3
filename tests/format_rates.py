"""How fast the CPU kernels read weights of each stored format at one row, as a share of what a core reads at most.

    python tests/format_rates.py [--formats fp8,mxfp4] [--shapes 2048x2048,1024x2048] [--rounds 15]

By hand, on a quiet machine. Of each format more matrices than any cache holds are multiplied one after the other, in
turns with a plain sum over as many bytes, both in huge pages; shares are of turns next to each other, by the thread's
own clock. `whole` counts the call from Python too; `share` does without what a call of next to nothing takes, as the
engine's kernels call these themselves.
"""

from __future__ import annotations

import argparse
import mmap
import time
from collections.abc import Callable, Iterator
from math import prod
from statistics import median

import numba
import numpy as np
import torch
from torch import Tensor

from buddymoe_ray.commands.common import emit
from buddymoe_ray.kernels import CodedWeight, CpuLinear, LowbitFormat, coded_shapes, pack_plain
from buddymoe_ray.types import CodedMatrix, CodeFormat

BYTES = 96 << 20
HUGE = 2 << 20
STORED = {
    "fp8": CodeFormat(codes="fp8", block=(128, 128), scale="float32"),
    "mxfp8": CodeFormat(codes="fp8", block=(1, 32), scale="e8m0"),
    "fp8-e8m0": CodeFormat(codes="fp8", block=(128, 128), scale="e8m0"),
    "mxfp4": CodeFormat(codes="mxfp4", block=(1, 32), scale="e8m0"),
    "nvfp4": CodeFormat(codes="nvfp4", block=(1, 16), scale="float8_e4m3fn", global_scale="*"),
    "int8": CodeFormat(codes="int8", block=(1, 0), scale="bfloat16"),
    "int4": CodeFormat(codes="int4", block=(1, 32), scale="bfloat16"),
    "int4-zeros": CodeFormat(codes="int4", block=(1, 128), scale="bfloat16", zeros=True),
    "gptq": CodeFormat(codes="gptq", block=(1, 128), scale="float16", zeros=True),
    "awq": CodeFormat(codes="awq", block=(1, 128), scale="float16", zeros=True),
}
OWN = {"own int8": LowbitFormat(bits=8), "own int4": LowbitFormat(bits=4)}


class Room:
    """Memory in huge pages for tensors that lie one after the other."""

    def __init__(self, nbytes: int) -> None:
        self._map = mmap.mmap(-1, nbytes + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._map.madvise(mmap.MADV_HUGEPAGE)
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        self._at = -self._bytes.data_ptr() % HUGE

    def __call__(self, tensor: Tensor) -> Tensor:
        placed = self._bytes[self._at : self._at + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        self._at += -(-tensor.nbytes // 64) * 64
        return placed.copy_(tensor)


@numba.njit(fastmath=True)
def _total(words: np.ndarray) -> int:
    found = 0
    for at in range(words.size):
        found += words[at]
    return found


def coded(format: CodeFormat, N: int, K: int, room: Room) -> CodedWeight:
    """Random codes and scales."""
    matrix = CodedMatrix(name="weight", format=format, parts=1, N=N, K=K)
    parts = dict[str, Tensor]()
    for part, (shape, name) in coded_shapes(matrix).items():
        dtype = getattr(torch, name)
        if part == "global_scale":
            tensor = torch.full(shape, 0.01)
        elif part == "scales":
            powers = torch.randint(118, 124, shape, dtype=torch.uint8)
            tensor = powers if dtype is torch.uint8 else (torch.rand(shape) / 8 + 0.01).to(dtype)
        elif format.codes == "fp8":
            tensor = (torch.randn(shape) * 100).clamp(-448, 448).to(dtype)
        else:
            whole = torch.randint(0, 256, (prod(shape) * dtype.itemsize,), dtype=torch.uint8)
            tensor = whole.view(dtype).view(shape)
        parts[part] = room(tensor)
    return CodedWeight(matrix=matrix, **parts)


def linears(name: str, N: int, K: int, *, some: int | None = None) -> tuple[list[CpuLinear], int]:
    """`BYTES` of them or `some`, and what one holds."""
    room, found, held, each = Room(BYTES + 4 * N * K), list[CpuLinear](), 0, 0
    while held + each <= BYTES if some is None else len(found) < some:
        if name in OWN:
            packed = pack_plain(torch.randn(N, K).bfloat16(), OWN[name])
            parts = {key: room(part) if isinstance(part, Tensor) else part for key, part in vars(packed).items()}
            found.append(CpuLinear(type(packed)(**parts), OWN[name], torch.bfloat16, None))
        else:
            weight = coded(STORED[name], N, K, room)
            parts = weight.named()
            found.append(CpuLinear(weight, None, torch.bfloat16, None))
        each = sum(part.nbytes for part in parts.values() if isinstance(part, Tensor))
        held += each
    return found, each


def seconds(work: Callable[[], object]) -> float:
    """Of this thread."""
    began = time.thread_time()
    work()
    return time.thread_time() - began


def call_seconds(name: str) -> float:
    """Of a call that has next to nothing to compute."""
    linear, row = linears(name, 8, 128, some=1)[0][0], torch.randn(1, 128).bfloat16()
    return min(seconds(lambda: [linear(row) for _ in range(100)]) for _ in range(20)) / 100


def rates(name: str, N: int, K: int, rounds: int) -> Iterator[tuple[float, float, float]]:
    """GB/s of the kernel, with its call, and of the plain sum, of each round after a first."""
    (found, each), call = linears(name, N, K), call_seconds(name)
    plain = Room(BYTES)(torch.ones(BYTES // 8, dtype=torch.int64)).numpy()
    row = torch.randn(1, K).bfloat16()
    for turn in range(rounds + 1):
        read = plain.nbytes / seconds(lambda: _total(plain)) / 1e9
        taken = seconds(lambda: [linear(row) for linear in found]) / len(found)
        if turn:
            yield each / (taken - call) / 1e9, each / taken / 1e9, read


def main() -> None:
    """A line per format and shape, which go to golden/measured/formats.jsonl."""
    parser = argparse.ArgumentParser(description="Rates of kernels by stored format.")
    parser.add_argument("--formats", default=",".join((*STORED, *OWN)))
    parser.add_argument("--shapes", default="2048x2048,768x2048,2048x768,2048x1024", help="outputs x inputs")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for shape in options.shapes.split(","):
        N, K = map(int, shape.split("x"))
        for name in options.formats.split(","):
            turns = list(rates(name, N, K, options.rounds))
            shares = sorted(rate / read for rate, _, read in turns)
            kernel, whole, read = (median(column) for column in zip(*turns, strict=True))
            emit(
                {
                    "format": name,
                    "shape": [N, K],
                    "gbps": round(kernel, 2),
                    "read_gbps": round(read, 2),
                    "whole": round(whole / read, 3),
                    "share": [round(share, 3) for share in (median(shares), shares[0], shares[-1])],
                }
            )


if __name__ == "__main__":
    main()
