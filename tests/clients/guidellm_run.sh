#!/bin/sh
# guidellm against a running service of builtin:tiny: `buddymoe serve deployments/tiny-cpu.yaml`, then
# `tests/clients/guidellm_run.sh [URL] [PATH/TO/guidellm]`, with `pip install guidellm==0.8.1` in an environment of its own.
set -eu
url=${1:-http://127.0.0.1:8000}
weights=$(cd "$(dirname "$0")/../../buddymoe_ray/models/tiny/weights" && pwd)
out=$(mktemp -d)
cd "$out"
"${2:-guidellm}" run --backend "kind=openai_http,target=$url" --profile kind=concurrent,streams=2 \
    --constraint kind=max_requests,count=10 --tokenizer "kind=huggingface_auto,model=$weights" \
    --data kind=synthetic_text,prompt_tokens=32,output_tokens=16 --disable-console-interactive
python3 - <<'END'
import json
[run] = json.load(open("benchmarks.json"))["benchmarks"]
counts = run["metrics"]["request_totals"]
print(counts)
assert counts["successful"] == 10 and not counts["errored"], counts
END
