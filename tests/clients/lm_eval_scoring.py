"""lm-eval's local-completions against a running service of `builtin:tiny`: its log-likelihoods are the engine's own.

Run by hand, with `pip install 'lm_eval[api]'`: `buddymoe serve deployments/tiny-cpu.yaml`, then
`python tests/clients/lm_eval_scoring.py [URL]`. Tokenises once here and once by the service (/tokenize).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import lm_eval
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.tasks import TaskManager

from buddymoe_ray import LLM
from buddymoe_ray.models.tiny import path
from buddymoe_ray.types import SamplingParams

DOCS = [
    {"text": "def add(a, b):\n    return", "choices": [" a + b", " a - q", " zebra"], "gold": 0},
    {"text": "import", "choices": [" os", " }", " Tuesday night"], "gold": 0},
    {"text": "for i in range(", "choices": ["10):", "cat and dog", ":("], "gold": 0},
]
TASK = """task: tiny
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_target: gold
doc_to_choice: "{{choices}}"
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


def main(url: str = "http://127.0.0.1:8000/v1/completions") -> None:
    """Say accuracy and the largest difference; raise where it is more than 1e-4."""
    with TemporaryDirectory() as name, LLM("builtin:tiny", memory="100%") as llm:
        folder, worst = Path(name), 0.0
        (folder / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
        (folder / "tiny.yaml").write_text(TASK % (folder / "docs.jsonl"))
        for backend in ("huggingface", "remote"):
            model = LocalCompletionsAPI(
                base_url=url,
                model="builtin:tiny",
                tokenizer_backend=backend,
                tokenizer=str(path()),
                max_length=512,
            )
            tasks = TaskManager(include_path=name)
            found = lm_eval.simple_evaluate(
                model=model, tasks=["tiny"], task_manager=tasks, log_samples=True, bootstrap_iters=0
            )
            for sample in found["samples"]["tiny"]:
                for choice, response in zip(sample["doc"]["choices"], sample["resps"], strict=True):
                    worst = max(worst, abs(response[0][0] - own(llm, sample["doc"]["text"], choice)))
            print(f"lm-eval {lm_eval.__version__}, {backend}: {found['results']['tiny']}, difference {worst:.1e}")
        assert worst <= 1e-4, worst


def own(llm: LLM, text: str, choice: str) -> float:
    """The same by the engine in this process, of the tokens that lm-eval takes."""
    context, whole = llm.tokenizer.encode(text), llm.tokenizer.encode(text + choice)
    answer = llm.generate([context + whole[len(context) :]], SamplingParams(prompt_logprobs=0, max_tokens=0))[0]
    return sum(entry.logprob for entry in answer.prompt_logprobs[len(context) :] if entry is not None)


if __name__ == "__main__":
    main(*sys.argv[1:])
